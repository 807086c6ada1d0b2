from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from featxfer import ArtifactError, Degradation, FeatureTransferBlock, FeatureTransferHead, Recipe
from featxfer.images import cropped, flipped, open_images
from featxfer_integrations import (
    AttachError,
    TransferFit,
    attach_transfer,
    backbone_of,
    detach_transfer,
    fit_transfer,
    load_transfers,
    save_transfers,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations._attach import is_attached
from featxfer_integrations.attach import find_place
from featxfer_integrations.deep import (
    _Views,
    enough_crops,
    extract_maps,
    new_blocks,
    plan_blocks,
)

LR = Degradation(hr_size=32, lr_size=8)
QUICK = Recipe(epochs=20, learning_rate=1e-3, optimizer="adamw", schedule="one-cycle")
BLOCKS = dataclasses.replace(QUICK, epochs=6, batch_size=16, learning_rate=2e-3)


def fit(model: nn.Module, images: Any, cache: Path, **options: Any) -> TransferFit:
    arguments = {
        "degradation": LR,
        "recipe": QUICK,
        "block_recipe": BLOCKS,
        "cache": cache,
        "at": "layer1",
        "depth": "deep",
        "precision": "fp32",
        "held_out": 0.25,
        "crops": 1,
        **options,
    }
    return fit_transfer(model, images, **arguments)


@pytest.mark.parametrize("with_head", [False, True])
def test_blocks_are_attached_and_help(
    model: nn.Module,
    drawings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    with_head: bool,
) -> None:
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    plain = model(images)
    if with_head:
        attach_transfer(model)
    fitted = fit(model, drawings, tmp_path)
    assert fitted.depth == "deep"
    assert "training blocks takes about" in capsys.readouterr().err
    assert set(transfers_of(model)) == ({"layer1", "pooled"} if with_head else {"layer1"})
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
    detach_transfer(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("with_head", [False, True])
def test_the_model_gives_the_features_that_were_reported(
    model: nn.Module, drawings: Path, tmp_path: Path, with_head: bool
) -> None:
    """The held-out cosine again, from pixels through the attached model."""
    if with_head:
        attach_transfer(model)
    (pairs,) = fit(model, drawings, tmp_path).held_out
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
    fit(model, drawings, tmp_path)
    block, head = transfers_of(model)["layer1"], transfers_of(model)["pooled"]
    assert block.card is not None
    assert head.card is not None
    assert block.card.details["at"] == "layer1"
    assert head.card.details["after"] == ["layer1"]
    for name, module in (("block", block), ("head", head)):
        module.save_pretrained(tmp_path / name)
    readme = (tmp_path / "block" / "README.md").read_text()
    assert 'attach_transfer(model, head=PATH_OR_HUB_ID, at="layer1")' in readme
    third = copy.deepcopy(other)
    attach_transfer(other, head=tmp_path / "block", at="layer1")
    attach_transfer(other, head=tmp_path / "head")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other(images), model(images), rtol=1e-4, atol=1e-4)
    saved = save_transfers(model, tmp_path / "all")
    assert load_transfers(third, saved, degradation=LR) is third
    assert torch.equal(third(images), other(images))
    with pytest.raises(AttachError, match="something is attached already"):
        load_transfers(third, saved)
    detach_transfer(third)
    attach_transfer(third, head=tmp_path / "block", at="layer1")
    with pytest.raises(FileExistsError, match=r"an earlier save had attached at pooled; wanted a"):
        save_transfers(third, saved)
    detach_transfer(third)
    with pytest.raises(FileNotFoundError, match="nothing that save_transfers wrote"):
        load_transfers(third, tmp_path / "block")
    with torch.no_grad():
        next(third.parameters()).add_(1)
    with pytest.raises(ArtifactError, match="wanted weights"):
        load_transfers(third, saved)
    assert not is_attached(third)


def test_one_seed_gives_one_result_and_interrupted_training_goes_on(
    model: nn.Module, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [copy.deepcopy(model) for _ in range(2)]
    fit(models[0], drawings, tmp_path / "one")
    import featxfer.trainer as trainer

    epochs = trainer.PseudoLabelTrainer._epoch

    def interrupted(self: Any, progress: Any, *args: Any) -> None:
        if len(progress.log) == 3 and self.recipe.epochs == 6:
            raise KeyboardInterrupt
        epochs(self, progress, *args)

    monkeypatch.setattr(trainer.PseudoLabelTrainer, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(models[1], drawings, tmp_path / "two")
    assert not is_attached(models[1])
    seen: list[int] = []

    def counted(self: Any, progress: Any, *args: Any) -> None:
        if self.recipe.epochs == 6:
            seen.append(len(progress.log))
        epochs(self, progress, *args)

    monkeypatch.setattr(trainer.PseudoLabelTrainer, "_epoch", counted)
    fit(models[1], drawings, tmp_path / "two")
    assert seen == [3, 4, 5]
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)
    assert not list((tmp_path / "two" / "training").glob("*"))


def test_several_places_and_what_is_attached_is_trained_anew(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    block: Any = FeatureTransferBlock(32, 24, units=1, kernel_size=3)
    attach_transfer(model, block, at="layer1")
    attach_transfer(model, hidden_features=48)
    head = transfers_of(model)["pooled"]
    fitted = fit(model, drawings, tmp_path, at=["layer1", "layer2"])
    assert transfers_of(model)["layer1"] is block
    assert transfers_of(model)["pooled"] is head
    assert isinstance(head, FeatureTransferHead)
    assert head.fc1.out_features == 48
    assert set(transfers_of(model)) == {"layer1", "layer2", "pooled"}
    assert all(bool(parameter.any()) for parameter in block.parameters())
    assert fitted.held_out[0].after.cosine > fitted.held_out[0].before.cosine


def test_a_model_in_training_mode_stays_as_it_is(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    """Batch norm sees nothing of it, and the blocks are those of the model in eval mode."""
    other = copy.deepcopy(model).train()
    before = copy.deepcopy(other.state_dict())
    (pairs,) = fit(other, drawings, tmp_path).held_out
    assert other.training
    state = other.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert pairs == fit(model, drawings, tmp_path).held_out[0]


def test_blocks_that_training_would_not_know_of_are_refused(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    fit(model, drawings, tmp_path)
    state = copy.deepcopy(model.state_dict())
    message = "blocks are attached at layer1, and what is trained now would be trained without"
    with pytest.raises(AttachError, match=message):
        fit(model, drawings, tmp_path, at=None, depth="pooled")
    with pytest.raises(AttachError, match=message):
        fit(model, drawings, tmp_path, at="layer2")
    with pytest.raises(AttachError, match=message):
        fit(model, drawings, tmp_path, depth="auto", minutes=1e-9)
    assert set(transfers_of(model)) == {"layer1"}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:the head does not help", "ignore:blocks do not help")
def test_auto_goes_deep_where_there_is_time(
    drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    view = Degradation(hr_size=64, lr_size=16)
    short = dataclasses.replace(BLOCKS, epochs=1)
    options = {"at": None, "degradation": view, "block_recipe": short, "depth": "auto"}
    other = copy.deepcopy(model)
    assert fit(other, drawings, tmp_path, **options).depth == "deep"
    assert set(transfers_of(other)) == {"layer3", "layer4"}
    assert "seconds, after their maps are taken: " in capsys.readouterr().err
    fitted = fit(model, drawings, tmp_path, minutes=1e-9, **options)
    assert fitted.depth == "pooled"
    assert "a head alone: blocks would train for about" in capsys.readouterr().err
    assert set(transfers_of(model)) == {"pooled"}


def test_blocks_that_do_not_help_stay_the_identity(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    images = torch.randn(2, 3, 32, 32)
    plain = model(images)
    wild = Recipe(epochs=1, learning_rate=10.0, batch_size=64, optimizer="adamw", steps=())
    with pytest.warns(UserWarning, match="blocks do not help: held-out cosine"):
        (pairs,) = fit(model, drawings, tmp_path, block_recipe=wild).held_out
    assert pairs.after.cosine == pytest.approx(pairs.before.cosine)
    assert torch.equal(model(images), plain)


def test_auto_trains_a_head_alone_where_maps_do_not_suffice(
    drawings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AttachError("at: the feature does not come from the maps alone")

    monkeypatch.setattr("featxfer_integrations.fit.open_rest", refuse)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    options = {"at": None, "degradation": Degradation(hr_size=64, lr_size=16)}
    with pytest.raises(AttachError, match="does not come from the maps alone"):
        fit(model, drawings, tmp_path, depth="deep", **options)
    assert not is_attached(model)
    assert fit(model, drawings, tmp_path, depth="auto", **options).depth == "pooled"
    assert "a head alone: at: the feature does not come" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("tf_efficientnet_lite0", ["blocks.4", "blocks.6"]),
        ("resnet18", ["layer3", "layer4"]),
        ("mobilenetv3_small_100", ["blocks.3", "blocks.5"]),
    ],
)
def test_new_blocks_take_less_than_a_tenth_of_the_arithmetic(name: str, after: list[str]) -> None:
    model = timm.create_model(name).eval()
    plans = plan_blocks(model, find_place(model), "auto", None, None)
    assert [plan.module for plan in plans] == after
    blocks = new_blocks(model, plans, 0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    whole, added = counter.get_total_flops(), 0
    for plan in plans:
        block = blocks[plan.module]
        maps = torch.zeros(1, plan.channels, plan.side, plan.side)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(maps)
        assert counter.get_total_flops() == 2 * block.macs(plan.side, plan.side)
        added += counter.get_total_flops()
    widths = {block.hidden_channels for block in blocks.values()}
    assert len(widths) == 1
    assert added <= 0.09 * whole or widths == {16}
    assert added > 0.08 * whole or widths == {256}


def test_crops_make_up_for_few_images() -> None:
    assert [enough_crops(n) for n in (60, 1212, 2500, 3000, 5000, 100_000)] == [4, 4, 2, 1, 0, 0]


def test_views_are_every_image_in_each_lr_view_and_a_share_in_hr(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    from featxfer_integrations.deep import MapAt
    from featxfer_integrations.fit import host_backbone

    place = find_place(model, at="layer1")
    backbone = dataclasses.replace(
        host_backbone(model, find_place(model)), module=MapAt(model, place)
    )
    views = [LR, Degradation(hr_size=32, lr_size=16)]
    maps = extract_maps(backbone, open_images(drawings), views, tmp_path, (32, 8, 8))
    targets = [torch.arange(60.0)[:, None], -torch.arange(60.0)[:, None]]
    train = torch.arange(10, 50)
    rows = _Views(maps, targets, train, 0.5, vary=True)
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
    assert torch.equal(wanted[:, 0], images * sign)
    for row in range(0, 100, 7):
        pixels = open_images(drawings).read(int(images[row]))
        pixels = pixels.flip(-1) if kinds[row] % 2 else pixels
        made = [views[0].lr, views[1].lr, LR.hr][kinds[row] // 2](pixels)
        with torch.no_grad():
            expected = backbone.module(backbone.preprocessing(made[None]))
        torch.testing.assert_close(inputs[row].flatten(), expected[0], rtol=1e-3, atol=1e-3)


def test_flipped_images_are_mirrored_and_have_another_fingerprint(drawings: Path) -> None:
    images = open_images(drawings)
    mirrored = flipped(images)
    assert torch.equal(mirrored.read(3), images.read(3).flip(-1))
    assert mirrored.ids == images.ids
    assert mirrored.fingerprint != images.fingerprint


def test_crops_are_parts_of_the_image_the_same_every_time(drawings: Path) -> None:
    images = open_images(drawings)
    whole = images.read(5)
    first, again = cropped(images, 0), cropped(images, 0)
    part = first.read(5)
    assert torch.equal(part, again.read(5))
    assert first.fingerprint == again.fingerprint != cropped(images, 1).fingerprint
    shapes, mirrored = set(), 0
    for draw in range(20):
        part = cropped(images, draw).read(5)
        height, width = part.shape[1:]
        shapes.add((height, width))
        assert 0.35 < height * width / 48**2 <= 1
        places = [
            (top, left, flip)
            for flip in (0, 1)
            for top in range(48 - height + 1)
            for left in range(48 - width + 1)
            if torch.equal(
                whole[:, top : top + height, left : left + width],
                part.flip(-1) if flip else part,
            )
        ]
        assert len(places) == 1
        mirrored += places[0][2]
    assert len(shapes) > 10
    assert 4 <= mirrored <= 16
    with pytest.raises(ValueError, match="least: got 0, wanted a share"):
        cropped(images, 0, least=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"depth": "shallow"}, ValueError, "depth: got 'shallow', wanted one of"),
        ({"depth": "pooled"}, ValueError, "at: got 'layer1' with depth='pooled'"),
        ({"crops": -1}, ValueError, "crops: got -1"),
        ({"minutes": 0}, ValueError, "minutes: got 0, wanted > 0"),
        ({"precision": "fp16"}, ValueError, "precision: got 'fp16'"),
        ({"at": "nowhere"}, AttachError, "no module 'nowhere'"),
        ({"at": "fc"}, AttachError, r"at: fc gives \(1, 7\), wanted maps"),
        ({"held_out": 1.0}, ValueError, "held_out: got 1.0"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(
    model: nn.Module,
    drawings: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        fit(model, drawings, tmp_path, **options)
    assert not is_attached(model)


def test_heads_of_clusters_and_models_without_maps_stay_pooled(
    drawings: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    view = Degradation(hr_size=160, lr_size=32)
    with pytest.raises(AttachError, match=r"at: .*wanted maps|names no stage"):
        fit(model, drawings, tmp_path, at=None, degradation=view)
    assert not is_attached(model)
