"""The gap benchmark's table: every method, every seed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.common import table
from benchmarks.common.study import Study
from benchmarks.common.versions import versions
from benchmarks.gap.methods import METHODS
from featxfer import BLOCK_RECIPE, FEATURES_RECIPE, Degradation

SELF_CHECKS = ("cosine_gap", "retrieval_gap", "clusters_gap", "cosine", "retrieval", "clusters")


def run(study: Study, methods: Iterable[str], view: Degradation, seeds: int) -> dict[str, Any]:
    """All rows of the table, and what of the self-check goes with the gap recovered."""
    rows = table.run(study, {name: METHODS[name] for name in methods}, view, seeds)
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
        "table": table.with_gaps(rows),
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
