"""What a head's training minimises: the paper's cross-entropy, and what pairs allow besides.

Objectives of features take enhanced features and the HR features of the same images, both `(n, d)`.
`make_objective` makes them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from featxfer.checks import ArrayLike, as_features, check_choice


class Objective(Protocol):
    """A loss of a mini-batch of outputs, of a head mostly, against their targets."""

    def __call__(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """The mean loss, with gradient, and the number of rows that match their target: scalars."""
        ...

    def check(self, outputs: Any, targets: Any, rows: int) -> None:
        """Raises `ValueError` unless `targets` of `rows` rows go with outputs like these."""
        ...


class LabelCrossEntropy:
    """Multinomial logistic loss (nats) on pseudo-labels (Wu et al. 2019, section 4.3).

    Outputs: logits `(n, k)`. Targets: int64 `(n,)`, each in [0, k).
    """

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, and the number of rows whose largest logit is the target's."""
        matches = (outputs.detach().argmax(1) == targets).sum()
        return F.cross_entropy(outputs, targets), matches

    def check(self, outputs: Tensor, targets: Tensor, rows: int) -> None:
        """Raises `ValueError` for other shapes or dtypes, and for labels that have no logit."""
        if targets.shape != (rows,) or targets.dtype != torch.int64 or int(targets.min()) < 0:
            raise ValueError(
                f"labels: got {targets.dtype} {tuple(targets.shape)}, "
                f"wanted int64 ({rows},), none negative"
            )
        if int(targets.max()) >= outputs.shape[-1]:
            raise ValueError(
                f"labels: got {int(targets.max())}, wanted labels below {outputs.shape[-1]}"
            )


class PairedRegression:
    """Regression to the paired feature: two terms, each a mean over rows (ours).

    - `cosine_weight` x (1 - cosine of output and target);
    - `distance_weight` x squared distance / variance of HR features: it keeps the length of
      features, which a trained classifier needs and cosines do not see.

    A row matches where the most similar target of the batch is its own.

    Args:
        variance: mean squared distance of HR features to their mean, > 0.
        cosine_weight: >= 0.
        distance_weight: >= 0.

    Raises:
        ValueError: a value outside of these.
    """

    def __init__(
        self, variance: float, *, cosine_weight: float = 5.0, distance_weight: float = 1.0
    ) -> None:
        _check(variance=variance, cosine_weight=cosine_weight, distance_weight=distance_weight)
        self.variance = variance
        self.cosine_weight = cosine_weight
        self.distance_weight = distance_weight

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, and the number of rows that find their own target in the batch."""
        unit, wanted = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
        found = (unit.detach() @ wanted.T).argmax(1)
        matches = (found == torch.arange(len(found), device=found.device)).sum()
        return self.of_directions(outputs, targets, unit, wanted), matches

    def of_directions(
        self, outputs: Tensor, targets: Tensor, unit: Tensor, wanted: Tensor
    ) -> Tensor:
        """The mean loss; `unit` and `wanted` are the rows divided by their lengths."""
        cosine = 1 - (unit * wanted).sum(1).mean()
        distance = (outputs - targets).square().sum(1).mean() / self.variance
        return self.cosine_weight * cosine + self.distance_weight * distance

    def check(self, outputs: Tensor, targets: Tensor, rows: int) -> None:
        """Raises `ValueError` for targets that are not finite `(rows, d)`, or another width."""
        as_features("targets", targets, width=outputs.shape[-1])
        if len(targets) != rows:
            raise ValueError(
                f"targets: got {tuple(targets.shape)} for {rows} rows of {outputs.shape[-1]} "
                f"features, wanted ({rows}, {outputs.shape[-1]})"
            )


class PrototypeDistillation(PairedRegression):
    """Enhanced features against the paired HR features, HR centroids as prototypes (ours).

    `PairedRegression`, and with `p(x) = softmax(cos(x, centroids) / T)` the Kullback-Leibler
    divergence of `p(output)` from `p(target)`, in nats, a mean over rows: the paper's idea, HR
    clusters that teach LR features, with soft labels of the paired image. With `hard` labels it is
    the cross-entropy (nats) on the target's most similar centroid instead.

    A row matches where its most similar centroid is the target's.

    Args:
        centroids: of HR features, `(k, d)`; compared by direction alone.
        variance: as `PairedRegression` has it, like both weights.
        temperature: T, > 0.
        hard: whether labels are the one most similar centroid.

    Raises:
        ValueError: a value outside of these, a centroid of zero.
    """

    def __init__(
        self,
        centroids: ArrayLike,
        variance: float,
        *,
        temperature: float = 0.1,
        cosine_weight: float = 5.0,
        distance_weight: float = 1.0,
        hard: bool = False,
    ) -> None:
        super().__init__(variance, cosine_weight=cosine_weight, distance_weight=distance_weight)
        _check(temperature=temperature)
        rows = as_features("centroids", centroids)
        if not bool(rows.norm(dim=1).all()):
            raise ValueError("centroids: got one of zero, wanted directions")
        self.prototypes = F.normalize(rows, dim=1)
        self.temperature = temperature
        self.hard = hard

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, and the number of rows whose most similar centroid is the target's."""
        unit, wanted = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
        prototypes = self.prototypes.to(outputs.device, outputs.dtype)
        logits, labels = unit @ prototypes.T, wanted @ prototypes.T
        scaled, nearest = logits / self.temperature, labels.argmax(1)
        if self.hard:
            clusters = F.cross_entropy(scaled, nearest)
        else:
            soft = F.softmax(labels / self.temperature, dim=1)
            clusters = F.kl_div(F.log_softmax(scaled, dim=1), soft, reduction="batchmean")
        matches = (logits.detach().argmax(1) == nearest).sum()
        return self.of_directions(outputs, targets, unit, wanted) + clusters, matches

    def check(self, outputs: Tensor, targets: Tensor, rows: int) -> None:
        """Raises `ValueError` for targets that are not finite `(rows, d)`, or another width."""
        super().check(outputs, targets, rows)
        width = self.prototypes.shape[1]
        if outputs.shape[-1] != width:
            raise ValueError(
                f"targets: got {tuple(targets.shape)} for {rows} rows of {outputs.shape[-1]} "
                f"features, wanted ({rows}, {width})"
            )


class InstanceContrast(PairedRegression):
    """`PairedRegression`, and InfoNCE against the HR features of the batch (van den Oord 2018).

    Cross-entropy (nats) of `softmax(cos(output, targets of the batch) / T)` on the row's own
    target, a mean over rows.

    Args:
        variance: as `PairedRegression` has it, like both weights.
        temperature: T, > 0.

    Raises:
        ValueError: a value outside of these.
    """

    def __init__(
        self,
        variance: float,
        *,
        temperature: float = 0.1,
        cosine_weight: float = 5.0,
        distance_weight: float = 1.0,
    ) -> None:
        super().__init__(variance, cosine_weight=cosine_weight, distance_weight=distance_weight)
        _check(temperature=temperature)
        self.temperature = temperature

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, and the number of rows that find their own target in the batch."""
        unit, wanted = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
        own = torch.arange(len(unit), device=unit.device)
        logits = unit @ wanted.T / self.temperature
        loss = self.of_directions(outputs, targets, unit, wanted) + F.cross_entropy(logits, own)
        return loss, (logits.detach().argmax(1) == own).sum()


OBJECTIVES: Mapping[str, Callable[[ArrayLike, float], Objective]] = {
    "prototypes": PrototypeDistillation,
    "labels": lambda centroids, variance: PrototypeDistillation(
        centroids, variance, hard=True, cosine_weight=0.0
    ),
    "regression": lambda _, variance: PairedRegression(variance),
    "contrast": lambda _, variance: InstanceContrast(variance),
}
"""Objectives of features by name, from centroids and the variance of HR features.

- "prototypes": `PrototypeDistillation`, the default;
- "labels": the paper's cross-entropy, on the paired image's cluster, as similarities to centroids;
- "regression": `PairedRegression`;
- "contrast": `InstanceContrast`.
"""


def make_objective(name: str, centroids: ArrayLike, variance: float) -> Objective:
    """One of `OBJECTIVES`; `ValueError` for another name or a variance that is not > 0."""
    check_choice("objective", name, OBJECTIVES)
    return OBJECTIVES[name](centroids, variance)


def _check(**values: float) -> None:
    """Raises `ValueError` for a weight below zero, or another value that is not above it."""
    for name, value in values.items():
        weight = name.endswith("_weight")
        if not (value >= 0 if weight else value > 0):
            raise ValueError(f"{name}: got {value!r}, wanted {'>= 0' if weight else '> 0'}")
