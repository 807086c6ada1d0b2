"""Heads that the library does not train, built from its core: the tables' controls.

They are worth nothing beyond the default (README): several clusterings, a start from ridge
regression, and targets without pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.ridge import warm_start_head
from benchmarks.common.study import Study, small
from benchmarks.gap.unpaired import unpaired_targets
from featxfer import (
    FEATURES_RECIPE,
    Degradation,
    EpochLog,
    FeatureTransferHead,
    Images,
    PseudoLabelTrainer,
    Recipe,
    fill_stores,
    kmeans,
)
from featxfer.checks import variance_of
from featxfer.evaluation.pairs import HeldOutPairs, report_pairs
from featxfer.training.objectives import Objective, PairedRegression, PrototypeDistillation
from featxfer_integrations import backbone_of

HELD_OUT = 0.1
"""Share of the images that judges a head, as `fit_transfer` has it."""


class SeveralPrototypes(PairedRegression):
    """`PrototypeDistillation` with the prototypes of several clusterings.

    The Kullback-Leibler divergence is a mean over clusterings; a row matches by the first.

    Args:
        centroids: of HR features, `(k, d)`, of each clustering.
        variance: mean squared distance of HR features to their mean, > 0.
        temperature: > 0.
    """

    def __init__(
        self, centroids: Sequence[Tensor], variance: float, temperature: float = 0.1
    ) -> None:
        super().__init__(variance)
        self.prototypes = [F.normalize(rows, dim=1) for rows in centroids]
        self.temperature = temperature

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, and the number of rows whose most similar centroid is the target's."""
        unit, wanted = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
        loss, matches = self.of_directions(outputs, targets, unit, wanted), []
        for prototypes in self.prototypes:
            logits, labels = unit @ prototypes.T, wanted @ prototypes.T
            given = F.log_softmax(logits / self.temperature, dim=1)
            soft = F.softmax(labels / self.temperature, dim=1)
            loss = loss + F.kl_div(given, soft, reduction="batchmean") / len(self.prototypes)
            matches.append((logits.detach().argmax(1) == labels.argmax(1)).sum())
        return loss, matches[0]


@dataclass(frozen=True)
class Control:
    """A trained head, its log, and what it does to held-out pairs."""

    head: FeatureTransferHead
    log: list[EpochLog]
    held_out: list[HeldOutPairs]


def train_head(
    head: FeatureTransferHead,
    rows: tuple[Tensor, Tensor],
    centroids: Tensor,
    objective: Objective,
    *,
    warm_start: bool = False,
    recipe: Recipe = FEATURES_RECIPE,
    seed: int = 0,
) -> list[EpochLog]:
    """`fit_features_head` with inputs, targets and an objective of one's own.

    Args:
        head: output "features".
        rows: inputs `(n, d)`, LR and then HR features, and what they are to become.
        centroids: `(k, d)`, which the head keeps.
        objective: what is minimised.
        warm_start: whether the head begins with what ridge regression finds.
        recipe: of the training.
        seed: of the order of the rows and of dropout.
    """
    head.set_centroids(centroids)
    head.set_input_statistics(rows[0])
    if warm_start:
        warm_start_head(head, *rows)
    return PseudoLabelTrainer(head, recipe, objective=objective, seed=seed).fit(*rows)


def of_pairs(
    study: Study,
    view: Degradation,
    seed: int,
    *,
    clusters: Sequence[int] = (),
    warm_start: bool = False,
) -> Control:
    """A head on pairs of views: by several clusterings, or from a start by ridge regression.

    Clusters are no more than a third of the images; by default 100, or a tenth of the images.
    """
    features = study.features("train", view)
    count = len(features.hr)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    kept = count - max(1, round(HELD_OUT * count))
    train, test = order[:kept].sort().values, order[kept:].sort().values
    hr, lr = features.hr[train], features.lr[train]
    ks = [min(k, count // 3) for k in clusters] or [min(100, max(1, kept // 10))]
    clusterings = [kmeans(F.normalize(hr, dim=1), k, seed=seed) for k in ks]
    head = FeatureTransferHead(hr.shape[1], ks[0], seed=seed)
    centroids = [part.centroids for part in clusterings]
    rows = torch.cat([lr, hr]), torch.cat([hr, hr])
    objective = SeveralPrototypes(centroids, variance_of("hr", hr))
    log = train_head(head, rows, centroids[0], objective, warm_start=warm_start, seed=seed)
    before, wanted = features.lr[test], features.hr[test]
    after, hr_after = head.transfer(before), head.transfer(wanted)
    return Control(head, log, [report_pairs(wanted, before, after, hr_after, centroids[0])])


def without_pairs(
    study: Study, view: Degradation, seed: int, halves: tuple[Images, Images], kind: str
) -> Control:
    """A head on HR features of some images and LR features of others.

    Args:
        study: what is transferred.
        view: of LR images.
        seed: of the clusters and of the head.
        halves: HR images, and those of which LR images alone are there.
        kind: a name of `unpaired.UNPAIRED`.
    """
    backbone = backbone_of(study.model)
    hr, lr = (
        fill_stores(backbone, images, view, study.cache / "features", views=["hr"])["hr"]
        .read()
        .features.float()
        for images in (halves[0], small(halves[1], view.lr_size))
    )
    clustering = kmeans(F.normalize(hr, dim=1), min(100, max(1, len(hr) // 10)), seed=seed)
    head = FeatureTransferHead(hr.shape[1], clustering.k, seed=seed)
    rows = torch.cat([lr, hr]), torch.cat([unpaired_targets(kind, hr, lr, clustering), hr])
    objective = PrototypeDistillation(clustering.centroids, variance_of("hr", hr))
    return Control(head, train_head(head, rows, clustering.centroids, objective, seed=seed), [])
