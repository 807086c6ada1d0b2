"""What a head's training minimises: the paper's cross-entropy, and our prototype distillation."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from featxfer._checks import ArrayLike, as_features


class Objective(Protocol):
    """A loss of a mini-batch of the head's outputs against their targets."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, a scalar with gradient, and the number of right labels, a scalar."""
        ...

    def check(self, outputs: Tensor, targets: Tensor, rows: int) -> None:
        """Raises `ValueError` unless `targets` of `rows` rows go with outputs like these."""
        ...


class LabelCrossEntropy:
    """Multinomial logistic loss (nats) on pseudo-labels (Wu et al. 2019, section 4.3).

    Outputs: logits `(n, k)`. Targets: int64 `(n,)`, each in [0, k).
    """

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, and the number of rows whose largest logit is the target's."""
        right = (outputs.detach().argmax(1) == targets).sum()
        return F.cross_entropy(outputs, targets), right

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


class PrototypeDistillation:
    """Enhanced features against the paired HR features, HR centroids as prototypes (ours).

    The sum of three terms, each a mean over rows, with `p(x) = softmax(cos(x, centroids) / T)`:

    - Kullback-Leibler divergence of `p(output)` from `p(target)`, in nats: the paper's idea, HR
      clusters that teach LR features, with soft labels of the paired image;
    - `cosine_weight` x (1 - cosine of output and target);
    - `distance_weight` x squared distance / variance of HR features: it keeps the length of
      features, which a trained classifier needs and the two cosines do not see.

    Outputs and targets: `(n, d)`. The label of a row is the target's most similar centroid.

    Args:
        centroids: of HR features, `(k, d)`; compared by direction alone.
        variance: mean squared distance of HR features to their mean, > 0.
        temperature: T, > 0.
        cosine_weight: >= 0.
        distance_weight: >= 0.

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
    ) -> None:
        for name, value, valid, wanted in (
            ("variance", variance, variance > 0, "> 0"),
            ("temperature", temperature, temperature > 0, "> 0"),
            ("cosine_weight", cosine_weight, cosine_weight >= 0, ">= 0"),
            ("distance_weight", distance_weight, distance_weight >= 0, ">= 0"),
        ):
            if not valid:
                raise ValueError(f"{name}: got {value!r}, wanted {wanted}")
        prototypes = as_features("centroids", centroids)
        if not prototypes.norm(dim=1).all():
            raise ValueError("centroids: got one of zero, wanted directions")
        self.prototypes = F.normalize(prototypes, dim=1)
        self.variance = variance
        self.temperature = temperature
        self.cosine_weight = cosine_weight
        self.distance_weight = distance_weight

    def __call__(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, and the number of rows whose most similar centroid is the target's."""
        prototypes = self.prototypes.to(outputs.device, outputs.dtype)
        unit, wanted = F.normalize(outputs, dim=1), F.normalize(targets, dim=1)
        logits, labels = (unit @ prototypes.T, wanted @ prototypes.T)
        clusters = F.kl_div(
            F.log_softmax(logits / self.temperature, dim=1),
            F.softmax(labels / self.temperature, dim=1),
            reduction="batchmean",
        )
        cosine = 1 - (unit * wanted).sum(1).mean()
        distance = (outputs - targets).square().sum(1).mean() / self.variance
        loss = clusters + self.cosine_weight * cosine + self.distance_weight * distance
        return loss, (logits.detach().argmax(1) == labels.argmax(1)).sum()

    def check(self, outputs: Tensor, targets: Tensor, rows: int) -> None:
        """Raises `ValueError` for targets that are not finite `(rows, d)`, or another width."""
        as_features("targets", targets, width=outputs.shape[-1])
        width = self.prototypes.shape[1]
        if len(targets) != rows or outputs.shape[-1] != width:
            raise ValueError(
                f"targets: got {tuple(targets.shape)} for {rows} rows of {outputs.shape[-1]} "
                f"features, wanted ({rows}, {width})"
            )
