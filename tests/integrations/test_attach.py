from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from featxfer import (
    ArtifactError,
    Card,
    Degradation,
    FeatureTransferBlock,
    FeatureTransferHead,
    load_head,
)
from featxfer.features.backbone import weights_sha256
from featxfer_integrations import (
    AttachError,
    attach_transfer,
    backbone_of,
    detach_transfer,
    train_transfer_only,
    transfer_disabled,
)

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """A model that says nothing of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.pool(self.stem(images)))
        return logits


def make(name: str) -> Any:
    """A model by name, in eval mode, with weights that are the same each time."""
    torch.manual_seed(0)
    if name == "tiny":
        return Tiny().eval()
    library, _, name = name.partition("/")
    if library == "timm":
        return timm.create_model(name).eval()
    return torchvision.models.get_model(name, weights=None).eval()


def randomise(module: nn.Module, name: str = "pooled") -> Any:
    """What is attached to a model, with weights as if it had been trained."""
    attached: Any = module.get_submodule(f"feature_transfer.{name}")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in attached.parameters():
            value.normal_(std=0.1, generator=generator)
    return attached


@torch.no_grad()
def run(model: nn.Module, *watched: str, images: Tensor = IMAGES) -> tuple[Tensor, ...]:
    """A model's output, and the output of some of its modules as others see it."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, __, output: seen.update({name: output.clone()})  # ReLUs work in place

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in watched]
    output = model(images)
    for handle in handles:
        handle.remove()
    return (output, *(seen[name] for name in watched))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """What is inside leaves the model as it was: state dict, attributes, hooks, outputs."""
    state, output = copy.deepcopy(model.state_dict()), run(model)[0]
    attributes, hooked = sorted(vars(model)), hooks(model)
    children = [name for name, _ in model.named_modules()]
    yield
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(run(model)[0], output)
    assert [name for name, _ in model.named_modules()] == children
    assert (sorted(vars(model)), hooks(model)) == (attributes, hooked)


# Where


@pytest.mark.parametrize("where", ["pool", "pool.1"])
def test_where_names_the_module_whose_output_is_transferred(where: str) -> None:
    model = make("tiny")
    logits, feature = run(model, "pool")
    attach_transfer(model, where=where)
    assert torch.equal(run(model)[0], logits)
    head = randomise(model, where.replace(".", "_"))
    changed, transferred = run(model, "pool")
    assert torch.equal(transferred, head(feature))
    assert torch.equal(changed, model.fc(head(feature)))


def test_where_may_name_maps_and_logits() -> None:
    for where, width in (("layer3", 256), ("fc", 1000), ("layer1.0.conv1", 64)):
        model = make("torchvision/resnet18")
        plain = run(model, where)[1]
        attach_transfer(model, where=where)
        head = randomise(model, where.replace(".", "_"))
        assert head.in_features == width
        assert torch.equal(run(model, where)[1], head(plain))


def test_a_sequential_host_runs_as_before() -> None:
    model = nn.Sequential(*make("tiny").stem, *make("tiny").pool, make("tiny").fc).eval()
    (plain, feature), stem = run(model, "4"), run(model, "2")[1]
    attach_transfer(attach_transfer(model, where="4"), at="2", hidden_features=16)
    assert torch.equal(run(model)[0], plain)
    head = randomise(model, "4")
    assert torch.equal(run(model, "4")[1], head(feature))
    block = randomise(model, "2")
    assert torch.equal(run(model, "2")[1], block(stem))
    assert not torch.equal(run(model)[0], plain)
    assert torch.equal(detach_transfer(model)(IMAGES), plain)


@pytest.mark.parametrize(
    ("name", "at", "module", "channels", "layout"),
    [
        ("timm/test_resnet", "stage0", "act1", 32, "nchw"),
        ("timm/test_resnet", "stage2", "layer2", 48, "nchw"),
        ("timm/test_efficientnet", "stage1", "blocks.1", 24, "nchw"),
        ("timm/swin_tiny_patch4_window7_224", "stage2", "layers.2", 384, "nhwc"),
        ("torchvision/resnet18", "stage0", "relu", 64, "nchw"),
        ("torchvision/resnet18", "stage3", "layer3", 256, "nchw"),
        ("torchvision/swin_t", "stage1", "features.3", 192, "nhwc"),
        ("torchvision/mobilenet_v3_small", "stage4", "features", 576, "nchw"),
        ("torchvision/resnet18", "layer2", "layer2", 128, "nchw"),
        ("torchvision/resnet18", "layer1.0.bn1", "layer1.0.bn1", 64, "nchw"),
        ("tiny", "stem", "stem", 8, "nchw"),
    ],
)
def test_at_puts_a_block_after_a_stage_or_module(
    name: str, at: str, module: str, channels: int, layout: str
) -> None:
    model = make(name)
    images = torch.randn(1, 3, 224, 224) if layout == "nhwc" else IMAGES
    logits, maps = run(model, module, images=images)
    attach_transfer(model, at=at, hidden_features=16)
    assert torch.equal(run(model, images=images)[0], logits)
    block = randomise(model, module.replace(".", "_"))
    assert isinstance(block, FeatureTransferBlock)
    assert (block.in_features, block.layout) == (channels, layout)
    assert block.config["hidden_channels"] == 16
    changed, transferred = run(model, module, images=images)
    assert torch.equal(transferred, block(maps))
    assert not torch.equal(changed, logits)


def test_where_may_name_maps_with_channels_last() -> None:
    model = make("torchvision/swin_t")
    attach_transfer(model, where="features", hidden_features=16)
    assert model.feature_transfer["features"].in_features == 768


def test_a_stage_of_a_sequential_is_transferred_when_its_layers_are_run_alone() -> None:
    """As timm's models do it: `for layer in stage: x = layer(x)`."""
    model = make("torchvision/resnet18")
    plain = model.layer1(torch.ones(1, 64, 8, 8))
    block = randomise(attach_transfer(model, at="layer1", hidden_features=16), "layer1")
    maps = torch.ones(1, 64, 8, 8)
    for layer in model.layer1:
        maps = layer(maps)
    assert torch.equal(maps, block(plain))


def test_a_stage_whose_forward_is_its_own_is_transferred_as_a_whole() -> None:
    """timm's RDNet: a stage is a Sequential, but its result is more than its last layer's."""
    model = make("timm/rdnet_tiny")
    maps = run(model, "dense_stages.0")[1]
    attach_transfer(model, at="stage0", hidden_features=16)
    block = randomise(model, "dense_stages_0")
    assert block.in_features == maps.shape[1]
    assert torch.equal(run(model, "dense_stages.0")[1], block(maps))


@pytest.mark.parametrize(
    ("name", "at"), [("timm/test_vit", "stage1"), ("tiny", "pool"), ("tiny", "fc")]
)
def test_tokens_and_vectors_are_no_maps(name: str, at: str) -> None:
    model = make(name)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(AttachError, match=r"at: .* gives \(1, .*wanted maps \(n, c, h, w\) or"):
        attach_transfer(model, at=at)
    assert [name for name, _ in model.named_modules()] == names
    assert hooks(model) == 0


def test_a_models_own_stages_have_names_too() -> None:
    """timm's `features_only` models give the transferred maps."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", features_only=True).eval()
    with torch.no_grad():
        plain = model(IMAGES)
        block = randomise(attach_transfer(model, at="stage2", hidden_features=16), "layer2")
        changed = model(IMAGES)
        assert len(changed) == len(plain)
        assert torch.equal(changed[2], block(plain[2]))
        assert torch.equal(changed[1], plain[1])


def test_a_head_and_blocks_act_together_in_any_order() -> None:
    outputs = []
    for order in (("layer1", "pooled", "stage3"), ("stage3", "layer1", "pooled")):
        model = make("torchvision/resnet18")
        with untouched(model):
            for place in order:
                attach_transfer(model, at=None if place == "pooled" else place, hidden_features=16)
            assert set(model.feature_transfer) == {"layer1", "layer3", "pooled"}
            for place in model.feature_transfer:
                randomise(model, place)
            output, maps = run(model, "layer1")
            outputs.append(output)
            with torch.no_grad():
                rest = model.avgpool(model.layer4(model.layer3(model.layer2(maps)))).flatten(1)
                assert torch.equal(model.fc(rest), output)
            detach_transfer(model)
    assert torch.equal(*outputs)


def test_a_wrapper_and_what_it_wraps_may_both_have_something_attached() -> None:
    inner = make("timm/test_resnet")
    outer = nn.Sequential(inner, nn.ReLU()).eval()
    with untouched(inner):
        attach_transfer(inner, hidden_features=16)
        randomise(inner)
        attached = run(outer)[0]
        attach_transfer(outer, where="0", in_features=1000, hidden_features=16)
        randomise(outer, "0")
        assert not torch.equal(run(outer)[0], attached)
        detach_transfer(outer)
        assert torch.equal(run(outer)[0], attached)
        detach_transfer(inner)


# Modes and copies


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/resnet18"])
@pytest.mark.parametrize("output", ["features", "clusters"])
def test_pickles_and_copies_are_complete_and_their_own(name: str, output: str) -> None:
    model = make(name)
    plain = run(model)[0]
    randomise(attach_transfer(model, output=output, hidden_features=16))
    transferred = run(model)[0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        copy.deepcopy(model),
    ):
        assert torch.equal(run(copied)[0], transferred)
        copied.feature_transfer["pooled"].fc2.weight.data.zero_()
        assert not torch.equal(run(copied)[0], transferred)
        with transfer_disabled(copied):
            assert torch.equal(run(copied)[0], plain)
        assert torch.equal(run(detach_transfer(copied))[0], plain)
        assert torch.equal(run(model)[0], transferred)


def test_reset_classifier_leaves_what_is_attached_elsewhere() -> None:
    model = make("timm/test_resnet")
    attach_transfer(attach_transfer(model), at="stage1", hidden_features=16)
    randomise(model, "layer1")
    maps = run(model, "layer1")[1]
    model.reset_classifier(7)
    assert torch.equal(run(model, "layer1")[1], maps)
    assert hooks(detach_transfer(model)) == 0


def test_state_dicts_carry_what_is_attached() -> None:
    model, other = make("timm/test_resnet"), make("timm/test_resnet")
    for part in (model, other):
        attach_transfer(attach_transfer(part), at="stage1", hidden_features=16)
    randomise(model)
    randomise(model, "layer1")
    state = model.state_dict()
    other.load_state_dict(state, strict=True)
    assert torch.equal(run(other)[0], run(model)[0])
    del state["feature_transfer.pooled.fc1.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*feature_transfer\.pooled\.fc1\.bias"):
        other.load_state_dict(state, strict=True)


def test_plain_checkpoints_of_a_wrapper_load_too() -> None:
    wrapper = nn.ModuleDict({"backbone": make("timm/test_resnet"), "neck": nn.Linear(3, 3)})
    state = copy.deepcopy(wrapper.state_dict())
    head = randomise(attach_transfer(wrapper["backbone"]))
    second = head.fc2.weight.clone()
    wrapper.load_state_dict(state, strict=True)
    assert torch.equal(head.fc2.weight, second)
    del state["backbone.fc.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "backbone\.fc\.w'):
        wrapper.load_state_dict(state, strict=True)


def test_transfer_disabled_nests_and_ends_with_exceptions() -> None:
    model = make("timm/test_resnet")
    plain = run(model)[0]
    randomise(attach_transfer(model))
    transferred = run(model)[0]
    with transfer_disabled(model):
        with transfer_disabled(model):
            assert torch.equal(run(model)[0], plain)
        assert torch.equal(run(model)[0], plain)
        with pytest.raises(ZeroDivisionError), transfer_disabled(model):
            raise ZeroDivisionError
        assert torch.equal(run(model)[0], plain)
    assert torch.equal(run(model)[0], transferred)


@pytest.mark.parametrize("mode", [True, False])
def test_it_takes_the_models_mode_and_follows_it(mode: bool) -> None:
    model = attach_transfer(make("timm/test_resnet").train(mode))
    head = model.feature_transfer["pooled"]
    assert head.training == mode
    assert head.fc1.training == mode
    model.train(not mode)
    assert head.training != mode


def test_train_transfer_only_trains_all_that_is_attached() -> None:
    model = attach_transfer(make("timm/test_resnet").train(), hidden_features=16)
    attach_transfer(model, at="stage1", hidden_features=16)
    parameters = train_transfer_only(model)
    attached = model.feature_transfer
    assert {id(p) for p in parameters} == {id(p) for p in attached.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert {m for m in model.modules() if m.training} == set(attached.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_it_follows_the_models_dtype(dtype: torch.dtype) -> None:
    for at in (None, "stage1"):
        model = make("timm/test_resnet").to(dtype)
        plain = run(model, images=IMAGES.to(dtype))[0]
        attach_transfer(model, at=at, hidden_features=16)
        assert {value.dtype for value in model.feature_transfer.parameters()} == {dtype}
        wide = torch.promote_types(dtype, torch.float32)
        assert {value.dtype for value in model.feature_transfer.buffers()} == {wide}
        output = run(model, images=IMAGES.to(dtype))[0]
        assert output.dtype == dtype
        assert torch.equal(output, plain)
        model.float()
        assert {value.dtype for value in model.feature_transfer.parameters()} == {torch.float32}


def test_dtype_is_of_what_is_attached_alone() -> None:
    model = make("timm/test_resnet")
    plain = run(model)[0]
    attach_transfer(model, dtype=torch.bfloat16)
    head = model.feature_transfer["pooled"]
    assert {value.dtype for value in head.parameters()} == {torch.bfloat16}
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(run(model)[0], plain)
    randomise(model)
    assert run(model)[0].dtype == torch.float32
    assert not torch.equal(run(model)[0], plain)


def test_a_model_without_parameters_takes_the_default_dtype() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    head = attach_transfer(model, where="1").get_submodule("feature_transfer.1")
    assert isinstance(head, FeatureTransferHead)
    assert (head.in_features, head.fc1.weight.dtype) == (12, torch.float32)


def test_detach_keeps_the_users_own_hooks_and_attach_works_again() -> None:
    model = make("torchvision/resnet18")
    calls: list[str] = []
    model.fc.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.layer1[-1].register_forward_hook(lambda *_: calls.append("after"))
    with untouched(model):
        for _ in range(2):
            attach_transfer(attach_transfer(model), at="layer1", hidden_features=16)
            detach_transfer(model)
    calls.clear()
    run(model)
    assert calls == ["after", "before"]


REPLACED = "module {}, to which 'pooled' was attached, was taken away or replaced since"


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/resnet18"])
def test_a_classifier_that_is_replaced_is_told(name: str) -> None:
    model = make(name)
    head = randomise(attach_transfer(model, hidden_features=16))
    model.fc = nn.Linear(head.in_features, 7)
    with pytest.raises(AttachError, match=REPLACED.format("'fc'")):
        run(model)
    with transfer_disabled(model):
        assert run(model)[0].shape == (2, 7)
    attach_transfer(detach_transfer(model), head)
    transferred = run(model)[0]
    with transfer_disabled(model):
        assert not torch.equal(run(model)[0], transferred)


@pytest.mark.parametrize("name", ["repvit_m1", "levit_128s", "shvit_s1"])
def test_a_classifier_that_is_reparameterised_is_told(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    side = 224 if name == "levit_128s" else 64
    images = torch.randn(1, 3, side, side)
    randomise(attach_transfer(model, hidden_features=16))
    fused = reparameterize_model(model)
    with pytest.raises(AttachError, match=REPLACED.format(".*")):
        run(fused, images=images)
    run(model, images=images)


def test_the_users_own_methods_are_not_replaced() -> None:
    model = make("timm/test_resnet")

    def forward_head(x: Tensor, pre_logits: bool = False) -> Tensor:
        return type(model).forward_head(model, 2 * x, pre_logits)  # type: ignore[no-any-return]

    model.forward_head = forward_head
    with (
        untouched(model),
        pytest.raises(AttachError, match="model: it has a forward_head of its own on this inst"),
    ):
        attach_transfer(model)


# Bad input


def test_a_place_that_is_taken() -> None:
    model = attach_transfer(make("timm/test_resnet"))
    attach_transfer(model, at="stage1", hidden_features=16)
    randomise(model)
    for at, place in ((None, "pooled"), ("layer1", "layer1")):
        with (
            untouched(model),
            pytest.raises(AttachError, match=f"attached at '{place}' already; detach_transfer"),
        ):
            attach_transfer(model, at=at)


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
        ("tiny", {}, r"where: wanted the name of a module .*in Tiny: stem, .*pool, .*, fc"),
        ("tiny", {"where": "head"}, r"no module 'head'; candidates in Tiny: stem, .*, fc"),
        ("tiny", {"where": ""}, "no module ''; candidates"),
        ("tiny", {"at": "stage1"}, r"no module 'stage1'; candidates in Tiny: stem"),
        ("tiny", {"at": "layer9"}, "no module 'layer9'; candidates"),
        ("timm/test_resnet", {"where": "x"}, r"no module 'x'.*the last 12 of \d+\): layer4"),
        ("timm/test_resnet", {"at": "stage9"}, r"no stage9; it has stage0 = act1, .*= layer4"),
        ("torchvision/resnet18", {"at": "stage5"}, "no stage5; it has stage0 = relu, .* layer4"),
        ("torchvision/resnet18", {"at": "fc"}, r"fc gives \(1, 1000\), wanted maps"),
    ],
)
def test_no_such_place(name: str, options: dict[str, Any], message: str) -> None:
    model = make(name)
    with untouched(model), pytest.raises(AttachError, match=message):
        attach_transfer(model, **options)


def test_what_is_attached_is_no_candidate() -> None:
    model = attach_transfer(make("timm/test_resnet"))
    with pytest.raises(AttachError, match="candidates") as raised:
        attach_transfer(model, where="nope")
    assert "feature_transfer" not in str(raised.value)


@pytest.mark.parametrize("name", ["feature_transfer.pooled.fc1", "feature_transfer.pooled"])
def test_what_is_attached_is_no_place(name: str) -> None:
    model = attach_transfer(make("timm/test_resnet"))
    with untouched(model), pytest.raises(AttachError, match="no module 'feature_transfer"):
        attach_transfer(model, where=name)


class Named(nn.Module):
    """A model with a module of the name that is asked for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()))

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.get_submodule(self.name)(images)
        return maps


@pytest.mark.parametrize("name", ["values", "transfer", "update", "enabled", "places"])
def test_modules_may_have_the_names_of_methods(name: str) -> None:
    model = Named(name)
    maps = run(model)[0]
    attach_transfer(model, where=name)
    assert torch.equal(run(model)[0], maps)
    assert not hasattr(detach_transfer(model), "feature_transfer")


def test_a_custom_models_module_may_be_called_stage1() -> None:
    model = attach_transfer(Named("stage1"), at="stage1", hidden_features=16)
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


@pytest.mark.parametrize("at", ["first", "second"])
def test_a_stage_that_ends_in_a_shared_module_is_transferred_once(at: str) -> None:
    model = Shared()
    maps = run(model, at)[1]
    block = randomise(attach_transfer(model, at=at, hidden_features=16), at)
    calls: list[int] = []
    block.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(run(model, at)[1], block(maps))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("head", "at", "error", "message"),
    [
        (FeatureTransferHead(95), None, ArtifactError, "head: head for features of width 95, .*96"),
        (FeatureTransferBlock(31), "stage1", ArtifactError, "block for .* width 31, wanted 32"),
        (
            FeatureTransferBlock(32),
            None,
            AttachError,
            r"a block, wanted a head \(a block needs at=",
        ),
        (FeatureTransferHead(32), "stage1", AttachError, "got a head, wanted a block"),
    ],
)
def test_another_width_or_kind_of_head(
    head: Any, at: str | None, error: type[Exception], message: str
) -> None:
    model = make("timm/test_resnet")
    with untouched(model), pytest.raises(error, match=message):
        attach_transfer(model, head, at=at)


def test_other_types() -> None:
    model = make("tiny")
    heads: tuple[Any, ...] = (nn.Linear(8, 8), 3, FeatureTransferHead)
    for head in heads:
        with untouched(model), pytest.raises(TypeError, match=r"head: got \w+, wanted a Feature"):
            attach_transfer(model, head, where="pool")
    not_a_model: Any = "resnet18"
    with pytest.raises(TypeError, match=r"model: got str, wanted a torch\.nn\.Module"):
        attach_transfer(not_a_model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "pool", "at": "stem"}, "where, at: got both"),
        ({"at": "stem", "output": "clusters"}, "output: a block has none"),
        ({"where": "pool", "output": "other"}, "output: got 'other'"),
        ({"where": "pool", "hidden_features": 0}, "hidden_features: got 0"),
        ({"at": "stem", "hidden_features": 0}, "hidden_channels: got 0"),
        ({"where": "pool", "in_features": -1}, "in_features: got -1"),
        ({"where": "pool", "head": FeatureTransferHead(8), "output": "features"}, "for a new head"),
        ({"where": "pool", "head": FeatureTransferHead(8), "hidden_features": 4}, "for a new head"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    model = make("tiny")
    with untouched(model), pytest.raises(ValueError, match=message):
        attach_transfer(model, **options)


def test_models_that_do_not_run_on_a_colour_image_need_the_width() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    with pytest.raises(AttachError, match=r"run on an image of 3 x 224 x 224 \(Runtime"):
        attach_transfer(model, where="0")
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    rows, plain = torch.ones(3, 6), model(torch.ones(3, 6))
    attach_transfer(model, where="0", in_features=4)
    assert torch.equal(model(rows), plain)
    randomise(model, "0")
    assert not torch.equal(model(rows), plain)


@pytest.mark.parametrize(
    ("name", "where", "said"),
    [("timm/test_resnet", None, 96), ("timm/test_resnet", "layer2", 48), ("tiny", "pool", 8)],
)
def test_a_width_that_is_not_the_models_is_refused(name: str, where: str | None, said: int) -> None:
    model = make(name)
    with (
        untouched(model),
        pytest.raises(ValueError, match=f"in_features: got 95, the model says {said}"),
    ):
        attach_transfer(model, where=where, in_features=95)


@pytest.mark.parametrize("options", [{"img_size": 56}, {"in_chans": 1}])
def test_blocks_in_models_made_for_other_images(options: dict[str, int]) -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", **options)
    attach_transfer(model, at="stage2", hidden_features=16)
    assert model.feature_transfer["layers_2"].in_features == 384


class Unused(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 8)


def test_modules_that_never_run_or_give_no_tensor() -> None:
    model, lstm = Unused().eval(), nn.Sequential(nn.Flatten(2), nn.Flatten(0, 1), nn.LSTM(50176, 4))
    with untouched(model), pytest.raises(AttachError, match="no tensor passes other when the mod"):
        attach_transfer(model, where="other")
    with pytest.raises(AttachError, match="no tensor passes 2 when the model runs"):
        attach_transfer(lstm, where="2")
    assert len(lstm) == 3


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
            attach_transfer(model, where="pool")
        assert list(model.state_dict()) == names


def test_models_of_other_kinds_in_timm_are_told() -> None:
    model = timm.create_model("test_resnet", features_only=True)
    with pytest.raises(AttachError, match="timm's FeatureListNet has no classification head"):
        attach_transfer(model)


# Saved heads

SEEN = Degradation(lr_size=16)


def save_for(model: nn.Module, classifier: str, folder: Path, head: Any) -> Path:
    """A head with a card for that model."""
    sha256 = weights_sha256(model, leave_out=(f"{classifier}.", "feature_transfer."))
    head.card = Card(type(model).__name__, sha256, (SEEN,), {"seed": 3})
    head.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/resnet18"])
def test_saved_heads_round_trip(name: str, tmp_path: Path) -> None:
    trained, model = make(name), make(name)
    plain = run(model)[0]
    head = randomise(attach_transfer(trained, hidden_features=16))
    folder = save_for(trained, "fc", tmp_path / "head", head)
    for given in (folder, str(folder), load_head(folder)[0]):
        attach_transfer(model, given, degradation=SEEN)
        assert torch.equal(run(model)[0], run(trained)[0])
        assert model.feature_transfer["pooled"].card == head.card
        assert torch.equal(run(detach_transfer(model))[0], plain)


def test_saved_blocks_round_trip(tmp_path: Path) -> None:
    trained, model = make("timm/test_resnet"), make("timm/test_resnet")
    block = randomise(attach_transfer(trained, at="stage1", hidden_features=16), "layer1")
    sha256 = backbone_of(model).weights_sha256
    block.card = Card("timm/test_resnet", sha256, (SEEN,))
    block.save_pretrained(tmp_path)
    attach_transfer(model, tmp_path, at="stage1")
    assert torch.equal(run(model)[0], run(trained)[0])
    other = make("timm/test_resnet")
    other.reset_classifier(3)
    attach_transfer(other, tmp_path, at="stage1")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    detach_transfer(model)
    with pytest.raises(ArtifactError, match="wanted weights"):
        attach_transfer(model, tmp_path, at="stage1")
    with pytest.raises(AttachError, match=rf"{tmp_path}: got a block, wanted a head"):
        attach_transfer(make("timm/test_resnet"), tmp_path)


def test_the_classifier_does_not_count_for_the_backbone(tmp_path: Path) -> None:
    """A head serves the model with other classes, and headless."""
    head = FeatureTransferHead(96, hidden_features=16)
    folder = save_for(make("timm/test_resnet"), "fc", tmp_path / "timm", head)
    for classes in (0, 7):
        model = make("timm/test_resnet")
        model.reset_classifier(classes)
        assert "feature_transfer" in dict(attach_transfer(model, folder).named_children())
    head = FeatureTransferHead(512, hidden_features=16)
    folder = save_for(make("torchvision/resnet18"), "fc", tmp_path / "tv", head)
    model = make("torchvision/resnet18")
    model.fc = nn.Identity()
    assert "feature_transfer" in dict(attach_transfer(model, folder).named_children())


def test_a_head_for_another_backbone_is_refused(tmp_path: Path) -> None:
    model = make("timm/test_resnet")
    folder = save_for(model, "fc", tmp_path, FeatureTransferHead(96))
    with torch.no_grad():
        model.conv1[0].weight[0, 0, 0, 0] += 1
    for given in (folder, load_head(folder)[0]):
        with (
            untouched(model),
            pytest.raises(ArtifactError, match=r"ResNet with weights \w+ in float32, wanted"),
        ):
            attach_transfer(model, given)


def test_another_degradation_is_warned_of(tmp_path: Path) -> None:
    model = make("timm/test_resnet")
    folder = save_for(model, "fc", tmp_path, FeatureTransferHead(96))
    with pytest.warns(UserWarning, match=r'trained on \{.*"lr_size": 16.*"lr_size": 32') as caught:
        attach_transfer(model, folder, degradation=Degradation(lr_size=32))
    assert [warning.filename for warning in caught] == [__file__]
    detach_transfer(model)
    attach_transfer(model, folder)  # nothing is said of the images, nothing is warned of


def test_damaged_or_missing_heads_leave_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = make("timm/test_resnet")
    folder = save_for(model, "fc", tmp_path / "head", FeatureTransferHead(96))
    weights = folder / "head.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with untouched(model), pytest.raises(ArtifactError, match="are not those that card"):
        attach_transfer(model, folder)
    (folder / "card.json").write_text("{")
    with untouched(model), pytest.raises(ArtifactError, match="no valid JSON"):
        attach_transfer(model, folder)
    for name in (tmp_path / "nowhere", "nobody/nothing"):
        with untouched(model), pytest.raises(FileNotFoundError, match="is no folder, and the"):
            attach_transfer(model, name)


# Cluster logits


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("timm/test_resnet", "fc"),
        ("timm/test_vit", "head"),
        ("timm/test_convnext", "head.fc"),
        ("torchvision/resnet18", "fc"),
        ("torchvision/mobilenet_v3_small", "classifier.3"),
    ],
)
def test_clusters_pass_the_classifier_by(name: str, classifier: str) -> None:
    model = make(name)
    images = torch.randn(2, 3, 160, 160) if name == "timm/test_vit" else IMAGES
    state = copy.deepcopy(model.state_dict())
    attributes = sorted(vars(model.get_submodule(classifier)))
    feature: list[Tensor] = []
    handle = model.get_submodule(classifier).register_forward_pre_hook(
        lambda _, args: feature.append(args[0])
    )
    plain = run(model, images=images)[0]
    handle.remove()
    attach_transfer(model, output="clusters", hidden_features=16)
    head = model.feature_transfer["pooled"]
    assert torch.equal(run(model, images=images)[0], head(feature[0]))
    assert run(model, images=images)[0].shape == (2, 100)
    assert [key for key in model.state_dict() if "feature_transfer" not in key] == list(state)
    with transfer_disabled(model):
        assert torch.equal(run(model, images=images)[0], plain)
    model.load_state_dict(state, strict=True)
    detach_transfer(model)
    assert torch.equal(run(model, images=images)[0], plain)
    assert sorted(vars(model.get_submodule(classifier))) == attributes
    assert hooks(model) == 0


def test_clusters_are_timms_pre_logits_too() -> None:
    model = make("timm/test_resnet")
    with torch.no_grad():
        maps = model.forward_features(IMAGES)
        feature = model.forward_head(maps, pre_logits=True)
        attach_transfer(model, output="clusters", hidden_features=16)
        clusters = model.feature_transfer["pooled"](feature)
        assert torch.equal(model.forward_head(maps, pre_logits=True), clusters)
        assert torch.equal(model.forward_head(maps), clusters)


def test_a_new_classifier_on_cluster_logits() -> None:
    """timm's own cannot be made for them; none is fine."""
    model = make("timm/test_resnet")
    attach_transfer(model, output="clusters", hidden_features=16)
    clusters = run(model)[0]
    with (
        untouched(model),
        pytest.raises(AttachError, match=r"take 96 features, the attached head gives 100 clu"),
    ):
        model.reset_classifier(7)
    model.reset_classifier(0)
    assert torch.equal(run(model)[0], clusters)
    assert hooks(detach_transfer(model)) == 0
    assert run(model)[0].shape == (2, 96)


def test_a_new_classifier_of_another_width_is_refused() -> None:
    """Average and maximum side by side: twice the features."""
    model = attach_transfer(make("timm/test_resnet"))
    with pytest.raises(AttachError, match="192"):
        model.reset_classifier(7, "catavgmax")
    assert run(model)[0].shape == (2, 96)


def test_cluster_logits_that_would_be_cut_off_at_zero_are_refused() -> None:
    model = make("torchvision/squeezenet1_1")
    with untouched(model), pytest.raises(ValueError, match="a ReLU of SqueezeNet behind 'class"):
        attach_transfer(model, output="clusters", hidden_features=16)
