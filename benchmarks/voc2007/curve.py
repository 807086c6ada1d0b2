"""Mean average precision over C: what a row's figure hangs on where C is not chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import product
from typing import Any

from tqdm import tqdm

from benchmarks.common.intervals import summarise
from benchmarks.common.plots import new_figure, png
from benchmarks.common.study import Study, Transferred
from benchmarks.voc2007.methods import Row
from featxfer import PROTOCOLS, Degradation

COSTS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
SCALES = {"rows as they come": False, "rows of unit length": True}
"""Whether rows are divided by their L2 norm, by the panel's title."""


def measure_curve(
    study: Study, rows: Mapping[str, Row], view: Degradation, seeds: int
) -> dict[str, Any]:
    """MAP in % of a few rows by C, by row, by panel; all else as the protocol `plain` has it."""
    wanted = [rows[name] for name in rows if name not in ("paired", "hidden", "random")]
    found: dict[str, Any] = {title: {} for title in SCALES}
    for row in tqdm(wanted, desc="curve over C", disable=None):
        runs = []
        for seed in range(seeds if row.seeded else 1):
            key = {"curve": row.label, "of": row.choices, "seed": seed, "view": view.to_dict()}
            key |= {"costs": COSTS}
            runs.append(study.figures(key, lambda: _maps(study, row.make(study, view, seed))))  # noqa: B023
        for title, lines in found.items():
            by_cost = zip(*(run[title] for run in runs), strict=True)
            lines[row.label] = [
                {"cost": cost, "map": summarise(list(values))}
                for cost, values in zip(COSTS, by_cost, strict=True)
            ]
    return found


def _maps(study: Study, rows: Transferred) -> dict[str, list[float]]:
    """MAP in % by C, by panel."""
    assert rows.train is not None
    found: dict[str, list[float]] = {title: [] for title in SCALES}
    for (title, normalize), cost in product(SCALES.items(), COSTS):
        protocol = dataclasses.replace(PROTOCOLS["plain"], costs=(cost,), normalize=normalize)
        svms = study.svms(rows.train, study.labels("train"), protocol)
        found[title].append(study.precision(svms.decisions(rows.test), study.labels("test")))
    return found


def draw_curve(curve: Mapping[str, Any]) -> bytes:
    """A panel each for rows as they come and for rows of unit length."""
    figure = new_figure(7.4, 4.4)
    for axes, (title, lines) in zip(figure.subplots(1, 2, sharey=True), curve.items(), strict=True):
        for label, points in lines.items():
            means = [point["map"]["mean"] for point in points]
            style = "--" if label.startswith("Baseline") else "-"
            costs = [point["cost"] for point in points]
            axes.plot(costs, means, style, marker="o", markersize=3, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("C of the SVMs")
        axes.set_title(title, loc="left")
    figure.axes[0].set_ylabel("mAP (%)")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, ncols=2, loc="outside lower center", frameon=False)
    return png(figure)
