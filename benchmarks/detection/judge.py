"""Average precision of detections: COCO's by pycocotools, VOC's AP50, and intervals over images."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featxfer.evaluation.voc import ObjectBoxes

COLUMNS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
"""The first six of COCO's figures, in their order."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Detections:
    """What a detector finds in one image.

    Args:
        boxes: `(n, 4)`: left, top, right, bottom, pixels.
        scores: `(n,)`.
        labels: `(n,)`, indices of the classes.
    """

    boxes: Floats
    scores: Floats
    labels: npt.NDArray[np.int64]

    def to_lists(self) -> dict[str, Any]:
        """As JSON types."""
        boxes = np.round(self.boxes, 3).tolist()
        return {"boxes": boxes, "scores": self.scores.tolist(), "labels": self.labels.tolist()}

    @classmethod
    def from_lists(cls, values: dict[str, Any]) -> Detections:
        """The inverse of `to_lists`."""
        boxes = np.array(values["boxes"], dtype=np.float64).reshape(-1, 4)
        scores = np.array(values["scores"], dtype=np.float64)
        return cls(boxes, scores, np.array(values["labels"], dtype=np.int64))


@dataclass(frozen=True)
class Judge:
    """The objects of a set of images, and how detections compare with them.

    Args:
        objects: of each image.
        classes: their names.
    """

    objects: Sequence[ObjectBoxes]
    classes: Sequence[str]

    @cached_property
    def _coco(self) -> Any:
        from pycocotools.coco import COCO

        annotations: list[dict[str, Any]] = []
        for image, known in enumerate(self.objects):
            corners = known.boxes.astype(np.float64)
            sides = corners[:, 2:] - corners[:, :2]
            areas = sides.prod(1) if known.areas is None else known.areas
            boxes = np.hstack([corners[:, :2], sides])
            parts = (boxes, areas, known.labels, known.difficult)
            for box, area, label, difficult in zip(*(p.tolist() for p in parts), strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": label,
                        "bbox": box,
                        "area": area,
                        "iscrowd": int(difficult),
                    }
                )
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = {
                "info": {},
                "images": [{"id": image} for image in range(len(self.objects))],
                "categories": [{"id": i, "name": name} for i, name in enumerate(self.classes)],
                "annotations": annotations,
            }
            coco.createIndex()
        return coco

    def evaluate(self, found: Sequence[Detections]) -> Evaluated:
        """COCO's matching of detections, one `Detections` an image, to the objects."""
        from pycocotools.cocoeval import COCOeval

        rows = [
            [image, left, top, right - left, bottom - top, score, label]
            for image, part in enumerate(found)
            for (left, top, right, bottom), score, label in zip(
                part.boxes.tolist(), part.scores.tolist(), part.labels.tolist(), strict=True
            )
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            # loadRes takes no empty list: a box that no object can match stands in for it
            results = self._coco.loadRes(np.array(rows or [[0, -9.0, -9.0, 1.0, 1.0, 0.0, 0]]))
            evaluation = COCOeval(self._coco, results, "bbox")
            evaluation.evaluate()
        return Evaluated(evaluation, len(self.objects))

    def voc_ap50(self, found: Sequence[Detections]) -> float:
        """VOC2007's mean AP: 11-point, at an overlap of 0.5, difficult objects ignored; percent."""
        values = [self._class_ap50(found, label) for label in range(len(self.classes))]
        known = [value for value in values if value is not None]
        return 100 * float(np.mean(known))

    def _class_ap50(self, found: Sequence[Detections], label: int) -> float | None:
        scores: list[float] = []
        kinds: list[int] = []
        missed = 0
        for known, part in zip(self.objects, found, strict=True):
            mine = known.labels == label
            boxes, difficult = known.boxes[mine].astype(np.float64), known.difficult[mine]
            taken = np.zeros(len(boxes), dtype=bool)
            chosen = np.flatnonzero(part.labels == label)
            for row in chosen[np.argsort(-part.scores[chosen], kind="stable")]:
                overlap = overlaps(part.boxes[row], boxes)
                best = int(overlap.argmax()) if len(overlap) else -1
                scores.append(float(part.scores[row]))
                if best < 0 or overlap[best] < 0.5:
                    kinds.append(-1)
                elif difficult[best]:
                    kinds.append(0)
                else:
                    kinds.append(-1 if taken[best] else 1)
                    taken[best] = True
            missed += int((~taken & ~difficult).sum())
        if kinds.count(1) + missed == 0:
            return None
        return _eleven_points(np.array(scores), np.array(kinds, dtype=np.int64), missed)


def _eleven_points(scores: Floats, kinds: npt.NDArray[np.int64], missed: int) -> float:
    """11-point AP of detections, right (1), ignored (0) or wrong (-1), and of missed objects."""
    ranked = kinds[np.argsort(-scores, kind="stable")]
    ranked = ranked[ranked != 0]
    hits = np.cumsum(ranked == 1)
    total = missed + int((ranked == 1).sum())
    recall, precision = hits / total, hits / np.arange(1, len(ranked) + 1)
    points = [
        precision[recall >= threshold].max(initial=0.0) for threshold in np.linspace(0, 1, 11)
    ]
    return float(np.mean(points))


def overlaps(box: Floats, boxes: Floats) -> Floats:
    """Intersection over union of one box with each of `(n, 4)`."""
    left_top = np.maximum(box[:2], boxes[:, :2])
    right_bottom = np.minimum(box[2:], boxes[:, 2:])
    inside = np.prod(np.clip(right_bottom - left_top, 0, None), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    shares: Floats = inside / (areas - inside)
    return shares


@dataclass(frozen=True)
class Evaluated:
    """Matched detections, of which figures are taken over any choice of the images."""

    evaluation: Any
    images: int

    def figures(self, chosen: npt.NDArray[np.int64] | None = None) -> dict[str, float]:
        """`COLUMNS` in percent over these images, which may be there more than once.

        NaN where there is no object of a size.
        """
        with self._accumulated(chosen):
            self.evaluation.summarize()
        stats = self.evaluation.stats[: len(COLUMNS)]
        return {
            name: 100 * float(value) if value >= 0 else float("nan")
            for name, value in zip(COLUMNS, stats, strict=True)
        }

    def ap(self, chosen: npt.NDArray[np.int64]) -> float:
        """The first figure alone, which takes a tenth of the time."""
        with self._accumulated(chosen, alone=True):
            precision = self.evaluation.eval["precision"]
        known = precision[precision > -1]
        return 100 * float(known.mean()) if known.size else float("nan")

    @contextlib.contextmanager
    def _accumulated(
        self, chosen: npt.NDArray[np.int64] | None, *, alone: bool = False
    ) -> Iterator[None]:
        """Inside, the evaluation is that of these images; of objects of all sizes `alone`."""
        matched, parameters = self.evaluation.evalImgs, self.evaluation._paramsEval
        before, wanted = parameters.imgIds, copy.copy(self.evaluation.params)
        if alone:
            wanted.areaRng, wanted.maxDets = wanted.areaRng[:1], wanted.maxDets[-1:]
        try:
            if chosen is not None:
                per_image = np.array(matched, dtype=object).reshape(-1, self.images)
                self.evaluation.evalImgs = list(per_image[:, chosen].ravel())
                wanted.imgIds = parameters.imgIds = list(range(len(chosen)))
            with contextlib.redirect_stdout(io.StringIO()):
                self.evaluation.accumulate(wanted)
                yield
        finally:
            self.evaluation.evalImgs, parameters.imgIds = matched, before
