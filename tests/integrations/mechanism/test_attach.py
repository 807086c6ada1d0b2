"""What is attached goes with its model: modes, copies, dtypes, checkpoints, the way back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from featxfer import (
    FeatureTransferHead,
)
from featxfer_integrations import (
    AttachError,
    attach_transfer,
    detach_transfer,
    train_transfer_only,
    transfer_disabled,
)
from tests.integrations.models import IMAGES, hooks, make, randomise, run, untouched


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
        copied.feature_transfer["head"].fc2.weight.data.zero_()
        assert not torch.equal(run(copied)[0], transferred)
        with transfer_disabled(copied):
            assert torch.equal(run(copied)[0], plain)
        assert torch.equal(run(detach_transfer(copied))[0], plain)
        assert torch.equal(run(model)[0], transferred)


def test_reset_classifier_leaves_what_is_attached_elsewhere() -> None:
    model = make("timm/test_resnet")
    attach_transfer(attach_transfer(model), site="stage1", hidden_features=16)
    randomise(model, "layer1")
    maps = run(model, "layer1")[1]
    model.reset_classifier(7)
    assert torch.equal(run(model, "layer1")[1], maps)
    assert hooks(detach_transfer(model)) == 0


def test_state_dicts_carry_what_is_attached() -> None:
    model, other = make("timm/test_resnet"), make("timm/test_resnet")
    for part in (model, other):
        attach_transfer(attach_transfer(part), site="stage1", hidden_features=16)
    randomise(model)
    randomise(model, "layer1")
    state = model.state_dict()
    other.load_state_dict(state, strict=True)
    assert torch.equal(run(other)[0], run(model)[0])
    del state["feature_transfer.head.fc1.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*feature_transfer\.head\.fc1\.bias"):
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
    head = model.feature_transfer["head"]
    assert head.training == mode
    assert head.fc1.training == mode
    model.train(not mode)
    assert head.training != mode


def test_train_transfer_only_trains_all_that_is_attached() -> None:
    model = attach_transfer(make("timm/test_resnet").train(), hidden_features=16)
    attach_transfer(model, site="stage1", hidden_features=16)
    parameters = train_transfer_only(model)
    attached = model.feature_transfer
    assert {id(p) for p in parameters} == {id(p) for p in attached.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert {m for m in model.modules() if m.training} == set(attached.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_it_follows_the_models_dtype(dtype: torch.dtype) -> None:
    for site in (None, "stage1"):
        model = make("timm/test_resnet").to(dtype)
        plain = run(model, images=IMAGES.to(dtype))[0]
        attach_transfer(model, site=site, hidden_features=16)
        assert {value.dtype for value in model.feature_transfer.parameters()} == {dtype}
        wide = torch.promote_types(dtype, torch.float32)
        assert {value.dtype for value in model.feature_transfer.buffers()} == {wide}
        output = run(model, images=IMAGES.to(dtype))[0]
        assert output.dtype == dtype
        assert torch.equal(output, plain)
        model.float()
        assert {value.dtype for value in model.feature_transfer.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_mixed_precision_it_follows_layers_and_no_norm(dtype: torch.dtype) -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, dtype=dtype), nn.BatchNorm2d(8)]
    model: Any = nn.Sequential(*layers).eval()
    with torch.no_grad():
        plain = model(IMAGES.to(dtype))
        attach_transfer(model, site="1", hidden_features=16)
        assert {value.dtype for value in model.feature_transfer.parameters()} == {dtype}
        assert torch.equal(model(IMAGES.to(dtype)), plain)


def test_dtype_is_of_what_is_attached_alone() -> None:
    model = make("timm/test_resnet")
    plain = run(model)[0]
    attach_transfer(model, dtype=torch.bfloat16)
    head = model.feature_transfer["head"]
    assert {value.dtype for value in head.parameters()} == {torch.bfloat16}
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(run(model)[0], plain)
    randomise(model)
    assert run(model)[0].dtype == torch.float32
    assert not torch.equal(run(model)[0], plain)


def test_a_model_without_parameters_takes_the_default_dtype() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    head = attach_transfer(model, site="1").get_submodule("feature_transfer.1")
    assert isinstance(head, FeatureTransferHead)
    assert (head.in_features, head.fc1.weight.dtype) == (12, torch.float32)


def test_detach_keeps_the_users_own_hooks_and_attach_works_again() -> None:
    model = make("torchvision/resnet18")
    calls: list[str] = []
    model.fc.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.layer1[-1].register_forward_hook(lambda *_: calls.append("after"))
    with untouched(model):
        for _ in range(2):
            attach_transfer(attach_transfer(model), site="layer1", hidden_features=16)
            detach_transfer(model)
    calls.clear()
    run(model)
    assert calls == ["after", "before"]


@pytest.mark.parametrize("site", ["head", "layer1"])
def test_hooks_that_were_there_before_see_what_comes_out_as_later_ones_do(site: str) -> None:
    """Hosts that take features by hooks of their own register them at whatever time."""
    model, seen = make("torchvision/resnet18"), dict[str, Tensor]()

    def watch(name: str) -> None:
        if site == "head":
            model.fc.register_forward_pre_hook(lambda _, args: seen.update({name: args[0]}))
        else:
            model.layer1[-1].register_forward_hook(lambda _, __, out: seen.update({name: out}))

    watch("before")
    run(model)
    plain = seen["before"]
    randomise(attach_transfer(model, site=site, hidden_features=16), site)
    watch("after")
    run(model)
    assert not torch.equal(seen["before"], plain)
    assert torch.equal(seen["before"], seen["after"])


REPLACED = "module {}, to which 'head' was attached, was taken away or replaced since"


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
