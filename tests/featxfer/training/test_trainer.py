from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featxfer import (
    DivergenceError,
    EpochLog,
    FeatureTransferHead,
    PseudoLabelTrainer,
    Recipe,
    assign,
    fit_features_head,
    fit_head,
    kmeans,
)

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(300, 10, generator=GENERATOR)
LABELS = assign(ROWS, torch.randn(6, 10, generator=GENERATOR))
HELD_OUT = (ROWS[200:], LABELS[200:])
RECIPE = Recipe(epochs=8, batch_size=32, learning_rate=0.05)


def new_head(seed: int = 0) -> FeatureTransferHead:
    return FeatureTransferHead(10, 6, 64, output="clusters", seed=seed)


def test_it_learns_the_labels() -> None:
    head = new_head()
    log = PseudoLabelTrainer(head, RECIPE).fit(ROWS, LABELS)
    assert len(log) == 8
    assert log[0].loss > 2 * log[-1].loss
    assert log[-1].match_rate > 0.95
    assert float((head(ROWS).argmax(1) == LABELS).float().mean()) > 0.95


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


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a global generator was set or read")


def test_the_global_random_state_is_neither_read_nor_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread draws from it meanwhile, and draws what it would without the training."""

    def fit(callback: Callable[[EpochLog], object]) -> Tensor:
        head: Any = FeatureTransferHead(10, 6, 64, output="clusters", dropout=0.5)
        PseudoLabelTrainer(head, RECIPE).fit(ROWS, LABELS, held_out=HELD_OUT, callback=callback)
        weight: Tensor = head.fc1.weight
        return weight

    alone = fit(lambda _: None)
    states: list[Tensor] = []
    torch.manual_seed(11)
    states.append(torch.get_rng_state())
    wanted = [torch.randn(3) for _ in range(RECIPE.epochs)]
    torch.manual_seed(11)
    for owner, name in (
        (torch, "manual_seed"),
        (torch, "set_rng_state"),
        (torch.random, "manual_seed"),
        (torch.random, "fork_rng"),
        (torch.cuda, "manual_seed_all"),
        (torch.cuda, "set_rng_state"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    drawn: list[Tensor] = []

    def draw(_: EpochLog) -> None:
        states.append(torch.get_rng_state())
        thread = threading.Thread(target=lambda: drawn.append(torch.randn(3)))
        thread.start()
        thread.join()
        states.append(torch.get_rng_state())

    assert torch.equal(fit(draw), alone)
    assert torch.equal(torch.stack(drawn), torch.stack(wanted))
    assert all(torch.equal(*pair) for pair in zip(states[::2], states[1::2], strict=False))


def test_trainings_in_two_threads_at_once_are_what_each_is_alone() -> None:
    def fit(seed: int) -> Tensor:
        head: Any = FeatureTransferHead(10, 6, 64, output="clusters", dropout=0.5)
        PseudoLabelTrainer(head, RECIPE, seed=seed).fit(ROWS, LABELS)
        weight: Tensor = head.fc1.weight
        return weight

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(fit, (1, 2, 3, 4)))
    for seed, weight in enumerate(together, start=1):
        assert torch.equal(weight, fit(seed))


def test_layers_that_draw_from_the_global_random_state_are_told() -> None:
    module: Any = nn.Sequential(nn.Linear(10, 6), nn.Dropout(0.1))
    with pytest.warns(UserWarning, match="head: 1 draws from torch's global generator"):
        PseudoLabelTrainer(module, Recipe(epochs=1)).fit(ROWS, LABELS)
    module[1].p = 0.0
    PseudoLabelTrainer(module, Recipe(epochs=1)).fit(ROWS, LABELS)


def test_dropout_hangs_on_the_seed_and_the_heads_own_generator_stays() -> None:
    weights = []
    for seed, own in ((1, 0), (1, 5), (2, 0)):
        head = FeatureTransferHead(10, 6, 64, output="clusters", dropout=0.5)
        head.generator.manual_seed(own)
        generator, state = head.generator, head.generator.get_state()
        recipe = Recipe(epochs=1, batch_size=300)
        PseudoLabelTrainer(head, recipe, seed=seed).fit_rows(InOrder(ROWS, LABELS))
        assert head.generator is generator
        assert torch.equal(generator.get_state(), state)
        weights.append(head.fc1.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_torchs_default_device_does_not_matter() -> None:
    """It is where the head is not: "meta" stands for a GPU."""

    heads = [FeatureTransferHead(10, 6, 64), FeatureTransferHead(10, 6, 64)]
    clustering = kmeans(HR, 6, seed=0)
    labelled = [new_head(), new_head()]
    for device, head, other in zip(("cpu", "meta"), heads, labelled, strict=True):
        with torch.device(device):
            fit_features_head(head, HR, [LR], clustering, recipe=RECIPE)
            PseudoLabelTrainer(other, RECIPE).fit(ROWS, LABELS, held_out=HELD_OUT)
    assert torch.equal(heads[0].fc1.weight, heads[1].fc1.weight)
    assert torch.equal(labelled[0].fc1.weight, labelled[1].fc1.weight)
    assert heads[0].fc2.weight.any()


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
    with pytest.raises(ValueError, match="held_out: labels: got 6, wanted labels below 6"):
        PseudoLabelTrainer(head, RECIPE).fit(ROWS, LABELS, held_out=(ROWS, LABELS + 1))
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


@dataclasses.dataclass(frozen=True)
class InOrder:
    """Rows as they are, by the protocol."""

    inputs: Tensor
    targets: Tensor

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.arange(len(self.inputs))

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[indices], self.targets[indices]


@dataclasses.dataclass(frozen=True)
class Spoiling(InOrder):
    """Rows that become NaN after they were taken so many times."""

    times: int
    taken: list[int] = dataclasses.field(default_factory=list)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.taken.append(len(indices))
        inputs, targets = super().take(indices)
        return inputs + (math.nan if len(self.taken) > self.times else 0), targets


@pytest.mark.parametrize(
    ("held_out", "error", "message"),
    [
        (Spoiling(*HELD_OUT, 0), ValueError, "held_out: got a loss of nan before training"),
        (Spoiling(*HELD_OUT, 1), DivergenceError, "the held-out loss is not finite after epoch 0"),
        (InOrder(ROWS[:0], LABELS[:0]), ValueError, "held_out: got no rows"),
    ],
)
def test_held_out_rows_that_judge_nothing_are_told(
    held_out: InOrder, error: type[Exception], message: str
) -> None:
    head = new_head()
    with pytest.raises(error, match=message):
        PseudoLabelTrainer(head, RECIPE).fit_rows(InOrder(ROWS, LABELS), held_out=held_out)
    assert torch.equal(head.fc1.weight, new_head().fc1.weight)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows: got \[0\] rows in 1 processes, wanted some"):
        PseudoLabelTrainer(new_head(), RECIPE).fit_rows(InOrder(ROWS[:0], LABELS[:0]))


def test_patience_without_held_out_rows_is_refused() -> None:
    patient = dataclasses.replace(RECIPE, patience=3)
    head, residual = new_head(), FeatureTransferHead(10, 6, 8)
    clustering = kmeans(HR, 6, seed=0)
    trainer = PseudoLabelTrainer(head, patient)
    fits: list[Callable[[], object]] = [
        lambda: trainer.fit(ROWS, LABELS),
        lambda: trainer.fit_rows(InOrder(ROWS, LABELS)),
        lambda: fit_head(head, HR, LR, clustering, recipe=patient),
        lambda: fit_features_head(residual, HR, [LR], clustering, recipe=patient),
    ]
    for fit in fits:
        with pytest.raises(ValueError, match="recipe: got patience=3 without held_out rows"):
            fit()
    assert not head.centroids.any()
    assert not residual.centroids.any()


def test_the_best_epochs_running_statistics_are_kept_with_its_weights() -> None:
    module: Any = nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 6))
    found: list[tuple[float, Tensor]] = []

    def look(log: EpochLog) -> None:
        found.append((log.held_out_loss or 0, module[0].running_mean.clone()))

    recipe = Recipe(epochs=20, batch_size=16, learning_rate=0.3, weight_decay=0, steps=())
    held_out = (ROWS[200:] + 2, LABELS[200:])
    PseudoLabelTrainer(module, recipe).fit(
        ROWS[:32] + 2, LABELS[:32], held_out=held_out, callback=look
    )
    best = min(range(20), key=lambda epoch: found[epoch][0])
    assert best < 19
    assert torch.equal(module[0].running_mean, found[best][1])


def test_each_layer_is_in_its_former_mode_after() -> None:
    module: Any = nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 6)).train()
    module[0].eval()
    modes: list[list[bool]] = []

    def look(_: EpochLog) -> None:
        modes.append([part.training for part in module.modules()])

    PseudoLabelTrainer(module, Recipe(epochs=1)).fit(ROWS, LABELS, callback=look)
    assert modes == [[True] * 3]
    assert [part.training for part in module.modules()] == [True, False, True]


def test_bad_seeds_and_targets_are_told() -> None:
    with pytest.raises(ValueError, match=r"seed: got \d+, wanted an int below 2\*\*63"):
        PseudoLabelTrainer(new_head(), seed=2**63)
    PseudoLabelTrainer(new_head(), Recipe(epochs=1), seed=2**63 - 1).fit(ROWS, LABELS)
    with pytest.raises(TypeError, match=r"targets: got list, wanted a torch\.Tensor"):
        PseudoLabelTrainer(new_head()).fit(ROWS, LABELS.tolist())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="held_out_batch: got 0, wanted an int >= 1"):
        PseudoLabelTrainer(new_head()).fit_rows(InOrder(ROWS, LABELS), held_out_batch=0)


def test_frozen_parameters_are_left_alone() -> None:
    head = new_head()
    head.fc1.requires_grad_(False)
    before = head.fc1.weight.clone()
    PseudoLabelTrainer(head, RECIPE).fit(ROWS, LABELS)
    assert torch.equal(head.fc1.weight, before)
    assert not torch.equal(head.fc2.weight, new_head().fc2.weight)
    with pytest.raises(ValueError, match="head: got no parameter that asks for a gradient"):
        PseudoLabelTrainer(head.requires_grad_(False), RECIPE)
