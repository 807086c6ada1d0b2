from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from featxfer import (
    Degradation,
    DivergenceError,
    FeatureTransferBlock,
    Preprocessing,
    PseudoLabelTrainer,
    Recipe,
    open_images,
)
from featxfer_integrations import (
    FitOptions,
    attach_transfer,
    backbone_of,
    detach_transfer,
    transfers_of,
)
from featxfer_integrations.hosts import torchvision_boxes
from featxfer_integrations.mechanism.attach import is_attached
from featxfer_integrations.mechanism.fingerprint import libraries
from featxfer_integrations.plan import plan
from tests.integrations.fitting import (
    BLOCKS,
    LR,
    assert_holds,
    assert_untouched,
    fit_blocks,
    fit_detector,
    fit_head,
    interrupted_after,
    state_of,
    told_of_epochs,
)

pytestmark = pytest.mark.filterwarnings("ignore:.* not help")


def checkpoints(cache: Path) -> list[Path]:
    return sorted((cache / "training").iterdir())


def fit_stage(stage: str, model: nn.Module, images: Any, folder: Path) -> Any:
    """One of the four kinds of stages alone, with its cache in `folder / "cache"`."""
    if stage == "head":
        return fit_head(model, images, folder)
    if stage == "maps":
        return fit_blocks(model, images, folder / "cache")
    site, trains = {"pyramid": ("fpn0", "blocks"), "boxes": ("boxes", "heads")}[stage]
    return fit_detector(model, images, folder / "cache", trains, site=site)


@pytest.mark.parametrize(
    ("stage", "what", "epochs"),
    [
        ("head", "the head", 20),
        ("maps", "blocks", 6),
        ("pyramid", "blocks", 4),
        ("boxes", "the head of boxes", 20),
    ],
)
def test_an_interrupted_stage_goes_on_to_the_same_bits(
    model: nn.Module,
    by_hand: Any,
    drawings: Path,
    discs: Path,
    tmp_path: Path,
    stage: str,
    what: str,
    epochs: int,
) -> None:
    detects = stage in ("pyramid", "boxes")
    host, images = (by_hand("faster r-cnn"), discs) if detects else (model, drawings)
    whole, plain = copy.deepcopy(host), state_of(host)
    wanted = fit_stage(stage, whole, images, tmp_path / "one")
    with interrupted_after(what, 2):
        fit_stage(stage, host, images, tmp_path / "two")
    assert_untouched(host, plain)
    (kept,) = checkpoints(tmp_path / "two" / "cache")
    seen: list[tuple[str, int]] = []
    with told_of_epochs(lambda *told: seen.append(told)):
        fitted = fit_stage(stage, host, images, tmp_path / "two")
    assert seen == [(what, epoch) for epoch in range(3, epochs)]
    assert not kept.exists()
    assert_holds(host, state_of(whole))
    for mine, other in ((fitted.log, wanted.log), (fitted.blocks_log, wanted.blocks_log)):
        assert [entry.loss for entry in mine] == [entry.loss for entry in other]
    assert fitted.held_out == wanted.held_out


def test_interrupted_work_on_a_detector_goes_on_to_the_same_bits(
    detector: nn.Module, discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the training of blocks, as boxes are taken through them, and in the training of heads."""
    monkeypatch.setattr("featxfer_integrations.stages.boxes.PART_ROWS", 4)
    whole, other = copy.deepcopy(detector), detector
    for model in (whole, other):
        attach_transfer(model, site="stage3", hidden_features=12)
        attach_transfer(model, hidden_features=20)
    fit_detector(whole, discs, tmp_path / "one")
    plain, cache = state_of(other), tmp_path / "two"
    name = "boxes" if type(detector).__name__ == "FasterRCNN" else "boxes_class"
    with interrupted_after("blocks", 1):
        fit_detector(other, discs, cache)
    assert_holds(other, plain)
    assert len(checkpoints(cache)) == 1
    read: list[int] = []

    def stopped(images: Any, levels: Any) -> Any:
        read.append(len(levels))
        if len(read) == 10:
            raise KeyboardInterrupt
        return whole_levels(images, levels)

    whole_levels = torchvision_boxes.levels_of_views
    with monkeypatch.context() as patch:
        patch.setattr(torchvision_boxes, "levels_of_views", stopped)
        with pytest.raises(KeyboardInterrupt):
            fit_detector(other, discs, cache)
    assert_holds(other, plain)
    assert len(checkpoints(cache)) == 1
    with interrupted_after(f"the head of {name}", 5):
        fit_detector(other, discs, cache)
    assert_holds(other, plain)
    assert len(checkpoints(cache)) == 2
    seen: list[tuple[str, int]] = []
    with told_of_epochs(lambda *told: seen.append(told)):
        fit_detector(other, discs, cache)
    assert seen == [(f"the head of {name}", epoch) for epoch in range(6, 20)]
    assert checkpoints(cache) == []
    assert_holds(other, state_of(whole))


@pytest.mark.parametrize("attached", [False, True])
def test_work_goes_on_where_attaching_was_interrupted(
    model: nn.Module,
    drawings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    attached: bool,
) -> None:
    """Checkpoints are there until all that was trained is attached; none of it is done again."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    sites: dict[str, Any] = {"site": ["layer1", "head"]}
    if attached:
        attach_transfer(model)
    other, plain = copy.deepcopy(model), state_of(model)
    with monkeypatch.context() as patch:
        patch.setattr("featxfer_integrations.fit.install", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit_blocks(model, drawings, tmp_path, recipe=BLOCKS, **sites)
    assert_holds(model, plain)
    assert len(checkpoints(tmp_path)) == 2
    seen: list[tuple[str, int]] = []
    with told_of_epochs(lambda *told: seen.append(told)):
        fit_blocks(model, drawings, tmp_path, recipe=BLOCKS, **sites)
    assert seen == []
    assert checkpoints(tmp_path) == []
    fit_blocks(other, drawings, tmp_path / "other", recipe=BLOCKS, **sites)
    assert_holds(model, state_of(other))


def test_where_the_last_stage_fails_nothing_is_attached_and_the_first_is_kept(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    plain, options = state_of(model), {"site": ["layer1", "head"]}
    wild = Recipe(epochs=3, learning_rate=1e30)
    with pytest.raises(DivergenceError, match="loss or weights are not finite"):
        fit_blocks(model, drawings, tmp_path, recipe=wild, **options)
    assert_untouched(model, plain)
    assert len(checkpoints(tmp_path)) == 1
    seen: list[str] = []
    with told_of_epochs(lambda what, _: seen.append(what)):
        fitted = fit_blocks(model, drawings, tmp_path, recipe=BLOCKS, **options)
    assert seen == ["the head"] * 6
    assert len(fitted.blocks_log) == 6
    assert set(transfers_of(model)) == {"layer1", "head"}
    assert checkpoints(tmp_path) == []


def test_where_the_last_stage_fails_what_is_attached_stays_as_it_was(
    by_hand: Any, discs: Path, tmp_path: Path
) -> None:
    model = by_hand("faster r-cnn")
    attach_transfer(model, site="fpn0", hidden_features=8)
    attach_transfer(model, hidden_features=20)
    plain, modules = state_of(model), dict(transfers_of(model).items())
    with pytest.raises(ValueError, match="clusters: got 9999, wanted at most"):
        fit_detector(model, discs, tmp_path, clusters=9999)
    assert_holds(model, plain)
    assert dict(transfers_of(model).items()) == modules
    assert all(module.card is None for module in modules.values())


class Stages(nn.Module):
    """Two sites whose maps have one shape, and two features of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.one = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        feature: torch.Tensor = self.fc(self.pool(self.two(self.one(self.stem(images)))))
        return feature


def test_a_checkpoint_is_of_all_that_training_hangs_on(
    drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change is another file, though every feature and every shape is the same."""

    def interrupt(*_: Any, checkpoint: Path, **__: Any) -> None:
        seen.append(checkpoint.name)
        raise KeyboardInterrupt

    def begin(**options: Any) -> None:
        usual = {"site": "one", "targets": ["pool"], "clusters": 4, "crops": 0}
        with pytest.raises(KeyboardInterrupt):
            fit_blocks(model, files, tmp_path / "cache", **{**usual, **options})

    seen: list[str] = []
    files = [tmp_path / path.name for path in sorted(drawings.iterdir())[:12]]
    for path in files:
        path.write_bytes((drawings / path.name).read_bytes())
    monkeypatch.setattr(PseudoLabelTrainer, "fit_rows", interrupt)
    torch.manual_seed(0)
    model: Any = Stages().eval()
    with torch.no_grad():
        model.two[0].weight.copy_(torch.eye(8)[:, :, None, None])  # the identity, of what is >= 0
        model.two[0].bias.zero_()
    begin()
    begin()
    assert seen[0] == seen.pop()
    begin(site="two")
    begin(site=["one", "two"])
    begin(targets=["fc"])
    begin(targets=["one", "pool"])
    begin(targets=lambda host, images: host(images))
    begin(crops=1)
    begin(seed=1)
    begin(held_out=0.5)
    begin(clusters=5)
    begin(objective="labels")
    begin(precision="bf16")
    begin(degradation=Degradation(32, 16))
    begin(block_recipe=dataclasses.replace(BLOCKS, patience=3))
    begin(block_recipe=dataclasses.replace(BLOCKS, momentum=0.8))
    begin(preprocessing=Preprocessing((0.0, 0.0, 0.0)))
    os.utime(files[0])
    begin()
    attach_transfer(model, FeatureTransferBlock(8, 8, kernel_size=3), site="one")
    begin()
    detach_transfer(model)
    named = "featxfer_integrations.stages.base.libraries"
    monkeypatch.setattr(named, lambda _: "another version")
    begin()
    assert len(set(seen)) == len(seen) == 19


def test_a_key_names_the_libraries_of_all_modules(model: nn.Module) -> None:
    around = nn.Sequential(model, torchvision.ops.Permute([0, 1]))
    versions = f"timm {timm.__version__}, torchvision {torchvision.__version__.partition('+')[0]}"
    assert libraries(model) == backbone_of(model).host == f"timm {timm.__version__}"
    assert libraries(around).startswith(versions)
    attach_transfer(model)
    assert libraries(model) == f"timm {timm.__version__}"
    assert libraries(nn.Sequential(nn.ReLU())).startswith("torch 2.")


def test_a_detectors_keys_name_the_libraries_of_all_its_modules(
    by_hand: Any, discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backbone may be timm's: its version is another store and another checkpoint."""
    model = by_hand("faster r-cnn")
    (stage,) = plan(model, discs, None, "boxes", None, FitOptions(), tmp_path, 0)
    manifest = stage.boxes.features.stores["boxes"].manifest  # type: ignore[attr-defined]
    assert f"timm {timm.__version__}, torchvision " in manifest.host
    seen: list[str] = []

    def interrupt(*_: Any, checkpoint: Path, **__: Any) -> None:
        seen.append(checkpoint.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(PseudoLabelTrainer, "fit_rows", interrupt)
    for version in ("1", "1", "2"):
        name = "featxfer_integrations.stages.base.libraries"
        monkeypatch.setattr(name, lambda _, version=version: f"timm {version}")
        with pytest.raises(KeyboardInterrupt):
            fit_detector(model, discs, tmp_path, "blocks", site="fpn1")
    assert seen[0] == seen[1] != seen[2]


def test_weights_of_what_is_trained_anew_do_not_count(
    by_hand: Any, model: nn.Module, drawings: Path, discs: Path
) -> None:
    """And those of blocks that stay do."""

    def keys(host: nn.Module, images: Path, site: str, **options: Any) -> set[str]:
        degradation = options.pop("degradation", None)
        found = set()
        for _ in range(2):
            for name, parameter in transfers_of(host).named_parameters():
                if name.startswith(options.get("changed", site)):
                    nn.init.normal_(parameter)
            stages = plan(host, open_images(images), degradation, site, None, None, None, 0)
            found.add(" ".join(stage.key() for stage in stages))
        return found

    attach_transfer(model)
    assert len(keys(model, drawings, "head", degradation=LR)) == 1
    detach_transfer(model)
    attach_transfer(model, site="layer1")
    assert len(keys(model, drawings, "layer1", degradation=LR)) == 1
    detector = by_hand("faster r-cnn")
    attach_transfer(detector, site="fpn0", hidden_features=8)
    attach_transfer(detector)
    assert len(keys(detector, discs, "boxes")) == 1
    assert len(keys(detector, discs, "boxes", changed="fpn0")) == 2


def test_a_split_is_the_same_whatever_the_default_device_is(
    model: nn.Module, drawings: Path
) -> None:
    options = FitOptions(held_out=0.3)
    (stage,) = plan(model, drawings, LR, "head", None, options, None, 1)
    with torch.device("meta"):
        parts = stage.task.split(20)
    assert [len(part) for part in parts] == [14, 6]
    assert all(torch.equal(*pair) for pair in zip(parts, stage.task.split(20), strict=True))
    assert not is_attached(model)
