"""Two ways to do one thing, timed in turns in one run, so that noise meets both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.markdown import Column


@dataclass(frozen=True)
class Way:
    """One way to do it: `prepare` is not timed, `run` is."""

    prepare: Callable[[], object]
    run: Callable[[], object]

    def seconds(self) -> float:
        """Of one run."""
        self.prepare()
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


def time_pairs(
    name: str, first: Way, second: Way, pairs: int, *, warm_up: bool = True
) -> dict[str, Any]:
    """Runs both once to warm up, unless told not to, then `pairs` times each in turns.

    Returns median milliseconds of each and the median of the ratios second / first, with the
    quarter and three-quarter marks of the ratios.
    """
    for way in (first, second) if warm_up else ():
        way.seconds()
    times = []
    for index in tqdm(range(pairs), desc=name, unit="pair", disable=None, leave=False):
        if index % 2:
            b, a = second.seconds(), first.seconds()
        else:
            a, b = first.seconds(), second.seconds()
        times.append((a, b))
    values = np.array(times)
    low, median, high = np.quantile(values[:, 1] / values[:, 0], (0.25, 0.5, 0.75))
    return {
        "first_ms": 1000 * float(np.median(values[:, 0])),
        "second_ms": 1000 * float(np.median(values[:, 1])),
        "ratio": float(median),
        "ratio_quartiles": [float(low), float(high)],
        "pairs": pairs,
    }


def quartiles(form: str) -> Column[Any]:
    """The column of the quarter and three-quarter marks of the ratios."""
    return "quartiles", lambda row: " to ".join(format(q, form) for q in row["ratio_quartiles"])
