from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from featxfer import ImageError, open_images
from featxfer_integrations import (
    AttachError,
    FitOptions,
    attach_transfer,
    detach_transfer,
    transfers_of,
)
from featxfer_integrations.mechanism.attach import is_attached
from featxfer_integrations.plan import plan
from featxfer_integrations.stages.blocks import ViewPairs
from featxfer_integrations.stages.pyramid import PyramidStage
from tests.integrations.conftest import failing
from tests.integrations.fitting import (
    SCALED,
    WHOLE,
    assert_half_precision_is_trained_in_full,
    assert_trained_and_saved,
    fit_blocks,
    fit_detector,
)

pytestmark = pytest.mark.filterwarnings("ignore:blocks do not help")


@pytest.mark.parametrize(
    ("site", "names"),
    [
        (None, {f"backbone_stages_layer{i}" for i in (2, 3, 4)}),
        ("backbone", {f"backbone_stages_layer{i}" for i in (2, 3, 4)}),
        ("fpn", {"fpn0", "fpn1", "fpn2"}),
        ("stage2", {"backbone_stages_layer2"}),
    ],
)
def test_blocks_are_attached_and_nothing_else_changes(
    detector: nn.Module,
    discs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    site: str | None,
    names: set[str],
) -> None:
    plain = copy.deepcopy(detector)
    fitted = fit_detector(detector, discs, tmp_path / "cache", "blocks", site=site)
    assert "training blocks takes about" in capsys.readouterr().err
    assert set(transfers_of(detector)) == names
    assert (fitted.log, len(fitted.blocks_log)) == ([], 4)
    assert fitted.blocks_log[-1].loss < fitted.blocks_log[0].loss
    (pairs,) = fitted.held_out
    assert pairs.after.cosine > pairs.before.cosine
    assert_trained_and_saved(detector, plain, discs, tmp_path / "saved")


def test_half_precision_detectors_are_trained_in_full(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    assert_half_precision_is_trained_in_full(detector, discs, tmp_path, "blocks", "fpn")


def test_images_without_proposals(by_hand: Any, discs: Path, tmp_path: Path) -> None:
    """Blocks learn from maps alone, and there are no boxes to report on."""
    model = by_hand("faster r-cnn")
    model.rpn.score_thresh = 2.0
    with pytest.warns(UserWarning, match="the detector proposes no boxes in"):
        fitted = fit_detector(model, discs, tmp_path, "blocks", site="fpn")
    assert (fitted.held_out, len(fitted.blocks_log)) == ([], 4)


def test_broken_images_are_skipped_or_an_error(
    by_hand: Any, discs: Path, tmp_path: Path, odd_images: Path
) -> None:
    model, cache = by_hand("faster r-cnn"), tmp_path / "cache"
    with pytest.raises(ImageError, match="broken"):
        fit_detector(model, odd_images, cache, "blocks")
    assert not is_attached(model)
    fitted = fit_detector(model, odd_images, cache, "blocks", on_error="skip")
    assert list(fitted.skipped) == ["broken.png"]
    assert fitted.images == 6
    detach_transfer(model)
    with pytest.raises(ImageError, match="broken"):
        fit_detector(model, odd_images, cache, "blocks")
    with pytest.raises(ValueError, match=r"images: none of 1 could be read: .*broken\.png"):
        fit_detector(model, [odd_images / "broken.png"], cache, "blocks", on_error="skip")
    assert not is_attached(model)


def test_an_image_that_fails_once_is_left_out_of_all_views(
    by_hand: Any, discs: Path, tmp_path: Path
) -> None:
    model, images = by_hand("faster r-cnn"), open_images(discs)
    rest = open_images([path for path in sorted(discs.iterdir()) if path.name != "01.png"])
    once = failing(images, {1: 1})
    fitted = fit_detector(model, once, tmp_path / "one", "blocks", on_error="skip")
    assert set(fitted.skipped) == {"01.png"}
    detach_transfer(model)
    wanted = fit_detector(model, rest, tmp_path / "two", "blocks", on_error="skip")
    assert fitted.held_out == wanted.held_out
    assert fitted.images == wanted.images == 11
    twice = failing(images, {1: 2})
    with pytest.raises(ImageError, match="could not be read this once"):
        fit_detector(model, twice, tmp_path / "three", "blocks", on_error="skip")


def test_rows_are_in_the_same_order_whatever_the_default_device_is(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    options = FitOptions(precision="fp32", block_recipe=WHOLE)
    (stage,) = plan(detector, discs, SCALED, "fpn0", None, options, tmp_path, 0)
    assert isinstance(stage, PyramidStage)
    rows, found = ViewPairs(stage, torch.arange(8), vary=True), []
    for device in ("cpu", "meta"):
        with torch.device(device):
            found.append(rows.order(torch.Generator().manual_seed(0)))
    assert torch.equal(*found)
    assert len(found[0]) == 12


def test_a_stage_hangs_on_the_blocks_that_are_trained(
    by_hand: Any, discs: Path, tmp_path: Path
) -> None:
    model = by_hand("retinanet")
    attach_transfer(model, site="fpn0", hidden_features=12)
    block = transfers_of(model)["fpn0"]
    fit_detector(model, discs, tmp_path, "blocks")
    assert transfers_of(model)["fpn0"] is block
    assert block.config["hidden_channels"] == 12
    assert set(transfers_of(model)) == {"fpn0"}


def maps_tell_nothing(*_: Any) -> Any:
    raise AttachError("site: it does not come from the maps alone")


def test_where_maps_do_not_suffice_blocks_are_trained_on_images_as_they_are_read(
    model: nn.Module,
    drawings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("featxfer_integrations.stages.maps.Suffix", maps_tell_nothing)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    files = [*sorted(drawings.iterdir())[:40], broken]
    with pytest.raises(ImageError, match=r"broken\.png"):
        fit_blocks(model, files, tmp_path, crops=None)
    assert not is_attached(model)
    fitted = fit_blocks(model, files, tmp_path, crops=None, on_error="skip")
    told = capsys.readouterr().err
    assert "images are read anew each time: site: it does not come from the maps" in told
    assert list(fitted.skipped) == [str(broken)]
    assert (fitted.images, len(fitted.blocks_log)) == (30, 6)
    (pairs,) = fitted.held_out
    assert pairs.pairs == 10
    assert pairs.after.cosine > pairs.before.cosine
    assert not (tmp_path / "maps").exists()


def test_a_head_is_not_trained_behind_blocks_whose_maps_do_not_suffice(
    model: nn.Module, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featxfer_integrations.stages.maps.Suffix", maps_tell_nothing)
    sites = ["layer1", "head"]
    with pytest.raises(AttachError, match="site: a head at 'head' cannot be trained behind blocks"):
        fit_blocks(model, drawings, tmp_path, site=sites, crops=None)
    assert not is_attached(model)
