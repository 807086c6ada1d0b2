"""Small models for tests of what is attached, and what was there before it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
import torchvision.models
from torch import Tensor, nn

from featxfer_integrations import Site, host_of, transfers_of
from featxfer_integrations.hosts.base import find_sites

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


class Branched(nn.Module):
    """A stem, a branch that leads nowhere, and a classifier."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.aside = nn.Linear(8, 4)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.pool(self.norm(self.conv(images)))
        self.aside(pooled)
        logits: Tensor = self.fc(pooled)
        return logits


def make_branched(kind: type[nn.Module] = Branched, **options: Any) -> Any:
    """In eval mode, with weights that are the same each time."""
    torch.manual_seed(0)
    return kind(**options).eval()


def find_site(model: nn.Module, name: str) -> Site:
    """The one site of that name."""
    (site,) = find_sites(host_of(model), model, name)
    return site


def make(name: str) -> Any:
    """A model by name, in eval mode, with weights that are the same each time."""
    torch.manual_seed(0)
    if name == "tiny":
        return Tiny().eval()
    library, _, name = name.partition("/")
    if library == "timm":
        return timm.create_model(name).eval()
    return torchvision.models.get_model(name, weights=None).eval()


def randomise(module: nn.Module, name: str = "head") -> Any:
    """What is attached to a model, with weights as if it had been trained."""
    attached: Any = module.get_submodule(f"feature_transfer.{name}")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in attached.parameters():
            value.normal_(std=0.1, generator=generator)
    return attached


def randomise_all(model: nn.Module) -> None:
    """As `randomise`, of all that is attached to a model."""
    with torch.no_grad():
        for value in transfers_of(model).parameters():
            value.normal_(std=0.1, generator=torch.Generator().manual_seed(1))


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
