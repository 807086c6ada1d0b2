from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featxfer import (
    DivergenceError,
    EpochLog,
    FeatureTransferHead,
    PseudoLabelTrainer,
    Recipe,
    assign,
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
