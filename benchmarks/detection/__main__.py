"""`python -m benchmarks.detection`: a detector trained on HR images meets LR ones."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.common.plots import require_matplotlib
from benchmarks.common.results import write_results
from benchmarks.common.shell import cache_option, chosen, numbers, root_option, told_errors
from benchmarks.detection.detectors import KINDS
from benchmarks.detection.methods import METHODS, TUNING
from benchmarks.detection.run import DetectionStudy, picture, run, summary
from featxfer import VOCDevkit

_factors = numbers(float, "numbers with commas between")


@click.command(context_settings={"show_default": True})
@root_option
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
    root: Path,
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
    train, test = ("train", "val") if tune else ("trainval", "test")
    out = out or Path("runs") / f"detection-{detector}{'-tune' if tune else ''}"
    with told_errors():
        if figures:
            require_matplotlib("--no-figures")
        study = DetectionStudy(detector, VOCDevkit(root), cache, weights, train, test)
        results = run(study, asked, factors, seeds)
        pictures = {"boxes.png": picture(study, asked[-1], factors[-1])} if figures else {}
        write_results(out, results, summary(results), pictures)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.detection")
