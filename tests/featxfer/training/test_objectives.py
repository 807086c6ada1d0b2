from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from featxfer import OBJECTIVES
from featxfer.training.objectives import (
    InstanceContrast,
    LabelCrossEntropy,
    PairedRegression,
    PrototypeDistillation,
    make_objective,
)

GENERATOR = torch.Generator().manual_seed(0)
HR = torch.randn(9, 4, generator=GENERATOR)
LR = HR + torch.randn(9, 4, generator=GENERATOR)
CENTROIDS = torch.randn(3, 4, generator=GENERATOR)


def test_cross_entropy_is_the_textbooks() -> None:
    logits, labels = LR[:, :3], torch.arange(9) % 3
    loss, right = LabelCrossEntropy()(logits, labels)
    by_hand = -sum(
        float(row[label] - row.exp().sum().log()) for row, label in zip(logits, labels, strict=True)
    )
    assert float(loss) == pytest.approx(by_hand / 9)
    assert int(right) == sum(
        int(row.argmax()) == int(y) for row, y in zip(logits, labels, strict=True)
    )


def test_distillation_is_the_sum_of_its_terms_by_hand() -> None:
    objective = PrototypeDistillation(
        CENTROIDS, 2.0, temperature=0.5, cosine_weight=3.0, distance_weight=0.25
    )
    loss, right = objective(LR, HR)
    total, hits = 0.0, 0
    for lr, hr in zip(LR, HR, strict=True):
        cosines = [[float(F.cosine_similarity(x, c, dim=0)) for c in CENTROIDS] for x in (lr, hr)]
        p, q = (
            [math.exp(c / 0.5) / sum(math.exp(o / 0.5) for o in row) for c in row]
            for row in cosines
        )
        total += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        total += 3 * (1 - float(F.cosine_similarity(lr, hr, dim=0)))
        total += 0.25 * float((lr - hr).square().sum()) / 2
        hits += p.index(max(p)) == q.index(max(q))
    assert float(loss) == pytest.approx(total / 9, rel=1e-4)
    assert int(right) == hits


def test_distillation_is_zero_at_the_target_and_falls_towards_it() -> None:
    objective = PrototypeDistillation(CENTROIDS, 1.0)
    losses = [float(objective(HR + (LR - HR) * share, HR)[0]) for share in (1.0, 0.5, 0.1, 0.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(0, abs=1e-5)


def test_prototypes_have_no_length() -> None:
    short, long = (PrototypeDistillation(CENTROIDS * scale, 1.0) for scale in (0.1, 10))
    assert float(short(LR, HR)[0]) == pytest.approx(float(long(LR, HR)[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variance": 0.0}, r"variance: got 0\.0, wanted > 0"),
        ({"temperature": -1}, "temperature: got -1, wanted > 0"),
        ({"cosine_weight": -0.1}, r"cosine_weight: got -0\.1, wanted >= 0"),
        ({"distance_weight": math.nan}, "distance_weight: got nan"),
        ({"centroids": CENTROIDS * 0}, "centroids: got one of zero"),
        ({"centroids": CENTROIDS / 0}, "centroids: row 0 has NaN or infinity"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrototypeDistillation(**{"centroids": CENTROIDS, "variance": 1.0, **arguments})


def test_targets_are_checked_before_training() -> None:
    objective = PrototypeDistillation(CENTROIDS, 1.0)
    objective.check(LR[:1], HR, 9)
    with pytest.raises(ValueError, match=r"targets: got \(8, 4\) for 9 rows"):
        objective.check(LR[:1], HR[:8], 9)
    with pytest.raises(ValueError, match="targets: got width 3, wanted 4"):
        objective.check(LR[:1], HR[:, :3], 9)
    with pytest.raises(ValueError, match="targets: row 0 has NaN"):
        objective.check(LR[:1], HR / 0, 9)
    with pytest.raises(ValueError, match="labels: got 3, wanted labels below 3"):
        LabelCrossEntropy().check(LR[:1, :3], torch.arange(4), 4)


def test_hard_labels_are_cross_entropy_on_the_nearest_centroid() -> None:
    objective = PrototypeDistillation(
        CENTROIDS, 1.0, temperature=0.2, cosine_weight=0, distance_weight=0, hard=True
    )
    unit, wanted, prototypes = (F.normalize(rows, dim=1) for rows in (LR, HR, CENTROIDS))
    expected = F.cross_entropy(unit @ prototypes.T / 0.2, (wanted @ prototypes.T).argmax(1))
    assert float(objective(LR, HR)[0]) == pytest.approx(float(expected), rel=1e-5)


def test_regression_by_hand() -> None:
    loss, right = PairedRegression(2.0, cosine_weight=3.0, distance_weight=0.5)(LR, HR)
    cosines = F.cosine_similarity(LR, HR)
    expected = 3 * (1 - cosines.mean()) + 0.5 * (LR - HR).square().sum(1).mean() / 2
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    nearest = [max(range(9), key=lambda j: float(F.cosine_similarity(x, HR[j], dim=0))) for x in LR]
    assert int(right) == sum(j == i for i, j in enumerate(nearest))


def test_contrast_by_hand() -> None:
    options: dict[str, Any] = {"cosine_weight": 0.0, "distance_weight": 0.0}
    loss, _ = InstanceContrast(1.0, temperature=0.3, **options)(LR, HR)
    total = 0.0
    for i, x in enumerate(LR):
        scores = [math.exp(float(F.cosine_similarity(x, h, dim=0)) / 0.3) for h in HR]
        total -= math.log(scores[i] / sum(scores))
    assert float(loss) == pytest.approx(total / 9, rel=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_by_name_is_lowest_at_the_target(name: str) -> None:
    objective = make_objective(name, CENTROIDS, 1.0)
    objective.check(LR[:1], HR, 9)
    moved = LR.clone().requires_grad_()
    loss, _ = objective(moved, HR)
    loss.backward()
    assert moved.grad is not None
    assert torch.isfinite(moved.grad).all()
    assert float(objective(HR, HR)[0]) < float(loss.detach())
    with pytest.raises(ValueError, match="targets: got"):
        objective.check(LR[:1], HR[:4], 9)
    with pytest.raises(ValueError, match=r"variance: got 0\.0, wanted > 0"):
        make_objective(name, CENTROIDS, 0.0)


def test_unknown_objectives_and_bad_temperatures() -> None:
    with pytest.raises(ValueError, match="objective: got 'mse'"):
        make_objective("mse", CENTROIDS, 1.0)
    with pytest.raises(ValueError, match="temperature: got 0, wanted > 0"):
        InstanceContrast(1.0, temperature=0)
