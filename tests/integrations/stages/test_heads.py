from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from featxfer import (
    Degradation,
    FeatureTransferHead,
    ImageError,
    Recipe,
    diagnose,
    extract_features,
    load_head,
    open_images,
)
from featxfer.modules.scaling import scale_features
from featxfer_integrations import (
    attach_transfer,
    backbone_of,
    detach_transfer,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations.mechanism.attach import is_attached
from tests.integrations.conftest import failing
from tests.integrations.fitting import LR, assert_untouched, fit_head, state_of


def test_it_leaves_a_trained_head_attached_and_nothing_else_changed(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    before, images = state_of(model), torch.randn(2, 3, 32, 32)
    plain, model.training = model(images), True
    fitted = fit_head(model, drawings, tmp_path)
    assert model.training
    model.eval()
    assert [entry.epoch for entry in fitted.log] == list(range(20))
    assert fitted.log[-1].loss < fitted.log[0].loss
    assert (fitted.images, fitted.skipped, fitted.blocks_log) == (54, {}, [])
    assert not torch.equal(model(images), plain)
    with transfer_disabled(model):
        assert torch.equal(model(images), plain)
    assert_untouched(detach_transfer(model), before)


def test_lr_features_come_nearer_and_hr_features_stay(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    (pairs,) = fit_head(model, drawings, tmp_path, held_out=0.25).held_out
    assert pairs.pairs == 15
    assert pairs.after.cosine > pairs.before.cosine
    assert 0 < pairs.cosine_gap_recovered < 1
    assert pairs.hr_cosine > 0.95


def test_the_card_says_what_it_was_made_of(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    fitted = fit_head(model, drawings, tmp_path, seed=3)
    head = transfers_of(model)["head"]
    assert isinstance(head, FeatureTransferHead)
    head.save_pretrained(tmp_path / "head")
    card = load_head(tmp_path / "head")[1]
    assert card.backbone == "timm/test_resnet"
    assert card.degradations == (LR,)
    assert card.details["site"] == "head"
    assert card.details["images"] == 54
    assert card.details["seed"] == 3
    assert card.details["recipe"]["epochs"] == 20
    assert card.details["diagnostics"][0]["agreement"] == fitted.diagnostics[0].agreement
    assert card.details["held_out"][0]["after"]["cosine"] == fitted.held_out[0].after.cosine


def test_the_head_fits_the_same_weights_with_or_without_a_classifier(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    headless = copy.deepcopy(model)
    headless.reset_classifier(0)  # type: ignore[operator]
    other = timm.create_model("test_resnet", num_classes=7)
    fit_head(model, drawings, tmp_path)
    head: Any = transfers_of(model)["head"]
    head.save_pretrained(tmp_path / "head")
    attach_transfer(headless, head=tmp_path / "head")
    images = torch.randn(2, 3, 32, 32)
    feature = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    assert torch.equal(headless(images), feature)
    state = state_of(other)
    with pytest.raises(ValueError, match="head for backbone timm/test_resnet with weights"):
        attach_transfer(other, head=tmp_path / "head")
    assert_untouched(other, state)


def test_the_cache_serves_a_second_fit_and_one_with_a_head_attached(
    model: nn.Module, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit_head(model, drawings, tmp_path)
    monkeypatch.setattr(
        "featxfer.features.store.FeatureStore.write_part", lambda *_: pytest.fail("computed again")
    )
    second = fit_head(model, drawings, tmp_path)
    assert [entry.loss for entry in second.log] == [entry.loss for entry in first.log]


def test_the_seed_decides_all(model: nn.Module, drawings: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    heads = []
    for seed in (1, 1, 2):
        fit_head(model, drawings, tmp_path, seed=seed)
        heads.append(state_of(transfers_of(model)["head"]))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not torch.equal(heads[0]["fc2.weight"], heads[2]["fc2.weight"])


def test_one_head_for_several_degradations(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    views = (LR, Degradation(hr_size=32, lr_size=4))
    fitted = fit_head(model, drawings, tmp_path, degradation=views)
    assert len(fitted.diagnostics) == len(fitted.held_out) == 2
    head = transfers_of(model)["head"]
    assert isinstance(head, FeatureTransferHead)
    assert head.card is not None
    assert head.card.degradations == views


def test_an_attached_head_is_trained_in_its_sizes(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    head = FeatureTransferHead(96, hidden_features=9)
    attach_transfer(model, head)
    parameters = list(head.parameters())
    fit_head(model, drawings, tmp_path)
    assert transfers_of(model)["head"] is head
    assert head.config["hidden_features"] == 9
    assert [id(p) for p in head.parameters()] == [id(p) for p in parameters]
    assert head.fc2.weight.any()
    assert head.centroids.shape == (5, 96)
    assert head.card is not None


def test_a_clusters_head_learns_the_papers_labels(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    attach_transfer(model, FeatureTransferHead(96, 4, 32, output="clusters"))
    with pytest.raises(ValueError, match="clusters: got 5, the attached head gives 4 logits"):
        fit_head(model, drawings, tmp_path, clusters=5)
    fitted = fit_head(model, drawings, tmp_path, recipe=Recipe(epochs=20))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert fitted.held_out == []
    assert fitted.log[-1].match_rate > fitted.log[0].match_rate


def test_a_clusters_head_that_scales_is_trained_on_scaled_features(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    head = FeatureTransferHead(96, 12, 32, output="clusters", scaling="l2")
    attach_transfer(model, head)
    fitted = fit_head(model, drawings, tmp_path, recipe=Recipe(epochs=3), held_out=0.0)
    assert head.scaling == "l2"
    features = extract_features(backbone_of(model), open_images(drawings), LR, tmp_path / "again")
    hr, lr = scale_features(features.hr, "l2"), scale_features(features.lr, "l2")
    wanted = diagnose(hr, lr, head.centroids)
    assert fitted.diagnostics == [wanted]
    assert min(wanted.hr_sizes) > 0
    assert wanted != diagnose(features.hr, features.lr, head.centroids)


def test_half_precision_hosts_are_followed(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    fit_head(model.to(torch.bfloat16), drawings, tmp_path)
    assert {p.dtype for p in transfers_of(model).parameters()} == {torch.bfloat16}
    assert model(torch.randn(1, 3, 32, 32).bfloat16()).dtype == torch.bfloat16


def test_images_that_cannot_be_read(model: nn.Module, drawings: Path, tmp_path: Path) -> None:
    files = [*sorted(drawings.iterdir()), tmp_path / "broken.png"]
    files[-1].write_bytes(b"no image")
    state = state_of(model)
    with pytest.raises(ImageError, match=r"broken\.png"):
        fit_head(model, files, tmp_path)
    assert_untouched(model, state)
    fitted = fit_head(model, files, tmp_path, on_error="skip")
    assert list(fitted.skipped) == [str(files[-1])]


@pytest.mark.filterwarnings("ignore:the head does not help")
def test_an_image_that_fails_once_is_left_out_of_all_views(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    """Image 1 fails in the first degradation's views, 2 in the second's: rows still pair up."""
    files = sorted(drawings.iterdir())[:24]
    images, rest = open_images(files), open_images([files[0], *files[3:]])
    views = (LR, Degradation(hr_size=32, lr_size=4))
    options = {"degradation": views, "held_out": 0.5, "on_error": "skip"}
    fitted = fit_head(model, failing(images, {1: 1, 2: 2}), tmp_path, **options)
    assert set(fitted.skipped) == {str(files[1]), str(files[2])}
    wanted = fit_head(model, rest, tmp_path / "rest", **options)
    assert (fitted.images, wanted.skipped) == (wanted.images, {})
    for mine, other in zip(fitted.held_out, wanted.held_out, strict=True):
        assert mine.before.cosine == pytest.approx(other.before.cosine, abs=1e-5)
        assert mine.before.retrieval == pytest.approx(other.before.retrieval)


def test_what_was_skipped_before_is_an_error_where_none_may_be(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    """Though the cache, where it was skipped, is finished."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    files = [*sorted(drawings.iterdir()), broken]
    assert list(fit_head(model, files, tmp_path, on_error="skip").skipped) == [str(broken)]
    detach_transfer(model)
    with pytest.raises(ImageError, match=r"broken\.png"):
        fit_head(model, files, tmp_path)
    with pytest.raises(ValueError, match=r"images: none of 1 could be read: .*broken\.png"):
        fit_head(model, [broken], tmp_path, on_error="skip")
    assert not is_attached(model)


def test_a_head_that_does_not_help_is_warned_of(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    idle = Recipe(epochs=1, learning_rate=1e-30)
    with pytest.warns(UserWarning, match="the head does not help: held-out cosine"):
        fit_head(model, drawings, tmp_path, recipe=idle)


@pytest.mark.parametrize("objective", ["prototypes", "regression", "contrast", "labels"])
def test_objectives_by_name(
    model: nn.Module, drawings: Path, tmp_path: Path, objective: str
) -> None:
    (pairs,) = fit_head(model, drawings, tmp_path, held_out=0.25, objective=objective).held_out
    assert pairs.after.cosine > pairs.before.cosine


def test_no_gap_is_told(model: nn.Module, drawings: Path, tmp_path: Path) -> None:
    same = Degradation(hr_size=32, lr_size=32)
    with pytest.warns(UserWarning, match="there is no gap to recover"):
        (pairs,) = fit_head(model, drawings, tmp_path, degradation=same).held_out
    assert pairs.cosine_gap_recovered == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "prototypes"}, "objective: got 'prototypes', .* pseudo-labels"),
        ({"clusters": 3}, "clusters: got 3, the attached head gives 4 logits"),
        ({"crops": 1}, "crops: got 1, .* heads alone are trained"),
    ],
    ids=str,
)
def test_a_clusters_head_takes_no_arguments_of_others(
    model: nn.Module, drawings: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    attach_transfer(model, FeatureTransferHead(96, 4, 32, output="clusters"))
    with pytest.raises(ValueError, match=message):
        fit_head(model, drawings, tmp_path, **options)
    assert not (tmp_path / "cache").exists()
