"""The same photographs as HR, as LR and as LR with transfer, and what is found in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from benchmarks.common.plots import new_figure, png
from benchmarks.detection.judge import Detections, overlaps
from featxfer.evaluation.voc import ObjectBoxes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SURE = 0.5
"""Detections of this score or more are drawn."""

RIGHT, WRONG, MISSED = "#2ca02c", "#d62728", "#ffbf00"


def sort_out(known: ObjectBoxes, found: Detections) -> tuple[list[int], list[int], list[int]]:
    """Detections of `SURE` or more that are right and wrong, and objects that are missed: indices.

    Right: of the object's class, at an overlap of 0.5 or more, the surest one of an object.
    """
    right, wrong, missed = [], [], set(range(len(known.boxes)))
    boxes = known.boxes.astype(np.float64)
    for row in np.argsort(-found.scores, kind="stable").tolist():
        if found.scores[row] < SURE:
            break
        shares = overlaps(found.boxes[row], boxes)
        fitting = [index for index in missed if known.labels[index] == found.labels[row]]
        best = max(fitting, key=lambda index: shares[index], default=None)
        if best is not None and shares[best] >= 0.5:
            missed.remove(best)
            right.append(row)
        else:
            wrong.append(row)
    return right, wrong, sorted(missed)


def side_by_side(
    photographs: Sequence[Mapping[str, tuple[Tensor, Detections]]], known: Sequence[ObjectBoxes]
) -> bytes:
    """A PNG file: a row a photograph, a column a way to see it.

    Args:
        photographs: of each its pixels, uint8 `(3, h, w)`, and what is found, by the column's name.
        known: the objects of each.
    """
    columns = list(photographs[0])
    figure = new_figure(3.6 * len(columns), 3.1 * len(photographs))
    grid = figure.subplots(len(photographs), len(columns), squeeze=False)
    for axes_of_row, views, objects in zip(grid, photographs, known, strict=True):
        for axes, (name, (pixels, found)) in zip(axes_of_row, views.items(), strict=True):
            right, wrong, missed = sort_out(objects, found)
            axes.imshow(pixels.movedim(0, -1).numpy())
            axes.set_axis_off()
            axes.set_title(
                f"{name}: {len(right)} right, {len(wrong)} wrong, {len(missed)} missed", fontsize=8
            )
            for boxes, colour, style in (
                (objects.boxes[missed], MISSED, ":"),
                (found.boxes[wrong], WRONG, "--"),
                (found.boxes[right], RIGHT, "-"),
            ):
                _draw(axes, boxes.tolist(), colour, style)
    return png(figure)


def _draw(axes: Axes, boxes: Sequence[Sequence[float]], colour: str, style: str) -> None:
    from matplotlib.patches import Rectangle

    for left, top, right, bottom in boxes:
        axes.add_patch(
            Rectangle(
                (left, top),
                right - left,
                bottom - top,
                fill=False,
                edgecolor=colour,
                linestyle=style,
                linewidth=1.2,
            )
        )
