"""Ultralytics' models, small and with random weights: detect, segment, pose, obb, classify."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from featxfer import Degradation, ScaledDegradation, open_images
from featxfer_integrations import (
    AttachError,
    FitOptions,
    attach_transfer,
    attached_runs,
    backbone_of,
    detach_transfer,
    fit_key,
    fit_transfer,
    host_of,
    load_transfers,
    save_transfers,
    train_transfer_only,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations.mechanism.attach import is_attached
from featxfer_integrations.mechanism.proof import are_equal
from tests.integrations.fitting import QUICK, arguments
from tests.integrations.hosts.fitted_contract import Case, check_attached, check_fitted
from tests.integrations.models import randomise_all

pytest.importorskip("ultralytics")
import cv2
from ultralytics import RTDETR, YOLO
from ultralytics.cfg import get_cfg
from ultralytics.engine.model import Model
from ultralytics.nn import tasks
from ultralytics.utils import DEFAULT_CFG_DICT

SIZE = 64
VIEW, SQUARES = ScaledDegradation(4), Degradation(SIZE, 16)
BATCHES = [
    torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for shape in ((2, 3, 64, 96), (1, 3, 64, 32))
]
QUICK_BLOCKS = dataclasses.replace(QUICK, epochs=1, batch_size=8)
KINDS = {
    "detect": tasks.DetectionModel,
    "segment": tasks.SegmentationModel,
    "pose": tasks.PoseModel,
    "obb": tasks.OBBModel,
    "classify": tasks.ClassificationModel,
    "semantic": tasks.SemanticSegmentationModel,
    "world": tasks.WorldModel,
    "yoloe": tasks.YOLOEModel,
    "rtdetr": tasks.RTDETRDetectionModel,
}
SHORT = dataclasses.replace(QUICK, epochs=4, batch_size=8, learning_rate=2e-3)
FITTED = (
    *("yolov5n", "yolov6n", "yolov8n-seg", "yolov8n-ghost", "yolov10n", "yolo26n-pose"),
    *("yolo26n-obb", "yolo26n-cls"),
)
OTHERS = (
    *("yolov3-tiny", "yolov9t", "yolo11n", "yolo12n", "yolov10n end to end"),
    *("yolo26n end to end", "yolo26n-sem", "yolov8n-cls", "yolov8n-world", "yoloe-v8n"),
    "yolov8n-rtdetr",
)


def make(name: str, channels: int = 3) -> Any:
    """In eval mode; those of several widths an eighth as wide as the widest."""
    torch.manual_seed(0)
    file, *ends = name.split(" ", 1)
    cfg = tasks.yaml_model_load(f"{file}.yaml")
    if "scales" in cfg:
        cfg["scales"][cfg["scale"] or "n"] = [0.34, 0.25 if "12" in name else 0.125, 1024]
    special = [kind for kind in ("world", "yoloe", "rtdetr") if kind in file]
    kind = KINDS[special[0] if special else tasks.guess_model_task(cfg)]
    model = kind(cfg, ch=channels, nc=4, verbose=False)
    model.args = {"imgsz": SIZE}
    if ends:
        model.end2end = True
    return model.eval()


def make_yolo(name: str = "yolov8n") -> Any:
    """A `YOLO` around the same, that finds something."""
    yolo = YOLO(f"{name}.yaml")
    yolo.model, yolo.overrides["imgsz"] = make(name), SIZE
    yolo.model.args, yolo.model.task = {**DEFAULT_CFG_DICT, **yolo.overrides}, yolo.task
    return yolo


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four images of two sizes, of waves that LR images have less of."""
    folder = tmp_path_factory.mktemp("waves")
    rng = np.random.default_rng(0)
    for index in range(24):
        rows, columns = np.mgrid[: 48 + 16 * (index % 3 == 0), :64]
        along = (rows if index % 2 else columns) + 2 * rng.integers(0, 4)
        wave = 80 * np.sin(along * np.pi / 4)[..., None] + rng.uniform(-10, 10)
        pixels = np.clip(wave + np.array([100, 130, 160]), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return folder


@cache
def _seen(name: str, folder: Path) -> Any:
    """Batch norm has seen the images, and is not far from linear: LR and HR differ, but not all."""
    model, images = make(name), open_images(folder)
    views = [view(images.read(row)) for row in range(24) for view in (SQUARES.hr, SQUARES.lr)]
    batch = torch.stack([*views, *(view.flip(-1) for view in views)]) / 255
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
            nn.init.constant_(module.bias, 1.0)
    with torch.no_grad():
        for _ in range(6):
            model.train()(batch)
    return model.eval()


def seen(name: str, folder: Path) -> Any:
    """A new one of these each time."""
    return copy.deepcopy(_seen(name, folder))


def case(make_model: Callable[[], nn.Module], name: str) -> Case:
    view, batches = VIEW, BATCHES
    if name.endswith("-cls"):
        view, batches = SQUARES, [*BATCHES, torch.rand(1, 3, 50, 37)]  # type: ignore[assignment]
    return Case(make_model, lambda model, batch: model(batch), batches, view)


@torch.no_grad()
def said(model: nn.Module, batch: Tensor = BATCHES[0]) -> Tensor:
    """What it returns where it is used: boxes with their scores, or probabilities."""
    result = model(batch)
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def found_by(yolo: Any, image: Any, **options: Any) -> Tensor:
    """Boxes, scores and classes that a `YOLO` predicts."""
    (result,) = yolo.predict(image, conf=1e-4, verbose=False, **options)
    boxes: Tensor = result.boxes.data
    return boxes


def picture(height: int = 48, width: int = 64) -> Any:
    """As OpenCV reads them: `(h, w, 3)`, blue first."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "blocks", "stages"),
    [
        ("yolov3-tiny", [6, 8, 12], [0, 2, 4, 6, 8, 12]),
        ("yolov5n-p6", [4, 6, 8], [0, 2, 4, 6, 8, 11]),
        ("yolov8n-p2", [4, 6, 9], [0, 2, 4, 6, 9]),
        ("yolov9t", [4, 6, 9], [0, 2, 4, 6, 9]),
        ("yolo26n-obb", [4, 6, 10], [0, 2, 4, 6, 10]),
        ("yolo26n-cls", [6, 9], [0, 2, 4, 6, 9]),
    ],
)
def test_sites_are_the_last_layers_of_a_resolution_of_the_backbone(
    name: str, blocks: list[int], stages: list[int]
) -> None:
    model = make(name)
    host = host_of(model)
    assert host.blocks(model) == [f"model.{index}" for index in blocks]
    kept = [index for index in stages if name != "yolov3-tiny" or index]
    assert host.stages(model)[-len(kept) :] == [f"model.{index}" for index in kept]
    assert host.model_name(model) == f"ultralytics/{name}"


@pytest.mark.parametrize("name", [*FITTED, *OTHERS])
def test_what_is_attached_is_the_identity_then_acts_and_leaves_no_trace(name: str) -> None:
    check_attached(case(partial(make, name), name))


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_brings_lr_images_nearer_and_is_saved(name: str, waves: Path, tmp_path: Path) -> None:
    check_fitted(case(partial(seen, name, waves), name), tmp_path, waves, block_recipe=SHORT)


@pytest.mark.parametrize("name", ["yolov8n", "yolov10n", "yolov6n", "yolo26n-cls"])
def test_what_is_attached_still_acts_once_the_model_is_fused(name: str) -> None:
    model = make(name)
    plain = said(model)
    attach_transfer(model, site="blocks")
    randomise_all(model)
    changed = said(model)
    model.fuse(verbose=False)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(said(model), changed, rtol=1e-4, atol=1e-4)
    with transfer_disabled(model):
        torch.testing.assert_close(said(model), plain, rtol=1e-4, atol=1e-4)
    assert (said(model) - plain).abs().max() > 10 * (said(model) - changed).abs().max()
    assert all(attached_runs(model, BATCHES[0]).values())


@pytest.mark.parametrize("name", ["model.6.cv1.conv", "model.6.cv1.bn", "model.6.m.0.cv2.act"])
def test_what_is_in_a_module_that_is_fused_is_no_site(name: str) -> None:
    """The convolution would give what batch norm gave, and its block would see that."""
    model = make("yolov8n")
    with pytest.raises(AttachError, match=r"of which fuse\(\) of DetectionModel makes another mod"):
        attach_transfer(model, site=name)
    attach_transfer(model, site=name.rpartition(".")[0], hidden_features=16)
    assert list(transfers_of(model)) == [name.rpartition(".")[0].replace(".", "_")]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("yolov8n", [(48, 64)]),
        ("yolov8n", [(48, 64), (90, 50)]),
        ("yolov8n", [(20, 33), (20, 33)]),
        ("yolov5n-p6", [(50, 70)]),
        ("yolov8n-rtdetr", [(48, 64)]),
    ],
)
def test_batches_are_what_a_predictor_gives_to_its_model(
    name: str, shapes: list[tuple[int, int]]
) -> None:
    model, yolo = make(name), YOLO("yolov8n.yaml")
    if "rtdetr" in name:
        yolo = RTDETR("yolov8n-rtdetr.yaml")
    yolo.model, yolo.overrides["imgsz"] = model, 100  # which no stride divides
    model.args = yolo.overrides
    images = [picture(*shape) for shape in shapes]
    yolo.predict(images, batch=len(images), verbose=False)
    given: list[Tensor] = []
    inner = yolo.predictor.model.model
    inner.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    yolo.predict(images, batch=len(images), verbose=False)
    pixels = [torch.from_numpy(image[..., ::-1].copy()).movedim(-1, 0) for image in images]
    host = host_of(model)
    assert torch.equal(host.batch(model, pixels, host.preprocessing(model)).images, given[-1])


def test_what_is_shown_is_what_comes_to_the_head_which_does_not_run() -> None:
    model, taken = make("yolo26n-obb"), list[Any]()
    host = host_of(model)
    image = torch.from_numpy(picture()).movedim(-1, 0)
    batch = host.batch(model, [image], host.preprocessing(model))
    with torch.no_grad():
        _, raw = model(batch.images)
        model.model[-1].register_forward_hook(lambda *_: taken.append(1))
        shown = host.show(model, batch)
    assert shown.vectors == {}
    assert are_equal(list(shown.maps.values()), raw["one2one"]["feats"])
    assert [part.shape[2] for part in shown.maps.values()] == [8, 4, 2]
    assert taken == []


def test_models_of_one_channel_are_given_greyscale_and_others_are_refused(
    waves: Path, tmp_path: Path
) -> None:
    model = make("yolov8n", channels=1)
    check_attached(Case(partial(make, "yolov8n", 1), lambda m, b: m(b), [BATCHES[0][:, :1]], VIEW))
    host, image = host_of(model), picture(64, 64)
    pixels = torch.from_numpy(image[..., ::-1].copy()).movedim(-1, 0)
    grey = host.batch(model, [pixels], host.preprocessing(model)).images
    wanted = torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)) / 255
    torch.testing.assert_close(grey[0, 0], wanted, atol=0.51 / 255, rtol=0)
    quick = FitOptions(block_recipe=dataclasses.replace(SHORT, epochs=1))
    with warnings.catch_warnings(action="ignore"):  # of random weights little is learned
        fit_transfer(model, waves, degradation=VIEW, options=quick, cache=tmp_path)
    model = make("yolov8n", channels=4)
    attach_transfer(model)
    with pytest.raises(AttachError, match="model: it takes images of 4 channels, wanted 1 or 3"):
        fit_transfer(model, waves, cache=tmp_path)


def test_losses_in_training_reach_the_blocks_and_are_what_they_were() -> None:
    model = make("yolov8n").train()
    model.args = get_cfg()
    batch = {
        "img": BATCHES[0],
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.tensor([[1.0], [2.0]]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.3, 0.4], [0.4, 0.6, 0.5, 0.2]]),
    }
    plain = copy.deepcopy(model).loss(batch)[0]
    attach_transfer(model)
    loss = model.loss(batch)[0]
    assert torch.equal(loss, plain)
    loss.sum().backward()
    blocks = transfers_of(model)
    assert blocks.training
    last = [value.grad for name, value in blocks.named_parameters() if "project.bias" in name]
    assert len(last) >= 3
    assert all(grad is not None and bool(grad.any()) for grad in last)


@pytest.mark.filterwarnings("ignore:.* not help")
def test_a_yolo_is_taken_for_the_model_in_it(waves: Path, tmp_path: Path) -> None:
    yolo = make_yolo()
    yolo.model = seen("yolov8n", waves)
    assert attach_transfer(yolo, hidden_features=16) is yolo
    assert transfers_of(yolo) is transfers_of(yolo.model)
    assert attached_runs(yolo, BATCHES[0]) == dict.fromkeys(transfers_of(yolo), True)
    assert detach_transfer(yolo) is yolo
    assert not is_attached(yolo.model)
    given = arguments(degradation=VIEW, block_recipe=QUICK_BLOCKS, precision="fp32")
    assert fit_key(yolo, waves, **given) == fit_key(yolo.model, waves, **given)
    fit_transfer(yolo, waves, cache=tmp_path, **given)
    randomise_all(yolo)
    trained = said(yolo.model)
    with transfer_disabled(yolo):
        assert not torch.equal(said(copy.deepcopy(yolo.model)), trained)
    folder = save_transfers(yolo, tmp_path / "saved")
    detach_transfer(yolo)
    assert load_transfers(yolo, folder) is yolo
    assert torch.equal(said(yolo.model), trained)
    assert len(train_transfer_only(yolo)) == len(list(transfers_of(yolo).parameters()))
    classifier = make_yolo("yolov8n-cls")
    assert backbone_of(classifier).name == "ultralytics/yolov8n-cls"
    with pytest.raises(AttachError, match="the name of a module whose output is the feature"):
        backbone_of(yolo)


def test_a_yolo_of_an_exported_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "yolov8n.onnx"
    path.touch()
    with pytest.raises(AttachError, match=r"got a YOLO of '.*yolov8n.onnx', wanted one of a PyT"):
        attach_transfer(YOLO(path, task="detect"))


def test_a_predictor_is_renewed_and_disabled_with_the_model_that_it_copied() -> None:
    yolo, image = make_yolo(), picture()
    predict = partial(found_by, yolo, image)
    plain = predict()
    assert len(plain)
    attach_transfer(yolo)
    randomise_all(yolo)
    changed = predict()
    assert changed.shape != plain.shape or not torch.equal(changed, plain)
    with transfer_disabled(yolo):
        assert torch.equal(predict(), plain)
        yolo.predictor = None
        assert torch.equal(predict(), plain)
    assert torch.equal(predict(), changed)
    assert any(attached_runs(yolo, image, run=lambda given: found_by(yolo, given)).values())
    detach_transfer(yolo)
    assert torch.equal(predict(), plain)
    attach_transfer(yolo.model)  # of which the YOLO and its predictor do not know
    randomise_all(yolo.model)
    run = partial(found_by, yolo)
    assert not any(attached_runs(yolo.model, image, run=run).values())


def test_training_by_the_library_is_refused_while_something_is_attached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[dict[str, Any]] = []
    monkeypatch.setattr(Model, "train", lambda yolo, **given: called.append(given))
    yolo = attach_transfer(make_yolo())
    model = yolo.model
    with pytest.raises(AttachError, match=r"train: YOLO.train builds another model, without what"):
        yolo.train(data="coco8.yaml", epochs=1)
    assert yolo.model is model
    assert called == []
    detach_transfer(yolo).train(epochs=1)
    assert called == [{"epochs": 1}]


def test_what_the_library_saves_holds_what_is_attached(tmp_path: Path) -> None:
    yolo = attach_transfer(make_yolo())
    randomise_all(yolo)
    yolo.save(tmp_path / "whole.pt")
    loaded = YOLO(tmp_path / "whole.pt")
    torch.testing.assert_close(said(loaded.model), said(yolo.model.half().float()))
    assert all(attached_runs(loaded, BATCHES[0]).values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["yolov8n", "yolo26n-obb", "yolo26n-cls"])
def test_exports_give_what_the_model_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    yolo = attach_transfer(make_yolo(name), site="blocks")
    randomise_all(yolo)
    session = onnxruntime.InferenceSession(yolo.export(format="onnx", simplify=False))
    images = torch.rand(1, 3, SIZE, SIZE)
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), said(yolo.model, images), atol=1e-3, rtol=0)
    with transfer_disabled(yolo):
        assert (torch.from_numpy(got) - said(yolo.model, images)).abs().max() > 2e-3


NEW_PROCESS = """
import sys, torch, featxfer, featxfer_integrations as host
for name in host.__all__:
    getattr(host, name)
assert "ultralytics" not in sys.modules
folder, saved = sys.argv[1:]

def read():
    images = featxfer.open_images(folder)
    return [images.read(row) for row in range(len(images) - 1)]

def why():
    try:
        featxfer.open_images(folder).read(-1)
    except featxfer.ImageError as error:
        return str(error)

before = read(), why()
from tests.integrations.hosts.test_ultralytics import BATCHES, make, said
assert "ultralytics" in sys.modules
assert before[1] and before[1] == why()
assert all(map(torch.equal, before[0], read()))
model = host.load_transfers(make("yolov8n"), saved)
torch.save(said(model), saved + "/said.pt")
"""


@pytest.mark.filterwarnings("ignore:.* not help")
def test_a_new_process_reads_the_same_bits_and_gives_the_same_boxes(
    waves: Path, tmp_path: Path
) -> None:
    """Ultralytics puts a function of its own in the place of `PIL.Image.open`."""
    images = [*sorted(waves.iterdir())[:4]]
    folder = tmp_path / "images"
    folder.mkdir()
    for path in images:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "99.png").write_bytes(b"no image")
    model = make("yolov8n")
    given = arguments(degradation=VIEW, block_recipe=QUICK_BLOCKS, precision="fp32")
    fit_transfer(model, waves, cache=tmp_path / "cache", **given)
    saved = save_transfers(model, tmp_path / "saved")
    process = [sys.executable, "-c", NEW_PROCESS, str(folder), str(saved)]
    subprocess.run(process, check=True, cwd=Path(__file__).parents[3])
    assert torch.equal(torch.load(saved / "said.pt"), said(model))
