from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from featxfer import average_precision, gap_recovered
from featxfer.evaluation.metrics import confidence_interval


def oracle(scores: list[float], labels: list[int], kind: str) -> float:
    """AP straight from its definition, by counting at every threshold, in exact arithmetic."""
    kept = [(s, y) for s, y in zip(scores, labels, strict=True) if y != 0]
    positives = sum(y == 1 for _, y in kept)
    curve = []
    for threshold in sorted({s for s, _ in kept}, reverse=True):
        taken = [y for s, y in kept if s >= threshold]
        hits = sum(y == 1 for y in taken)
        curve.append((Fraction(hits, positives), Fraction(hits, len(taken))))

    def best_from(recall: Fraction) -> Fraction:
        return max(p for r, p in curve if r >= recall)

    if kind == "11point":
        return float(sum(best_from(Fraction(t, 10)) for t in range(11)) / 11)
    area, last = Fraction(0), Fraction(0)
    for recall, precision in curve:
        area += (recall - last) * (best_from(recall) if kind == "area" else precision)
        last = recall
    return float(area)


@pytest.mark.parametrize("kind", ["11point", "area", "step"])
def test_against_a_brute_force_oracle(kind: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        n = int(rng.integers(1, 25))
        scores = rng.integers(0, int(rng.integers(1, 30)), n) / 7 - 1
        labels = rng.choice([1, 0, -1], n, p=[0.4, 0.2, 0.4])
        labels[rng.integers(n)] = 1
        if not (labels == -1).any():
            labels[labels == 0] = 1
        got = average_precision(scores, labels, kind)
        assert got == pytest.approx(oracle(scores.tolist(), labels.tolist(), kind), abs=1e-12)


def test_step_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        scores, labels = rng.integers(0, 9, 40), rng.choice([1, -1], 40)
        expected = average_precision_score(labels == 1, scores)
        assert average_precision(scores, labels, "step") == pytest.approx(expected, abs=1e-12)


def test_by_hand() -> None:
    scores, labels = [0.9, 0.8, 0.7, 0.6], [1, -1, 1, -1]
    assert average_precision(scores, labels, "step") == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert average_precision(scores, labels, "11point") == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_ties_do_not_depend_on_the_order_of_the_rows() -> None:
    assert average_precision([1, 1], [1, -1], "step") == average_precision([1, 1], [-1, 1], "step")
    assert average_precision([1, 1], [1, -1], "step") == 0.5


def test_ignored_rows_are_as_if_absent() -> None:
    with_ignored = average_precision([3, 2.5, 2, 1], [1, 0, -1, 1])
    assert with_ignored == average_precision([3, 2, 1], [1, -1, 1])


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1, 2], [1], r"scores, labels: got shapes \(2,\) and \(1,\)"),
        ([1, np.nan], [1, -1], "scores: row 1 is nan"),
        ([1, 2], [1, 2], r"labels: got \[2\], wanted 1, 0 or -1"),
        ([1, 2], [0, -1], "labels: got no positive row"),
        ([1, 2], [0, 1], "labels: got 1 and 0 but no -1"),
    ],
)
def test_bad_input_is_named(scores: list[float], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_precision(scores, labels)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind: got 'mean', wanted one of '11point'"):
        average_precision([1], [1], "mean")


def test_gap_recovered_is_the_papers() -> None:
    assert gap_recovered(80.0, 78.1, 89.1) == pytest.approx(0.173, abs=5e-4)
    assert gap_recovered(0.5, 0.5, 0.9) == 0
    assert gap_recovered(0.9, 0.5, 0.9) == 1


@pytest.mark.parametrize("hr", [0.5, 0.4, float("nan")])
def test_no_gap_is_said(hr: float) -> None:
    with pytest.raises(ValueError, match="there is no gap to recover"):
        gap_recovered(0.6, 0.5, hr)


def test_interval_is_students_t() -> None:
    interval = confidence_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.half_width == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert interval.high - interval.mean == pytest.approx(interval.mean - interval.low)


def test_interval_of_one_value_has_no_ends() -> None:
    interval = confidence_interval([3.0])
    assert interval.mean == 3
    assert np.isnan(interval.low)
    assert np.isnan(interval.high)


@pytest.mark.parametrize(("values", "level"), [([], 0.95), ([1.0], 1.0), ([1.0], 0.0)])
def test_bad_intervals(values: list[float], level: float) -> None:
    with pytest.raises(ValueError, match="wanted"):
        confidence_interval(values, level)
