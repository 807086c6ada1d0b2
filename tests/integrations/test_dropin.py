"""What is attached trains in loops that know nothing of featxfer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.checkpoint import checkpoint

from featxfer import FeatureTransferHead
from featxfer_integrations import attach_transfer, train_transfer_only, transfers_of

GENERATOR = torch.Generator().manual_seed(0)
HR = torch.randn(16, 3, 16, 16, generator=GENERATOR)
LR = F.interpolate(F.avg_pool2d(HR, 2), scale_factor=2)


class Host(nn.Module):
    """Two stages, a pool and a classifier; no dropout, so that loops can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stage2 = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(12, 5)
        self.checkpointed = False

    def forward(self, images: Tensor) -> Tensor:
        first = self.stage1(images)
        if self.checkpointed:
            second = checkpoint(self.stage2, first, use_reentrant=False)
        else:
            second = self.stage2(first)
        logits: Tensor = self.classifier(self.pool(second))
        return logits


def make(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Host().eval()
    if "at" in options:
        return attach_transfer(model, hidden_features=16, **options)
    head = FeatureTransferHead(12, 4, 32, dropout=0.0)
    return attach_transfer(model, head, where="pool")


def loss_of(model: nn.Module, target: Tensor, images: Tensor = LR) -> Tensor:
    return F.mse_loss(model(images), target)


def train(
    model: nn.Module, parameters: list[nn.Parameter], *, autocast: bool = False
) -> list[float]:
    """Somebody's loop, towards logits of their own."""
    target = torch.ones(16, 5)
    optimizer, losses = torch.optim.Adam(parameters, 1e-2), []
    for _ in range(50):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not name.startswith("feature_transfer.")
    }


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("options", [{}, {"at": "stage1"}, {"at": "stage2"}])
def test_a_plain_loop_on_a_frozen_backbone(options: dict[str, str]) -> None:
    model = make(**options)
    before, parameters = plain_state(model), train_transfer_only(model)
    losses = train(model, parameters)
    assert losses[-1] < 0.9 * losses[0]
    assert_same(before, plain_state(model))
    attached = {id(parameter) for parameter in transfers_of(model).parameters()}
    assert {id(p) for p in model.parameters() if p.grad is not None} == attached


def test_a_plain_loop_on_an_unfrozen_backbone() -> None:
    model = make()
    before = plain_state(model)
    losses = train(model, list(model.parameters()))
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(before["stage1.0.weight"], plain_state(model)["stage1.0.weight"])
    head = transfers_of(model)["pool"]
    assert isinstance(head, FeatureTransferHead)
    assert head.fc2.weight.any()


def test_autocast() -> None:
    model = make()
    parameters = train_transfer_only(model)
    losses = train(model, parameters, autocast=True)
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in parameters)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = make(at="stage1")
        model.checkpointed = checkpointed  # type: ignore[assignment]
        parameters = train_transfer_only(model)
        loss_of(model, torch.zeros(16, 5)).backward()
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_a_hook_inside_a_checkpointed_stage_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = make(at="stage2")
        model.checkpointed = checkpointed  # type: ignore[assignment]
        block = transfers_of(model)["stage2"]
        nn.init.constant_(block.project.weight, 0.01)  # type: ignore[union-attr, arg-type]
        parameters = train_transfer_only(model)
        loss_of(model, torch.zeros(16, 5)).backward()
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_inside_a_sequential() -> None:
    model = nn.Sequential(nn.Flatten(), FeatureTransferHead(768, 4, 16, dropout=0.0))
    target = HR.flatten(1)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(20):
        loss = loss_of(model, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_train_transfer_only_keeps_batch_norm_and_trains_dropout() -> None:
    model = make().train()
    assert len(train_transfer_only(model)) == 4
    assert [m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [False] * 2
    assert transfers_of(model)["pool"].training


def work(rank: int, folder: str) -> None:
    """One of two processes: half of the images each, gradients averaged by DDP."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    model = make()
    parameters = train_transfer_only(model)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer, half = torch.optim.SGD(parameters, 0.1), slice(8 * rank, 8 * rank + 8)
    for _ in range(5):
        loss = loss_of(parallel, torch.ones(8, 5), LR[half])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save([parameter.detach() for parameter in parameters], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_processes_under_ddp_train_as_one(tmp_path: Path) -> None:
    spawn(work, args=(str(tmp_path),), nprocs=2)
    model = make()
    start = copy.deepcopy(model)
    parameters = train_transfer_only(model)
    optimizer = torch.optim.SGD(parameters, 0.1)
    for _ in range(5):
        loss = loss_of(model, torch.ones(16, 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for one, two, alone in zip(*ranks, parameters, strict=True):
        assert torch.equal(one, two)
        assert torch.allclose(one, alone, atol=1e-5)
    assert not torch.equal(
        transfers_of(start).state_dict()["pool.fc2.weight"], parameters[2].detach()
    )
