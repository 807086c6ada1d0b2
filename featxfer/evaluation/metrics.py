"""Average precision as PASCAL VOC defines it, the share of the gap recovered, and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featxfer.checks import check_choice

AVERAGE_PRECISIONS = ("11point", "area", "step")


def average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike, kind: str = "11point") -> float:
    """Average precision in [0, 1] of one class.

    Rows with equal scores enter the ranking together, as one threshold, so the result does not
    depend on the order of the rows. Rows with label 0 are ignored: as if they were not there.

    Args:
        scores: `(n,)`, finite; larger means more likely there.
        labels: `(n,)` in {1, 0, -1}: there, ignored (VOC: only difficult instances), not there.
        kind: "11point": mean over recall 0, 0.1, ..., 1 of the highest precision at that recall or
            a higher one (VOC2007's official measure); "area": the area under that envelope
            (VOC2010 and later); "step": the sum of precision times gain in recall, without the
            envelope (`sklearn.metrics.average_precision_score`).

    Raises:
        ValueError: other shapes, scores that are not finite, other labels, 1 and 0 without -1
            (0 means ignored here), no positive row.
    """
    check_choice("kind", kind, AVERAGE_PRECISIONS)
    s, y = _scores_and_labels(scores, labels)
    recall, precision = _recall_precision(s, y)
    if kind == "step":
        return float(np.diff(recall, prepend=0.0) @ precision)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if kind == "area":
        return float(np.diff(recall, prepend=0.0) @ envelope)
    positives = int((y == 1).sum())
    wanted = np.array([-(-tenth * positives // 10) for tenth in range(11)]) / positives
    return float(envelope[np.searchsorted(recall, wanted)].mean())


def _scores_and_labels(
    scores: npt.ArrayLike, labels: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if s.ndim != 1 or s.shape != y.shape:
        raise ValueError(f"scores, labels: got shapes {s.shape} and {y.shape}, wanted (n,) twice")
    if not np.isfinite(s).all():
        row = int(np.flatnonzero(~np.isfinite(s))[0])
        raise ValueError(f"scores: row {row} is {s[row]}, wanted finite values")
    if not np.isin(y, (1, 0, -1)).all():
        raise ValueError(f"labels: got {sorted(set(y.tolist()) - {1, 0, -1})}, wanted 1, 0 or -1")
    if not (y == -1).any() and (y == 0).any():
        raise ValueError("labels: got 1 and 0 but no -1, wanted -1 for not there (0 is ignored)")
    if not (y == 1).any():
        raise ValueError("labels: got no positive row, wanted at least one")
    return s[y != 0], y[y != 0].astype(np.int64)


def _recall_precision(
    scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Recall and precision at each distinct score, from the highest down."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(labels[order] == 1)[ends]
    return hits / hits[-1], hits / (ends + 1)


def gap_recovered(method: float, lr: float, hr: float) -> float:
    """Share of the gap that a method recovers: `(method - lr) / (hr - lr)`; 1 is all, 0 none.

    Raises `ValueError` where HR is not above LR: there is no gap to recover.
    """
    if not hr > lr:
        raise ValueError(
            f"hr, lr: got {hr:g} and {lr:g}, wanted hr > lr: there is no gap to recover"
        )
    return (method - lr) / (hr - lr)


@dataclass(frozen=True)
class Interval:
    """Mean and the ends of an interval; both ends NaN where one value gives none."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


def confidence_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean over seeds (or folds), taken as independent and normal.

    Args:
        values: one a seed, >= 1 of them.
        level: in (0, 1).

    Raises:
        ValueError: no values, or a level outside of (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, wanted a value in (0, 1)")
    if not len(values):
        raise ValueError("values: got none, wanted at least one")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    from scipy.special import stdtrit

    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * spread
    return Interval(mean, mean - half, mean + half)
