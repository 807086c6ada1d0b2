from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from featxfer import (
    FeatureTransferHead,
    PseudoLabelTrainer,
    Recipe,
    fit_features_head,
    fit_head,
    kmeans,
)
from featxfer.training.heads import features_task, labels_task

HR = torch.randn(200, 10, generator=torch.Generator().manual_seed(5))
MIX = torch.randn(10, 10, generator=torch.Generator().manual_seed(6))
LR = HR @ MIX / 3 + torch.randn(200, 10, generator=torch.Generator().manual_seed(7)) / 10 + 1
RECIPE = Recipe(epochs=8, batch_size=32, learning_rate=0.05)


@pytest.mark.parametrize("output", ["clusters", "features"])
def test_bf16_multiplies_in_it_and_learns_the_same(output: str) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        head = FeatureTransferHead(10, 6, 64, output=output, dropout=0.0)
        kinds: set[torch.dtype] = set()
        head.fc1.register_forward_hook(lambda _, __, out, kinds=kinds: kinds.add(out.dtype))
        clustering = kmeans(HR, 6, seed=0)
        if output == "clusters":
            log = fit_head(head, HR, HR, clustering, recipe=RECIPE, precision=precision)
        else:
            log = fit_features_head(
                head, HR + 1, [HR], clustering, recipe=RECIPE, precision=precision
            )
        assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert {p.dtype for p in head.parameters()} == {torch.float32}
        found[precision] = log[-1].loss
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.1)


def test_features_heads_take_objectives() -> None:
    clustering = kmeans(HR, 6, seed=0)
    recipe = Recipe(epochs=30, learning_rate=3e-3, optimizer="adamw", schedule="one-cycle")
    good: list[dict[str, Any]] = [
        {"objective": "regression"},
        {"objective": "contrast"},
        {"objective": "labels"},
    ]
    for options in good:
        head = FeatureTransferHead(10, 6, 64)
        fit_features_head(head, HR, [LR], clustering, recipe=recipe, **options)
        before, after = (F.cosine_similarity(rows, HR).mean() for rows in (LR, head.transfer(LR)))
        assert float(after) > float(before) + 0.1, options
    bad: list[tuple[dict[str, Any], str]] = [
        ({"objective": "mse"}, "objective: got 'mse'"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            fit_features_head(FeatureTransferHead(10, 6, 8), HR, [LR], clustering, **options)


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ({}, {"precision": "fp16"}, "precision: got 'fp16'"),
        ({}, {"seed": -1}, "seed: got -1"),
        ({"clusters": 5}, {}, "centroids: got 6, wanted 5"),
    ],
)
def test_bad_arguments_leave_a_features_head_unchanged(
    made: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    head = FeatureTransferHead(**{"in_features": 10, "clusters": 6, "hidden_features": 8, **made})
    before = copy.deepcopy(head.state_dict())
    options = {"clustering": kmeans(HR, 6, seed=0), **options}
    with pytest.raises(ValueError, match=message):
        fit_features_head(head, HR, [LR], **options)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize("output", ["clusters", "features"])
def test_a_task_and_a_trainer_are_what_fitting_does(output: str) -> None:
    fitted, tasked = (FeatureTransferHead(10, 6, 16, output=output) for _ in range(2))
    clustering = kmeans(HR, 6, seed=0)
    if output == "clusters":
        fit_head(fitted, HR, LR, clustering, recipe=RECIPE, seed=3)
        pairs, objective = labels_task(tasked, HR, LR, clustering)
        assert torch.equal(pairs.inputs, LR)
    else:
        fit_features_head(fitted, HR, [LR], clustering, recipe=RECIPE, seed=3)
        pairs, objective = features_task(tasked, HR, [LR], clustering)
        assert torch.equal(pairs.targets, torch.cat([HR, HR]))
    PseudoLabelTrainer(tasked, RECIPE, objective=objective, seed=3).fit_rows(pairs)
    for name, value in tasked.state_dict().items():
        assert torch.equal(value, fitted.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "far"}, "assignment: got 'far'"),
        ({"lr": LR[:9]}, "hr, lr: got shapes"),
        ({"clustering": kmeans(HR, 5, seed=0)}, "centroids: got 5, wanted 6"),
    ],
)
def test_bad_arguments_leave_a_head_of_clusters_unchanged(
    options: dict[str, Any], message: str
) -> None:
    head = FeatureTransferHead(10, 6, 8, output="clusters")
    before = copy.deepcopy(head.state_dict())
    given = {"hr": HR, "lr": LR, "clustering": kmeans(HR, 6, seed=0), **options}
    with pytest.raises(ValueError, match=message):
        fit_head(head, **given)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    with pytest.raises(ValueError, match="head's output: got 'clusters'"):
        fit_features_head(head, HR, [LR], kmeans(HR, 6, seed=0))
