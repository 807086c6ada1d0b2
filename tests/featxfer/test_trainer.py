from __future__ import annotations

import copy
import dataclasses
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from featxfer import (
    CheckpointError,
    DivergenceError,
    EpochLog,
    FeatureTransferHead,
    PseudoLabelTrainer,
    Recipe,
    assign,
    fit_features_head,
    fit_head,
    kmeans,
    warm_start_head,
)

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(300, 10, generator=GENERATOR)
LABELS = assign(ROWS, torch.randn(6, 10, generator=GENERATOR))
RECIPE = Recipe(epochs=8, batch_size=32, learning_rate=0.05)


def new_head(seed: int = 0) -> FeatureTransferHead:
    return FeatureTransferHead(10, 6, 64, output="clusters", seed=seed)


def test_it_learns_the_labels() -> None:
    head = new_head()
    log = PseudoLabelTrainer(head, RECIPE).fit(ROWS, LABELS)
    assert len(log) == 8
    assert log[0].loss > 2 * log[-1].loss
    assert log[-1].label_accuracy > 0.95
    assert float((head(ROWS).argmax(1) == LABELS).float().mean()) > 0.95


@pytest.mark.parametrize("output", ["clusters", "features"])
def test_bf16_multiplies_in_it_and_learns_the_same(output: str) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        head = FeatureTransferHead(10, 6, 64, output=output, dropout=0.0)
        kinds: set[torch.dtype] = set()
        head.fc1.register_forward_hook(lambda _, __, out, kinds=kinds: kinds.add(out.dtype))
        clustering = kmeans(ROWS, 6, seed=0)
        if output == "clusters":
            log = fit_head(head, ROWS, ROWS, clustering, recipe=RECIPE, precision=precision)
        else:
            log = fit_features_head(
                head, ROWS + 1, [ROWS], clustering, recipe=RECIPE, precision=precision
            )
        assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert {p.dtype for p in head.parameters()} == {torch.float32}
        found[precision] = log[-1].loss
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.1)


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision: got 'fp16', wanted"):
        PseudoLabelTrainer(new_head(), precision="fp16")


def test_one_seed_gives_the_same_weights_bit_for_bit() -> None:
    heads = [new_head() for _ in range(3)]
    logs = [
        PseudoLabelTrainer(head, RECIPE, seed=seed).fit(ROWS, LABELS)
        for head, seed in zip(heads, (5, 5, 6), strict=True)
    ]
    first, same, other = (torch.cat([p.flatten() for p in h.parameters()]) for h in heads)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert [e.loss for e in logs[0]] == [e.loss for e in logs[1]]


def test_the_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    PseudoLabelTrainer(new_head(), RECIPE).fit(ROWS, LABELS)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_is_sgd_with_momentum_and_weight_decay() -> None:
    """Two updates against the rule written out."""
    head, recipe = new_head(), Recipe(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
    mine = {n: p.detach().clone().requires_grad_() for n, p in head.named_parameters()}
    velocity = {n: torch.zeros_like(p) for n, p in mine.items()}
    trainer = PseudoLabelTrainer(head, recipe)
    for part in (slice(0, 50), slice(50, 100)):
        loss, right = trainer.step(ROWS[part], LABELS[part])
        logits = torch.func.functional_call(head, mine, ROWS[part])
        expected = F.cross_entropy(logits, LABELS[part])
        torch.testing.assert_close(loss, expected.detach())
        assert int(right) == int((logits.argmax(1) == LABELS[part]).sum())
        gradients = torch.autograd.grad(expected, list(mine.values()))
        for (name, p), gradient in zip(mine.items(), gradients, strict=True):
            velocity[name] = 0.9 * velocity[name] + gradient + 0.01 * p.detach()
            mine[name] = (p.detach() - 0.1 * velocity[name]).requires_grad_()
    for name, p in head.named_parameters():
        torch.testing.assert_close(p.detach(), mine[name].detach(), rtol=1e-5, atol=1e-6)


def test_the_learning_rate_is_stepped_down() -> None:
    recipe = Recipe(epochs=8, learning_rate=1.0, steps=(0.5, 0.75), gamma=0.1)
    rates = [recipe.learning_rate_at(epoch) for epoch in range(8)]
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    small = Recipe(epochs=4, learning_rate=0.01)
    log = PseudoLabelTrainer(new_head(), small).fit(ROWS, LABELS)
    assert [e.learning_rate for e in log] == pytest.approx([0.01, 0.01, 0.001, 0.0001])


def test_every_row_is_seen_once_an_epoch() -> None:
    seen: list[Tensor] = []

    class Spy(FeatureTransferHead):
        def forward(self, features: Tensor) -> Tensor:
            seen.append(features[:, 0].clone())
            return super().forward(features)

    PseudoLabelTrainer(Spy(10, 6, 4), Recipe(epochs=2, batch_size=64)).fit(ROWS, LABELS)
    assert [len(s) for s in seen] == [1] + [64, 64, 64, 64, 44] * 2, "one row tells the width"
    for epoch in (seen[1:6], seen[6:]):
        assert torch.equal(torch.cat(epoch).sort().values, ROWS[:, 0].sort().values)


def test_the_callback_sees_each_epoch_and_may_stop() -> None:
    epochs: list[int] = []

    def stop_after_three(log: EpochLog) -> None:
        epochs.append(log.epoch)
        if log.epoch == 2:
            raise StopIteration

    head = new_head().eval()
    with pytest.raises(StopIteration):
        PseudoLabelTrainer(head, RECIPE).fit(ROWS, LABELS, callback=stop_after_three)
    assert epochs == [0, 1, 2]
    assert not head.training


def test_step_in_a_loop_of_ones_own_equals_fit() -> None:
    fitted, stepped = new_head(), new_head()
    recipe = Recipe(epochs=1, batch_size=300)
    PseudoLabelTrainer(fitted, recipe).fit(ROWS, LABELS)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    PseudoLabelTrainer(stepped, recipe).step(ROWS[order], LABELS[order])
    assert torch.equal(fitted.fc1.weight, stepped.fc1.weight)


def test_a_diverging_loss_stops_and_keeps_the_last_good_epoch() -> None:
    head = new_head()
    recipe = Recipe(epochs=50, learning_rate=1e20, momentum=0.0)
    with pytest.raises(
        DivergenceError, match=r"loss or weights are not finite at epoch 0, step \d"
    ):
        PseudoLabelTrainer(head, recipe).fit(ROWS, LABELS)
    assert torch.equal(head.fc1.weight, new_head().fc1.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs: got 0, wanted an int >= 1"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"learning_rate": 0.0}, r"learning_rate: got 0\.0, wanted > 0"),
        ({"learning_rate": math.nan}, "learning_rate: got nan"),
        ({"momentum": 1.0}, r"momentum: got 1\.0, wanted in \[0, 1\)"),
        ({"weight_decay": -1.0}, r"weight_decay: got -1\.0, wanted >= 0"),
        ({"steps": (1.5,)}, r"steps: got \(1\.5,\), wanted shares in \(0, 1\)"),
        ({"gamma": 0.0}, r"gamma: got 0\.0, wanted > 0"),
    ],
)
def test_bad_recipes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


@pytest.mark.parametrize(
    "labels", [LABELS[:-1], LABELS.int(), LABELS - 1, LABELS[:, None]], ids=str
)
def test_bad_labels_leave_the_head_unchanged(labels: Tensor) -> None:
    head = new_head()
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match=r"labels: got .* wanted int64 \(300,\), none negative"):
        PseudoLabelTrainer(head, RECIPE).fit(ROWS, labels)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_a_label_without_an_output_is_refused() -> None:
    head = new_head().train()
    with pytest.raises(ValueError, match="labels: got 6, wanted labels below 6"):
        PseudoLabelTrainer(head, RECIPE).fit(ROWS, LABELS + 1)
    assert head.training


def test_weights_that_overflow_in_the_last_step_are_noticed() -> None:
    head, recipe = new_head(), Recipe(epochs=1, batch_size=300, learning_rate=1e38)
    with pytest.raises(DivergenceError, match="loss or weights are not finite at epoch 0, step 1"):
        PseudoLabelTrainer(head, recipe).fit(ROWS * 100, LABELS)
    assert torch.equal(head.fc1.weight, new_head().fc1.weight)


def test_bad_rows_are_named() -> None:
    rows = ROWS.clone()
    rows[17, 3] = math.inf
    with pytest.raises(ValueError, match="features: row 17 has NaN or infinity"):
        PseudoLabelTrainer(new_head(), RECIPE).fit(rows, LABELS)


HR = torch.randn(200, 10, generator=torch.Generator().manual_seed(5))
MIX = torch.randn(10, 10, generator=torch.Generator().manual_seed(6))
LR = HR @ MIX / 3 + torch.randn(200, 10, generator=torch.Generator().manual_seed(7)) / 10 + 1


@torch.no_grad()
def test_a_warm_start_is_ridge_regression() -> None:
    """Against the closed form with the penalty that it says it took, and a generous rank."""
    head = FeatureTransferHead(10, 3, 21).eval()
    head.set_input_statistics(LR)
    penalty = warm_start_head(head, LR, HR)
    z = ((LR - head.input_mean) / head.input_std).double()
    centred, change = z - z.mean(0), (LR - HR).double()
    weights = torch.linalg.solve(
        centred.T @ centred + penalty * torch.eye(10).double(),
        centred.T @ (change - change.mean(0)),
    )
    wanted = LR - (centred @ weights + change.mean(0)).float()
    torch.testing.assert_close(head(LR), wanted, rtol=1e-4, atol=1e-4)
    assert float((head(LR) - HR).square().mean()) < 0.1 * float((LR - HR).square().mean())


@torch.no_grad()
def test_a_narrow_warm_start_keeps_the_directions_that_matter() -> None:
    errors = []
    for hidden in (1, 4, 8, 20):
        head = FeatureTransferHead(10, 3, hidden).eval()
        head.set_input_statistics(LR)
        warm_start_head(head, LR, HR)
        errors.append(float((head(LR) - HR).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1]


@torch.no_grad()
def test_a_warm_start_from_fewer_rows_than_features() -> None:
    head = FeatureTransferHead(10, 3, 64).eval()
    head.set_input_statistics(LR[:6])
    warm_start_head(head, LR[:6], HR[:6])
    after, before = ((rows - HR[:6]).square().mean() for rows in (head(LR[:6]), LR[:6]))
    assert float(after) < float(before)


def test_a_warm_start_wants_a_residual_head_with_relu() -> None:
    with pytest.raises(ValueError, match="head's output: got 'clusters'"):
        warm_start_head(new_head(), LR, HR)
    with pytest.raises(ValueError, match="head's activation: got 'gelu'"):
        warm_start_head(FeatureTransferHead(10, activation="gelu"), LR, HR)


def test_features_heads_take_objectives_targets_and_several_clusterings() -> None:
    clusterings = [kmeans(HR, k, seed=0) for k in (6, 3)]
    recipe = Recipe(epochs=30, learning_rate=3e-3, optimizer="adamw", schedule="one-cycle")
    good: list[dict[str, Any]] = [
        {"objective": "regression"},
        {"objective": "contrast"},
        {"objective": "labels"},
        {"warm_start": True},
        {"targets": [HR]},
    ]
    for options in good:
        head = FeatureTransferHead(10, 6, 64)
        fit_features_head(head, HR, [LR], clusterings, recipe=recipe, **options)
        before, after = (F.cosine_similarity(rows, HR).mean() for rows in (LR, head.transfer(LR)))
        assert float(after) > float(before) + 0.1, options
    bad: list[tuple[dict[str, Any], str]] = [
        ({"objective": "mse"}, "objective: got 'mse'"),
        ({"targets": []}, "targets: got 0 arrays for 1 of lr"),
        ({"targets": [HR[:9]]}, "9"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            fit_features_head(FeatureTransferHead(10, 6, 8), HR, [LR], clusterings, **options)


HELD_OUT = (ROWS[200:], LABELS[200:])


def test_the_best_epoch_on_held_out_rows_is_kept_and_patience_counts() -> None:
    """Few rows and a high rate: the held-out loss rises again."""
    recipe = Recipe(epochs=60, batch_size=16, learning_rate=0.3, weight_decay=0, steps=(0.99,))
    last, best, early = new_head(), new_head(), new_head()
    PseudoLabelTrainer(last, recipe).fit(ROWS[:40], LABELS[:40])
    log = PseudoLabelTrainer(best, recipe).fit(ROWS[:40], LABELS[:40], held_out=HELD_OUT)
    losses = [entry.held_out_loss or 0.0 for entry in log]
    assert min(losses) > 0
    with torch.no_grad():
        found = [float(F.cross_entropy(head(ROWS[200:]), LABELS[200:])) for head in (best, last)]
    assert found[0] == pytest.approx(min(losses), rel=1e-5)
    assert found[0] < found[1]
    patient = dataclasses.replace(recipe, patience=2)
    short = PseudoLabelTrainer(early, patient).fit(ROWS[:40], LABELS[:40], held_out=HELD_OUT)
    assert len(short) < len(log)
    assert [entry.held_out_loss for entry in short] == losses[: len(short)]
    assert losses.index(min(losses[: len(short)])) == len(short) - 3


class InMemory:
    """Rows of a trainer, by the protocol."""

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(300, generator=generator)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return ROWS[indices], LABELS[indices]


def test_training_goes_on_from_a_checkpoint_to_the_same_weights(tmp_path: Path) -> None:
    def make() -> PseudoLabelTrainer:
        head = FeatureTransferHead(10, 6, 16, output="clusters", dropout=0.5)
        recipe = dataclasses.replace(RECIPE, optimizer="adamw", schedule="one-cycle")
        return PseudoLabelTrainer(head, recipe)

    def stop(log: EpochLog) -> None:
        if log.epoch == 4:
            raise KeyboardInterrupt

    whole, resumed, path = make(), make(), tmp_path / "c.safetensors"
    wanted = whole.fit_rows(InMemory(), held_out=InMemory())
    with pytest.raises(KeyboardInterrupt):
        make().fit_rows(InMemory(), held_out=InMemory(), checkpoint=path, callback=stop)
    log = resumed.fit_rows(InMemory(), held_out=InMemory(), checkpoint=path)
    assert [entry.loss for entry in log] == [entry.loss for entry in wanted]
    for first, second in zip(whole.head.parameters(), resumed.head.parameters(), strict=True):
        assert torch.equal(first, second)
    again = make()
    assert again.fit_rows(InMemory(), checkpoint=path) == log
    with pytest.raises(CheckpointError, match="no checkpoint of this training"):
        PseudoLabelTrainer(new_head(), RECIPE).fit_rows(InMemory(), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="delete it to start anew"):
        make().fit_rows(InMemory(), checkpoint=path)


def test_frozen_parameters_are_left_alone() -> None:
    head = new_head()
    head.fc1.requires_grad_(False)
    before = head.fc1.weight.clone()
    PseudoLabelTrainer(head, RECIPE).fit(ROWS, LABELS)
    assert torch.equal(head.fc1.weight, before)
    assert not torch.equal(head.fc2.weight, new_head().fc2.weight)
    with pytest.raises(ValueError, match="head: got no parameter that asks for a gradient"):
        PseudoLabelTrainer(head.requires_grad_(False), RECIPE)


@dataclasses.dataclass(frozen=True)
class InOrder:
    """Rows as they are; of several processes each takes its share of every batch."""

    inputs: Tensor
    targets: Tensor

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.arange(len(self.inputs))

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[indices], self.targets[indices]


def train_in_order(head: nn.Module, rank: int, world_size: int) -> None:
    """40 rows in batches of 8, or one process's share of them."""
    generator = torch.Generator().manual_seed(3)
    rows, labels = torch.randn(40, 6, generator=generator), torch.arange(40) % 4
    mine = InOrder(rows[rank::world_size], labels[rank::world_size])
    recipe = Recipe(epochs=3, batch_size=8 // world_size, learning_rate=0.1)
    PseudoLabelTrainer(head, recipe).fit_rows(mine)


def train_distributed(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    head = FeatureTransferHead(6, 4, 8, output="clusters", seed=rank)
    train_in_order(DistributedDataParallel(head), rank, 2)
    dist.destroy_process_group()
    safetensors.torch.save_file(head.state_dict(), folder / f"{rank}.safetensors")


def test_two_processes_train_the_head_that_one_does(tmp_path: Path) -> None:
    """`DistributedDataParallel`: each has its share of the rows, and all the same weights."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=train_distributed, args=(r, tmp_path)) for r in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    alone = FeatureTransferHead(6, 4, 8, output="clusters", seed=0)
    before = {name: value.clone() for name, value in alone.state_dict().items()}
    train_in_order(alone, 0, 1)
    found = [safetensors.torch.load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for name, value in alone.state_dict().items():
        assert found[0][name].equal(found[1][name])
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-6)
    assert not before["fc1.weight"].equal(alone.state_dict()["fc1.weight"])
