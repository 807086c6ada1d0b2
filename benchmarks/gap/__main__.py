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

from benchmarks.gap.methods import METHODS
from benchmarks.gap.run import run
from benchmarks.gap.study import Study
from benchmarks.gap.tables import few_labels, to_markdown
from benchmarks.shell import told_errors
from featxfer import PROTOCOLS, Degradation, VOCDevkit
from featxfer.features.extract import default_cache
from featxfer.files import write_atomic


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
            Degradation(hr_size=hr_size),
            PROTOCOLS[protocol],
        )
        results = run(study, methods, study.view(lr_size), seeds)
        write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        summary = to_markdown(results["table"]) + "\n" + few_labels(results["table"])
        write_atomic(out / "summary.md", summary.encode())
        click.echo(summary)
        click.echo(f"Wrote results.json and summary.md to {out}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gap")
