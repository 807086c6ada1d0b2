from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from featxfer import (
    ArtifactError,
    Degradation,
    FeatureTransferBlock,
    FeatureTransferHead,
    ImageError,
    Recipe,
    open_images,
)
from featxfer_integrations import (
    AttachError,
    FitOptions,
    attach_transfer,
    backbone_of,
    detach_transfer,
    host_of,
    load_transfers,
    save_transfers,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations.hosts.base import find_sites
from featxfer_integrations.mechanism.attach import is_attached
from featxfer_integrations.mechanism.fingerprint import backbone_at
from featxfer_integrations.plan import plan
from featxfer_integrations.stages.blocks import ViewPairs
from featxfer_integrations.stages.maps import Maps, MapsStage, extract_maps
from tests.integrations.conftest import failing
from tests.integrations.fitting import LR, assert_holds, fit_blocks, state_of


@pytest.mark.parametrize("with_head", [False, True])
def test_blocks_are_attached_and_help(
    model: nn.Module,
    drawings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    with_head: bool,
) -> None:
    before = state_of(model)
    images = torch.randn(2, 3, 32, 32)
    plain = model(images)
    if with_head:
        attach_transfer(model)
    fitted = fit_blocks(model, drawings, tmp_path)
    assert "seconds, after their maps are taken: " in capsys.readouterr().err
    assert set(transfers_of(model)) == ({"layer1", "head"} if with_head else {"layer1"})
    assert len(fitted.log) == (20 if with_head else 0)
    assert len(fitted.blocks_log) == 6
    assert fitted.blocks_log[-1].loss < fitted.blocks_log[0].loss
    assert all(entry.held_out_loss is not None for entry in fitted.blocks_log)
    (pairs,) = fitted.held_out
    assert pairs.pairs == 15
    assert pairs.after.cosine > pairs.before.cosine
    assert not torch.equal(model(images), plain)
    with transfer_disabled(model):
        assert torch.equal(model(images), plain)
    assert_holds(detach_transfer(model), before)


@pytest.mark.parametrize("with_head", [False, True])
def test_the_model_gives_the_features_that_were_reported(
    model: nn.Module, drawings: Path, tmp_path: Path, with_head: bool
) -> None:
    """The held-out cosine again, from pixels through the attached model."""
    if with_head:
        attach_transfer(model)
    (pairs,) = fit_blocks(model, drawings, tmp_path).held_out
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    opened = open_images(drawings)
    chosen = [opened.read(index) for index in order[45:].sort().values.tolist()]
    preprocessing, attached = backbone_of(model).preprocessing, cast("Any", model)

    def features(view: Any) -> torch.Tensor:
        images = preprocessing(torch.stack([view(image) for image in chosen]))
        result: torch.Tensor = attached.forward_head(
            attached.forward_features(images), pre_logits=True
        )
        return result

    with torch.no_grad():
        after = features(LR.lr)
        with transfer_disabled(model):
            hr = features(LR.hr)
    cosine = float(torch.cosine_similarity(after, hr).mean())
    assert cosine == pytest.approx(pairs.after.cosine, abs=1e-4)


def test_cards_say_where_blocks_go_and_fit_again(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    other = copy.deepcopy(model)
    attach_transfer(model)
    fit_blocks(model, drawings, tmp_path)
    attached: dict[str, Any] = dict(transfers_of(model).items())
    block, head = attached["layer1"], attached["head"]
    assert block.card.details["site"] == "layer1"
    assert head.card.details["after"] == ["layer1"]
    for name, module in (("block", block), ("head", head)):
        module.save_pretrained(tmp_path / name)
    readme = (tmp_path / "block" / "README.md").read_text()
    assert 'attach_transfer(model, head=PATH_OR_HUB_ID, site="layer1")' in readme
    third = copy.deepcopy(other)
    attach_transfer(other, head=tmp_path / "block", site="layer1")
    attach_transfer(other, head=tmp_path / "head")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other(images), model(images), rtol=1e-4, atol=1e-4)
    saved = save_transfers(model, tmp_path / "all")
    assert load_transfers(third, saved, degradation=LR) is third
    assert torch.equal(third(images), other(images))
    with pytest.raises(AttachError, match="something is attached already"):
        load_transfers(third, saved)
    detach_transfer(third)
    attach_transfer(third, head=tmp_path / "block", site="layer1")
    with pytest.raises(FileExistsError, match=r"an earlier save had attached at head; wanted a"):
        save_transfers(third, saved)
    detach_transfer(third)
    with pytest.raises(FileNotFoundError, match="nothing that save_transfers wrote"):
        load_transfers(third, tmp_path / "block")
    with torch.no_grad():
        next(third.parameters()).add_(1)
    with pytest.raises(ArtifactError, match="wanted weights"):
        load_transfers(third, saved)
    assert not is_attached(third)


def maps_of(
    model: nn.Module, images: Any, views: list[Degradation], cache: Path, **options: Any
) -> Maps:
    """Behind layer1."""
    host = host_of(model)
    (site,) = find_sites(host, model, "layer1")
    backbone = backbone_at(host, model, site, host.preprocessing(model), flat=True)
    return extract_maps(backbone, images, views, cache, (32, 8, 8), **options)


def pairs_of(
    model: nn.Module,
    images: Any,
    views: list[Degradation],
    maps: Maps,
    targets: list[torch.Tensor],
    chosen: torch.Tensor,
) -> ViewPairs:
    """Towards vectors alone."""
    (stage,) = plan(model, images, views, "layer1", None, FitOptions(crops=0), None, 0)
    assert isinstance(stage, MapsStage)
    stage.maps, stage.targets, stage.shows_maps = maps, {"head": torch.stack(targets)}, False
    stage.total = len(maps.hr[0])
    return ViewPairs(stage, chosen, vary=True)


def test_an_image_that_fails_once_is_left_out_of_all_maps(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    """Image 1 fails as it is, 2 mirrored, 3 in its crop: rows are still of the same images."""
    images = open_images(sorted(drawings.iterdir())[:12])
    views = [LR, Degradation(hr_size=32, lr_size=4)]
    options: dict[str, Any] = {"crops": 1, "on_error": "skip"}
    whole = maps_of(model, images, views, tmp_path / "whole", **options)
    failures = failing(images, {1: 1, 2: 2, 3: 3})
    maps = maps_of(model, failures, views, tmp_path / "failing", **options)
    assert set(maps.skipped) == {images.ids[index] for index in (1, 2, 3)}
    kept = torch.tensor([0, *range(4, 12)])
    for view, other in zip(maps.views, whole.views, strict=True):
        for rows, wanted in zip(view, other, strict=True):
            assert rows.ids == tuple(images.ids[index] for index in kept.tolist())
            taken = maps.take(rows, torch.arange(9)), whole.take(wanted, kept)
            torch.testing.assert_close(*taken, rtol=1e-4, atol=1e-4)
    again = maps_of(model, failures, views, tmp_path / "failing", **options)
    assert again.skipped == {}
    assert len(again.hr[0]) == 12


def test_blocks_are_trained_on_the_images_that_all_views_have(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    files = sorted(drawings.iterdir())
    images, rest = open_images(files), open_images([files[0], *files[3:]])
    options = {"on_error": "skip", "held_out": 0.5}
    fitted = fit_blocks(model, failing(images, {1: 1, 2: 2}), tmp_path, **options)
    assert set(fitted.skipped) == {str(files[1]), str(files[2])}
    detach_transfer(model)
    wanted = fit_blocks(model, rest, tmp_path / "rest", **options)
    assert fitted.images == wanted.images == 29
    assert fitted.blocks_log[0].loss == pytest.approx(wanted.blocks_log[0].loss, rel=0.02)
    for mine, other in zip(fitted.held_out, wanted.held_out, strict=True):
        assert mine.before.cosine == pytest.approx(other.before.cosine, abs=1e-5)
        assert mine.before.retrieval == pytest.approx(other.before.retrieval)


def test_maps_that_were_skipped_before_are_an_error_where_none_may_be(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    files = [*sorted(drawings.iterdir()), broken]
    fitted = fit_blocks(model, files, tmp_path, on_error="skip")
    assert list(fitted.skipped) == [str(broken)]
    detach_transfer(model)
    with pytest.raises(ImageError, match=r"broken\.png"):
        fit_blocks(model, files, tmp_path)
    with pytest.raises(ValueError, match=r"images: none of 1 could be read: .*broken\.png"):
        fit_blocks(model, [broken], tmp_path, on_error="skip")
    assert not is_attached(model)


def test_half_precision_hosts_get_blocks_that_are_trained_in_full(
    model: nn.Module, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, dict[str, torch.Tensor]] = {}
    judge = MapsStage.judge

    def kept(self: MapsStage) -> Any:
        for name, block in self.modules.items():
            trained[name] = copy.deepcopy(block.state_dict())
        return judge(self)

    monkeypatch.setattr(MapsStage, "judge", kept)
    (pairs,) = fit_blocks(model.to(torch.bfloat16), drawings, tmp_path).held_out
    assert pairs.after.cosine > pairs.before.cosine
    state = transfers_of(model)["layer1"].state_dict()
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    for name, value in trained["layer1"].items():
        assert value.dtype == torch.float32
        assert torch.equal(state[name], value.to(state[name].dtype))
    fine = trained["layer1"]["units.0.expand.weight"]
    assert not torch.equal(fine, fine.bfloat16().float())


def test_rows_are_in_the_same_order_whatever_the_default_device_is(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    images = open_images(sorted(drawings.iterdir())[:8])
    maps = maps_of(model, images, [LR], tmp_path)
    rows = pairs_of(model, images, [LR], maps, [torch.zeros(8, 1)] * 2, torch.arange(8))
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            found.append(rows.order(torch.Generator().manual_seed(0)))
    assert torch.equal(*found)


def test_several_sites_and_what_is_attached_is_trained_anew(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    block: Any = FeatureTransferBlock(32, 24, units=1, kernel_size=3)
    attach_transfer(model, block, site="layer1")
    attach_transfer(model, hidden_features=48)
    head = transfers_of(model)["head"]
    fitted = fit_blocks(model, drawings, tmp_path, site=["layer1", "layer2", "head"])
    assert transfers_of(model)["layer1"] is block
    assert transfers_of(model)["head"] is head
    assert isinstance(head, FeatureTransferHead)
    assert head.fc1.out_features == 48
    assert set(transfers_of(model)) == {"layer1", "layer2", "head"}
    assert all(bool(parameter.any()) for parameter in block.parameters())
    assert fitted.held_out[0].after.cosine > fitted.held_out[0].before.cosine


def test_a_model_in_training_mode_stays_as_it_is(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    """Batch norm sees nothing of it, and the blocks are those of the model in eval mode."""
    other = copy.deepcopy(model).train()
    before = copy.deepcopy(other.state_dict())
    (pairs,) = fit_blocks(other, drawings, tmp_path).held_out
    assert other.training
    state = other.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert pairs == fit_blocks(model, drawings, tmp_path).held_out[0]


def test_blocks_that_do_not_help_stay_the_identity(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    images = torch.randn(2, 3, 32, 32)
    plain = model(images)
    wild = Recipe(epochs=1, learning_rate=10.0, batch_size=64, optimizer="adamw", steps=())
    with pytest.warns(UserWarning, match="blocks do not help: held-out cosine"):
        (pairs,) = fit_blocks(model, drawings, tmp_path, block_recipe=wild).held_out
    assert pairs.after.cosine == pytest.approx(pairs.before.cosine)
    assert torch.equal(model(images), plain)


def stage_of(model: nn.Module, images: Any, site: str, **options: Any) -> MapsStage:
    (stage,) = plan(model, images, None, site, None, FitOptions(**options), None, 0)
    assert isinstance(stage, MapsStage)
    return stage


def test_crops_make_up_for_few_images(model: nn.Module, drawings: Path) -> None:
    images, found = open_images(drawings), []
    for count in (60, 1212, 2500, 3000, 5000, 100_000):
        many = dataclasses.replace(images, ids=tuple(map(str, range(count))))
        found.append(stage_of(model, many, "layer1").crops)
    assert found == [4, 4, 2, 1, 0, 0]
    assert stage_of(model, images, "layer1", crops=7).crops == 7


def test_views_are_every_image_in_each_lr_view_and_a_share_in_hr(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    views = [LR, Degradation(hr_size=32, lr_size=16)]
    maps = maps_of(model, open_images(drawings), views, tmp_path)
    targets = [torch.arange(60.0)[:, None], -torch.arange(60.0)[:, None]]
    train = torch.arange(10, 50)
    rows = pairs_of(model, drawings, views, maps, targets, train)
    order = rows.order(torch.Generator().manual_seed(0))
    assert len(order) == 40 + 40 + 20
    kinds, images = order // 60, order % 60
    for view, count in ((0, 40), (1, 40), (2, 20)):
        mine = images[kinds // 2 == view]
        assert len(mine) == count == len(mine.unique())
        assert set(mine.tolist()) <= set(train.tolist())
    assert 30 < int((kinds % 2).sum()) < 70
    inputs, wanted = rows.take(order)
    sign = torch.where(kinds % 2 == 0, 1.0, -1.0)
    assert wanted.maps == {}
    assert torch.equal(wanted.vectors["head"][:, 0], images * sign)
    preprocessing, layers = backbone_of(model).preprocessing, cast("Any", model)
    for row in range(0, 100, 7):
        pixels = open_images(drawings).read(int(images[row]))
        pixels = pixels.flip(-1) if kinds[row] % 2 else pixels
        made = [views[0].lr, views[1].lr, LR.hr][kinds[row] // 2](pixels)
        with torch.no_grad():
            stem = layers.maxpool(layers.act1(layers.bn1(layers.conv1(preprocessing(made[None])))))
            expected = layers.layer1(stem)
        torch.testing.assert_close(inputs[row], expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("depth", ["head", "blocks", "blocks and a head"])
def test_nothing_may_be_held_out(
    model: nn.Module, drawings: Path, tmp_path: Path, depth: str
) -> None:
    options: dict[str, Any] = {"held_out": 0.0, "degradation": [LR, Degradation(32, 16)]}
    if depth == "head":
        options |= {"site": "head", "block_recipe": None, "crops": None}
    if "a head" in depth:
        attach_transfer(model)
    found = fit_blocks(model, drawings, tmp_path, **options)
    assert (found.held_out, found.images) == ([], 60)
