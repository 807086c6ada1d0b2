"""A head trained on HR and LR features of the same images: the paper's way and ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from featxfer.checks import ArrayLike, as_features, check_choice, check_paired, variance_of
from featxfer.modules.head import FeatureTransferHead
from featxfer.training.objectives import LabelCrossEntropy, Objective, make_objective
from featxfer.training.pairs import TensorPairs
from featxfer.training.pseudo_labels import Clustering, pseudo_labels
from featxfer.training.recipe import FEATURES_RECIPE, Recipe
from featxfer.training.state import EpochLog
from featxfer.training.trainer import PseudoLabelTrainer


def fit_head(
    head: FeatureTransferHead,
    hr: ArrayLike,
    lr: ArrayLike,
    clustering: Clustering,
    *,
    labels: str = "nearest",
    recipe: Recipe | None = None,
    seed: int = 0,
    precision: str = "fp32",
    callback: Callable[[EpochLog], object] | None = None,
) -> list[EpochLog]:
    """Trains the paper's head on the pseudo-labels of a clustering; leaves the centroids in it.

    Arguments up to `labels` and errors as `labels_task`, the others as `PseudoLabelTrainer` and its
    `fit`; the recipe has no `patience`, which counts on held-out rows.
    """
    trainer = PseudoLabelTrainer(head, recipe, seed=seed, precision=precision)
    trainer.recipe.check_held_out(None)
    pairs, trainer.objective = labels_task(head, hr, lr, clustering, labels=labels)
    return trainer.fit_rows(pairs, callback=callback)


def labels_task(
    head: FeatureTransferHead,
    hr: ArrayLike,
    lr: ArrayLike,
    clustering: Clustering,
    *,
    labels: str = "nearest",
) -> tuple[TensorPairs, Objective]:
    """What the paper's head is trained on, on its device; leaves the centroids in it.

    Args:
        head: output "clusters", k of them; its input statistics are as the caller set them.
        hr: HR features `(n, d)`, as they come: the head scales them (`FeatureTransferHead.scale`).
        lr: LR features `(n, d)` of the same images, as they come.
        clustering: of the HR features as the head scales them, k clusters.
        labels: "nearest" (the paper) or "paired", see `pseudo_labels`.

    Raises:
        ValueError: another output, other shapes, NaN or infinity, as `pseudo_labels` and
            `FeatureTransferHead.set_centroids`. The head is then unchanged.
    """
    check_choice("head's output", head.output, ("clusters",))
    hr, lr = (as_features(name, rows) for name, rows in (("hr", hr), ("lr", lr)))
    check_paired(hr, lr)
    targets = pseudo_labels(head.scale(hr), head.scale(lr), clustering.centroids, labels)
    head.set_centroids(clustering.centroids)
    device = head.fc1.weight.device
    return TensorPairs(lr.to(device), targets.to(device)), LabelCrossEntropy()


def fit_features_head(
    head: FeatureTransferHead,
    hr: ArrayLike,
    lr: Sequence[ArrayLike],
    clustering: Clustering,
    *,
    objective: str = "prototypes",
    recipe: Recipe | None = None,
    seed: int = 0,
    precision: str = "fp32",
    callback: Callable[[EpochLog], object] | None = None,
) -> list[EpochLog]:
    """Trains a head with output "features" towards the HR features of the same images (ours).

    Arguments up to `objective` and errors as `features_task`, others as `PseudoLabelTrainer` and
    its `fit`; the recipe, by default `FEATURES_RECIPE`, has no `patience`.
    """
    trainer = PseudoLabelTrainer(head, recipe or FEATURES_RECIPE, seed=seed, precision=precision)
    trainer.recipe.check_held_out(None)
    pairs, trainer.objective = features_task(head, hr, lr, clustering, objective=objective)
    return trainer.fit_rows(pairs, callback=callback)


def features_task(
    head: FeatureTransferHead,
    hr: ArrayLike,
    lr: Sequence[ArrayLike],
    clustering: Clustering,
    *,
    objective: str = "prototypes",
) -> tuple[TensorPairs, Objective]:
    """What a head with output "features" is trained on, on its device (ours).

    HR features are among the inputs as well, with themselves as targets, so that HR images come
    out as they went in. Leaves the inputs' statistics and the centroids in the head.

    Args:
        head: output "features", as many clusters as the clustering.
        hr: HR features `(n, d)`, as they come.
        lr: LR features `(n, d)` of the same images, one array a degradation, at least one.
        clustering: of the HR features or of their directions.
        objective: a name of `featxfer.training.objectives.OBJECTIVES`.

    Raises:
        ValueError: another output, other shapes, NaN or infinity, HR features without variance, an
            unknown objective. The head is then unchanged.
    """
    check_choice("head's output", head.output, ("features",))
    device = head.fc1.weight.device
    wanted = as_features("hr", hr, width=head.in_features).to(device)
    views = [
        as_features(f"lr[{i}]", rows, width=head.in_features).to(device)
        for i, rows in enumerate(lr)
    ]
    if not views:
        raise ValueError("lr: got none, wanted the LR features of at least one degradation")
    for view in views:
        check_paired(wanted, view)
    goal = make_objective(objective, clustering.centroids, variance_of("hr", wanted))
    inputs, targets = torch.cat([*views, wanted]), torch.cat([wanted] * (len(views) + 1))
    head.set_centroids(clustering.centroids)
    head.set_input_statistics(inputs)
    return TensorPairs(inputs, targets), goal
