"""`python -m benchmarks.yolox`: a detector that nobody here trained meets LR images."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.common.results import write_results
from benchmarks.common.shell import cache_option, numbers, root_option, told_errors
from benchmarks.common.study import subset
from benchmarks.yolox.run import Photographs, YoloxStudy, run, summary
from featxfer import Images, VOCDevkit, open_coco

_factors = numbers(int, "whole numbers with commas between")


@click.command(context_settings={"show_default": True})
@root_option
@click.option(
    "--coco", nargs=2, type=Path, required=True, metavar="INSTANCES IMAGES", help="Of val2017."
)
@click.option("--weights", type=Path, required=True, help="yolox_nano.onnx.")
@click.option("--factors", default="2,4,8", callback=_factors, help="How many times smaller.")
@click.option("--seeds", default=3)
@click.option("--train-images", type=int, help="Some of VOC's, evenly spaced.  [default: all]")
@click.option("--val-images", type=int, help="The same, of each set.")
@cache_option
@click.option("--out", type=Path, default=Path("runs") / "yolox")
def main(
    root: Path,
    coco: tuple[Path, Path],
    weights: Path,
    factors: tuple[int, ...],
    seeds: int,
    train_images: int | None,
    val_images: int | None,
    cache: Path,
    out: Path,
) -> None:
    """Writes results.json and summary.md. May be interrupted; the same command goes on."""
    with told_errors():
        devkit, instances = VOCDevkit(root), open_coco(*coco)
        judged = {
            "VOC val": Photographs(devkit.images("val"), devkit.boxes("val"), devkit.classes),
            "COCO val": Photographs(instances.images, instances.boxes, instances.classes),
        }
        sets = {name: _some(part, val_images) for name, part in judged.items()}
        train = devkit.images("train")
        train = subset(train, _spaced(train, train_images))
        study = YoloxStudy(weights, instances.classes, train, sets, cache)
        results = run(study, factors, seeds)
        write_results(out, results, summary(results))


def _spaced(images: Images, count: int | None) -> list[int]:
    """Indices of so many images, evenly spaced."""
    kept = min(count or len(images), len(images))
    return [index * len(images) // kept for index in range(kept)]


def _some(part: Photographs, count: int | None) -> Photographs:
    rows = _spaced(part.images, count)
    return Photographs(subset(part.images, rows), [part.boxes[row] for row in rows], part.classes)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.yolox")
