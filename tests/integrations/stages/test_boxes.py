from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from featxfer import (
    ArtifactError,
    BaseDegradation,
    FeatureTransferHead,
    ImageError,
    ScaledDegradation,
    open_images,
)
from featxfer_integrations import (
    AttachError,
    Site,
    attach_transfer,
    detach_transfer,
    host_of,
    load_transfers,
    save_transfers,
    transfers_of,
)
from featxfer_integrations.hosts.base import find_sites
from featxfer_integrations.mechanism.attach import is_attached
from featxfer_integrations.stages.boxes import NOTHING, PER_IMAGE, BoxFeatures
from featxfer_integrations.stages.pyramid import chance_of
from tests.integrations.conftest import failing
from tests.integrations.fitting import (
    HEADS,
    SCALED,
    assert_half_precision_is_trained_in_full,
    assert_trained_and_saved,
    detect,
    fit_detector,
    same,
)

pytestmark = pytest.mark.filterwarnings("ignore:.* not help")


def boxes_of(
    model: nn.Module,
    folder: Path,
    cache: Path,
    views: Sequence[BaseDegradation] = (SCALED,),
    seed: int = 0,
) -> tuple[BoxFeatures, Site]:
    """Features at the first site of heads, filled."""
    host, images = host_of(model), open_images(folder)
    sites = find_sites(host, model, "boxes")
    boxes = BoxFeatures(host, model, sites, images, views, seed=seed, cache=cache)
    boxes.fill()
    return boxes, sites[0]


def test_heads_are_attached_and_nothing_else_changes(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    plain = copy.deepcopy(detector)
    fitted = fit_detector(detector, discs, tmp_path / "cache", "heads", site="boxes")
    assert set(transfers_of(detector)) == {HEADS[type(detector).__name__]}
    assert (len(fitted.log), fitted.blocks_log) == (20, [])
    assert fitted.log[-1].loss < fitted.log[0].loss
    (pairs,) = fitted.held_out
    assert pairs.after.cosine > pairs.before.cosine - 0.1
    assert_trained_and_saved(detector, plain, discs, tmp_path / "saved")


def test_blocks_first_and_heads_on_what_comes_through_them(
    detector: nn.Module, discs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attach_transfer(detector, site="stage3", hidden_features=12)
    attach_transfer(detector, branch="both", hidden_features=20)
    modules = dict(transfers_of(detector).items())
    fitted = fit_detector(detector, discs, tmp_path, degradation=[SCALED, ScaledDegradation(2)])
    heads = [module for module in modules.values() if isinstance(module, FeatureTransferHead)]
    assert dict(transfers_of(detector).items()) == modules
    assert {head.fc1.out_features for head in heads} == {20}
    assert len(fitted.blocks_log) == 4
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
    site = HEADS[type(detector).__name__]
    with pytest.warns(UserWarning, match="trained behind blocks at backbone_stages_layer3"):
        attach_transfer(detector, saved / site, site=site, branch="both")
    detach_transfer(detector)
    with pytest.raises(ArtifactError, match="head for branch='both', got 'class'"):
        attach_transfer(detector, saved / site, site=site)


def test_the_readme_says_where_a_head_goes(by_hand: Any, discs: Path, tmp_path: Path) -> None:
    model = by_hand("retinanet")
    attach_transfer(model, branch="both")
    fit_detector(model, discs, tmp_path / "cache", "heads")
    saved = save_transfers(model, tmp_path / "saved")
    readme = (saved / "boxes_class" / "README.md").read_text()
    assert 'head=PATH_OR_HUB_ID, site="boxes_class", branch="both")' in readme


def test_features_of_boxes_are_those_that_the_predictor_gets(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    """The store's rows again, through the whole detector, at what it says of the LR image."""
    images = open_images(discs)
    boxes, site = boxes_of(detector, discs, tmp_path)
    views, labels = boxes.read(site, torch.arange(len(images)), 10_000)
    assert [part.shape for part in views] == [views[0].shape] * 2
    assert len(labels) == len(views[0]) <= PER_IMAGE * len(images)
    assert not torch.equal(views[0], views[1])
    seen: list[Tensor] = []
    layer = detector.get_submodule(site.modules[0])
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for view, rows in ((images.read(0), views[0]), (SCALED.lr(images.read(0)), views[1])):
        seen.clear()
        with torch.no_grad():
            detector([view / 255])
        given = torch.cat([part if part.ndim == 2 else part[0].flatten(1).T for part in seen])
        nearest = torch.cdist(rows[:8], given).min(1).values / rows[:8].norm(dim=1)
        assert float(nearest.max()) < (2e-3 if rows is views[0] else 1.0)
    handle.remove()


def test_rare_labels_get_their_share_of_half_the_rows(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    everything = torch.arange(len(open_images(discs)))
    boxes, site = boxes_of(detector, discs, tmp_path)
    _, labels = boxes.read(site, everything, 10_000)
    counts = labels.bincount(minlength=4)
    most = min(len(labels) // 2, int(2 * counts[counts > 0].min()))
    _, few = boxes.read(site, everything, most)
    assert len(few) == most
    kept = few.bincount(minlength=4)
    rarest = int(torch.where(counts > 0, counts, 10_000).argmin())
    share = most // 2 // int((counts > 0).sum())
    assert int(kept[rarest]) >= min(int(counts[rarest]), share)
    stored = boxes.stores[site.name].open_rows().take(everything).unflatten(1, (PER_IMAGE, -1))
    assert int((stored[..., 0] != NOTHING).sum()) == len(labels)


def test_boxes_of_an_image_are_the_same_whatever_its_lr_views_are(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    """And others with another seed, where there are more than are drawn."""
    everything = torch.arange(len(open_images(discs)))
    first, site = boxes_of(detector, discs, tmp_path)
    other, _ = boxes_of(detector, discs, tmp_path, [ScaledDegradation(1)])
    (hr, lr), labels = first.read(site, everything, 10_000)
    (hr_again, as_hr), labels_again = other.read(site, everything, 10_000)
    assert torch.equal(labels, labels_again)
    assert torch.equal(hr, hr_again)
    torch.testing.assert_close(as_hr, hr)
    assert not torch.allclose(lr, hr)
    if len(labels) == PER_IMAGE * len(everything):
        drawn_anew, _ = boxes_of(detector, discs, tmp_path, seed=99)
        assert not torch.equal(drawn_anew.read(site, everything, 10_000)[0][0], hr)
    else:
        assert type(detector).__name__ == "FasterRCNN"


def test_heads_are_trained_on_what_standing_blocks_give(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    """Step by step as at once, and the blocks stay as they were."""
    at_once = copy.deepcopy(detector)
    attach_transfer(at_once, site="fpn", hidden_features=8)
    attach_transfer(at_once, hidden_features=20)
    fit_detector(at_once, discs, tmp_path / "one")
    attach_transfer(detector, site="fpn", hidden_features=8)
    fit_detector(detector, discs, tmp_path / "two", "blocks")
    blocks = copy.deepcopy(transfers_of(detector).state_dict())
    attach_transfer(detector, hidden_features=20)
    fitted = fit_detector(detector, discs, tmp_path / "two", "heads", site="boxes")
    assert (len(fitted.log), fitted.blocks_log) == (20, [])
    state = transfers_of(detector).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in blocks.items())
    for name, value in transfers_of(at_once).state_dict().items():
        assert torch.equal(value, state[name]), name
    card: Any = transfers_of(detector)[HEADS[type(detector).__name__]].card
    assert card.details["after"] == ["fpn0", "fpn1", "fpn2"]


def test_labels_of_a_level_are_the_same_without_the_other_levels() -> None:
    torch.manual_seed(0)
    few = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 20}
    model: Any = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, **few).eval()
    host = host_of(model)
    sites = find_sites(host, model, "boxes", "both")
    image = torch.randint(256, (3, 200, 220), dtype=torch.uint8)
    views = [image, SCALED.lr(image)]
    together = host.sampler(model, sites, PER_IMAGE)(views, chance_of(0, 0))
    for site in (sites[1], sites[-2]):
        alone = host.sampler(model, [site], PER_IMAGE)(views, chance_of(0, 0))[site.name]
        assert torch.equal(alone.labels, together[site.name].labels)
        for mine, wanted in zip(alone.views, together[site.name].views, strict=True):
            assert torch.equal(mine, wanted)


def test_heads_of_the_regression_branch_and_of_named_modules(
    by_hand: Any, discs: Path, tmp_path: Path
) -> None:
    model = by_hand("retinanet")
    attach_transfer(model, site="boxes_regression", branch="both")
    assert len(fit_detector(model, discs, tmp_path, "heads").log) == 20
    detach_transfer(model)
    attach_transfer(model, site="head.classification_head.conv", output="features")
    assert len(fit_detector(model, discs, tmp_path, "heads").log) == 20
    detach_transfer(model)
    attach_transfer(model, site="backbone.neck.layer_blocks.0", output="features")
    with pytest.raises(AttachError, match="'backbone_neck_layer_blocks_0' has no vector for each"):
        fit_detector(model, discs, tmp_path, "heads")
    rcnn = by_hand("faster r-cnn")
    attach_transfer(rcnn, site="backbone.neck.layer_blocks.0", output="features")
    with pytest.raises(AttachError, match="has no vector for each box"):
        fit_detector(rcnn, discs, tmp_path, "heads")


def test_half_precision_detectors_are_trained_in_full(
    detector: nn.Module, discs: Path, tmp_path: Path
) -> None:
    assert_half_precision_is_trained_in_full(detector, discs, tmp_path, "heads", "boxes")


def test_images_of_other_kinds_and_broken_ones(
    detector: nn.Module, discs: Path, tmp_path: Path, odd_images: Path
) -> None:
    """Grey and 16-bit images count as others; one that is no image is skipped, or an error."""
    options: dict[str, Any] = {"trains": "heads", "site": "boxes"}
    with pytest.raises(ImageError, match="broken"):
        fit_detector(detector, odd_images, tmp_path / "cache", **options)
    assert not is_attached(detector)
    skipping = {**options, "on_error": "skip"}
    fitted = fit_detector(detector, odd_images, tmp_path / "cache", **skipping)
    assert list(fitted.skipped) == ["broken.png"]
    assert fitted.images == 6
    detach_transfer(detector)
    with pytest.raises(ImageError, match="broken"):
        fit_detector(detector, odd_images, tmp_path / "cache", **options)
    broken = [odd_images / "broken.png"]
    with pytest.raises(ValueError, match=r"images: none of 1 could be read: .*broken\.png"):
        fit_detector(detector, broken, tmp_path / "cache", **skipping)
    assert not is_attached(detector)


def test_images_without_boxes_and_more_clusters_than_boxes(
    by_hand: Any, discs: Path, tmp_path: Path
) -> None:
    model = by_hand("faster r-cnn")
    options: dict[str, Any] = {"trains": "heads", "site": "boxes"}
    with pytest.raises(ValueError, match=r"clusters: got 9999, wanted at most the \d+ boxes"):
        fit_detector(model, discs, tmp_path, clusters=9999, **options)
    assert not is_attached(model)
    model.rpn.score_thresh = 2.0
    message = "images: the detector finds no box at 'boxes' in any of"
    with pytest.raises(ValueError, match=message):
        fit_detector(model, discs, tmp_path, **options)
    assert not is_attached(model)


def test_an_image_that_fails_once_is_left_out_of_all_views(
    by_hand: Any, discs: Path, tmp_path: Path
) -> None:
    model, images = by_hand("faster r-cnn"), open_images(discs)
    rest = open_images([path for path in sorted(discs.iterdir()) if path.name != "01.png"])
    options: dict[str, Any] = {"trains": "heads", "site": "boxes", "on_error": "skip"}
    fitted = fit_detector(model, failing(images, {1: 1}), tmp_path / "one", **options)
    assert set(fitted.skipped) == {"01.png"}
    detach_transfer(model)
    wanted = fit_detector(model, rest, tmp_path / "two", **options)
    assert fitted.held_out == wanted.held_out
    assert fitted.images == wanted.images == 11


def test_an_image_that_fails_as_its_boxes_are_taken_is_skipped_or_an_error(
    by_hand: Any, discs: Path, tmp_path: Path
) -> None:
    """The second reading of an image: the first one tells whether it can be read."""
    model, images = by_hand("faster r-cnn"), open_images(discs)
    options: dict[str, Any] = {"trains": "heads", "site": "boxes"}
    with pytest.raises(ImageError, match="could not be read this once"):
        fit_detector(model, failing(images, {1: 1}), tmp_path / "one", **options)
    assert not is_attached(model)
    twice = failing(images, {1: 2})
    fitted = fit_detector(model, twice, tmp_path / "two", on_error="skip", **options)
    assert set(fitted.skipped) == {"01.png"}
    assert fitted.images == 11


def test_features_of_boxes_that_are_others_now_are_told_and_computed_anew(
    detector: nn.Module, discs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an edited `forward` gives them: no key knows of it."""
    everything = torch.arange(len(open_images(discs)))

    def hr_features(cache: Path) -> Tensor:
        boxes, site = boxes_of(detector, discs, cache)
        return boxes.read(site, everything, 10_000)[0][0]

    before = hr_features(tmp_path)
    assert torch.equal(hr_features(tmp_path), before)
    assert "computed anew" not in capsys.readouterr().err
    module = detector.get_submodule("backbone.neck.layer_blocks.0")
    module.register_forward_hook(lambda _, __, output: 2 * output)
    after = hr_features(tmp_path)
    assert "computed anew" in capsys.readouterr().err
    assert not torch.equal(after, before)
    assert torch.equal(after, hr_features(tmp_path / "new"))
