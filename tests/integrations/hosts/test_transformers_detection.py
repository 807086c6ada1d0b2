from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers as hf

from featxfer import ScaledDegradation, open_images
from featxfer_integrations import (
    FitOptions,
    attach_transfer,
    attached_runs,
    detach_transfer,
    fit_key,
    fit_transfer,
    host_of,
    save_transfers,
    train_transfer_only,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations.mechanism.capture import watched
from featxfer_integrations.mechanism.fingerprint import backbone_sha256
from featxfer_integrations.mechanism.proof import are_equal, numbers_of
from tests.integrations.fitting import WHOLE, assert_untouched, state_of
from tests.integrations.hosts import transformers_detectors as tiny
from tests.integrations.hosts.fitted_contract import Case, check_attached, check_fitted
from tests.integrations.models import find_site, randomise_all

QUICK = dataclasses.replace(WHOLE, epochs=6, learning_rate=1e-3)
VIEW = ScaledDegradation(4)


def run(model: Any, pixels: Tensor) -> Any:
    """All that a detector says; DAB-DETR's decoder does not run in half precision."""
    if model.config.model_type == "dab-detr" and model.dtype is torch.bfloat16:
        return model.model.backbone(pixels, torch.ones_like(pixels[:, 0]))[0]
    return model(pixels)


def case_of(name: str, folder: Path) -> Case:
    chance = torch.Generator().manual_seed(0)
    sizes = [(2, 3, 64, 64), (1, 3, 64, 96)]
    if name not in (*tiny.FIXED, "Yolos"):
        sizes.append((1, 3, 75, 97))
    batches = [torch.rand(size, generator=chance) for size in sizes]
    return Case(lambda: tiny.beside(name, folder), run, batches, VIEW, site="backbone")


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images of large squares: of noise, YOLOS' linear embedding has nothing to restore."""
    folder, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for index in range(16):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((80, 64), Image.Resampling.NEAREST).save(folder / f"{index:02d}.png")
    return folder


@pytest.mark.parametrize("name", tiny.NAMES)
def test_blocks_change_nothing_until_trained_then_act_and_leave_no_trace(
    name: str, tmp_path: Path
) -> None:
    check_attached(case_of(name, tmp_path))


@pytest.mark.parametrize("name", [n for n in tiny.NAMES if n not in ("TableTransformer", "Deimv2")])
def test_a_fit_brings_maps_of_lr_images_nearer(
    name: str, discs: Path, squares: Path, tmp_path: Path
) -> None:
    case = case_of(name, tiny.save_processor(name, tmp_path / "processor"))
    check_fitted(case, tmp_path, squares if name == "Yolos" else discs, block_recipe=QUICK)


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("Detr", [f"model.backbone.model.encoder.stages.{i}" for i in (1, 2, 3)]),
        ("DabDetr", [f"model.backbone.conv_encoder.model.encoder.stages.{i}" for i in (1, 2, 3)]),
        ("DFine", [f"model.backbone.model.encoder.stages.{i}" for i in (1, 2, 3)]),
        ("Deimv2", [f"model.conv_encoder.encoder_input_proj.{i}" for i in (0, 1, 2)]),
        ("Yolos", ["vit.embeddings.patch_embeddings.projection"]),
        ("LwDetr", ["model.backbone.projector.scale_layers.0"]),
        ("RfDetr", ["model.backbone.projector"]),
    ],
)
def test_blocks_follow_the_last_maps_of_each_resolution(name: str, modules: list[str]) -> None:
    model = tiny.make(name)
    assert host_of(model).name == "transformers detection"
    assert host_of(model).blocks(model) == modules


@pytest.mark.parametrize("name", ["Detr", "DeformableDetr", "RTDetr"])
@torch.no_grad()
def test_what_is_shown_is_what_enters_the_encoder_and_no_more_is_run(
    name: str, discs: Path, tmp_path: Path
) -> None:
    model = tiny.beside(name, tiny.save_processor(name, tmp_path))
    host, images = host_of(model), open_images(discs)
    batch = host.batch(model, [images.read(row) for row in range(2)], host.preprocessing(model))
    names = ("input_projection", "input_proj", "encoder_input_proj")
    layers = [n for n, m in model.named_modules() if n.split(".")[1:2] and n.split(".")[1] in names]
    entering: dict[str, Tensor] = {}
    with watched(model, layers, after=lambda layer, maps: entering.setdefault(layer, maps)):
        model(batch.images)
    ends = [maps for layer, maps in entering.items() if layer.count(".") == 1 + (name != "Detr")]
    later: list[str] = []
    with watched(model, ["model.encoder", "model.decoder"], before=lambda n, _: later.append(n)):
        shown = host.show(model, batch)
    assert later == []
    assert not shown.vectors
    assert len(shown.maps) == (1 if name == "Detr" else 3)
    for maps, wanted in zip(shown.maps.values(), ends, strict=False):
        assert torch.equal(maps, wanted)


@torch.no_grad()
def test_images_of_two_sizes_are_seen_as_the_processor_gives_them(
    discs: Path, tmp_path: Path
) -> None:
    model = attach_transfer(tiny.beside("Detr", tiny.save_processor("Detr", tmp_path)))
    host, images = host_of(model), [open_images(discs).read(row) for row in range(2)]
    given = hf.AutoImageProcessor.from_pretrained(tmp_path)(images=images, return_tensors="pt")
    assert torch.equal(
        host.batch(model, images, host.preprocessing(model)).images, given["pixel_values"]
    )
    assert not given["pixel_mask"].all()
    with transfer_disabled(model):
        plain = numbers_of(model(**given))
    assert are_equal(numbers_of(model(**given)), plain)
    assert all(attached_runs(model, given).values())


def test_preprocessing_is_that_of_the_processor_and_part_of_the_key(
    discs: Path, tmp_path: Path
) -> None:
    model = tiny.beside("RTDetr", tmp_path)
    hf.RTDetrImageProcessor(size=tiny.SQUARE).save_pretrained(tmp_path)
    found = host_of(model).preprocessing(model)
    assert (found.mean, found.std) == ((0, 0, 0), (1, 1, 1))
    keys = []
    for longest in (96, 128, 128):
        sizes = {"shortest_edge": 64, "longest_edge": longest}
        hf.DetrImageProcessor(image_mean=[0.1] * 3, size=sizes).save_pretrained(tmp_path)
        assert host_of(model).preprocessing(model).mean == (0.1, 0.1, 0.1)
        keys.append(fit_key(model, discs, degradation=VIEW))
    assert keys[0] != keys[1] == keys[2]


def test_a_model_and_its_blocks_are_saved_apart_and_meet_in_another_process(
    discs: Path, tmp_path: Path
) -> None:
    folder = tiny.save_processor("RTDetr", tmp_path / "model")
    model = tiny.beside("RTDetr", folder)
    once = FitOptions(block_recipe=dataclasses.replace(QUICK, epochs=2), held_out=0.0)
    fit_transfer(model, discs, degradation=VIEW, options=once, cache=tmp_path)
    save_transfers(model, tmp_path / "blocks")
    with pytest.warns(UserWarning, match="gives the model without what is attached; save that by"):
        model.save_pretrained(folder)
    pixels = torch.rand(2, 3, 64, 64)
    torch.save(pixels, tmp_path / "pixels.pt")
    code = """
import torch
from transformers import AutoModelForObjectDetection
from featxfer_integrations import load_transfers
model = AutoModelForObjectDetection.from_pretrained("model").eval()
load_transfers(model, "blocks")
with torch.no_grad():
    torch.save(model(torch.load("pixels.pt")).logits, "logits.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(pixels).logits)
        with transfer_disabled(model):
            assert not torch.equal(torch.load(tmp_path / "logits.pt"), model(pixels).logits)


def test_a_detector_in_training_mode_is_fitted_as_one_in_eval_mode(
    discs: Path, tmp_path: Path
) -> None:
    """Batch norm keeps its statistics, and no queries are made of labels."""
    folder, found = tiny.save_processor("RTDetr", tmp_path / "model"), []
    once = FitOptions(block_recipe=dataclasses.replace(QUICK, epochs=1), held_out=0.0)
    for mode in (True, False):
        model = tiny.beside("RTDetr", folder, freeze_backbone_batch_norms=False).train(mode)
        state = state_of(model)
        fit_transfer(model, discs, degradation=VIEW, options=once, cache=tmp_path)
        assert model.training is mode
        found.append(state_of(transfers_of(model)))
        assert_untouched(detach_transfer(model), state)
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_losses_in_training_reach_what_is_attached() -> None:
    model = attach_transfer(tiny.make("RTDetr").train())
    parameters = train_transfer_only(model)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}]
    model(torch.rand(1, 3, 64, 64), labels=labels).loss.backward()
    assert sum(bool(p.grad is not None and p.grad.any()) for p in parameters) >= 6


def test_a_new_predictor_does_not_count_for_blocks() -> None:
    model = tiny.make("Detr")
    host, site = host_of(model), find_site(model, "stage2")
    before = backbone_sha256(host, model, site)
    nn.init.ones_(model.class_labels_classifier.weight)
    nn.init.ones_(model.model.input_projection.weight)
    assert backbone_sha256(host, model, site) == before
    nn.init.ones_(model.model.backbone.model.embedder.embedder.convolution.weight)
    assert backbone_sha256(host, model, site) != before


@pytest.mark.parametrize("kind", ["DetrModel", "DetrForSegmentation"])
@torch.no_grad()
def test_models_around_and_inside_of_a_detector_are_detectors_too(kind: str) -> None:
    torch.manual_seed(0)
    stages = tiny.resnet(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = tiny.config("Detr", encoder_attention_heads=8, backbone_config=stages)
    model = getattr(hf, kind)(config).eval()
    pixels = torch.rand(1, 3, 64, 64)
    plain = numbers_of(model(pixels))
    attach_transfer(model, site="blocks")
    assert are_equal(numbers_of(model(pixels)), plain)
    assert list(attached_runs(model, pixels).values()) == [True] * 3


@torch.no_grad()
def test_a_backbone_takes_from_its_layer_what_comes_out_of_the_block_there() -> None:
    """LW-DETR's keeps what its layers return by hooks, which were there before."""
    model, pixels = tiny.make("LwDetr"), torch.rand(1, 3, 64, 64)
    vit = model.model.backbone.backbone
    plain = vit(pixels).feature_maps
    attach_transfer(model, site="model.backbone.backbone.encoder.layer.1", hidden_features=16)
    randomise_all(model)
    changed = vit(pixels).feature_maps
    assert not any(map(torch.equal, changed, plain))


@pytest.mark.parametrize("name", ["Detr", "RTDetr", "Yolos"])
@torch.no_grad()
def test_exported_detectors_say_what_they_say_here(name: str) -> None:
    model = attach_transfer(tiny.make(name), hidden_features=16)
    randomise_all(model)
    pixels = torch.rand(1, 3, 64, 64)
    said, exported = model(pixels), torch.export.export(model, (pixels,)).module()(pixels)
    for part in ("logits", "pred_boxes", "last_hidden_state"):
        torch.testing.assert_close(exported[part], said[part], rtol=1e-3, atol=1e-3)
    with transfer_disabled(model):
        plain = model(pixels).last_hidden_state
    assert not torch.allclose(exported["last_hidden_state"], plain, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_a_detector_in_onnx_says_what_it_says_here(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = attach_transfer(tiny.make("Detr"), hidden_features=16)
    randomise_all(model)
    pixels = torch.rand(1, 3, 64, 64)
    exported: Any = torch.onnx.export(model, (pixels,), dynamo=True, verbose=False)
    exported.save(tmp_path / "detr.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "detr.onnx")
    logits, boxes, *_ = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    said = model(pixels)
    torch.testing.assert_close(torch.from_numpy(logits), said.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(boxes), said.pred_boxes, rtol=1e-3, atol=1e-3)
