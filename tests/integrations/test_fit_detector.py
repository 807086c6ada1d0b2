from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from featxfer import (
    ArtifactError,
    Degradation,
    FeatureTransferBlock,
    FeatureTransferHead,
    ImageError,
    PseudoLabelTrainer,
    Recipe,
    ScaledDegradation,
    open_images,
)
from featxfer.modules.hub import TransferModule
from featxfer_integrations import (
    AttachError,
    TransferFit,
    attach_transfer,
    detach_transfer,
    fit_transfer,
    load_transfers,
    save_transfers,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations._attach import Place, is_attached
from featxfer_integrations._fitting import put
from featxfer_integrations.attach import find_places
from featxfer_integrations.boxes import (
    KEPT,
    NOTHING,
    PER_IMAGE,
    Sampler,
    balanced,
    detector_key,
    fill_box_stores,
    half_balanced,
)
from featxfer_integrations.detector_blocks import Pyramid, Views
from tests.integrations.conftest import failing

QUICK = Recipe(epochs=20, learning_rate=1e-3, optimizer="adamw", schedule="one-cycle")
BLOCKS = Recipe(epochs=4, batch_size=4, learning_rate=2e-3, optimizer="adamw", schedule="one-cycle")
LR = ScaledDegradation(3)
HEADS = {"FasterRCNN": "boxes", "RetinaNet": "boxes_class"}


def fit(
    model: nn.Module, images: Any, cache: Path, trains: str = "blocks and heads", **options: Any
) -> TransferFit:
    """With the recipes of what is trained."""
    arguments = {
        "degradation": LR,
        "recipe": QUICK if "heads" in trains else None,
        "block_recipe": BLOCKS if "blocks" in trains else None,
        "cache": cache,
        "held_out": 0.25,
        "precision": "fp32",
        **options,
    }
    return fit_transfer(model, images, **arguments)


@torch.no_grad()
def detect(model: nn.Module, folder: Path) -> list[dict[str, Tensor]]:
    images = open_images(folder)
    found: list[dict[str, Tensor]] = model([LR.lr(images.read(row)) / 255 for row in range(3)])
    return found


def same(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> bool:
    pairs = [(a[key], b[key]) for a, b in zip(some, others, strict=True) for key in a]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore:the head does not help")
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"depth": "pooled"}, {"heads"}),
        ({"depth": "deep"}, {f"backbone_stages_layer{i}" for i in (2, 3, 4)}),
        ({"where": "fpn"}, {"fpn0", "fpn1", "fpn2"}),
        ({"at": "stage2"}, {"backbone_stages_layer2"}),
    ],
)
def test_what_is_trained_is_attached_and_nothing_else_changes(
    detector: nn.Module, discs: Path, tmp_path: Path, options: dict[str, Any], names: set[str]
) -> None:
    before, plain = copy.deepcopy(detector.state_dict()), detect(detector, discs)
    other = copy.deepcopy(detector)
    deep = options != {"depth": "pooled"}
    trains = "blocks" if deep else "heads"
    fitted = fit(detector, discs, tmp_path / "cache", trains, **options)
    transfers = transfers_of(detector)
    assert set(transfers) == ({HEADS[type(detector).__name__]} if names == {"heads"} else names)
    assert fitted.depth == ("deep" if deep else "pooled")
    assert len(fitted.blocks_log) == (4 if deep else 0)
    log = fitted.blocks_log if deep else fitted.log
    assert log[-1].loss < log[0].loss
    (pairs,) = fitted.held_out
    assert pairs.after.cosine > pairs.before.cosine - (0 if deep else 0.1)
    assert not same(detect(detector, discs), plain)
    with transfer_disabled(detector):
        assert same(detect(detector, discs), plain)
    saved = save_transfers(detector, tmp_path / "saved")
    load_transfers(other, saved, degradation=LR)
    assert same(detect(other, discs), detect(detector, discs))
    for module in transfers.values():
        card: Any = module.card
        assert card.degradations == (LR,)
        assert card.details["images"] == 12
    detach_transfer(detector)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


@pytest.mark.filterwarnings("ignore:blocks do not help")
def test_blocks_first_and_heads_on_what_comes_through_them(
    detector: nn.Module, discs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attach_transfer(detector, at="stage3", hidden_features=12)
    attach_transfer(detector, branch="both", hidden_features=20)
    modules = dict(transfers_of(detector).items())
    fitted = fit(detector, discs, tmp_path, degradation=[LR, ScaledDegradation(2)])
    heads = [module for module in modules.values() if isinstance(module, FeatureTransferHead)]
    assert dict(transfers_of(detector).items()) == modules
    assert {head.fc1.out_features for head in heads} == {20}
    assert fitted.depth == "deep"
    assert len(fitted.log) == 20 * len(heads)
    assert len(fitted.held_out) == 2 + 2 * len(heads)
    assert all(bool(head.fc2.weight.any()) for head in heads)
    branches = {head.card.details["branch"] for head in heads if head.card}
    assert branches == {"both"}
    known: Any = heads[0].card
    assert known.details["after"] == ["backbone_stages_layer3"]
    assert "features of boxes take up to " in capsys.readouterr().err
    saved = save_transfers(detector, tmp_path / "saved")
    other = copy.deepcopy(detect(detector, discs))
    detach_transfer(detector)
    assert same(detect(load_transfers(detector, saved), discs), other)
    detach_transfer(detector)
    place = HEADS[type(detector).__name__]
    readme = (saved / place / "README.md").read_text()
    assert f'head=PATH_OR_HUB_ID, where="{place}", branch="both")' in readme
    with pytest.warns(UserWarning, match="trained behind blocks at backbone_stages_layer3"):
        attach_transfer(detector, saved / place, where=place, branch="both")
    detach_transfer(detector)
    with pytest.raises(ArtifactError, match="head for branch='both', got 'class'"):
        attach_transfer(detector, saved / place, where=place)


def test_features_of_boxes_are_those_that_the_predictor_gets(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    """The store's rows again, through the whole detector, at what it says of the LR image."""
    images = open_images(discs)
    places = find_places(detector, where="boxes")
    kept = fill_box_stores(Sampler(detector, places, seed=0), images, [LR], tmp_path)
    stores = kept[places[0].name]
    views, labels = stores.read(torch.arange(len(images)), 10_000, 0)
    assert [part.shape for part in views] == [views[0].shape] * 2
    assert len(labels) == len(views[0]) <= PER_IMAGE * len(images)
    assert not torch.equal(views[0], views[1])
    seen: list[Tensor] = []
    layer = detector.get_submodule(places[0].inputs[0])
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for view, rows in ((images.read(0), views[0]), (LR.lr(images.read(0)), views[1])):
        seen.clear()
        with torch.no_grad():
            detector([view / 255])
        given = torch.cat([part if part.ndim == 2 else part[0].flatten(1).T for part in seen])
        nearest = torch.cdist(rows[:8], given).min(1).values / rows[:8].norm(dim=1)
        assert float(nearest.max()) < (2e-3 if rows is views[0] else 1.0)
    handle.remove()


def test_boxes_are_balanced_by_label() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.2, 0.3, 0.1])
    assert balanced(labels, scores, 4).tolist() == [0, 5, 6, 1]
    assert balanced(labels, scores, 99).tolist() == [0, 5, 6, 1, 4, 2, 3]
    assert balanced(labels[:0], scores[:0], 4).tolist() == []


def test_half_of_what_is_drawn_is_balanced_over_objects_and_half_by_chance() -> None:
    labels = torch.tensor([0] * 80 + [1] * 10 + [2] * 2)
    scores = torch.linspace(0, 1, len(labels))
    draws = [
        half_balanced(labels, scores, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    for drawn in draws:
        assert len(drawn.unique()) == 16
        assert sorted(labels[drawn[:8]].tolist()) == [1] * 6 + [2] * 2
        assert drawn[:8].sort().values.tolist() == [84, 85, 86, 87, 88, 89, 90, 91]
        assert (labels[drawn[8:]] == 0).sum() >= 6
    everything = half_balanced(labels, scores, 999, torch.Generator())
    assert everything.sort().values.equal(torch.arange(len(labels)))
    assert half_balanced(labels[:0], scores[:0], 4, torch.Generator()).tolist() == []


def test_rare_labels_get_their_share_of_half_the_rows(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    images = open_images(discs)
    (place,) = find_places(detector, where="boxes")
    sampler = Sampler(detector, [place], seed=0)
    stores = fill_box_stores(sampler, images, [LR], tmp_path)[place.name]
    _, labels = stores.read(torch.arange(len(images)), 10_000, 0)
    counts = labels.bincount(minlength=4)
    most = min(len(labels) // 2, int(2 * counts[counts > 0].min()))
    _, few = stores.read(torch.arange(len(images)), most, 0)
    assert len(few) == most
    kept = few.bincount(minlength=4)
    rarest = int(torch.where(counts > 0, counts, 10_000).argmin())
    share = most // 2 // int((counts > 0).sum())
    assert int(kept[rarest]) >= min(int(counts[rarest]), share)
    stored = stores.drawn.read().features.unflatten(1, (-1, KEPT))
    assert int((stored[..., 0] != NOTHING).sum()) == len(labels)


@pytest.mark.filterwarnings("ignore:the head does not help", "ignore:blocks do not help")
def test_heads_are_trained_on_what_standing_blocks_give(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    """Step by step as at once, and the blocks stay as they were."""
    at_once = copy.deepcopy(detector)
    attach_transfer(at_once, where="fpn", hidden_features=8)
    attach_transfer(at_once, hidden_features=20)
    fit(at_once, discs, tmp_path / "one")
    attach_transfer(detector, where="fpn", hidden_features=8)
    fit(detector, discs, tmp_path / "two", "blocks")
    blocks = copy.deepcopy(transfers_of(detector).state_dict())
    attach_transfer(detector, hidden_features=20)
    fitted = fit(detector, discs, tmp_path / "two", "heads", where="boxes")
    assert (fitted.depth, fitted.blocks_log) == ("deep", [])
    state = transfers_of(detector).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in blocks.items())
    for name, value in transfers_of(at_once).state_dict().items():
        assert torch.equal(value, state[name]), name
    card: Any = transfers_of(detector)[HEADS[type(detector).__name__]].card
    assert card.details["after"] == ["fpn0", "fpn1", "fpn2"]


def test_later_views_are_of_the_boxes_that_were_drawn_first(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    """Though the detector, by then, would propose others."""
    images, places = open_images(discs), find_places(detector, where="boxes")
    sampler = Sampler(detector, places, per_image=12, seed=0)
    first = fill_box_stores(sampler, images, [LR], tmp_path)[places[0].name]
    sampler.chance = lambda index: torch.Generator().manual_seed(99)  # type: ignore[method-assign]
    other = fill_box_stores(sampler, images, [ScaledDegradation(1)], tmp_path)[places[0].name]
    everything = torch.arange(len(images))
    (hr, lr), labels = first.read(everything, 10_000, 0)
    (hr_again, same), labels_again = other.read(everything, 10_000, 0)
    assert torch.equal(labels, labels_again)
    assert torch.equal(hr, hr_again)
    torch.testing.assert_close(same, hr)
    assert not torch.allclose(lr, hr)
    sampler = Sampler(detector, places, per_image=12, seed=0)
    sampler.chance = lambda index: torch.Generator().manual_seed(99)  # type: ignore[method-assign]
    drawn_anew = fill_box_stores(sampler, images, [LR], tmp_path / "new")[places[0].name]
    assert not torch.equal(drawn_anew.read(everything, 10_000, 0)[0][0], hr)


def test_a_key_is_the_same_before_and_after_a_run_and_in_another_process(
    detector: nn.Module, discs: Path
) -> None:
    attach_transfer(detector, where="backbone", hidden_features=8)
    script = (
        "import sys, torch\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from tests.integrations.conftest import make_detector\n"
        "from featxfer_integrations import attach_transfer\n"
        "from featxfer_integrations.boxes import detector_key\n"
        "from safetensors.torch import load_file\n"
        "model = make_detector(sys.argv[1])\n"
        "attach_transfer(model, where='backbone', hidden_features=8)\n"
        "model.load_state_dict(load_file(sys.argv[2]))\n"
        "print(detector_key(model))\n"
    )
    kind = {"FasterRCNN": "faster r-cnn", "RetinaNet": "retinanet"}[type(detector).__name__]
    weights = discs.parent / f"{kind}.safetensors"
    safetensors.torch.save_file(detector.state_dict(), weights)
    key = detector_key(detector)
    detect(detector, discs)
    assert detector_key(detector) == key
    run = subprocess.run(
        [sys.executable, "-c", script, kind, str(weights)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.stdout.strip() == key


def test_a_key_hangs_on_settings_layers_blocks_and_weights(by_hand: Any) -> None:
    model = by_hand("faster r-cnn")
    keys = [detector_key(model)]
    model.roi_heads.score_thresh = 0.123
    keys.append(detector_key(model))
    model.rpn.box_coder.weights = (2.0, 2.0, 1.0, 1.0)
    keys.append(detector_key(model))
    model.transform.min_size = (99,)
    keys.append(detector_key(model))
    attach_transfer(model, where="fpn0", hidden_features=8)
    keys.append(detector_key(model))
    nn.init.ones_(model.rpn.head.cls_logits.bias)
    keys.append(detector_key(model))
    assert len(set(keys)) == len(keys)


def test_labels_of_a_level_are_the_same_without_the_other_levels() -> None:
    torch.manual_seed(0)
    few = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 20}
    model: Any = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, **few).eval()
    places = find_places(model, where="boxes", branch="both")
    image = torch.randint(256, (3, 200, 220), dtype=torch.uint8)
    views = [image, LR.lr(image)]
    together = Sampler(model, places, seed=0)(views, 0)
    for place in (places[1], places[-2]):
        alone = Sampler(model, [place], seed=0)(views, 0)[place.name]
        assert torch.equal(alone.labels, together[place.name].labels)
        assert torch.equal(alone.drawn, together[place.name].drawn)
        assert torch.equal(alone.views[1], together[place.name].views[1])


@pytest.mark.filterwarnings("ignore:the head does not help")
def test_heads_of_the_regression_branch_and_of_named_modules(
    by_hand: Any, discs: Path, tmp_path: Path
) -> None:
    model = by_hand("retinanet")
    attach_transfer(model, where="boxes_regression", branch="both")
    assert fit(model, discs, tmp_path, "heads").depth == "pooled"
    detach_transfer(model)
    attach_transfer(model, where="head.classification_head.conv", in_features=16)
    assert len(fit(model, discs, tmp_path, "heads").log) == 20
    detach_transfer(model)
    attach_transfer(model, where="backbone.neck.layer_blocks.0", in_features=16)
    with pytest.raises(AttachError, match="'backbone_neck_layer_blocks_0' has no vector for each"):
        fit(model, discs, tmp_path, "heads")
    rcnn = by_hand("faster r-cnn")
    attach_transfer(rcnn, where="backbone.neck.layer_blocks.0", in_features=16)
    with pytest.raises(AttachError, match="has no vector for each box"):
        fit(rcnn, discs, tmp_path, "heads")


@pytest.mark.filterwarnings("ignore:the head does not help", "ignore:blocks do not help")
@pytest.mark.parametrize("options", [{"depth": "pooled"}, {"where": "fpn"}])
def test_half_precision_detectors_are_trained_in_full(
    detector: nn.Module, discs: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = copy.deepcopy(detector.bfloat16())
    trains = "blocks" if "where" in options else "heads"
    fit(detector, discs, tmp_path, trains, **options)
    for module in transfers_of(detector).values():
        assert {value.dtype for value in module.parameters()} == {torch.bfloat16}
    float_host = whole.float()
    fit(float_host, discs, tmp_path, trains, **options)
    for mine, wanted in zip(
        transfers_of(detector).parameters(), transfers_of(float_host).parameters(), strict=True
    ):
        assert torch.equal(mine, wanted.bfloat16())


@pytest.mark.filterwarnings("ignore:the head does not help", "ignore:blocks do not help")
def test_interrupted_work_goes_on_to_the_same_result(
    detector: nn.Module, discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import featxfer.training.trainer as trainer
    import featxfer_integrations.boxes as boxes

    monkeypatch.setattr(boxes, "PART_ROWS", 4)
    whole, other = copy.deepcopy(detector), detector
    for model in (whole, other):
        attach_transfer(model, at="stage3", hidden_features=12)
        attach_transfer(model, hidden_features=20)
    fit(whole, discs, tmp_path / "one")
    plain = copy.deepcopy(other.state_dict())
    epoch, call = trainer.PseudoLabelTrainer._epoch, boxes.Sampler.__call__

    def stopped_epoch(self: Any, progress: Any, *args: Any) -> None:
        if len(progress.log) == 2:
            raise KeyboardInterrupt
        epoch(self, progress, *args)

    def stopped_call(self: Any, views: Any, index: int, known: Any) -> Any:
        if index == 9:
            raise KeyboardInterrupt
        return call(self, views, index, known)

    for owner, name, stop, old in (
        (trainer.PseudoLabelTrainer, "_epoch", stopped_epoch, epoch),
        (boxes.Sampler, "__call__", stopped_call, call),
    ):
        monkeypatch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            fit(other, discs, tmp_path / "two")
        assert all(torch.equal(v, plain[n]) for n, v in other.state_dict().items())
        assert len(list((tmp_path / "two" / "training").iterdir())) == 1
        monkeypatch.setattr(owner, name, old)
    fit(other, discs, tmp_path / "two")
    assert not list((tmp_path / "two" / "training").iterdir())
    for first, second in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:the head does not help", "ignore:blocks do not help")
def test_work_goes_on_where_attaching_was_interrupted(
    by_hand: Any, discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the blocks is there until the heads are attached as well."""
    model = by_hand("faster r-cnn")
    attach_transfer(model, at="stage3", hidden_features=12)
    attach_transfer(model, hidden_features=20)

    def interrupt(model: nn.Module, place: Place, module: TransferModule) -> None:
        if not place.block:
            raise KeyboardInterrupt
        put(model, place, module)

    with monkeypatch.context() as patch:
        patch.setattr("featxfer_integrations.fit_detector.put", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(model, discs, tmp_path)
    assert len(list((tmp_path / "training").iterdir())) == 1
    steps: list[int] = []
    epoch = PseudoLabelTrainer._epoch

    def counted(self: Any, progress: Any, *args: Any) -> None:
        steps.append(self.recipe.epochs)
        epoch(self, progress, *args)

    monkeypatch.setattr(PseudoLabelTrainer, "_epoch", counted)
    fit(model, discs, tmp_path)
    assert steps == [20] * 20
    assert not list((tmp_path / "training").iterdir())


def test_keys_name_the_libraries_of_all_modules(
    by_hand: Any, discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backbone may be timm's: its version is another store and another checkpoint."""
    model = by_hand("faster r-cnn")
    places, images = find_places(model, where="boxes"), open_images(discs)
    stores = fill_box_stores(Sampler(model, places, seed=0), images, [LR], tmp_path)
    manifest = stores["boxes"].drawn.manifest
    assert f"timm {timm.__version__}, torchvision " in manifest.host
    seen: list[str] = []

    def interrupt(*_: Any, checkpoint: Path, **__: Any) -> None:
        seen.append(checkpoint.name)
        raise KeyboardInterrupt

    monkeypatch.setattr("featxfer_integrations.fit_detector.train_detector_blocks", interrupt)
    for version in ("1", "1", "2"):
        name = "featxfer_integrations.fit_detector.libraries"
        monkeypatch.setattr(name, lambda _, version=version: f"timm {version}")
        with pytest.raises(KeyboardInterrupt):
            fit(model, discs, tmp_path, "blocks", where="fpn1")
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("retinanet", {"batch_size": 8}, "batch_size: got 8, .* not for detectors"),
        ("retinanet", {"depth": "pooled", "minutes": 3}, "minutes: got 3, .* not 'pooled'"),
        ("retinanet", {"where": "fpn", "minutes": 3}, "minutes: got 3, .* however long"),
        ("retinanet", {"depth": "pooled", "block_recipe": BLOCKS}, "block_recipe: .* heads alone"),
        ("retinanet", {"where": "boxes", "precision": "bf16"}, "precision: got 'bf16', .* heads"),
        ("retinanet", {"where": "fpn", "recipe": QUICK}, "recipe: got a Recipe, .* blocks alone"),
        ("retinanet", {"depth": "deep", "warm_start": True}, "warm_start: got True, .* blocks al"),
        (
            "retinanet",
            {"depth": "deep", "clusters": 9},
            "clusters: got 9, .* RetinaNet proposes no",
        ),
        ("retinanet", {"depth": "deep", "objective": "labels"}, "objective: got 'labels', .* maps"),
        (
            "faster r-cnn",
            {"depth": "deep", "objective": "contrast", "clusters": 9},
            "clusters: got 9, .* objective='contrast'",
        ),
        ("faster r-cnn", {"recipe": QUICK}, "recipe: got a Recipe, .* there is the time for them"),
        ("retinanet", {"clusters": 9}, "clusters: got 9, .* time for them, on maps: RetinaNet"),
        (
            "faster r-cnn",
            {"minutes": 1e-9, "block_recipe": BLOCKS},
            "block_recipe: got a Recipe, .* since blocks would train for about",
        ),
        (
            "faster r-cnn",
            {"minutes": 1e-9, "precision": "bf16"},
            "precision: got 'bf16', .* since blocks would train for about",
        ),
    ],
    ids=str,
)
def test_arguments_without_effect_are_refused_before_anything_is_trained(
    by_hand: Any, discs: Path, tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    model = by_hand(kind)
    with pytest.raises(ValueError, match=message):
        fit(model, discs, tmp_path / "cache", "none", **options)
    assert not is_attached(model)
    assert not (tmp_path / "cache").exists()


def test_boxes_are_the_same_whatever_the_default_device_is(
    detector: nn.Module, discs: Path
) -> None:
    images, found = open_images(discs), []
    labels, scores = torch.tensor([0] * 30 + [1] * 5), torch.linspace(0, 1, 35)
    pyramid = Pyramid(detector, "fp32")
    options: dict[str, Any] = {"hr_share": 0.5, "seed": 0}
    rows = Views(pyramid, images, [LR], torch.arange(8), **options)
    for device in ("cpu", "meta"):
        with torch.device(device):
            chosen = half_balanced(labels, scores, 16, torch.Generator().manual_seed(0))
            found.append((chosen, rows.order(torch.Generator().manual_seed(0))))
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:the head does not help", "ignore:blocks do not help")
def test_auto_trains_heads_where_blocks_would_take_too_long(
    detector: nn.Module, discs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = fit(detector, discs, tmp_path, "heads", minutes=1e-9)
    assert fitted.depth == "pooled"
    assert set(transfers_of(detector)) == {HEADS[type(detector).__name__]}
    assert "heads alone: blocks would train for about" in capsys.readouterr().err
    detach_transfer(detector)
    short = Recipe(epochs=1, batch_size=4, learning_rate=1e-3, optimizer="adamw", steps=())
    assert fit(detector, discs, tmp_path, "none", block_recipe=short).depth == "deep"
    assert "training blocks takes about" in capsys.readouterr().err


def grey(folder: Path) -> None:
    Image.new("L", (70, 60), 99).save(folder / "grey.png")
    Image.new("I;16", (40, 90), 30_000).save(folder / "sixteen.png")


@pytest.mark.filterwarnings("ignore:the head does not help", "ignore:blocks do not help")
def test_images_without_proposals_of_other_kinds_and_broken_ones(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    """Grey and 16-bit images count as others; one that is no image is skipped, or an error."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in list(discs.iterdir())[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    grey(folder)
    (folder / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="broken"):
        fit(detector, folder, tmp_path / "cache", "heads", depth="pooled")
    assert not is_attached(detector)
    fitted = fit(detector, folder, tmp_path / "cache", "heads", depth="pooled", on_error="skip")
    assert list(fitted.skipped) == ["broken.png"]
    detach_transfer(detector)
    for depth, trains in (("deep", "blocks"), ("pooled", "heads")):
        with pytest.raises(ImageError, match="broken"):
            fit(detector, folder, tmp_path / "cache", trains, depth=depth)
        assert not is_attached(detector)
    fitted = fit(detector, folder, tmp_path / "cache", "blocks", depth="deep", on_error="skip")
    assert list(fitted.skipped) == ["broken.png"]
    assert fitted.images == 6
    detach_transfer(detector)
    with pytest.raises(ValueError, match=r"images: none of 1 could be read: .*broken\.png"):
        fit(detector, [folder / "broken.png"], tmp_path / "cache", on_error="skip")
    rpn = getattr(detector, "rpn", None)
    if rpn is not None:
        rpn.score_thresh = 2.0
        message = "images: the detector finds no box at 'boxes' in any of"
        with pytest.raises(ValueError, match=message):
            fit(detector, discs, tmp_path / "cache", "heads", depth="pooled")
        assert not is_attached(detector)
        rpn.score_thresh = 0.0
        with pytest.raises(ValueError, match=r"clusters: got 9999, wanted at most the \d+ boxes"):
            fit(detector, discs, tmp_path / "cache", "heads", depth="pooled", clusters=9999)
        assert not is_attached(detector)
        rpn.score_thresh = 2.0
        with pytest.warns(UserWarning, match="the detector proposes no boxes in"):
            fitted = fit(detector, discs, tmp_path / "cache", "blocks", where="fpn")
        assert (fitted.held_out, len(fitted.blocks_log)) == ([], 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"degradation": Degradation()},
            ValueError,
            "degradation: got Degradation, wanted ScaledDegradation",
        ),
        ({"degradation": []}, ValueError, "degradation: got none"),
        ({"lr_images": "x"}, ValueError, "lr_images: got 'x', .* not for detectors"),
        ({"crops": 2}, ValueError, "crops: got 2, .* not for detectors"),
        ({"clusters": [3, 4]}, ValueError, r"clusters: got \(3, 4\), wanted one number"),
        ({"clusters": 0}, ValueError, "clusters: got 0"),
        ({"objective": "gan"}, ValueError, "objective: got 'gan'"),
        ({"on_error": "ignore"}, ValueError, "on_error: got 'ignore'"),
        ({"where": "fpn", "depth": "pooled"}, ValueError, "depth: got 'pooled', but blocks go to"),
        ({"where": "boxes", "depth": "deep"}, ValueError, "depth: got 'deep', but a head goes to"),
        ({"where": "nowhere"}, AttachError, "where: got 'nowhere', wanted 'boxes'"),
        ({"where": "boxes", "at": "stage2"}, ValueError, "where, at: got both"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"where": 3}, TypeError, "where: got 3, wanted a name"),
        ({"at": []}, ValueError, "at: got none, wanted"),
        ({"degradation": 4}, TypeError, "degradation: got 4, wanted a ScaledDegradation"),
        ({"recipe": 3}, TypeError, "recipe: got int, wanted a Recipe"),
        ({"minutes": "5"}, ValueError, "minutes: got '5', wanted > 0"),
        ({"held_out": "a"}, ValueError, "held_out: got 'a', wanted a share"),
        ({"clusters": "10"}, ValueError, "clusters: got '10', wanted an int"),
        ({"at": "head"}, AttachError, "no module 'head'|'head' is not in it"),
        ({"where": "backbone.neck"}, AttachError, "where: the width at 'backbone_neck' is not"),
    ],
)
def test_bad_options_leave_the_detector_as_it_was(
    detector: nn.Module,
    discs: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        fit(detector, discs, tmp_path, **options)
    assert not is_attached(detector)


@pytest.mark.filterwarnings("ignore:the head does not help", "ignore:blocks do not help")
@pytest.mark.parametrize("depth", ["pooled", "deep"])
def test_an_image_that_fails_once_is_left_out_of_all_views(
    by_hand: Any, discs: Path, tmp_path: Path, depth: str
) -> None:
    model, images = by_hand("faster r-cnn"), open_images(discs)
    rest = open_images([path for path in sorted(discs.iterdir()) if path.name != "01.png"])
    trains = "heads" if depth == "pooled" else "blocks"
    options: dict[str, Any] = {"depth": depth, "on_error": "skip"}
    fitted = fit(model, failing(images, {1: 1}), tmp_path / "one", trains, **options)
    assert set(fitted.skipped) == {"01.png"}
    detach_transfer(model)
    wanted = fit(model, rest, tmp_path / "two", trains, **options)
    assert fitted.held_out == wanted.held_out
    assert fitted.images == wanted.images == 11
    with pytest.raises(ImageError, match="could not be read this once"):
        fit(model, failing(images, {1: 2}), tmp_path / "three", trains, **options)


def test_an_empty_folder_and_what_is_attached_elsewhere(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises((ImageError, ValueError, FileNotFoundError), match="empty"):
        fit(detector, tmp_path / "empty", tmp_path)
    attach_transfer(detector, where="fpn0")
    block = transfers_of(detector)["fpn0"]
    assert isinstance(block, FeatureTransferBlock)
    with pytest.raises(AttachError, match="something is attached at fpn0, and what is trained now"):
        fit(detector, discs, tmp_path, where="backbone")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(ValueError, match="degradation: got ScaledDegradation, wanted Degradation"):
        fit_transfer(model, discs, where="1", degradation=LR)


def test_features_of_boxes_that_are_others_now_are_told_and_computed_anew(
    detector: nn.Module, discs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an edited `forward` gives them: no key knows of it."""
    images, places = open_images(discs), find_places(detector, where="boxes")
    sampler = Sampler(detector, places, seed=0)
    all_images = torch.arange(len(images))

    def hr_features(cache: Path) -> torch.Tensor:
        stores = fill_box_stores(sampler, images, [LR], cache)
        return stores[places[0].name].read(all_images, 10_000, 0)[0][0]

    before = hr_features(tmp_path)
    assert torch.equal(hr_features(tmp_path), before)
    assert "computed anew" not in capsys.readouterr().err
    module = detector.get_submodule("backbone.neck.layer_blocks.0")
    module.register_forward_hook(lambda _, __, output: 2 * output)
    after = hr_features(tmp_path)
    assert "has other features of boxes at 'boxes" in capsys.readouterr().err
    assert not torch.equal(after, before)
    assert torch.equal(after, hr_features(tmp_path / "new"))
