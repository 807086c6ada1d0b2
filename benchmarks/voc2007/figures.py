"""Pictures of a run: the gap by method, AP by class, t-SNE as in Figures 1 and 3, image pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.bars import Bars, chart
from benchmarks.common.plots import new_figure, png
from benchmarks.gap.features import through_blocks
from benchmarks.gap.methods import BLOCKS
from benchmarks.voc2007.curve import draw_curve
from benchmarks.voc2007.run import Bench

TSNE_ROWS, TSNE_LEAST, TSNE_CLASSES, PAIRS = 500, 3, 10, 4

COLOURS = ("#9aa5b1", "#d9822b", "#2b6cb0")


def draw(bench: Bench, results: dict[str, Any]) -> dict[str, bytes]:
    """All pictures as PNG, by file name."""
    ap, classes = results["config"]["ap"], results["data"]["classes"]
    pictures = {
        f"ap_{protocol}.png": ap_bars(table, classes, ap)
        for protocol, table in results["tables"].items()
    }
    if len(_single_class_rows(bench)[0]) >= TSNE_LEAST:
        pictures["tsne.png"] = tsne(bench)
    if "curve" in results:
        pictures["curve.png"] = draw_curve(results["curve"])
    pictures["pairs.png"] = image_pairs(bench)
    return pictures


def gap_bars(results: dict[str, Any]) -> str:
    """The gap that each method recovers, with 95% intervals over seeds, as SVG."""
    protocol, table = next(iter(results["tables"].items()))
    rows = [
        Bars(label, [row.get("deploy gap"), row.get("retrain gap")])
        for label, row in reversed(table.items())
        if not label.startswith("Baseline") and row.get("retrain gap")
    ]
    config, size = results["config"], results["config"]["degradation"]["lr_size"]
    data = f"{config['data']} {config['splits'][1]}"
    if results["data"]["synthetic"]:
        data = "synthetic images"
    return chart(
        f"Gap recovered on {data} at {size} pixels, {protocol} SVMs",
        ("SVMs on HR features, never changed", "SVMs retrained on the method's LR features"),
        rows,
    )


def ap_bars(table: dict[str, Any], classes: list[str], ap: str) -> bytes:
    """AP of each class for Baseline-HR, Baseline-LR and the last row."""
    labels = [*list(table)[:2], list(table)[-1]]
    figure = new_figure(5.2, max(4.0, 0.3 * len(classes)))
    axes = figure.subplots()
    y = np.arange(len(classes))
    for i, (label, colour) in enumerate(zip(labels, COLOURS, strict=True)):
        aps = table[label]["classes"][ap]
        axes.barh(y + (i - 1) * 0.28, aps, 0.28, color=colour, label=label)
    axes.set_yticks(y, classes)
    axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.set_xlabel("AP (%), SVMs retrained")
    figure.legend(ncols=1, loc="outside upper left", frameon=False)
    return png(figure)


def tsne(bench: Bench) -> bytes:
    """HR and LR test features, and LR ones through blocks, by one projection, coloured by class.

    Without blocks it is the paper's head, whose outputs are in a space of their own: a projection
    of their own, too. Images of the 10 most frequent classes that have a single class among all.
    """
    rows, colours, names = _single_class_rows(bench)
    panels = _panels(bench, rows)
    groups = [list(panels)] if len({p.shape[1] for p in panels.values()}) == 1 else None
    groups = groups or [[*panels][:2], [*panels][2:]]
    points: dict[str, Any] = {}
    for group in groups:
        points |= _projected({name: panels[name] for name in group})
    figure = new_figure(7.4, 4.2)
    axes = figure.subplots(1, 3, sharex=len(groups) == 1, sharey=len(groups) == 1)
    for axis, (title, found) in zip(axes, points.items(), strict=True):
        for c, name in enumerate(names):
            axis.scatter(*found[colours == c].T, s=9, color=f"C{c}", label=name)
        axis.set_title(title, fontsize=13)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=12, ncols=3, loc="outside lower center"
    )
    return png(figure)


def _panels(bench: Bench, rows: np.ndarray) -> dict[str, Tensor]:
    """Features of test images by the panel's title."""
    study, view = bench.study, bench.options.degradation
    test = study.features("test", view)
    if "blocks" in bench.options.methods:
        fit = study.fit([view], 0, "blocks")
        fit.run()
        last = {f"LR, {BLOCKS.label}": through_blocks(study, fit.model, "test", view).lr}
    else:
        head = bench.transfer.head(bench.sizes, 0)
        last = {"LR, the paper's head": head.transfer(bench.transfer.scale(test.lr))}
    return {name: part[rows] for name, part in {"HR": test.hr, "LR": test.lr, **last}.items()}


def _projected(panels: dict[str, Tensor]) -> dict[str, Any]:
    """Points in two dimensions by panel, by one projection of all panels."""
    from sklearn.manifold import TSNE

    every = torch.cat(list(panels.values())).numpy()
    perplexity = min(30.0, (len(every) - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=0).fit_transform(every)
    return dict(zip(panels, np.split(points, len(panels)), strict=True))


def image_pairs(bench: Bench) -> bytes:
    """HR views above LR views of images spread over the test split."""
    degradation, images = bench.options.degradation, bench.study.images("test")
    chosen = np.linspace(0, len(images) - 1, min(PAIRS, len(images))).astype(int)
    figure = new_figure(1.5 * len(chosen), 3.4)
    grid = figure.subplots(2, len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        image = images.read(int(index))
        for row, view in enumerate((degradation.hr(image), degradation.lr(image))):
            grid[row, column].imshow(view.permute(1, 2, 0).numpy())
            grid[row, column].axis("off")
    grid[0, 0].set_title(f"HR ({degradation.hr_size} pixels)", fontsize=11, loc="left")
    grid[1, 0].set_title(f"LR ({degradation.lr_size} pixels)", fontsize=11, loc="left")
    return png(figure)


def _single_class_rows(bench: Bench) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Test rows with a single, frequent class; the colour of each; the classes' names."""
    labels, classes = bench.study.labels("test") == 1, bench.study.devkit.classes
    single = labels.sum(1) == 1
    frequent = np.argsort(-labels[single].sum(0), kind="stable")[:TSNE_CLASSES]
    rows = np.flatnonzero(single & labels[:, frequent].any(1))
    if len(rows) > TSNE_ROWS:
        rows = np.sort(np.random.default_rng(0).choice(rows, TSNE_ROWS, replace=False))
    return rows, labels[rows][:, frequent].argmax(1), [classes[c] for c in frequent]
