from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from featxfer import (
    ArtifactError,
    Degradation,
    FeatureTransferBlock,
    FeatureTransferHead,
    ImageError,
    Preprocessing,
    PseudoLabelTrainer,
    Recipe,
)
from featxfer.views.images import cropped, flipped, open_images
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
from featxfer_integrations._fitting import libraries
from featxfer_integrations.attach import find_place
from featxfer_integrations.deep import (
    _Views,
    block_width,
    enough_crops,
    extract_maps,
    maps_backbone,
    new_blocks,
    plan_blocks,
    train_blocks,
)
from tests.integrations.conftest import failing

LR = Degradation(hr_size=32, lr_size=8)
QUICK = Recipe(epochs=20, learning_rate=1e-3, optimizer="adamw", schedule="one-cycle")
BLOCKS = dataclasses.replace(QUICK, epochs=6, batch_size=16, learning_rate=2e-3)


def fit(model: nn.Module, images: Any, cache: Path, **options: Any) -> TransferFit:
    """Blocks, and then the head, if one is attached."""
    with_head = is_attached(model) and "pooled" in transfers_of(model)
    arguments = {
        "degradation": LR,
        "recipe": QUICK if with_head else None,
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
    import featxfer.training.trainer as trainer

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


def test_work_goes_on_where_attaching_was_interrupted(
    model: nn.Module, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the blocks is there until all that was trained is attached."""
    attach_transfer(model)
    other = copy.deepcopy(model)
    training = tmp_path / "training"
    for function in ("reports", "put"):

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(f"featxfer_integrations.fit.{function}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                fit(model, drawings, tmp_path)
        assert len(list(training.iterdir())) == 1
    steps: list[int] = []
    epoch = PseudoLabelTrainer._epoch

    def counted(self: Any, progress: Any, *args: Any) -> None:
        steps.append(self.recipe.epochs)
        epoch(self, progress, *args)

    monkeypatch.setattr(PseudoLabelTrainer, "_epoch", counted)
    fit(model, drawings, tmp_path)
    assert steps == [20] * 20
    assert not list(training.iterdir())
    fit(other, drawings, tmp_path / "other")
    for mine, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, wanted)


class Stages(nn.Module):
    """Two places whose maps have one shape, and two features of one width."""

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
        given = {"at": "one", "where": "pool", "clusters": 4, "crops": 0, **options}
        with pytest.raises(KeyboardInterrupt):
            fit(model, files, tmp_path / "cache", **given)

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
    begin(at="two")
    begin(at=["one", "two"])
    begin(where="fc")
    begin(crops=1)
    begin(seed=1)
    begin(clusters=5)
    begin(objective="labels")
    begin(precision="bf16")
    begin(block_recipe=dataclasses.replace(BLOCKS, patience=3))
    begin(block_recipe=dataclasses.replace(BLOCKS, momentum=0.8))
    begin(preprocessing=Preprocessing((0.0, 0.0, 0.0)))
    os.utime(files[0])
    begin()
    attach_transfer(model, FeatureTransferBlock(8, 8, kernel_size=3), at="one")
    begin()
    detach_transfer(model)
    monkeypatch.setattr("featxfer_integrations.fit.libraries", lambda _: "another version")
    begin()
    assert len(set(seen)) == len(seen) == 15


def test_a_key_names_the_libraries_of_all_modules(model: nn.Module) -> None:
    around = nn.Sequential(model, torchvision.ops.Permute([0, 1]))
    versions = f"timm {timm.__version__}, torchvision {torchvision.__version__.partition('+')[0]}"
    assert libraries(model) == backbone_of(model).host == f"timm {timm.__version__}"
    assert libraries(around).startswith(versions)
    attach_transfer(model)
    assert libraries(model) == f"timm {timm.__version__}"
    assert libraries(nn.Sequential(nn.ReLU())).startswith("torch 2.")


def test_an_image_that_fails_once_is_left_out_of_all_maps(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    """Image 1 fails as it is, 2 mirrored, 3 in its crop: rows are still of the same images."""
    images = open_images(sorted(drawings.iterdir())[:12])
    place = find_place(model, at="layer1")
    backbone = maps_backbone(backbone_of(model), model, place)
    views, shape = [LR, Degradation(hr_size=32, lr_size=4)], (32, 8, 8)
    options: dict[str, Any] = {"crops": 1, "on_error": "skip"}
    whole = extract_maps(backbone, images, views, tmp_path / "whole", shape, **options)
    failures = failing(images, {1: 1, 2: 2, 3: 3})
    maps = extract_maps(backbone, failures, views, tmp_path / "failing", shape, **options)
    assert set(maps.skipped) == {images.ids[index] for index in (1, 2, 3)}
    kept = torch.tensor([0, *range(4, 12)])
    for view, other in zip(maps.views, whole.views, strict=True):
        for rows, wanted in zip(view, other, strict=True):
            assert rows.ids == tuple(images.ids[index] for index in kept.tolist())
            taken = maps.take(rows, torch.arange(9)), whole.take(wanted, kept)
            torch.testing.assert_close(*taken, rtol=1e-4, atol=1e-4)
    again = extract_maps(backbone, failures, views, tmp_path / "failing", shape, **options)
    assert again.skipped == {}
    assert len(again.hr[0]) == 12


def test_blocks_are_trained_on_the_images_that_all_views_have(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    files = sorted(drawings.iterdir())
    images, rest = open_images(files), open_images([files[0], *files[3:]])
    options = {"on_error": "skip", "held_out": 0.5}
    fitted = fit(model, failing(images, {1: 1, 2: 2}), tmp_path, **options)
    assert set(fitted.skipped) == {str(files[1]), str(files[2])}
    detach_transfer(model)
    wanted = fit(model, rest, tmp_path / "rest", **options)
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
    assert list(fit(model, files, tmp_path, on_error="skip").skipped) == [str(broken)]
    detach_transfer(model)
    with pytest.raises(ImageError, match=r"broken\.png"):
        fit(model, files, tmp_path)
    with pytest.raises(ValueError, match=r"images: none of 1 could be read: .*broken\.png"):
        fit(model, [broken], tmp_path, on_error="skip")
    assert not is_attached(model)


def test_half_precision_hosts_get_blocks_that_are_trained_in_full(
    model: nn.Module, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, dict[str, torch.Tensor]] = {}

    def kept(*args: Any, **options: Any) -> Any:
        found = train_blocks(*args, **options)
        for name, block in found.blocks.items():
            trained[name] = copy.deepcopy(block.state_dict())
        return found

    monkeypatch.setattr("featxfer_integrations.fit.train_blocks", kept)
    (pairs,) = fit(model.to(torch.bfloat16), drawings, tmp_path).held_out
    assert pairs.after.cosine > pairs.before.cosine
    state = transfers_of(model)["layer1"].state_dict()
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    for name, value in trained["layer1"].items():
        assert value.dtype == torch.float32
        assert torch.equal(state[name], value.to(state[name].dtype))
    fine = trained["layer1"]["units.0.expand.weight"]
    assert not torch.equal(fine, fine.bfloat16().float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": QUICK}, "recipe: got a Recipe, .* no head is attached"),
        ({"warm_start": True}, "warm_start: got True, .* no head is attached"),
        ({"minutes": 1e-9, "at": "layer1"}, "at: got 'layer1', .* over minutes=1e-09; say depth"),
        ({"minutes": 1e-9, "crops": 0}, "crops: got 0, .* since blocks would train for about"),
        ({"minutes": 1e-9, "block_recipe": BLOCKS}, "block_recipe: got a Recipe, .* since blocks"),
    ],
    ids=str,
)
def test_auto_trains_nothing_where_what_it_decides_leaves_an_argument_without_effect(
    drawings: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    view = Degradation(hr_size=64, lr_size=16)
    plain = {"at": None, "crops": None, "block_recipe": None, "depth": "auto", "degradation": view}
    with pytest.raises(ValueError, match=message):
        fit(model, drawings, tmp_path / "cache", **{**plain, **options})
    assert not is_attached(model)
    assert not (tmp_path / "cache").exists()


def test_rows_are_in_the_same_order_whatever_the_default_device_is(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    place = find_place(model, at="layer1")
    backbone = maps_backbone(backbone_of(model), model, place)
    images = open_images(sorted(drawings.iterdir())[:8])
    maps = extract_maps(backbone, images, [LR], tmp_path, (32, 8, 8))
    rows = _Views(maps, [torch.zeros(8, 1)] * 2, torch.arange(8), 0.5, vary=True)
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            found.append(rows.order(torch.Generator().manual_seed(0)))
    assert torch.equal(*found)


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
    plain = {"at": None, "crops": None, "block_recipe": None}
    with pytest.raises(AttachError, match=message):
        fit(model, drawings, tmp_path, depth="pooled", **plain)
    with pytest.raises(AttachError, match=message):
        fit(model, drawings, tmp_path, at="layer2")
    with pytest.raises(AttachError, match=message):
        fit(model, drawings, tmp_path, depth="auto", minutes=1e-9, **plain)
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
    options: dict[str, Any] = {"at": None, "degradation": view, "depth": "auto"}
    other = copy.deepcopy(model)
    assert fit(other, drawings, tmp_path, block_recipe=short, **options).depth == "deep"
    assert set(transfers_of(other)) == {"layer3", "layer4"}
    assert "seconds, after their maps are taken: " in capsys.readouterr().err
    options |= {"minutes": 1e-9, "crops": None, "block_recipe": None, "recipe": QUICK}
    fitted = fit(model, drawings, tmp_path, **options)
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
    options: dict[str, Any] = {"at": None, "degradation": Degradation(hr_size=64, lr_size=16)}
    with pytest.raises(AttachError, match="does not come from the maps alone"):
        fit(model, drawings, tmp_path, depth="deep", **options)
    assert not is_attached(model)
    options |= {"crops": None, "block_recipe": None, "depth": "auto"}
    assert fit(model, drawings, tmp_path, **options).depth == "pooled"
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
        ({"minutes": 0, "depth": "auto"}, ValueError, "minutes: got 0, wanted > 0"),
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


@pytest.mark.filterwarnings("ignore:.* not help")
@pytest.mark.parametrize("depth", ["pooled", "deep"])
def test_torchs_default_device_does_not_matter(
    model: nn.Module, drawings: Path, tmp_path: Path, depth: str
) -> None:
    """The device without memory stands for a GPU: what is made there by mistake cannot be used."""
    other = copy.deepcopy(model)
    pooled = {"at": None, "block_recipe": None, "crops": None, "recipe": QUICK}
    for host, device in ((model, "cpu"), (other, "meta")):
        with torch.device(device):
            options = {"depth": depth, **(pooled if depth == "pooled" else {})}
            fit(host, drawings, tmp_path / device, **options)
    trained = transfers_of(other).state_dict()
    for name, value in transfers_of(model).state_dict().items():
        assert torch.equal(value, trained[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": ["layer2", "layer1"]}, "at: got layer2, layer1, wanted the first place first: lay"),
        ({"at": ["layer1", "layer1"]}, "at: got layer1, layer1, wanted each place once"),
        ({"degradation": [LR, LR]}, "degradation: got .* twice, wanted it once"),
    ],
)
def test_places_out_of_order_and_what_is_named_twice(
    model: nn.Module, drawings: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(model, drawings, tmp_path, **options)
    assert not is_attached(model)


@pytest.mark.parametrize("depth", ["pooled", "deep", "deep, with a head"])
def test_nothing_may_be_held_out(
    model: nn.Module, drawings: Path, tmp_path: Path, depth: str
) -> None:
    options: dict[str, Any] = {"held_out": 0.0, "degradation": [LR, Degradation(32, 16)]}
    if depth == "pooled":
        options |= {"depth": depth, "at": None, "block_recipe": None, "crops": None}
        options["recipe"] = QUICK
    if "head" in depth:
        attach_transfer(model)
    found = fit(model, drawings, tmp_path, **options)
    assert (found.held_out, found.images) == ([], 60)


class OfOneSize(nn.Module):
    """Of no known host, and of no other size than it says."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8 * 8 * 8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.fc(self.conv(images).flatten(1))
        return features


def test_blocks_are_as_wide_as_the_arithmetic_of_the_models_own_images_allows() -> None:
    model = OfOneSize().eval()
    pooled = find_place(model, where="fc")
    (plan,) = plan_blocks(model, pooled, "deep", "fc", "conv")
    assert (plan.channels, plan.side) == (8, 8)
    assert block_width(model, [plan]) == 16, "the narrowest: the model has hardly any arithmetic"
