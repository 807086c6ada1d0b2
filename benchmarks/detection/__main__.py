"""`python -m benchmarks.detection`: a detector trained on HR images meets LR ones."""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.detection.detectors import KINDS
from benchmarks.detection.methods import METHODS
from benchmarks.detection.run import Study, picture, run, to_markdown
from benchmarks.plots import require_matplotlib
from benchmarks.shell import told_errors
from featxfer import VOCDevkit
from featxfer._files import write_atomic
from featxfer.features import default_cache


def _methods(_: object, __: object, value: str) -> tuple[str, ...]:
    chosen = tuple(METHODS) if value == "all" else tuple(value.split(","))
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        raise click.BadParameter(f"got {', '.join(unknown)}, wanted some of {', '.join(METHODS)}")
    return chosen


def _factors(_: object, __: object, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"got {value!r}, wanted numbers with commas between") from error


@click.command(context_settings={"show_default": True})
@click.option("--root", type=Path, required=True, help="A devkit in VOC layout, with boxes.")
@click.option("--detector", default="faster-rcnn", type=click.Choice(KINDS))
@click.option("--weights", default="demo", help="Of the backbone: pretrained, demo, random.")
@click.option("--methods", default="all", callback=_methods, help="Names, with commas between.")
@click.option("--factors", default="16,24", callback=_factors, help="How many times smaller.")
@click.option("--seeds", default=3)
@click.option("--cache", type=Path, help="[default: $FEATXFER_CACHE or ~/.cache/featxfer]")
@click.option("--out", type=Path, help="[default: runs/detection-DETECTOR]")
@click.option("--figures/--no-figures", default=True, help="boxes.png: the last method and factor.")
def main(
    root: Path,
    detector: str,
    weights: str,
    methods: tuple[str, ...],
    factors: tuple[float, ...],
    seeds: int,
    cache: Path | None,
    out: Path | None,
    figures: bool,
) -> None:
    """Writes results.json, summary.md and boxes.png. May be interrupted; the same goes on."""
    out = out or Path("runs") / f"detection-{detector}"
    with told_errors():
        if figures:
            require_matplotlib("--no-figures")
        study = Study(detector, VOCDevkit(root), cache or default_cache(), weights)
        results = run(study, methods, factors, seeds)
        summary = to_markdown(results["tables"])
        write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        write_atomic(out / "summary.md", summary.encode())
        if figures:
            write_atomic(out / "boxes.png", picture(study, methods[-1], factors[-1]))
        click.echo(summary)
        pictures = " and boxes.png" if figures else ""
        click.echo(f"Wrote results.json, summary.md{pictures} to {out}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.detection")
