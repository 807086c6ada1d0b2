"""The controls of `benchmarks.gap`, against what the library gives and against the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gap.controls import SeveralPrototypes, train_head
from featxfer import FeatureTransferHead, Recipe, fit_features_head, kmeans
from featxfer.checks import variance_of
from featxfer.training.objectives import PrototypeDistillation, make_objective

HR = torch.randn(200, 10, generator=torch.Generator().manual_seed(5))
MIX = torch.randn(10, 10, generator=torch.Generator().manual_seed(6))
LR = HR @ MIX / 3 + torch.randn(200, 10, generator=torch.Generator().manual_seed(7)) / 10 + 1
ROWS = torch.cat([LR, HR]), torch.cat([HR, HR])
RECIPE = Recipe(epochs=30, learning_rate=3e-3, optimizer="adamw", schedule="one-cycle")
CLUSTERINGS = [kmeans(HR, k, seed=0).centroids for k in (6, 3)]


def test_several_clusterings_count_by_their_mean() -> None:
    alone = [PrototypeDistillation(centroids, 1.0)(LR, HR) for centroids in CLUSTERINGS]
    loss, matches = SeveralPrototypes(CLUSTERINGS, 1.0)(LR, HR)
    assert float(loss) == pytest.approx(sum(float(part) for part, _ in alone) / 2, rel=1e-5)
    assert int(matches) == int(alone[0][1])


@pytest.mark.parametrize("options", [{}, {"warm_start": True}])
def test_heads_come_nearer_to_hr(options: dict[str, Any]) -> None:
    head = FeatureTransferHead(10, 6, 64)
    objective = SeveralPrototypes(CLUSTERINGS, variance_of("hr", HR))
    train_head(head, ROWS, CLUSTERINGS[0], objective, recipe=RECIPE, **options)
    before, after = (F.cosine_similarity(rows, HR).mean() for rows in (LR, head.transfer(LR)))
    assert float(after) > float(before) + 0.1


@pytest.mark.parametrize("name", ["prototypes", "labels"])
def test_pairs_and_one_clustering_give_the_librarys_head(name: str) -> None:
    ours, theirs = (FeatureTransferHead(10, 6, 64) for _ in range(2))
    objective = make_objective(name, CLUSTERINGS[0], variance_of("hr", HR))
    train_head(ours, ROWS, CLUSTERINGS[0], objective, recipe=RECIPE)
    fit_features_head(theirs, HR, [LR], kmeans(HR, 6, seed=0), objective=name, recipe=RECIPE)
    for key, value in theirs.state_dict().items():
        assert value.equal(ours.state_dict()[key]), key


def test_one_of_several_is_the_default_objective() -> None:
    several = SeveralPrototypes(CLUSTERINGS[:1], 2.0)(LR, HR)[0]
    assert several.equal(PrototypeDistillation(CLUSTERINGS[0], 2.0)(LR, HR)[0])
