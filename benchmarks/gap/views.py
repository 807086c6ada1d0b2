"""`python -m benchmarks.gap.views`: heads on the degradation that they know, and on all others.

A head is trained on each degradation, and one on all of them; each is judged on every degradation
by SVMs on HR features that are never changed. `--views sizes` is the curve over resolutions,
`--views corruptions` blur, sensor noise, JPEG and their chain.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks.gap.features import through_blocks
from benchmarks.gap.methods import fit_pooled_head
from benchmarks.gap.study import Rows, Study
from benchmarks.gap.tables import grid, with_gaps
from benchmarks.plots import new_figure, png, require_matplotlib
from benchmarks.shell import told_errors
from benchmarks.versions import versions
from benchmarks.voc2007.methods import ridge
from featxfer import (
    BLOCK_RECIPE,
    FEATURES_RECIPE,
    Degradation,
    Recipe,
    VOCDevkit,
)
from featxfer.features.extract import default_cache
from featxfer.files import write_atomic
from featxfer_integrations import CorruptedDegradation, fit_transfer

SIZES = (16, 24, 32, 48, 64, 96, 128)
SMALL = 64
"""Side of the LR image that corruptions act on, pixels."""


def named_views(kind: str, hr_size: int) -> dict[str, Degradation]:
    """The degradations of a table by name."""
    if kind == "sizes":
        return {f"{size} px": Degradation(hr_size=hr_size, lr_size=size) for size in SIZES}
    sizes: dict[str, Any] = {"hr_size": hr_size, "lr_size": SMALL}
    corruptions: dict[str, dict[str, Any]] = {
        "": {},
        ", JPEG 20": {"jpeg_quality": 20},
        ", blur 1.5": {"blur_sigma": 1.5},
        ", noise 0.1": {"noise_std": 0.1},
        ", blur 1, noise 0.05, JPEG 40": {"blur_sigma": 1.0, "noise_std": 0.05, "jpeg_quality": 40},
    }
    return {
        f"{SMALL} px{name}": CorruptedDegradation(**sizes, **options)
        for name, options in corruptions.items()
    }


@click.command(context_settings={"show_default": True})
@click.option("--root", type=Path, required=True, help="A devkit in VOC layout.")
@click.option("--views", "kind", default="sizes", type=click.Choice(["sizes", "corruptions"]))
@click.option("--backbone", default="timm/tf_efficientnet_lite0")
@click.option("--weights", default="demo", help="pretrained, demo or a file.")
@click.option("--hr-size", default=224, help="Side of the model's input, pixels.")
@click.option("--seeds", default=3)
@click.option("--deep", is_flag=True, help="Blocks too, of every other degradation; one seed.")
@click.option("--figures/--no-figures", default=True, help="gap.png.")
@click.option("--cache", type=Path, help="[default: $FEATXFER_CACHE or ~/.cache/featxfer]")
@click.option("--out", type=Path, help="[default: runs/gap-VIEWS]")
def main(
    root: Path,
    kind: str,
    backbone: str,
    weights: str,
    hr_size: int,
    seeds: int,
    deep: bool,
    figures: bool,
    cache: Path | None,
    out: Path | None,
) -> None:
    """Writes results.json, summary.md and gap.png. May be interrupted; the same command goes on."""
    with told_errors():
        if figures:
            require_matplotlib("--no-figures")
        resize = Degradation(hr_size=hr_size)
        study = Study(backbone, weights, VOCDevkit(root), cache or default_cache(), resize)
        out = out or Path("runs") / f"gap-{kind}"
        results = run(study, named_views(kind, hr_size), seeds, deep=deep)
        results["config"] |= {"backbone": backbone, "weights": weights, "views": kind}
        summary = to_markdown(results)
        write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        write_atomic(out / "summary.md", summary.encode())
        if figures:
            write_atomic(out / "gap.png", curve(results["tables"]))
        click.echo(summary)
        pictures = " and gap.png" if figures else ""
        click.echo(f"Wrote results.json, summary.md{pictures} to {out}")


def run(
    study: Study, views: dict[str, Degradation], seeds: int, *, deep: bool = False
) -> dict[str, Any]:
    """Tables by the degradation that is judged; rows are heads by what they were trained on."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in views}
    for name, view in tqdm(views.items(), desc="plain features", disable=None):
        key: dict[str, Any] = {"views": "plain", "view": view.to_dict()}
        found = study.figures(key, lambda: {"rows": _plain(study, view)})["rows"]  # noqa: B023
        for label, figures in zip(("HR", "LR", "ridge regression"), found, strict=True):
            rows[name][label] = [figures]
    trained = {**{f"head of {name}": [view] for name, view in views.items()}}
    trained["one head for all"] = list(views.values())
    for label, known in tqdm(trained.items(), desc="heads", disable=None):
        for seed in range(seeds):
            key = {
                "views": [view.to_dict() for view in views.values()],
                "trained on": [view.to_dict() for view in known],
                "recipe": FEATURES_RECIPE.to_dict(),
                "seed": seed,
            }
            found = study.figures(
                key,
                lambda: {"rows": _head(study, known, list(views.values()), seed)},  # noqa: B023
            )["rows"]
            for name, figures in zip(views, found, strict=True):
                rows[name].setdefault(label, []).append(figures)
    if deep:
        known = list(views.values())[::2]
        recipe = dataclasses.replace(BLOCK_RECIPE, epochs=BLOCK_RECIPE.epochs // 2)
        key = {
            "views": [view.to_dict() for view in views.values()],
            "blocks trained on": [view.to_dict() for view in known],
            "recipes": [FEATURES_RECIPE.to_dict(), recipe.to_dict()],
        }
        found = study.figures(
            key, lambda: {"rows": _deep(study, known, list(views.values()), recipe)}
        )["rows"]
        for name, figures in zip(views, found, strict=True):
            rows[name][f"blocks of {', '.join(list(views)[::2])}"] = [figures]
    return {
        "config": {
            "hr_size": study.resize.hr_size,
            "seeds": seeds,
            "protocol": study.protocol.name,
        },
        "images": {split: len(study.images(split)) for split in ("trainval", "test")},
        "versions": versions(),
        "tables": {name: with_gaps(table) for name, table in rows.items()},
    }


def _plain(study: Study, view: Degradation) -> list[dict[str, float]]:
    train, test = (study.features(split, view) for split in ("trainval", "test"))
    _, mapped = ridge((train.lr, test.lr), train.hr)
    return [
        study.judge(Rows(None, test.hr, test.hr)),
        *(study.judge(Rows(None, rows)) for rows in (test.lr, mapped)),
    ]


def _head(
    study: Study, known: list[Degradation], views: list[Degradation], seed: int
) -> list[dict[str, Any]]:
    head, _ = fit_pooled_head(study, known, seed, study.images("trainval"))
    found = []
    for view in views:
        test = study.features("test", view)
        found.append(study.judge(Rows(None, head.transfer(test.lr), head.transfer(test.hr))))
    return found


def _deep(
    study: Study, known: list[Degradation], views: list[Degradation], recipe: Recipe
) -> list[dict[str, Any]]:
    model = study.copy()
    fit_transfer(
        model,
        study.images("trainval"),
        degradation=known,
        depth="deep",
        block_recipe=recipe,
        crops=0,
        cache=study.cache,
    )
    found = []
    for view in views:
        test = through_blocks(study, model, "test", view)
        found.append(study.judge(Rows(None, test.lr, test.hr)))
    return found


def curve(tables: dict[str, Any]) -> bytes:
    """The gap that each row gives back over the degradations, with 95% intervals, as a PNG file.

    Of heads that know one degradation, each is shown where it is at home, in one line.
    """
    figure = new_figure(7.0, 3.6)
    axes = figure.subplots()
    lines: dict[str, dict[str, Any]] = {}
    for view, table in tables.items():
        for label, figures in table.items():
            if "deploy gap" in figures and label not in ("HR", "LR"):
                name = "head of that alone" if label == f"head of {view}" else label
                lines.setdefault(name, {})[view] = figures["deploy gap"]
    places = {view: place for place, view in enumerate(tables)}
    for name, points in lines.items():
        if name.startswith("head of ") and name != "head of that alone":
            continue
        middle = [point["mean"] for point in points.values()]
        around = [
            0.0 if point["low"] is None else (point["high"] - point["low"]) / 2
            for point in points.values()
        ]
        at = [places[view] for view in points]
        axes.errorbar(at, middle, around, marker="o", markersize=3, capsize=2, label=name)
    axes.axhline(0, color="0.7", linewidth=0.8)
    axes.set_xticks(range(len(tables)), list(tables), fontsize=7)
    axes.set_ylabel("gap recovered, deploy (%)")
    axes.legend(fontsize=7, frameon=False)
    return png(figure)


def to_markdown(results: dict[str, Any]) -> str:
    """Deploy mAP by degradation and row, and the gap recovered with what HR images lose."""
    tables = results["tables"]
    columns = [(view, view, 1) for view in tables]
    maps, gaps = _by_row(tables, "deploy"), _by_row(tables, "deploy gap")
    for label, figures in next(iter(tables.values())).items():
        if "hr loss" in figures and label in gaps:
            gaps[label]["hr loss"] = figures["hr loss"]
    lost = [*columns, ("HR loses, mAP", "hr loss", 1)]
    return f"Deploy mAP, %:\n\n{grid(maps, columns)}\nGap recovered, %:\n\n{grid(gaps, lost)}"


def _by_row(tables: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """One figure of each row, by degradation."""
    rows: dict[str, dict[str, Any]] = {}
    for view, table in tables.items():
        for label, figures in table.items():
            if name in figures:
                rows.setdefault(label, {})[view] = figures[name]
    return rows


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gap.views")
