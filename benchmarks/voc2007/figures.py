"""Pictures of a run as PNG bytes: AP bars, t-SNE as in Figures 1 and 3, HR and LR image pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common.plots import new_figure, png
from benchmarks.voc2007.run import PaperStudy

TSNE_ROWS, TSNE_LEAST, TSNE_CLASSES, PAIRS = 1000, 3, 10, 8


def draw(study: PaperStudy, results: dict[str, Any]) -> dict[str, bytes]:
    """All pictures by file name."""
    pictures = {
        f"ap_{protocol}.png": ap_bars(table, results["data"]["classes"], protocol)
        for protocol, table in results["table1"].items()
    }
    if len(_single_class_rows(study)[0]) >= TSNE_LEAST:
        pictures["tsne.png"] = tsne(study)
    pictures["pairs.png"] = image_pairs(study)
    return pictures


def ap_bars(table: dict[str, Any], classes: list[str], protocol: str) -> bytes:
    """AP of each class for Baseline-HR, Baseline-LR and the head that was asked for."""
    shown = list(table.values())[:3]
    figure = new_figure(max(7.0, 0.42 * len(classes)), 3.6)
    axes = figure.subplots()
    x = np.arange(len(classes))
    for i, (entry, colour) in enumerate(zip(shown, ("#9aa5b1", "#d9822b", "#2b6cb0"), strict=True)):
        axes.bar(
            x + (i - 1) * 0.28,
            100 * np.array(entry["ap"]),
            0.28,
            color=colour,
            label=entry["label"],
        )
    axes.set_xticks(x, classes, rotation=60, ha="right", fontsize=7)
    axes.set_xlim(-0.7, len(classes) - 0.3)
    axes.set_ylabel("AP (%)")
    axes.set_title(f"Protocol {protocol}", loc="left", fontsize=9)
    axes.legend(fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    return png(figure)


def tsne(study: PaperStudy) -> bytes:
    """HR, LR and transferred LR test features in two dimensions, coloured by class.

    Images of the 10 most frequent classes that have a single class among all; at most 1,000.
    """
    from sklearn.manifold import TSNE

    rows, colours, names = _single_class_rows(study)
    features = study.data.test.features
    head = study.transfer.head(study.sizes, 0)
    panels = {
        "HR": features.hr,
        "LR": features.lr,
        "LR, transferred": head.transfer(study.transfer.scale(features.lr)),
    }
    figure = new_figure(10, 3.6)
    for axes, (title, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        perplexity = min(30.0, (len(rows) - 1) / 3)
        points = TSNE(perplexity=perplexity, random_state=0).fit_transform(values[rows].numpy())
        for c, name in enumerate(names):
            axes.scatter(*points[colours == c].T, s=5, color=f"C{c}", label=name)
        axes.set_title(title, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.legend(
        *axes.get_legend_handles_labels(), fontsize=7, ncols=5, loc="outside lower center"
    )
    return png(figure)


def image_pairs(study: PaperStudy) -> bytes:
    """HR views above LR views of images spread over the test split."""
    degradation = study.options.degradation
    kept = study.data.test.features.ids
    chosen = {kept[int(i)] for i in np.linspace(0, len(kept) - 1, min(PAIRS, len(kept)))}
    images = study.data.devkit.images("test")
    pixels = [images.read(i) for i, name in enumerate(images.ids) if name in chosen]
    figure = new_figure(1.3 * len(pixels), 2.8)
    grid = figure.subplots(2, len(pixels), squeeze=False)
    for column, image in enumerate(pixels):
        for row, view in enumerate((degradation.hr(image), degradation.lr(image))):
            grid[row, column].imshow(view.permute(1, 2, 0).numpy())
            grid[row, column].axis("off")
    grid[0, 0].set_title("HR", fontsize=8, loc="left")
    grid[1, 0].set_title(f"LR ({degradation.lr_size} pixels)", fontsize=8, loc="left")
    return png(figure)


def _single_class_rows(study: PaperStudy) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Test rows with a single, frequent class; the colour of each; the classes' names."""
    labels, classes = study.data.test.labels == 1, study.data.devkit.classes
    single = labels.sum(1) == 1
    frequent = np.argsort(-labels[single].sum(0), kind="stable")[:TSNE_CLASSES]
    rows = np.flatnonzero(single & labels[:, frequent].any(1))
    if len(rows) > TSNE_ROWS:
        rows = np.sort(np.random.default_rng(0).choice(rows, TSNE_ROWS, replace=False))
    return rows, labels[rows][:, frequent].argmax(1), [classes[c] for c in frequent]
