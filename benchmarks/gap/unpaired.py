"""Targets for LR features without their HR images: HR and LR sets of other images.

Each function gives every LR feature a target in the space of HR features; a head is trained towards
them as towards the HR features of pairs (`benchmarks.gap.controls`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featxfer.checks import ArrayLike, as_features, check_choice
from featxfer.training.pseudo_labels import Clustering, assign

_ITERATIONS = 2000


def moment_targets(hr: ArrayLike, lr: ArrayLike, *, shrinkage: float = 0.1) -> Tensor:
    """LR features whitened and coloured to the mean and covariance of HR ones, `(n, d)`.

    Correlation alignment (Sun, Feng and Saenko 2016), in closed form.

    Args:
        hr: HR features `(m, d)`.
        lr: LR features `(n, d)` of other images.
        shrinkage: of both covariances towards a multiple of the identity, in (0, 1]; ours.

    Raises:
        ValueError: other shapes, NaN or infinity, a shrinkage outside of (0, 1].
    """
    wanted, rows = _two_sets(hr, lr)
    if not 0 < shrinkage <= 1:
        raise ValueError(f"shrinkage: got {shrinkage!r}, wanted in (0, 1]")
    whitened = (rows - rows.mean(0)).double() @ _root(rows, shrinkage, -0.5)
    return (whitened @ _root(wanted, shrinkage, 0.5)).float() + wanted.mean(0)


def transport_targets(
    hr: ArrayLike, lr: ArrayLike, clustering: Clustering, *, regularisation: float = 0.05
) -> Tensor:
    """The barycentres that optimal transport of LR features to HR centroids gives, `(n, d)`.

    Entropic transport (Cuturi 2013; Courty et al. 2017 for domains) by POT, from LR features of
    equal mass to centroids with the mass of their clusters; the cost is 1 - cosine after both means
    are taken away (ours). Soft assignments that are scaled until clusters are as frequent as among
    HR features (marginal balance) have the same fixed point, so they are not offered besides.

    Args:
        hr: HR features `(m, d)`.
        lr: LR features `(n, d)` of other images.
        clustering: of the HR features or of their directions.
        regularisation: of the entropy, > 0, in units of the cost. Warns where it is so small that
            the clusters are not as frequent as they should be, by a hundredth of all features.

    Raises:
        ValueError: other shapes, NaN or infinity, a regularisation that is not > 0.
        ImportError: POT is not installed.
    """
    wanted, rows = _two_sets(hr, lr)
    if not regularisation > 0:
        raise ValueError(f"regularisation: got {regularisation!r}, wanted > 0")
    ot = require_pot()
    means, sizes = _cluster_means(wanted, clustering)
    cost = (1 - _similarities(wanted, rows, means)).double().numpy()
    masses = np.full(len(rows), 1 / len(rows)), (sizes / sizes.sum()).double().numpy()
    plan = ot.sinkhorn(
        *masses, cost, regularisation, method="sinkhorn_log", numItermax=_ITERATIONS, warn=False
    )
    misplaced = float(np.abs(plan.sum(0) - masses[1]).sum()) / 2
    if misplaced > 0.01:
        warnings.warn(
            f"regularisation: got {regularisation!r}, with which {_ITERATIONS} iterations left "
            f"{misplaced:.0%} of the features in clusters that are too large",
            stacklevel=2,
        )
    shares = torch.from_numpy(plan / plan.sum(1, keepdims=True)).float()
    return shares @ means


UNPAIRED: Mapping[str, Callable[[Tensor, Tensor, Clustering], Tensor]] = {
    "moments": lambda hr, lr, _: moment_targets(hr, lr),
    "transport": transport_targets,
}
"""Targets by name."""


def require_pot() -> ModuleType:
    """POT, which "transport" needs; `ImportError` says how to install it."""
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            "unpaired: 'transport' needs POT: pip install pot, or featxfer's extra 'transport'"
        ) from error
    module: ModuleType = ot
    return module


def unpaired_targets(name: str, hr: Tensor, lr: Tensor, clustering: Clustering) -> Tensor:
    """One of `UNPAIRED`; `ValueError` for another name, and as the function itself."""
    check_choice("unpaired", name, UNPAIRED)
    return UNPAIRED[name](hr, lr, clustering)


def _two_sets(hr: ArrayLike, lr: ArrayLike) -> tuple[Tensor, Tensor]:
    wanted = as_features("hr", hr)
    rows = as_features("lr", lr, width=wanted.shape[1])
    for name, part in (("hr", wanted), ("lr", rows)):
        if len(part) < 2:
            raise ValueError(f"{name}: got {len(part)} features, wanted at least 2 to compare sets")
    return wanted, rows


def _root(rows: Tensor, shrinkage: float, power: float) -> Tensor:
    """A power of the shrunk covariance of rows, float64 `(d, d)`."""
    covariance = torch.cov(rows.double().T)
    if covariance.ndim == 0:
        covariance = covariance.reshape(1, 1)
    level = covariance.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(len(covariance), dtype=torch.float64, device=rows.device)
    values, vectors = torch.linalg.eigh((1 - shrinkage) * covariance + shrinkage * level * identity)
    root: Tensor = (vectors * values.clamp(min=1e-12) ** power) @ vectors.T
    return root


def _cluster_means(hr: Tensor, clustering: Clustering) -> tuple[Tensor, Tensor]:
    """Mean HR feature and size of each cluster that has any, by direction."""
    centroids = as_features("clustering", clustering.centroids, width=hr.shape[1])
    labels = assign(F.normalize(hr, dim=1), F.normalize(centroids, dim=1))
    sizes = torch.bincount(labels, minlength=clustering.k).float()
    sums = hr.new_zeros(clustering.k, hr.shape[1]).index_add_(0, labels, hr)
    kept = sizes > 0
    return sums[kept] / sizes[kept, None], sizes[kept]


def _similarities(hr: Tensor, lr: Tensor, means: Tensor) -> Tensor:
    """Cosines of LR features and clusters, each less the mean of its set, `(n, k)`."""
    rows, clusters = lr - lr.mean(0), means - hr.mean(0)
    return F.normalize(rows, dim=1) @ F.normalize(clusters, dim=1).T
