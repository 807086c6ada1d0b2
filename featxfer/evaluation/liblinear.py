"""Linear SVMs by LIBLINEAR, scikit-learn's `LinearSVC`: the reference."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featxfer.evaluation.metrics import average_precision
from featxfer.evaluation.protocols import Protocol, targets_of

Matrix: TypeAlias = npt.NDArray[np.float64]
Trained: TypeAlias = tuple[Matrix, float, float, int, int]
"""Of one class: weights, intercept, the chosen C, fits that did not converge, all fits."""

_LIBLINEAR = threading.Lock()
"""Held while LIBLINEAR runs, which draws from one random state a process."""


def train_liblinear(
    seed: int, jobs: int, rows: Matrix, labels: npt.NDArray[np.integer], protocol: Protocol
) -> Iterator[Trained]:
    """One class after the other, `jobs` at a time, each in a process of its own."""
    from joblib import Parallel, delayed

    rotated, basis = _rotate(rows)
    for coef, *rest in Parallel(n_jobs=jobs, return_as="generator")(
        delayed(_train_class)(rotated, labels[:, column], protocol, seed)
        for column in range(labels.shape[1])
    ):
        yield (coef @ basis, *rest)


def _rotate(rows: Matrix) -> tuple[Matrix, Matrix]:
    """Rows `(n, d)` in an orthonormal basis of their own span, `(n, r)` and `(r, d)`.

    With d > n this leaves r = n columns. The solver's steps depend on the rows' inner products
    alone, which stay as they are, so only rounding differs; `coef @ basis` is in the old basis.
    """
    if rows.shape[1] <= rows.shape[0]:
        return rows, np.eye(rows.shape[1])
    orthonormal, triangular = np.linalg.qr(rows.T)
    return np.ascontiguousarray(triangular.T), orthonormal.T


def _train_class(
    rows: Matrix, labels: npt.NDArray[np.integer], protocol: Protocol, seed: int
) -> tuple[Matrix, float, float, int, int]:
    used, targets = targets_of(labels, protocol)
    rows = rows if used.all() else rows[used]
    cost, unconverged, fits = _choose_cost(rows, targets, protocol, seed)
    model, stopped = _fit(rows, targets, cost, protocol, seed)
    return model.coef_[0], float(model.intercept_[0]), cost, unconverged + stopped, fits + 1


def _choose_cost(
    rows: Matrix, targets: npt.NDArray[np.int64], protocol: Protocol, seed: int
) -> tuple[float, int, int]:
    """The C with the highest mean AP over the folds; fits that did not converge, and all fits."""
    from sklearn.model_selection import StratifiedKFold

    if len(protocol.costs) == 1:
        return protocol.costs[0], 0, 0
    scores = np.zeros((protocol.folds, len(protocol.costs)))
    unconverged = 0
    for fold, (train, held_out) in enumerate(StratifiedKFold(protocol.folds).split(rows, targets)):
        train_rows, held_out_rows = rows[train], rows[held_out]
        for i, cost in enumerate(protocol.costs):
            model, stopped = _fit(train_rows, targets[train], cost, protocol, seed)
            decisions = model.decision_function(held_out_rows)
            scores[fold, i] = average_precision(decisions, targets[held_out], "step")
            unconverged += stopped
    return protocol.costs[int(scores.mean(0).argmax())], unconverged, scores.size


def _fit(
    rows: Matrix, targets: npt.NDArray[np.int64], cost: float, protocol: Protocol, seed: int
) -> tuple[Any, bool]:
    """A fitted `LinearSVC`, and whether it stopped at `max_iter`."""
    from sklearn.svm import LinearSVC

    model = LinearSVC(
        C=cost,
        class_weight={1: protocol.positive_weight, -1: 1.0},
        dual=True,
        max_iter=protocol.max_iter,
        random_state=seed,
    )
    with _LIBLINEAR, warnings.catch_warnings():
        # Counted instead: LinearSVMs.unconverged.
        warnings.filterwarnings("ignore", message="Liblinear failed to converge")
        model.fit(rows, targets)
    return model, model.n_iter_ >= protocol.max_iter
