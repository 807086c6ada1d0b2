"""`python -m benchmarks.detection`: a detector trained on HR images meets LR ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import click

from benchmarks.detection.detectors import KINDS
from benchmarks.detection.methods import METHODS, TUNING, Method
from benchmarks.detection.run import Study, picture, run, to_markdown
from benchmarks.plots import require_matplotlib
from benchmarks.shell import told_errors
from featxfer import VOCDevkit
from featxfer.features.extract import default_cache
from featxfer.files import write_atomic


def _chosen(value: str | None, known: Mapping[str, Method]) -> list[Method]:
    names = list(known) if value is None else value.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        wanted = f"wanted some of {', '.join(known)}"
        raise click.BadParameter(f"got {', '.join(unknown)}, {wanted}", param_hint="--methods")
    return [known[name] for name in names]


def _factors(_: object, __: object, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"got {value!r}, wanted numbers with commas between") from error


@click.command(context_settings={"show_default": True})
@click.option("--root", type=Path, required=True, help="A devkit in VOC layout, with boxes.")
@click.option("--detector", default="faster-rcnn", type=click.Choice(KINDS))
@click.option("--weights", default="demo", help="Of the backbone: pretrained, demo, random.")
@click.option("--methods", help="Names, with commas between.  [default: every one]")
@click.option("--factors", default="16,24", callback=_factors, help="How many times smaller.")
@click.option("--seeds", default=3)
@click.option("--cache", type=Path, help="[default: $FEATXFER_CACHE or ~/.cache/featxfer]")
@click.option("--out", type=Path, help="[default: runs/detection-DETECTOR]")
@click.option("--tune", is_flag=True, help="Choices of blocks, trained on train, judged on val.")
@click.option("--figures/--no-figures", default=True, help="boxes.png: the last method and factor.")
def main(
    root: Path,
    detector: str,
    weights: str,
    methods: str | None,
    factors: tuple[float, ...],
    seeds: int,
    cache: Path | None,
    out: Path | None,
    tune: bool,
    figures: bool,
) -> None:
    """Writes results.json, summary.md and boxes.png. May be interrupted; the same goes on."""
    chosen = _chosen(methods, TUNING if tune else METHODS)
    train, test = ("train", "val") if tune else ("trainval", "test")
    out = out or Path("runs") / f"detection-{detector}{'-tune' if tune else ''}"
    with told_errors():
        if figures:
            require_matplotlib("--no-figures")
        study = Study(detector, VOCDevkit(root), cache or default_cache(), weights, train, test)
        results = run(study, chosen, factors, seeds)
        summary = to_markdown(results)
        write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        write_atomic(out / "summary.md", summary.encode())
        if figures:
            write_atomic(out / "boxes.png", picture(study, chosen[-1], factors[-1]))
        click.echo(summary)
        pictures = " and boxes.png" if figures else ""
        click.echo(f"Wrote results.json, summary.md{pictures} to {out}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.detection")
