"""What attach_transfer refuses, with the model as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from featxfer import (
    ArtifactError,
    FeatureTransferBlock,
    FeatureTransferHead,
)
from featxfer_integrations import (
    AttachError,
    attach_transfer,
    detach_transfer,
    train_transfer_only,
    transfer_disabled,
)
from tests.integrations.models import Tiny, make, randomise, run, untouched


def test_a_site_that_is_taken() -> None:
    model = attach_transfer(make("timm/test_resnet"))
    attach_transfer(model, site="stage1", hidden_features=16)
    randomise(model)
    for site, taken in ((None, "head"), ("layer1", "layer1")):
        with (
            untouched(model),
            pytest.raises(AttachError, match=f"attached at '{taken}' already; detach_transfer"),
        ):
            attach_transfer(model, site=site)


def test_nothing_is_attached() -> None:
    model = make("tiny")
    with untouched(model):
        with pytest.raises(AttachError, match="nothing is attached to this Tiny"):
            detach_transfer(model)
        with pytest.raises(AttachError, match="nothing is attached"), transfer_disabled(model):
            pass
        with pytest.raises(AttachError, match="nothing is attached"):
            train_transfer_only(model)
        assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny", {}, r"site: wanted the name of a module .*in Tiny: stem, .*pool, .*, fc"),
        ("tiny", {"site": "head"}, r"site: wanted the name of a module .*in Tiny: stem, .*, fc"),
        (
            "tiny",
            {"site": "blocks"},
            r"site: Tiny names no stage of maps; candidates in Tiny: stem",
        ),
        ("tiny", {"site": ""}, "no module ''; candidates"),
        ("tiny", {"site": "stage1"}, r"no module 'stage1'; candidates in Tiny: stem"),
        ("tiny", {"site": "layer9"}, "no module 'layer9'; candidates"),
        ("timm/test_resnet", {"site": "x"}, r"no module 'x'.*the last 12 of \d+\): layer4"),
        ("timm/test_resnet", {"site": "stage9"}, r"no stage9; it has stage0 = act1, .*= layer4"),
        ("torchvision/resnet18", {"site": "stage5"}, "no stage5; it has stage0 = relu, .* layer4"),
    ],
)
def test_no_such_site(name: str, options: dict[str, Any], message: str) -> None:
    model = make(name)
    with untouched(model), pytest.raises(AttachError, match=message):
        attach_transfer(model, **options)


def test_what_is_attached_is_no_candidate() -> None:
    model = attach_transfer(make("timm/test_resnet"))
    with pytest.raises(AttachError, match="candidates") as raised:
        attach_transfer(model, site="nope")
    assert "feature_transfer" not in str(raised.value)


@pytest.mark.parametrize("name", ["feature_transfer.head.fc1", "feature_transfer.head"])
def test_what_is_attached_is_no_site(name: str) -> None:
    model = attach_transfer(make("timm/test_resnet"))
    with untouched(model), pytest.raises(AttachError, match="no module 'feature_transfer"):
        attach_transfer(model, site=name)


class Named(nn.Module):
    """A model with a module of the name that is asked for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()))

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.get_submodule(self.name)(images)
        return maps


@pytest.mark.parametrize("name", ["values", "transfer", "update", "enabled", "sites"])
def test_modules_may_have_the_names_of_methods(name: str) -> None:
    model = Named(name)
    maps = run(model)[0]
    attach_transfer(model, site=name)
    assert torch.equal(run(model)[0], maps)
    assert not hasattr(detach_transfer(model), "feature_transfer")


def test_a_custom_models_module_may_be_called_stage1() -> None:
    model = attach_transfer(Named("stage1"), site="stage1", hidden_features=16)
    block = model.get_submodule("feature_transfer.stage1")
    assert isinstance(block, FeatureTransferBlock)


class Shared(nn.Module):
    """One activation for several layers, as much code has it."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), relu)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), relu)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.second(self.first(images))
        return maps


@pytest.mark.parametrize("site", ["first", "second"])
def test_a_stage_that_ends_in_a_shared_module_is_transferred_once(site: str) -> None:
    model = Shared()
    maps = run(model, site)[1]
    block = randomise(attach_transfer(model, site=site, hidden_features=16), site)
    calls: list[int] = []
    block.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(run(model, site)[1], block(maps))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("head", "site", "error", "message"),
    [
        (FeatureTransferHead(95), None, ArtifactError, "head: head for features of width 95, .*96"),
        (FeatureTransferBlock(31), "stage1", ArtifactError, "block for .* width 31, wanted 32"),
        (FeatureTransferBlock(32), None, AttachError, "got a block, wanted a head at 'head'"),
        (
            FeatureTransferBlock(96),
            "global_pool",
            AttachError,
            "got a block, wanted a head at 'glob",
        ),
    ],
)
def test_another_width_or_kind_of_head(
    head: Any, site: str | None, error: type[Exception], message: str
) -> None:
    model = make("timm/test_resnet")
    with untouched(model), pytest.raises(error, match=message):
        attach_transfer(model, head, site=site)


def test_other_types() -> None:
    model = make("tiny")
    heads: tuple[Any, ...] = (nn.Linear(8, 8), 3, FeatureTransferHead)
    for head in heads:
        with untouched(model), pytest.raises(TypeError, match=r"head: got \w+, wanted a Feature"):
            attach_transfer(model, head, site="pool")
    not_a_model: Any = "resnet18"
    with pytest.raises(TypeError, match=r"model: got str, wanted a torch\.nn\.Module"):
        attach_transfer(not_a_model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "pool", "output": "other"}, "output: got 'other'"),
        ({"site": "pool", "hidden_features": 0}, "hidden_features: got 0"),
        ({"site": "stem", "hidden_features": 0}, "hidden_channels: got 0"),
        ({"site": "pool", "in_features": -1}, "in_features: got -1"),
        ({"site": "pool", "head": FeatureTransferHead(8), "output": "features"}, "for a new head"),
        ({"site": "pool", "head": FeatureTransferHead(8), "hidden_features": 4}, "for a new head"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    model = make("tiny")
    with untouched(model), pytest.raises(ValueError, match=message):
        attach_transfer(model, **options)


def test_blocks_have_no_output() -> None:
    model = make("timm/test_resnet")
    with untouched(model), pytest.raises(ValueError, match="output: a block has none, got it wi"):
        attach_transfer(model, site="blocks", output="features")


def test_models_that_do_not_run_on_a_colour_image_need_the_width() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    with pytest.raises(AttachError, match=r"run on an image of 3 x 224 x 224 \(Runtime"):
        attach_transfer(model, site="0")
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    rows, plain = torch.ones(3, 6), model(torch.ones(3, 6))
    attach_transfer(model, site="0", in_features=4)
    assert torch.equal(model(rows), plain)
    randomise(model, "0")
    assert not torch.equal(model(rows), plain)


@pytest.mark.parametrize(
    ("name", "site", "said"),
    [("timm/test_resnet", None, 96), ("timm/test_resnet", "layer2", 48), ("tiny", "pool", 8)],
)
def test_a_width_that_is_not_the_models_is_refused(name: str, site: str | None, said: int) -> None:
    model = make(name)
    with (
        untouched(model),
        pytest.raises(ValueError, match=f"in_features: got 95, the model says {said}"),
    ):
        attach_transfer(model, site=site, in_features=95)


@pytest.mark.parametrize("options", [{"img_size": 56}, {"in_chans": 1}])
def test_blocks_in_models_made_for_other_images(options: dict[str, int]) -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", **options)
    attach_transfer(model, site="stage2", hidden_features=16)
    assert model.feature_transfer["layers_2"].in_features == 384


class Unused(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 8)


class Untensored(nn.Module):
    """A module that returns no tensor."""

    def forward(self, images: Tensor) -> list[int]:
        return list(images.shape)


def test_modules_that_never_run_or_give_no_tensor() -> None:
    model, shapes = Unused().eval(), nn.Sequential(nn.Flatten(), Untensored())
    with untouched(model), pytest.raises(AttachError, match="no tensor passes other when the mod"):
        attach_transfer(model, site="other")
    with pytest.raises(AttachError, match="no tensor passes 1 when the model runs"):
        attach_transfer(shapes, site="1")
    assert len(shapes) == 2


def test_scripted_compiled_and_quantised_models_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Tiny().eval())
        quantised = torch.ao.quantization.quantize_dynamic(Tiny().eval(), {nn.Linear})
    compiled: Any = torch.compile(Tiny(), backend="eager")
    for model, message in (
        (scripted, "got a TorchScript module"),
        (quantised, r"module 'fc' is quantised \(Linear\)"),
        (compiled, "got a compiled module, attach first"),
        (nn.DataParallel(Tiny()), r"got a DataParallel, wanted the model in it, \.module"),
    ):
        names = list(model.state_dict())
        with pytest.raises(AttachError, match=message):
            attach_transfer(model, site="pool")
        assert list(model.state_dict()) == names


def test_models_of_other_kinds_in_timm_are_told() -> None:
    model = timm.create_model("test_resnet", features_only=True)
    with pytest.raises(AttachError, match="timm's FeatureListNet has no classification head"):
        attach_transfer(model)
