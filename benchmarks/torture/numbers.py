"""Odd features through everything that takes features: finite results or one typed error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.ridge import warm_start_head
from benchmarks.gap.unpaired import unpaired_targets
from benchmarks.torture.outcome import Outcome
from featxfer import (
    PROTOCOLS,
    DivergenceError,
    FeatureTransferHead,
    Recipe,
    compare_pairs,
    diagnose,
    fit_features_head,
    fit_head,
    kmeans,
    train_svms,
)
from featxfer.estimator import FeatureTransfer
from featxfer.evaluation.svm import average_precisions
from featxfer.modules.scaling import scale_features
from featxfer.training.pseudo_labels import assign, centroid_scores

Array = np.ndarray[Any, Any]
TYPED = (ValueError, TypeError, DivergenceError)
"""What callers are told of features that cannot be used; all others are faults."""

NAMES_IT = re.compile(r"(\w+(, \w+)*: |Input X|Found array|loss or weights)")
"""How such a message begins: with the argument, or as scikit-learn and the trainer say it."""


def _plain(rng: np.random.Generator, n: int, d: int) -> Array:
    return rng.normal(size=(n, d))


def _with_cell(value: float) -> Callable[[np.random.Generator, int, int], Array]:
    def make(rng: np.random.Generator, n: int, d: int) -> Array:
        rows = rng.normal(size=(n, d))
        rows[rng.integers(n), rng.integers(d)] = value
        return rows

    return make


VALUES: Mapping[str, Callable[[np.random.Generator, int, int], Array]] = {
    "plain": _plain,
    "zeros": lambda rng, n, d: np.zeros((n, d)),
    "constant": lambda rng, n, d: np.full((n, d), rng.normal()),
    "constant columns": lambda rng, n, d: np.tile(rng.normal(size=d), (n, 1)),
    "two rows, many times": lambda rng, n, d: rng.normal(size=(2, d))[rng.integers(2, size=n)],
    "a row of zeros": lambda rng, n, d: rng.normal(size=(n, d)) * (np.arange(n)[:, None] > 0),
    "huge": lambda rng, n, d: 1e30 * rng.normal(size=(n, d)),
    "largest": lambda rng, n, d: 3e38 * rng.uniform(-1, 1, size=(n, d)),
    "denormal": lambda rng, n, d: 1e-40 * rng.normal(size=(n, d)),
    "tiny": lambda rng, n, d: 1e-20 * rng.normal(size=(n, d)),
    "of all sizes": lambda rng, n, d: (
        rng.normal(size=(n, d)) * 10.0 ** rng.uniform(-30, 30, (n, d))
    ),
    "far from zero": lambda rng, n, d: 1e6 + rng.normal(size=(n, d)),
    "NaN": _with_cell(math.nan),
    "infinity": _with_cell(math.inf),
    "a huge cell": _with_cell(1e30),
    "a denormal cell": _with_cell(1e-42),
}


def _read_only(rows: Array) -> Array:
    rows = rows.copy()
    rows.setflags(write=False)
    return rows


LAYOUTS: Mapping[str, Callable[[Array], Array | Tensor]] = {
    "float32": lambda rows: rows.astype(np.float32),
    "float64": lambda rows: rows,
    "float16": lambda rows: rows.astype(np.float16),
    "Fortran order": lambda rows: np.asfortranarray(rows, dtype=np.float32),
    "every other column": lambda rows: np.repeat(rows.astype(np.float32), 2, axis=1)[:, ::2],
    "backwards": lambda rows: rows.astype(np.float32)[::-1, ::-1],
    "big-endian": lambda rows: rows.astype(">f4"),
    "read-only": lambda rows: _read_only(rows.astype(np.float32)),
    "tensor": lambda rows: torch.from_numpy(rows.astype(np.float32)),
    "tensor, transposed": lambda rows: torch.from_numpy(rows.astype(np.float32).T.copy()).T,
    "tensor, bfloat16": lambda rows: torch.from_numpy(rows.astype(np.float32)).bfloat16(),
    "tensor, with gradient": lambda rows: torch.from_numpy(rows).float().requires_grad_(),
}

FEW = Recipe(epochs=2, batch_size=8, learning_rate=1e-3, optimizer="adamw", steps=())


def _labels(count: int) -> Array:
    return np.where(np.arange(count)[:, None] % 2 == np.arange(2), 1, -1).astype(np.int8)


def _features_head(hr: Any, lr: Any, k: int) -> list[Tensor]:
    clustering = kmeans(scale_features(hr, "l2"), k, seed=0)
    head = FeatureTransferHead(hr.shape[1], clustering.k, 8)
    log = fit_features_head(head, hr, [lr], clustering, recipe=FEW, seed=0)
    return [head.transfer(scale_features(lr, "none")), torch.tensor([part.loss for part in log])]


def _paper_head(hr: Any, lr: Any, k: int) -> list[Tensor]:
    clustering = kmeans(hr, k, seed=0)
    head = FeatureTransferHead(hr.shape[1], clustering.k, 8, output="clusters")
    head.set_input_statistics(scale_features(lr, "none"))
    log = fit_head(head, hr, lr, clustering, labels="nearest", recipe=FEW, seed=0)
    return [head(scale_features(lr, "none")), torch.tensor([part.loss for part in log])]


def _ridge(hr: Any, lr: Any, k: int) -> list[Tensor]:
    head = FeatureTransferHead(hr.shape[1], k, 2 * hr.shape[1])
    rows, goals = scale_features(lr, "none"), scale_features(hr, "none")
    head.set_input_statistics(rows)
    warm_start_head(head, rows, goals)
    return [head.transfer(rows)]


def _svms(solver: str) -> Callable[[Any, Any, int], list[Tensor]]:
    def run(hr: Any, lr: Any, k: int) -> list[Tensor]:
        labels = _labels(len(hr))
        svms = train_svms(hr, labels, PROTOCOLS["vissl"], solver=solver)
        scores = svms.decisions(lr)
        return [torch.as_tensor(scores), torch.as_tensor(average_precisions(scores, labels))]

    return run


def _estimator(hr: Any, lr: Any, k: int) -> list[Tensor]:
    fitted = FeatureTransfer(n_clusters=k, hidden_features=8, recipe=FEW).fit(lr, X_hr=hr)
    return [torch.as_tensor(fitted.transform(lr))]


def _agreement(hr: Any, lr: Any, k: int) -> list[Tensor]:
    found = compare_pairs(hr, lr, kmeans(hr, k, seed=0).centroids)
    return [torch.tensor([float(value) for value in vars(found).values()])]


def _diagnosis(hr: Any, lr: Any, k: int) -> list[Tensor]:
    found = diagnose(hr, lr, kmeans(hr, k, seed=0).centroids)
    return [torch.tensor([float(v) for v in found.summary().values() if not isinstance(v, list)])]


def _scores(hr: Any, lr: Any, k: int) -> list[Tensor]:
    centroids = kmeans(hr, k, seed=0).centroids
    return [centroids, centroid_scores(lr, centroids), assign(lr, centroids)]


def _without_pairs(hr: Any, lr: Any, k: int) -> list[Tensor]:
    return [unpaired_targets("moments", hr, lr, kmeans(hr, k, seed=0))]


STEPS: Mapping[str, Callable[[Any, Any, int], list[Tensor]]] = {
    "scale": lambda hr, lr, k: [scale_features(hr, "l2"), scale_features(lr, "none")],
    "k-means, labels": _scores,
    "k-means by scikit-learn": lambda hr, lr, k: [
        kmeans(hr, k, seed=0, backend="sklearn").centroids
    ],
    "diagnosis": _diagnosis,
    "agreement": _agreement,
    "head": _features_head,
    "the paper's head": _paper_head,
    "ridge": _ridge,
    "estimator": _estimator,
    "SVMs": _svms("liblinear"),
    "SVMs, batched": _svms("batched"),
    "no pairs": _without_pairs,
}


def cases(count: int, seed: int) -> Iterator[tuple[str, str, str, int, int, int]]:
    """Steps, values, layouts, n, d and k: every step with every value first, then by chance."""
    rng = np.random.default_rng(seed)
    pairs = [(step, value) for value in VALUES for step in STEPS]
    for number in range(count):
        if number < len(pairs):
            step, value = pairs[number]
        else:
            step, value = str(rng.choice(list(STEPS))), str(rng.choice(list(VALUES)))
        n, d = int(rng.integers(1, 24)), int(rng.choice([1, 2, 3, 7, 16]))
        k = int(rng.choice([1, max(1, n - 1), n, n + 1, min(3, n)]))
        yield step, value, str(rng.choice(list(LAYOUTS))), n, d, k


def run_numbers(count: int, seed: int) -> Outcome:
    """Runs so many cases."""
    faults, refused = [], 0
    for number, (step, value, layout, n, d, k) in enumerate(cases(count, seed)):
        rng = np.random.default_rng([seed, number])
        with np.errstate(all="ignore"):
            hr, lr = (LAYOUTS[layout](VALUES[value](rng, n, d)) for _ in range(2))
        name = f"{step}; {value}; {layout}; n={n}, d={d}, k={k}"
        try:
            found = STEPS[step](hr, lr, k)
        except TYPED as error:
            refused += 1
            if not NAMES_IT.match(str(error)):
                faults.append(f"{name}: {type(error).__name__}: {error}")
        except Exception as error:  # what this looks for
            faults.append(f"{name}: {type(error).__name__}: {error}")
        else:
            if not all(bool(torch.isfinite(part.float()).all()) for part in found):
                faults.append(f"{name}: not finite")
    return Outcome(count, faults, {"refused": refused})
