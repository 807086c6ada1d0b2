"""The gap benchmark's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.intervals import summarise_runs
from benchmarks.common.markdown import grid

ALL_ROWS = (
    ("deploy mAP %", "deploy", 1),
    ("gap %", "deploy gap", 1),
    ("accuracy gap %", "accuracy gap", 1),
    ("retrain mAP %", "retrain", 1),
    ("gap %", "retrain gap", 1),
    ("HR loses", "hr loss", 1),
    ("parameters", "parameters", 0),
    ("blocks, M MACs", "block_macs", 0),
    ("training, s", "seconds", 0),
)
FEW_LABELS = tuple(
    (text, name, 1)
    for m in (1, 5, 10)
    for text, name in ((f"{m} a class, mAP %", f"few-{m}"), ("gap %", f"few-{m} gap"))
)


def recovered(
    run: Mapping[str, float],
    low: Mapping[str, float],
    high: Mapping[str, float],
    names: tuple[str, ...] = ("deploy", "accuracy", "retrain", "few"),
) -> dict[str, float]:
    """Shares of the gap in %, of figures whose names begin so, where HR is above LR."""
    return {
        f"{name} gap": 100 * (run[name] - low[name]) / (high[name] - low[name])
        for name in run
        if name in low and name in high and name.startswith(names) and high[name] > low[name]
    }


def with_gaps(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Summaries by row, with the share of the gap recovered in %, where HR is above LR.

    The ends are plain HR and LR features under SVMs on HR features (deploy, few labels), and under
    SVMs on their own features (retrain).
    """
    high, low = rows["HR"][0], rows["LR"][0]
    table = {}
    for label, runs in rows.items():
        found = []
        for run in runs:
            cost = {"hr loss": high["hr"] - run["hr"]} if "hr" in run and "hr" in high else {}
            found.append({**run, **recovered(run, low, high), **cost})
        table[label] = summarise_runs(found)
    return table


def all_rows(table: Mapping[str, Any]) -> str:
    """All rows: figures and gaps with half of their 95% interval."""
    return grid(table, ALL_ROWS)


def few_labels(table: Mapping[str, Any]) -> str:
    """SVMs on few labelled HR images a class, tested on LR ones: mAP and gap."""
    return grid({k: v for k, v in table.items() if "few-1" in v}, FEW_LABELS)


def summary(results: Mapping[str, Any]) -> str:
    """All rows, and those of few labels."""
    return f"{all_rows(results['table'])}\n{few_labels(results['table'])}"
