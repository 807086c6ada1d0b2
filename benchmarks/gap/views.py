"""`python -m benchmarks.gap.views`: heads on the degradation that they know, and on all others.

A head is trained on each degradation, and one on all of them; each is judged on every degradation
by SVMs on HR features that are never changed. `--views sizes` is the curve over resolutions,
`--views corruptions` blur, sensor noise, JPEG and their chain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks.common.fit import Fit, head_of
from benchmarks.common.markdown import grid
from benchmarks.common.plots import new_figure, png, require_matplotlib
from benchmarks.common.results import write_results
from benchmarks.common.ridge import ridge
from benchmarks.common.study import Study, Transferred, with_study
from benchmarks.common.table import with_gaps
from benchmarks.common.versions import versions
from benchmarks.gap.features import through_blocks
from featxfer import BLOCK_RECIPE, Degradation
from featxfer_integrations import CorruptedDegradation, FitOptions

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
@click.option("--views", "kind", default="sizes", type=click.Choice(["sizes", "corruptions"]))
@click.option("--seeds", default=3)
@click.option("--deep", is_flag=True, help="Blocks too, of every other degradation; one seed.")
@click.option("--figures/--no-figures", default=True, help="gap.png.")
@click.option("--out", type=Path, help="[default: runs/gap-VIEWS]")
@with_study
def main(study: Study, kind: str, seeds: int, deep: bool, figures: bool, out: Path | None) -> None:
    """Writes results.json, summary.md and gap.png. May be interrupted; the same command goes on."""
    if figures:
        require_matplotlib("--no-figures")
    results = run(study, named_views(kind, study.resize.hr_size), seeds, deep=deep)
    results["config"] |= {"backbone": study.name, "weights": study.weights, "views": kind}
    pictures = {"gap.png": curve(results["tables"])} if figures else {}
    write_results(out or Path("runs") / f"gap-{kind}", results, summary(results), pictures)


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
    trained = {f"head of {name}": [view] for name, view in views.items()}
    trained["one head for all"] = list(views.values())
    fits = [
        (label, partial(study.fit, known, seed), _head)
        for label, known in trained.items()
        for seed in range(seeds)
    ]
    if deep:
        options = FitOptions(
            block_recipe=replace(BLOCK_RECIPE, epochs=BLOCK_RECIPE.epochs // 2), crops=0
        )
        known = list(views.values())[::2]
        blocks = partial(study.fit, known, 0, "blocks", options=options)
        fits.append((f"blocks of {', '.join(list(views)[::2])}", blocks, _blocks))
    for label, fit, judge in tqdm(fits, desc="heads and blocks", disable=None):
        asked = fit()
        key = {"views": [view.to_dict() for view in views.values()], "fit": asked.key}
        found = study.figures(key, lambda: {"rows": judge(study, asked, views.values())})["rows"]  # noqa: B023
        for name, figures in zip(views, found, strict=True):
            rows[name].setdefault(label, []).append(figures)
    return {
        "config": {
            "hr_size": study.resize.hr_size,
            "seeds": seeds,
            "protocol": study.protocol.name,
        },
        "images": study.counts,
        "versions": versions(),
        "tables": {name: with_gaps(table) for name, table in rows.items()},
    }


def _plain(study: Study, view: Degradation) -> list[dict[str, float]]:
    train, test = (study.features(split, view) for split in ("train", "test"))
    _, mapped = ridge((train.lr, test.lr), train.hr)
    return [
        study.judge(Transferred(None, test.hr, test.hr)),
        *(study.judge(Transferred(None, rows)) for rows in (test.lr, mapped)),
    ]


def _head(study: Study, fit: Fit, views: Iterable[Degradation]) -> list[dict[str, Any]]:
    fit.run()
    head, found = head_of(fit.model), []
    for view in views:
        test = study.features("test", view)
        found.append(study.judge(Transferred(None, head.transfer(test.lr), head.transfer(test.hr))))
    return found


def _blocks(study: Study, fit: Fit, views: Iterable[Degradation]) -> list[dict[str, Any]]:
    fit.run()
    through = [through_blocks(study, fit.model, "test", view) for view in views]
    return [study.judge(Transferred(None, test.lr, test.hr)) for test in through]


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
    if axes.get_legend_handles_labels()[0]:  # none where HR is nowhere above LR
        axes.legend(fontsize=7, frameon=False)
    return png(figure)


def summary(results: dict[str, Any]) -> str:
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
