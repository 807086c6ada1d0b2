"""Heads and blocks in training loops that know nothing of featxfer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from featxfer import FeatureTransferBlock, FeatureTransferHead
from featxfer_integrations import attach_transfer, train_transfer_only, transfer_disabled

KINDS = ("weight", "bias")
Context = Callable[[], AbstractContextManager[Any]]


class Tiny(nn.Module):
    """A backbone, pooling and a classifier; the backbone may recompute its activations."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, 5)

    def features(self, images: Tensor) -> Tensor:
        maps: Tensor = self.stage(self.stem(images))
        return maps

    def forward(self, images: Tensor) -> Tensor:
        if self.checkpointed:
            maps = checkpoint(self.features, images, use_reentrant=False)
        else:
            maps = self.features(images)
        logits: Tensor = self.fc(self.pool(maps))
        return logits


def make(*, checkpointed: bool = False, dropout: float = 0.0) -> Tiny:
    """With a head after the pooling and a block after the stage, which are not the identity."""
    torch.manual_seed(0)
    model = Tiny(checkpointed=checkpointed)
    attach_transfer(model, FeatureTransferHead(8, hidden_features=16, dropout=dropout), site="pool")
    attach_transfer(model, FeatureTransferBlock(8, 16), site="stage")
    with torch.no_grad():
        for value in model.get_submodule("feature_transfer").parameters():
            value.normal_(std=0.1)
    return model


def batch(count: int = 16, side: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, side, side, generator=generator)
    return images, torch.randint(5, (count,), generator=generator)


def fit(
    model: nn.Module,
    parameters: list[nn.Parameter],
    steps: int = 30,
    context: Context = nullcontext,
) -> list[float]:
    """A plain loop; the loss of each step."""
    images, labels = batch()
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        with context():
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of a model's parts, two levels of what is attached, of which some weight moved."""
    state = model.state_dict()
    names = [key for key, value in before.items() if not torch.equal(state[key], value)]
    depth = {"feature_transfer": 2}
    return {".".join(key.split(".")[: depth.get(key.split(".")[0], 1)]) for key in names}


ATTACHED = {"feature_transfer.pool", "feature_transfer.stage"}


def test_a_frozen_model_learns_with_what_is_attached_alone() -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    losses = fit(model, train_transfer_only(model))
    assert losses[-1] < 0.8 * losses[0]
    assert moved(model, before) == ATTACHED


def test_a_model_learns_as_a_whole() -> None:
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    losses = fit(model, list(model.parameters()))
    assert losses[-1] < 0.5 * losses[0]
    assert moved(model, before) == ATTACHED | {"stem", "stage", "fc"}


def test_a_backbone_learns_through_a_frozen_head() -> None:
    model = make().train()
    model.get_submodule("feature_transfer").requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    losses = fit(model, [value for value in model.parameters() if value.requires_grad])
    assert losses[-1] < 0.5 * losses[0]
    assert moved(model, before) == {"stem", "stage", "fc"}


def test_nothing_attached_learns_while_it_is_disabled() -> None:
    model = make().train()
    with transfer_disabled(model):
        model(batch()[0]).sum().backward()
    attached = model.get_submodule("feature_transfer")
    assert all(value.grad is None for value in attached.parameters())
    assert all(value.grad is not None for value in model.fc.parameters())


def test_a_new_head_learns_from_the_identity() -> None:
    """fc2 starts at zero: only it has a gradient at first, then all have."""
    torch.manual_seed(0)
    model: Any = attach_transfer(timm.create_model("test_resnet", num_classes=5))
    parameters = train_transfer_only(model)
    images, labels = batch(side=64)
    F.cross_entropy(model(images), labels).backward()
    head = model.feature_transfer["head"]
    assert head.fc2.weight.grad.any()
    assert not head.fc1.weight.grad.any()
    torch.optim.SGD(parameters, lr=0.1).step()
    F.cross_entropy(model(images), labels).backward()
    assert head.fc1.weight.grad.any()


def test_autocast() -> None:
    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)

    model = make()
    with autocast():
        assert model(batch()[0]).dtype == torch.bfloat16
    losses = fit(model, train_transfer_only(model), context=autocast)
    assert losses[-1] < 0.8 * losses[0]
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("frozen", [True, False])
def test_checkpointing_gives_the_same_gradients(frozen: bool) -> None:
    gradients = []
    for checkpointed in (True, False):
        model = make(checkpointed=checkpointed, dropout=0.5).train()
        images, labels = batch()
        if frozen:
            train_transfer_only(model)
        torch.manual_seed(1)
        F.cross_entropy(model(images), labels).backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    first, second = gradients
    assert first.keys() == second.keys()
    assert len(first) == (16 if frozen else 24)
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], msg=name)


def test_timms_checkpointing_of_a_backbone() -> None:
    gradients = []
    for enable in (True, False):
        torch.manual_seed(0)
        model: Any = timm.create_model("test_resnet", num_classes=5)
        attach_transfer(
            attach_transfer(model, site="stage2", hidden_features=16), hidden_features=16
        )
        model.set_grad_checkpointing(enable)
        unit = model.eval().feature_transfer["layer2"].units[1]
        unit.project.weight.data.normal_(std=0.1)
        model(batch(side=64)[0]).square().sum().backward()
        gradients.append(unit.spatial.weight.grad)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("output", ["features", "clusters"])
def test_a_head_in_a_sequential(output: str) -> None:
    """The bare head, between a backbone and a classifier of one's own."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 5, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    backbone.eval().requires_grad_(False)
    head = FeatureTransferHead(128, clusters=12, hidden_features=16, output=output, dropout=0)
    model = nn.Sequential(backbone, head, nn.Linear(head.out_features, 5))
    before = copy.deepcopy(model.state_dict())
    losses = fit(model, [value for value in model.parameters() if value.requires_grad])
    assert losses[-1] < 0.5 * losses[0]
    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert changed == {f"{name}.{kind}" for name in ("1.fc1", "1.fc2", "2") for kind in KINDS}


def train_attached(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """A few steps over what asks for gradients."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def train_rank(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        model = make()
        train_transfer_only(model)
        images, labels = batch()
        half = slice(rank * 8, rank * 8 + 8)
        train_attached(DistributedDataParallel(model), images[half], labels[half])
        torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_train_as_one_on_their_union(tmp_path: Path) -> None:
    mp.spawn(train_rank, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    alone = make()
    before = copy.deepcopy(alone.state_dict())
    train_transfer_only(alone)
    train_attached(alone, *batch())
    assert moved(alone, before) == ATTACHED
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, wanted in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], wanted, atol=1e-5, rtol=0, msg=name)
