"""`python -m benchmarks.gap`: every objective, control and site in one table.

Heads and blocks are trained by `fit_transfer` on the trainval images, without labels, and judged on
test images by linear SVMs: deploy (SVMs on HR features, never changed), retrain (SVMs on the row's
own LR features), few labels, and HR images sent through, which is what it costs.
"""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.common.results import write_results
from benchmarks.common.shell import chosen
from benchmarks.common.study import Study, with_study
from benchmarks.gap.methods import METHODS
from benchmarks.gap.run import run
from benchmarks.gap.tables import summary


@click.command(context_settings={"show_default": True})
@click.option("--methods", help="Names, with commas between.  [default: every one]")
@click.option("--lr-size", default=32, help="Side of the LR image, pixels.")
@click.option("--seeds", default=5)
@click.option("--out", type=Path, default=Path("runs") / "gap")
@with_study
def main(study: Study, methods: str | None, lr_size: int, seeds: int, out: Path) -> None:
    """Writes results.json and summary.md. May be interrupted; the same command goes on."""
    names = chosen("--methods", methods, METHODS)
    results = run(study, dict.fromkeys(["plain", *names]), study.view(lr_size), seeds)
    write_results(out, results, summary(results))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gap")
