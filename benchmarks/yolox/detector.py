"""YOLOX-nano from its ONNX file: images in, boxes of COCO's classes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from benchmarks.detection.judge import Detections
from featxfer import Degradation, Preprocessing

SIDE, LARGER = 416, 640
"""Of the square that the detector was trained on, and of the one that an image is enlarged to."""

STRIDES = (8, 16, 32)
GREY = 114
"""What is beside an image in its square."""

LEAST_SCORE, MOST_OVERLAP, MOST = 0.01, 0.65, 100
"""Of boxes that are kept, as YOLOX is judged; of an image so many at the most, as COCO has it."""

PREPROCESSING = Preprocessing((0.0,) * 3, (1 / 255,) * 3, bgr=True)

SITES = ("Mul_115", "Mul_161", "Mul_196")
"""The last modules of the backbone whose maps are 1/8, 1/16 and 1/32 of the image (dark3 to 5)."""

TARGETS = ("Mul_246", "Mul_272", "Mul_298")
"""The pyramid's maps, which the heads see, in the same order."""

SLICE = 0.6
"""Of an image's sides, each of 2 x 2 slices: they overlap by a fifth of the image."""


def load(weights: Path) -> nn.Module:
    """The detector, in eval mode: one image `(1, 3, s, s)`, s a multiple of 32 -> `(1, n, 85)`."""
    import onnx2torch

    model: nn.Module = onnx2torch.convert(weights).eval()
    return model


def letterbox(image: Tensor, side: int = SIDE) -> Tensor:
    """An image, uint8 `(3, h, w)`, in the upper left of a square, as large as it fits in."""
    height, width = fitted(image, side)
    found = image.new_full((3, side, side), GREY)
    resized = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)
    found[:, :height, :width] = resized[0]
    return found


def fitted(image: Tensor, side: int) -> tuple[int, int]:
    """Height and width of an image `(3, h, w)` in its square."""
    scale = side / max(image.shape[1:])
    return max(1, int(image.shape[1] * scale)), max(1, int(image.shape[2] * scale))


def decode(outputs: Tensor, side: int) -> Tensor:
    """Corners `(n, 4)` in pixels of the square, of what the detector says `(n, 85)` of it.

    It says where a box's middle is from its cell, in cells, and the logarithm of its sides.
    """
    cells, strides = [], []
    for stride in STRIDES:
        steps = torch.arange(side // stride)
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        cells.append(torch.stack([columns, rows], -1).flatten(0, 1))
        strides.append(torch.full((len(cells[-1]), 1), stride))
    each = torch.cat(strides)
    middles = (outputs[:, :2] + torch.cat(cells)) * each
    halves = outputs[:, 2:4].exp() * each / 2
    return torch.cat([middles - halves, middles + halves], 1)


def kept(boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
    """The surest boxes `(n, 4)`, without those that overlap with a surer one of their class."""
    rows = batched_nms(boxes, scores, labels, MOST_OVERLAP)[:MOST]
    corners, sure = boxes[rows].double().numpy(), scores[rows].double().numpy()
    return Detections(corners, sure, labels[rows].numpy())


@torch.no_grad()
def detect(model: nn.Module, square: Tensor) -> Detections:
    """What is found in a square image, uint8 `(3, s, s)`, in its pixels."""
    outputs = model(PREPROCESSING(square[None]))[0].float()
    scores, labels = outputs[:, 5:].max(1)
    scores = scores * outputs[:, 4]
    sure = scores >= LEAST_SCORE
    return kept(decode(outputs, square.shape[1])[sure], scores[sure], labels[sure])


def seen(image: Tensor, factor: int | None, side: int = SIDE) -> Tensor:
    """An image in its square, as HR for None, or as of a square of `SIDE / factor` pixels."""
    square = letterbox(image, side)
    return square if factor is None else Degradation(side, SIDE // factor).lr(square)


def find(model: nn.Module, image: Tensor, factor: int | None, side: int = SIDE) -> Detections:
    """What is found in an image seen so, in its own pixels."""
    return moved(detect(model, seen(image, factor, side)), max(image.shape[1:]) / side)


def find_in_slices(model: nn.Module, image: Tensor, factor: int | None) -> Detections:
    """The same in the whole image and in 2 x 2 slices of it, each as large as the whole."""
    height, width = fitted(image, SIDE)
    square = seen(image, factor)
    high, wide = math.ceil(SLICE * height), math.ceil(SLICE * width)
    found = [detect(model, square)]
    for top in (0, height - high):
        for left in (0, width - wide):
            part = square[:, top : top + high, left : left + wide]
            inside = detect(model, letterbox(part))
            found.append(moved(inside, max(high, wide) / SIDE, left, top))
    parts = [[getattr(part, name) for part in found] for name in ("boxes", "scores", "labels")]
    whole = kept(*(torch.from_numpy(np.concatenate(part)) for part in parts))
    return moved(whole, max(image.shape[1:]) / SIDE)


def moved(found: Detections, scale: float, left: int = 0, top: int = 0) -> Detections:
    """Detections with boxes `scale` times as large, and then moved."""
    boxes = found.boxes * scale + np.array([left, top, left, top])
    return Detections(boxes, found.scores, found.labels)


OTHER_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""COCO's names of VOC's classes, where they differ."""


def labels_among(classes: Sequence[str], known: Sequence[str]) -> npt.NDArray[np.int64]:
    """Of each class of COCO its index among those of a set, by name; -1 where the set has it not.

    Raises `ValueError` for a set's class that COCO has not.
    """
    names = [OTHER_NAMES.get(name, name) for name in known]
    strange = sorted(set(names) - set(classes))
    if strange:
        raise ValueError(f"classes: got {', '.join(strange)}, which the detector does not know")
    return np.array([names.index(name) if name in names else -1 for name in classes])


def relabelled(found: dict[str, Any], labels: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Detections of one image, as `Detections.to_lists` has them, of a set's classes alone."""
    mine = [row for row, label in enumerate(found["labels"]) if labels[label] >= 0]
    kept_parts = {name: [part[row] for row in mine] for name, part in found.items()}
    return {**kept_parts, "labels": [int(labels[label]) for label in kept_parts["labels"]]}
