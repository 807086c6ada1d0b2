"""What attach_transfer promises of a model, checked from attaching to detaching."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featxfer import FeatureTransferHead
from featxfer_integrations import (
    attach_transfer,
    detach_transfer,
    train_transfer_only,
    transfer_disabled,
)


@dataclass
class Host:
    """A model, and how the library gives its outputs: logits first, then features, pooled."""

    model: Any
    images: Tensor
    run: Callable[[], tuple[Tensor, ...]]


@dataclass
class Plain:
    """What a model was before anything was attached."""

    outputs: tuple[Tensor, ...]
    state: dict[str, Tensor]
    attributes: dict[str, set[str]]
    hooks: dict[str, int]


def fill_zeros(model: nn.Module) -> nn.Module:
    """Classifiers and last layers that start at zero would hide what comes before them."""
    for value in model.parameters():
        if value.ndim > 1 and not value.any():
            nn.init.normal_(value, std=0.1)
    return model


def run_with_input_of(module: nn.Module, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the model gives, and what comes to a module of it."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    output = model(images)
    handle.remove()
    return output, seen[0]


@torch.no_grad()
def note_plain(host: Host) -> Plain:
    outputs = host.run()
    assert all(output.isfinite().all() and output.any() for output in outputs)
    state = copy.deepcopy(host.model.state_dict())
    return Plain(outputs, state, attributes(host.model), hooks(host.model))


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def hooks(model: nn.Module) -> dict[str, int]:
    return {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in model.named_modules()
    }


def head_of(model: Any) -> FeatureTransferHead:
    head: FeatureTransferHead = model.feature_transfer["head"]
    return head


def randomise(head: FeatureTransferHead) -> None:
    """In place of training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in (head.fc1.bias, head.fc2.weight, head.fc2.bias):
            value.normal_(std=0.1, generator=generator)


def check_contract(host: Host) -> None:
    """Everything in turn, from attaching to detaching."""
    plain = note_plain(host)
    attach_transfer(host.model, hidden_features=32)
    assert head_of(host.model).in_features == plain.outputs[1].shape[1]
    with torch.no_grad():
        check_identity(host, plain)
        randomise(head_of(host.model))
        check_transfer(host, plain)
        check_state_dict(host, plain)
        check_copy(host, plain)
    check_training(host, plain)
    detach_transfer(host.model)
    check_detached(host, plain)


def check_identity(host: Host, plain: Plain) -> None:
    assert all(torch.equal(*pair) for pair in zip(host.run(), plain.outputs, strict=True))


def check_transfer(host: Host, plain: Plain) -> None:
    """Features go through the head, once, wherever they are looked at; logits follow."""
    logits, *features = host.run()
    assert not torch.equal(logits, plain.outputs[0])
    for feature, before in zip(features, plain.outputs[1:], strict=True):
        assert not torch.equal(feature, before)
        assert torch.equal(feature, head_of(host.model)(before))
    with transfer_disabled(host.model):
        check_identity(host, plain)


def check_state_dict(host: Host, plain: Plain) -> None:
    """A checkpoint of the plain model loads, and only the head's keys are new."""
    second = head_of(host.model).fc2.weight.clone()
    host.model.load_state_dict(plain.state, strict=True)
    assert torch.equal(head_of(host.model).fc2.weight, second)
    new = host.model.state_dict().keys() - plain.state.keys()
    assert new == {f"feature_transfer.head.{key}" for key in head_of(host.model).state_dict()}
    assert plain.state.keys() <= host.model.state_dict().keys()


def check_copy(host: Host, plain: Plain) -> None:
    """A copy has a head of its own."""
    copied = copy.deepcopy(host.model)
    for value in head_of(copied).fc2.parameters():
        value.zero_()
    assert torch.equal(copied(host.images), plain.outputs[0])
    assert not torch.equal(host.model(host.images), plain.outputs[0])


def check_training(host: Host, plain: Plain) -> None:
    """A step moves the head and nothing else: no weight, no batch-norm statistic."""
    optimizer = torch.optim.SGD(train_transfer_only(host.model.train()), lr=0.1)
    before = head_of(host.model).fc2.weight.detach().clone()
    host.model(host.images).abs().sum().backward()
    with_gradient = {name for name, p in host.model.named_parameters() if p.grad is not None}
    assert with_gradient == {
        f"feature_transfer.head.{name}" for name, _ in head_of(host.model).named_parameters()
    }
    optimizer.step()
    assert not torch.equal(head_of(host.model).fc2.weight, before)
    assert_plain_state(host.model, plain)
    host.model.eval()


def check_detached(host: Host, plain: Plain) -> None:
    assert host.model.state_dict().keys() == plain.state.keys()
    assert_plain_state(host.model, plain)
    assert attributes(host.model) == plain.attributes
    assert hooks(host.model) == plain.hooks
    with torch.no_grad():
        check_identity(host, plain)


def assert_plain_state(model: nn.Module, plain: Plain) -> None:
    state = model.state_dict()
    moved = [key for key, value in plain.state.items() if not torch.equal(state[key], value)]
    assert moved == []
