"""The gap benchmark's table: every method, every seed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.study import Study
from benchmarks.common.versions import versions
from benchmarks.gap.methods import METHODS
from benchmarks.gap.tables import with_gaps
from featxfer import BLOCK_RECIPE, FEATURES_RECIPE, Degradation

SELF_CHECKS = ("cosine_gap", "retrieval_gap", "clusters_gap", "cosine", "retrieval", "clusters")


def run(study: Study, methods: Iterable[str], view: Degradation, seeds: int) -> dict[str, Any]:
    """All rows of the table, and what of the self-check goes with the gap recovered."""
    rows: dict[str, list[dict[str, Any]]] = {}
    steps = [(name, seed) for name in methods for seed in METHODS[name].seeds(seeds)]
    for name, seed in tqdm(steps, desc="rows", disable=None):
        method = METHODS[name]
        key = {
            "method": name,
            "seed": seed,
            "view": view.to_dict(),
            "fit": method.choices(study, view, seed),
        }
        found = study.figures(key, lambda: {"rows": method.run(study, view, seed)})["rows"]  # noqa: B023
        for label, figures in zip(method.labels, found, strict=True):
            rows.setdefault(label, []).append(figures)
    table = with_gaps(rows)
    return {
        "config": {
            "backbone": study.name,
            "weights": study.weights,
            "lr_size": view.lr_size,
            "hr_size": view.hr_size,
            "seeds": seeds,
            "protocol": study.protocol.name,
            "solver": study.solver,
            "methods": list(methods),
            "recipes": {"head": FEATURES_RECIPE.to_dict(), "blocks": BLOCK_RECIPE.to_dict()},
        },
        "images": study.counts,
        "versions": versions(),
        "table": table,
        "self_check": self_check(rows),
    }


def self_check(rows: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Rank correlation, over heads and seeds, of each label-free figure with the deploy gap."""
    from scipy.stats import spearmanr

    runs = [run for several in rows.values() for run in several if run.get("self_check")]
    if len(runs) < 3:
        return {}
    deploy = [run["deploy"] for run in runs]
    found = {}
    for name in SELF_CHECKS:
        values = [run["self_check"][0][name] for run in runs]
        if len(set(values)) > 1 and len(set(deploy)) > 1:
            found[name] = float(np.round(spearmanr(values, deploy).statistic, 3))
    return {"runs": len(runs), **found}
