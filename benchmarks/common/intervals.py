"""Figures over seeds: their mean, its 95% interval, and the gap recovered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featxfer import gap_recovered
from featxfer.evaluation.metrics import confidence_interval


def summarise(values: list[float]) -> dict[str, Any]:
    """Values over seeds with their mean and 95% interval; JSON null where one seed gives none."""
    interval = confidence_interval(values)
    several = len(values) > 1
    return {
        "values": values,
        "mean": interval.mean,
        "low": interval.low if several else None,
        "high": interval.high if several else None,
    }


def summarise_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`summarise` of each number that all runs have, a run a seed."""
    names = [name for name, value in runs[0].items() if isinstance(value, int | float)]
    return {name: summarise([run[name] for run in runs]) for name in names}


def gaps(values: list[float], lr: float, hr: float) -> dict[str, Any] | None:
    """Gap recovered over seeds; None where HR is not above LR, so that there is no gap."""
    return summarise([gap_recovered(value, lr, hr) for value in values]) if hr > lr else None


def plus_minus(summary: Mapping[str, Any] | None, digits: int = 1) -> str:
    """`mean ± half width`, or the mean alone, zero without a sign; nothing for None."""
    if summary is None:
        return ""
    text = f"{round(summary['mean'], digits) + 0.0:,.{digits}f}"
    if summary["low"] is None or digits == 0:
        return text
    return f"{text} ± {(summary['high'] - summary['low']) / 2:.{digits}f}"
