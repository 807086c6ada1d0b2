from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from featxfer import (
    Degradation,
    DivergenceError,
    FeatureTransferBlock,
    FeatureTransferHead,
    ImageError,
    Preprocessing,
    Recipe,
)
from featxfer_integrations import (
    AttachError,
    attach_transfer,
    fit_key,
    fit_transfer,
    transfers_of,
)
from featxfer_integrations.mechanism.attach import is_attached
from tests.integrations.fitting import (
    BLOCKS,
    LR,
    QUICK,
    SCALED,
    WHOLE,
    assert_holds,
    assert_untouched,
    fit_blocks,
    fit_detector,
    fit_head,
    state_of,
)


def test_targets_of_a_detector_are_what_its_heads_see(by_hand: Any, discs: Path) -> None:
    with pytest.raises(ValueError, match=r"targets: got \['rpn'\], a detector's are what its"):
        fit_transfer(by_hand("retinanet"), discs, targets=["rpn"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": ["layer1", "layer1"]}, "site: got 'layer1' twice, wanted each once"),
        ({"site": ["layer1", "stage0", "stage1"]}, "site: got 'layer1' twice, wanted each once"),
        ({"degradation": [LR, LR]}, "degradation: got .* twice, wanted it once"),
    ],
    ids=str,
)
def test_what_is_named_twice_is_refused(
    model: nn.Module, drawings: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_blocks(model, drawings, tmp_path, **options)
    assert not is_attached(model)


BAD = [
    ({"degradation": []}, ValueError, "degradation: got none"),
    ({"degradation": 4}, TypeError, "degradation: got 4, wanted a (Scaled)?Degradation"),
    ({"site": []}, ValueError, "site: got none, wanted"),
    ({"site": 3}, TypeError, "site: got 3, wanted a name"),
    ({"site": ["layer1", 3]}, (TypeError, AttachError), "site: got (3|'layer1'), wanted"),
    ({"seed": -1}, ValueError, "seed: got -1"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *BAD,
        (
            {"degradation": [LR, Degradation(hr_size=64, lr_size=8)]},
            ValueError,
            r"degradation: got hr_size \[32, 64\], wanted one for all",
        ),
        (
            {"degradation": SCALED},
            ValueError,
            "degradation: got ScaledDegradation, wanted Degradation",
        ),
        ({"clusters": 100}, ValueError, "k: got 100 clusters for 54 features"),
        ({"site": "nowhere", "recipe": None}, AttachError, "no module 'nowhere'"),
        ({"site": "stage9", "recipe": None}, AttachError, "no stage9; it has stage0 = "),
        (
            {"recipe": Recipe(epochs=3, learning_rate=1e30)},
            DivergenceError,
            "loss or weights are not finite",
        ),
    ],
    ids=str,
)
def test_bad_arguments_leave_the_model_untouched(
    model: nn.Module,
    drawings: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    state = state_of(model)
    with pytest.raises(error, match=message):
        fit_head(model, drawings, tmp_path, **options)
    assert_untouched(model, state)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        *BAD,
        ({"degradation": LR}, ValueError, "degradation: got Degradation, wanted ScaledDegradation"),
        ({"crops": 2}, ValueError, "crops: got 2, .* not for detectors"),
        ({"site": "nowhere"}, AttachError, "site: got 'nowhere', wanted 'boxes'"),
        ({"site": "head"}, AttachError, "no pooled feature|got 'head', wanted 'boxes'"),
        ({"site": "backbone.neck"}, AttachError, "site: several tensors pass there, 0, 1, 2"),
    ],
    ids=str,
)
def test_bad_arguments_leave_the_detector_untouched(
    detector: nn.Module,
    discs: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    state = state_of(detector)
    with pytest.raises(error, match=message):
        fit_detector(detector, discs, tmp_path, **options)
    assert_untouched(detector, state)


@pytest.mark.parametrize("site", ["head", "blocks"])
def test_equal_images_have_nothing_to_cluster(
    model: nn.Module, drawings: Path, tmp_path: Path, site: str
) -> None:
    folder = tmp_path / "equal"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.png").write_bytes((drawings / "00.png").read_bytes())
    state = state_of(model)
    with pytest.raises(ValueError, match="hr: got 3 equal rows, wanted features that vary"):
        fit_head(model, folder, tmp_path, site=site, recipe=QUICK if site == "head" else None)
    assert_untouched(model, state)


def test_an_empty_folder_and_what_is_attached_elsewhere(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises((ImageError, ValueError, FileNotFoundError), match="empty"):
        fit_detector(detector, tmp_path / "empty", tmp_path, "blocks")
    attach_transfer(detector, site="fpn0")
    block = transfers_of(detector)["fpn0"]
    assert isinstance(block, FeatureTransferBlock)
    with pytest.raises(AttachError, match="something is attached at fpn0, and what is trained now"):
        fit_detector(detector, discs, tmp_path, "blocks", site="backbone")
    assert dict(transfers_of(detector).items()) == {"fpn0": block}


def test_blocks_that_training_would_not_know_of_are_refused(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    fit_blocks(model, drawings, tmp_path)
    state = state_of(model)
    message = "something is attached at layer1, and what is trained now would be trained without"
    with pytest.raises(AttachError, match=message):
        fit_head(model, drawings, tmp_path)
    with pytest.raises(AttachError, match=message):
        fit_blocks(model, drawings, tmp_path, site="layer2")
    with pytest.raises(AttachError, match=message):
        fit_blocks(model, drawings, tmp_path, site="blocks")
    assert set(transfers_of(model)) == {"layer1"}
    assert_holds(model, state)


def test_a_block_that_is_attached_is_trained_as_one(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    attach_transfer(model, site="layer2", hidden_features=16)
    for site in ("layer2", None):
        with pytest.raises(ValueError, match=r"recipe: got a Recipe, .* blocks alone are trained"):
            fit_head(model, drawings, tmp_path, site=site)


def test_options_are_fit_options(model: nn.Module, drawings: Path) -> None:
    options: Any = {"recipe": QUICK}
    with pytest.raises(TypeError, match="options: got dict, wanted FitOptions"):
        fit_transfer(model, drawings, options=options)
    with pytest.raises(TypeError, match="options: got dict, wanted FitOptions"):
        fit_key(model, drawings, options=options)
    assert not is_attached(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": 2}, "crops: got 2, .* heads alone are trained"),
        ({"block_recipe": BLOCKS}, "block_recipe: got a Recipe, .* heads alone are trained"),
        ({"site": "blocks"}, "recipe: got a Recipe, .* blocks alone are trained"),
        ({"site": None}, "recipe: got a Recipe, .* blocks alone are trained"),
        ({"site": "head", "targets": ["fc"]}, "recipe: got a Recipe, .* blocks alone are trained"),
    ],
    ids=str,
)
def test_arguments_without_effect_are_refused_before_anything_runs(
    model: nn.Module,
    drawings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    opened = "featxfer_integrations.plan.open_images"
    monkeypatch.setattr(opened, lambda *_: pytest.fail("images were opened"))
    with pytest.raises(ValueError, match=message):
        fit_head(model, drawings, tmp_path, **options)
    assert not is_attached(model)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("retinanet", {"batch_size": 8}, "batch_size: got 8, .* not for detectors"),
        ("retinanet", {"crops": 0}, "crops: got 0, .* not for detectors"),
        ("retinanet", {"preprocessing": Preprocessing()}, "preprocessing: .* not for detectors"),
        ("retinanet", {"site": "boxes", "block_recipe": WHOLE}, "block_recipe: .* heads alone"),
        ("retinanet", {"site": "boxes", "precision": "bf16"}, "precision: got 'bf16', .* heads"),
        ("retinanet", {"site": "fpn", "recipe": QUICK}, "recipe: got a Recipe, .* blocks alone"),
        ("retinanet", {"clusters": 9}, "clusters: got 9, .* on maps: RetinaNet proposes no"),
        ("retinanet", {"objective": "labels"}, "objective: got 'labels', .* maps"),
        (
            "faster r-cnn",
            {"site": "backbone", "objective": "contrast", "clusters": 9},
            "clusters: got 9, .* 'contrast'",
        ),
        ("faster r-cnn", {"recipe": QUICK}, "recipe: got a Recipe, .* blocks alone"),
    ],
    ids=str,
)
def test_arguments_without_effect_on_detectors_are_refused_before_anything_is_trained(
    by_hand: Any, discs: Path, tmp_path: Path, kind: str, options: dict[str, Any], message: str
) -> None:
    model = by_hand(kind)
    with pytest.raises(ValueError, match=message):
        fit_detector(model, discs, tmp_path / "cache", "none", **options)
    assert not is_attached(model)
    assert not (tmp_path / "cache").exists()


def test_a_clusters_head_is_not_trained_behind_blocks(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    attach_transfer(model, FeatureTransferHead(96, 4, 32, output="clusters"))
    message = 'head with output "clusters" is attached, wanted "features" behind blocks'
    with pytest.raises(AttachError, match=message):
        fit_blocks(model, drawings, tmp_path, site=["layer1", "head"])
    assert set(transfers_of(model)) == {"head"}
