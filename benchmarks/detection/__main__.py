"""`python -m benchmarks.detection`: a detector trained on HR images meets LR ones."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.common.plots import require_matplotlib
from benchmarks.common.results import write_results
from benchmarks.common.shell import cache_option, chosen, numbers, told_errors
from benchmarks.detection.detectors import KINDS
from benchmarks.detection.methods import METHODS, TUNING
from benchmarks.detection.run import CocoSplits, DetectionStudy, picture, run, summary
from featxfer import VOCDevkit, open_coco

_factors = numbers(float, "numbers with commas between")


@click.command(context_settings={"show_default": True})
@click.option("--root", type=Path, help="A devkit in VOC layout.")
@click.option(
    "--coco",
    nargs=2,
    type=Path,
    multiple=True,
    metavar="INSTANCES IMAGES",
    help="In its place, in COCO's layout: first of images to train on, then of others to judge by.",
)
@click.option("--detector", default="faster-rcnn", type=click.Choice(KINDS))
@click.option("--weights", default="demo", help="Of the backbone: pretrained, demo, random.")
@click.option("--methods", help="Names, with commas between.  [default: every one]")
@click.option("--factors", default="16,24", callback=_factors, help="How many times smaller.")
@click.option("--seeds", default=3)
@cache_option
@click.option("--out", type=Path, help="[default: runs/detection-DETECTOR]")
@click.option("--tune", is_flag=True, help="Choices of blocks, trained on train, judged on val.")
@click.option("--figures/--no-figures", default=True, help="boxes.png: the last method and factor.")
def main(
    root: Path | None,
    coco: tuple[tuple[Path, Path], ...],
    detector: str,
    weights: str,
    methods: str | None,
    factors: tuple[float, ...],
    seeds: int,
    cache: Path,
    out: Path | None,
    tune: bool,
    figures: bool,
) -> None:
    """Writes results.json, summary.md and boxes.png. May be interrupted; the same goes on."""
    known = TUNING if tune else METHODS
    asked = [known[name] for name in chosen("--methods", methods, known)]
    train, test = ("train", "val") if tune or coco else ("trainval", "test")
    if len(coco) != (2 if root is None else 0):
        raise click.UsageError("wanted --root, or --coco twice: to train on, and to judge by")
    out = out or Path("runs") / f"detection-{detector}{'-tune' if tune else ''}"
    with told_errors():
        if figures:
            require_matplotlib("--no-figures")
        sets = [open_coco(*pair) for pair in coco]
        devkit = (
            VOCDevkit(root) if root else CocoSplits(dict(zip((train, test), sets, strict=True)))
        )
        study = DetectionStudy(detector, devkit, cache, weights, train, test)
        results = run(study, asked, factors, seeds)
        pictures = {"boxes.png": picture(study, asked[-1], factors[-1])} if figures else {}
        write_results(out, results, summary(results), pictures)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.detection")
