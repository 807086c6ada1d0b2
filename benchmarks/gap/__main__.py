"""`python -m benchmarks.gap`: every objective, control and depth in one table.

Heads and blocks are trained by `fit_transfer` on the trainval images, without labels, and judged on
test images by linear SVMs: deploy (SVMs on HR features, never changed), retrain (SVMs on the row's
own LR features), few labels, and HR images sent through, which is what it costs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from benchmarks.gap.methods import METHODS
from benchmarks.gap.study import Study
from benchmarks.gap.tables import few_labels, to_markdown, with_gaps
from benchmarks.shell import told_errors
from benchmarks.versions import versions
from featxfer import BLOCK_RECIPE, FEATURES_RECIPE, PROTOCOLS, VOCDevkit
from featxfer._files import write_atomic
from featxfer.features import default_cache

SELF_CHECKS = ("cosine_gap", "retrieval_gap", "clusters_gap", "cosine", "retrieval", "clusters")


def _methods(_: Any, __: Any, value: str) -> tuple[str, ...]:
    chosen = tuple(METHODS) if value == "all" else ("plain", *value.split(","))
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        raise click.BadParameter(f"got {', '.join(unknown)}, wanted some of {', '.join(METHODS)}")
    return tuple(dict.fromkeys(chosen))


@click.command(context_settings={"show_default": True})
@click.option("--root", type=Path, required=True, help="A devkit in VOC layout.")
@click.option("--backbone", default="timm/tf_efficientnet_lite0")
@click.option("--weights", default="demo", help="pretrained, demo or a file.")
@click.option("--methods", default="all", callback=_methods, help="Names, with commas between.")
@click.option("--lr-size", default=32, help="Side of the LR image, pixels.")
@click.option("--hr-size", default=224, help="Side of the model's input, pixels.")
@click.option("--seeds", default=5)
@click.option("--protocol", default="vissl", type=click.Choice(list(PROTOCOLS)))
@click.option("--cache", type=Path, help="[default: $FEATXFER_CACHE or ~/.cache/featxfer]")
@click.option("--out", type=Path, default=Path("runs") / "gap")
def main(
    root: Path,
    backbone: str,
    weights: str,
    methods: tuple[str, ...],
    lr_size: int,
    hr_size: int,
    seeds: int,
    protocol: str,
    cache: Path | None,
    out: Path,
) -> None:
    """Writes results.json and summary.md. May be interrupted; the same command goes on."""
    with told_errors():
        study = Study(
            backbone,
            weights,
            VOCDevkit(root),
            cache or default_cache(),
            hr_size,
            PROTOCOLS[protocol],
        )
        results = run(study, methods, lr_size, seeds)
        write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        summary = to_markdown(results["table"]) + "\n" + few_labels(results["table"])
        write_atomic(out / "summary.md", summary.encode())
        click.echo(summary)
        click.echo(f"Wrote results.json and summary.md to {out}")


def run(study: Study, methods: tuple[str, ...], lr_size: int, seeds: int) -> dict[str, Any]:
    """All rows of the table, and what of the self-check goes with the gap recovered."""
    view = study.view(lr_size)
    rows: dict[str, list[dict[str, Any]]] = {}
    steps = [
        (name, seed) for name in methods for seed in range(seeds if METHODS[name].seeded else 1)
    ]
    for name, seed in tqdm(steps, desc="rows", disable=None):
        method = METHODS[name]
        key: dict[str, Any] = {
            "method": name,
            "seed": seed,
            "view": view.to_dict(),
            "recipes": [FEATURES_RECIPE.to_dict()],
        }
        if name == "deep":
            key["recipes"].append(BLOCK_RECIPE.to_dict())
        found = study.figures(key, lambda: {"rows": method.run(study, [view], seed)})["rows"]  # noqa: B023
        for label, figures in zip(method.labels, found, strict=True):
            rows.setdefault(label, []).append(figures)
    table = with_gaps(rows)
    return {
        "config": {
            "backbone": study.name,
            "weights": study.weights,
            "lr_size": lr_size,
            "hr_size": study.hr_size,
            "seeds": seeds,
            "protocol": study.protocol.name,
            "solver": "batched",
            "methods": methods,
            "recipes": {"head": FEATURES_RECIPE.to_dict(), "blocks": BLOCK_RECIPE.to_dict()},
        },
        "images": {split: len(study.images(split)) for split in ("trainval", "test")},
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


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gap")
