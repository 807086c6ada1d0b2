"""The one harness of the classification tables: methods in, rows with their gaps out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from benchmarks.common.intervals import summarise_runs
from benchmarks.common.method import Method
from benchmarks.common.study import Figures, Study
from featxfer import Degradation

TableMethod = Method[[Study, Degradation, int], list[Figures]]
"""From a study, the LR view and a seed to the figures of each row."""

Rows = dict[str, list[Figures]]
"""Figures of each row, a seed each; HR is the first row and LR the second."""


def run(study: Study, methods: Mapping[str, TableMethod], view: Degradation, seeds: int) -> Rows:
    """The figures of all rows, computed or read from earlier, interrupted runs."""
    rows: Rows = {}
    steps = [(name, seed) for name in methods for seed in methods[name].seeds(seeds)]
    for name, seed in tqdm(steps, desc=f"rows, {study.protocol.name}", disable=None):
        method = methods[name]
        key = {
            "method": name,
            "seed": seed,
            "view": view.to_dict(),
            "fit": method.choices(study, view, seed),
        }
        found = study.figures(key, lambda: {"rows": method.run(study, view, seed)})["rows"]  # noqa: B023
        for label, figures in zip(method.labels, found, strict=True):
            rows.setdefault(label, []).append(figures)
    return rows


def recovered(
    run: Mapping[str, Any],
    low: Mapping[str, Any],
    high: Mapping[str, Any],
    names: tuple[str, ...] = ("deploy", "accuracy", "retrain", "few"),
) -> dict[str, float]:
    """Shares of the gap in %, of figures whose names begin so, where HR is above LR."""
    return {
        f"{name} gap": 100 * (run[name] - low[name]) / (high[name] - low[name])
        for name, value in run.items()
        if isinstance(value, float)
        and name in low
        and name in high
        and name.startswith(names)
        and high[name] > low[name]
    }


def with_gaps(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Summaries by row, with the share of the gap recovered in %, where HR is above LR.

    The ends are the first two rows: plain HR and LR features, under SVMs on HR features (deploy,
    few labels), and under SVMs on their own features (retrain).
    """
    high, low = (runs[0] for runs in list(rows.values())[:2])
    table = {}
    for label, runs in rows.items():
        found = []
        for run in runs:
            cost = {"hr loss": high["hr"] - run["hr"]} if "hr" in run and "hr" in high else {}
            found.append({**run, **recovered(run, low, high), **cost})
        table[label] = summarise_runs(found)
    return table
