"""Pseudo-labels: k-means on HR features, and which HR cluster an LR feature belongs to.

Sources: Wu et al. 2019, section 3.2. `nearest` is the paper's assignment; `paired`, the diagnostics
and all defaults (scaling, iterations, redo) are ours: the paper does not state any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featxfer.checks import ArrayLike, as_features, check_choice, check_integer, check_paired

BACKENDS = ("faiss", "sklearn")
ASSIGNMENTS = ("nearest", "paired")


@dataclass(frozen=True)
class Clustering:
    """The result of k-means.

    Args:
        centroids: float32 `(k, d)`.
        inertia: mean squared distance of a feature to its centroid.
        seed: of the initial centroids.
        backend: "faiss" or "sklearn".
    """

    centroids: Tensor
    inertia: float
    seed: int
    backend: str

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.centroids)


def kmeans(
    features: ArrayLike,
    k: int,
    *,
    seed: int,
    iterations: int = 50,
    redo: int = 3,
    backend: str = "faiss",
) -> Clustering:
    """Lloyd's k-means on all rows of `features`, `(n, d)`; the best of `redo` starts is kept.

    Features are clustered as they come: scale them before. No row is left out (faiss by itself
    would subsample above 256 rows a centroid).

    Raises:
        ValueError: NaN or infinity (the row is named), k < 1, k > n, fewer than k distinct rows.
        ImportError: the backend is not installed.
    """
    rows = as_features("features", features)
    check_integer("k", k, at_least=1)
    check_integer("iterations", iterations, at_least=1)
    check_integer("redo", redo, at_least=1)
    check_integer("seed", seed, at_least=0)
    if seed >= 2**31:
        raise ValueError(f"seed: got {seed}, wanted an int < 2**31")
    check_choice("backend", backend, BACKENDS)
    if k > len(rows):
        raise ValueError(
            f"k: got {k} clusters for {len(rows)} features, wanted at most {len(rows)}"
        )
    distinct = count_distinct(rows, k)
    if distinct < k:
        raise ValueError(
            f"features: collapsed, only {distinct} distinct rows of {len(rows)}, "
            f"wanted at least k={k}"
        )
    run = _kmeans_faiss if backend == "faiss" else _kmeans_sklearn
    centroids = torch.from_numpy(run(rows.numpy(), k, seed, iterations, redo))
    inertia = float((rows - centroids[assign(rows, centroids)]).square().sum(1).mean())
    return Clustering(centroids, inertia, seed, backend)


def count_distinct(rows: Tensor, most: int) -> int:
    """Number of distinct rows; counting ends at `most`. -0.0 is 0.0."""
    seen: set[bytes] = set()
    for row in rows.numpy():
        seen.add((row + np.float32(0)).tobytes())
        if len(seen) == most:
            break
    return len(seen)


def centroid_scores(features: ArrayLike, centroids: ArrayLike) -> Tensor:
    """Scores `W x + b` with `W = c`, `b = -|c|^2 / 2`, `(n, k)`: largest for the nearest centroid.

    `|x - c|^2 = |x|^2 - 2 (W x + b)`, so the nearest centroid's label is an exact linear function
    of the feature.
    """
    centres = as_features("centroids", centroids)
    rows = as_features("features", features, width=centres.shape[1])
    return rows @ centres.T - centres.square().sum(1) / 2


def assign(features: ArrayLike, centroids: ArrayLike) -> Tensor:
    """Index of each row's nearest centroid (Euclidean), int64 `(n,)`; a tie goes to the lower."""
    return centroid_scores(features, centroids).argmax(dim=1)


def pseudo_labels(hr: ArrayLike, lr: ArrayLike, centroids: ArrayLike, assignment: str) -> Tensor:
    """The label that each LR row is trained on, int64 `(n,)`.

    Args:
        hr: HR features `(n, d)` of the same images.
        lr: LR features `(n, d)`.
        centroids: of the HR features, `(k, d)`.
        assignment: "nearest" (the paper: the HR centroid nearest to the LR feature) or "paired"
            (ours: the cluster of the same image's HR feature).

    Raises:
        ValueError: other shapes, NaN or infinity, another assignment.
    """
    check_choice("assignment", assignment, ASSIGNMENTS)
    hr_rows, lr_rows = as_features("hr", hr), as_features("lr", lr)
    check_paired(hr_rows, lr_rows)
    return assign(lr_rows if assignment == "nearest" else hr_rows, centroids)


@dataclass(frozen=True)
class LabelDiagnostics:
    """What pseudo-labels look like before anything is trained on them.

    Args:
        k: number of clusters.
        agreement: share in [0, 1] of images whose nearest and paired labels are the same; where it
            is low, the paper's labels say little about an image's HR content.
        hr_sizes: HR features a cluster, k counts.
        lr_sizes: LR features whose nearest centroid it is, k counts.
    """

    k: int
    agreement: float
    hr_sizes: tuple[int, ...]
    lr_sizes: tuple[int, ...]

    def summary(self) -> dict[str, float | int]:
        """Agreement; and for HR and LR: empty, tiny and giant clusters and the entropy.

        Tiny: not empty but under a tenth of the mean size; giant: over ten times the mean size.
        Entropy: of the sizes, divided by log(k), so 1 is even and 0 is a single cluster.
        """
        result: dict[str, float | int] = {"k": self.k, "agreement": self.agreement}
        for view, sizes in (("hr", self.hr_sizes), ("lr", self.lr_sizes)):
            mean = sum(sizes) / self.k
            result[f"{view}_empty"] = sum(size == 0 for size in sizes)
            result[f"{view}_tiny"] = sum(0 < size < mean / 10 for size in sizes)
            result[f"{view}_giant"] = sum(size > 10 * mean for size in sizes)
            result[f"{view}_entropy"] = _normalised_entropy(sizes)
        return result


def diagnose(hr: ArrayLike, lr: ArrayLike, centroids: ArrayLike) -> LabelDiagnostics:
    """Compares the two assignments; shapes and errors as `pseudo_labels`."""
    paired = pseudo_labels(hr, lr, centroids, "paired")
    nearest = pseudo_labels(hr, lr, centroids, "nearest")
    k = len(centroids)
    return LabelDiagnostics(
        k,
        float((paired == nearest).float().mean()),
        tuple(torch.bincount(paired, minlength=k).tolist()),
        tuple(torch.bincount(nearest, minlength=k).tolist()),
    )


def _kmeans_faiss(rows: np.ndarray, k: int, seed: int, iterations: int, redo: int) -> np.ndarray:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("backend 'faiss' needs faiss: pip install faiss-cpu") from error
    search = faiss.Kmeans(
        rows.shape[1],
        k,
        niter=iterations,
        nredo=redo,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    search.train(rows)
    return np.ascontiguousarray(search.centroids)


def _kmeans_sklearn(rows: np.ndarray, k: int, seed: int, iterations: int, redo: int) -> np.ndarray:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("backend 'sklearn' needs it: pip install scikit-learn") from error
    search = KMeans(k, max_iter=iterations, n_init=redo, random_state=seed).fit(rows)
    return np.ascontiguousarray(search.cluster_centers_, dtype=np.float32)


def _normalised_entropy(sizes: tuple[int, ...]) -> float:
    total = sum(sizes)
    if len(sizes) == 1:
        return 0.0
    entropy = -sum(size / total * math.log(size / total) for size in sizes if size)
    return entropy / math.log(len(sizes))
