"""The tables: every set of images, every resolution, every way to see LR images."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.common.fit import Fit
from benchmarks.common.markdown import figure, to_markdown
from benchmarks.common.memo import Memo
from benchmarks.common.versions import versions
from benchmarks.detection.judge import Detections, Judge
from benchmarks.detection.run import RESAMPLES, TABLE, Evaluation
from benchmarks.yolox.detector import (
    LARGER,
    PREPROCESSING,
    SIDE,
    SITES,
    TARGETS,
    find,
    find_in_slices,
    labels_among,
    letterbox,
    load,
    relabelled,
)
from featxfer import BLOCK_RECIPE, Degradation, Images
from featxfer.evaluation.voc import ObjectBoxes
from featxfer.features.backbone import weights_sha256
from featxfer_integrations import FitOptions

RECIPE = dataclasses.replace(BLOCK_RECIPE, epochs=4, batch_size=8)
"""Of the blocks."""

TIMED = 9
"""Runs of each way, in turn, of which the median is told."""

Way = Callable[[nn.Module, Tensor, int | None], Detections]

ENLARGED: Mapping[str, Way] = {
    f"LR, enlarged to {LARGER}": partial(find, side=LARGER),
    "LR, whole and in 2 x 2 slices": find_in_slices,
}
"""What is done today, without training, for time."""


@dataclass(frozen=True)
class Photographs:
    """Images that the detector is judged on.

    Args:
        images: of any sizes.
        boxes: the objects of each.
        classes: their names.
    """

    images: Images
    boxes: Sequence[ObjectBoxes]
    classes: Sequence[str]


@dataclass(frozen=True)
class YoloxStudy:
    """A detector that is never changed, and photographs.

    Args:
        weights: the ONNX file.
        classes: COCO's, in their order.
        train: unlabelled HR images, for blocks.
        sets: what is judged on, by name.
        cache: where finished work is kept.
    """

    weights: Path
    classes: Sequence[str]
    train: Images
    sets: Mapping[str, Photographs]
    cache: Path

    @cached_property
    def model(self) -> nn.Module:
        """The plain detector."""
        return load(self.weights)

    @cached_property
    def squares(self) -> Images:
        """The images to train on, as the detector takes them."""
        return dataclasses.replace(
            self.train,
            read=lambda row: letterbox(self.train.read(row)),
            fingerprint=f"{self.train.fingerprint} in squares of {SIDE}",
            targets=None,
        )

    def fit(self, factor: int, seed: int) -> Fit:
        """The fit of blocks."""
        arguments = {
            "degradation": Degradation(SIDE, SIDE // factor),
            "site": SITES,
            "targets": TARGETS,
            "options": FitOptions(block_recipe=RECIPE, crops=0, preprocessing=PREPROCESSING),
            "seed": seed,
        }
        return Fit(copy.deepcopy(self.model), self.squares, self.cache, arguments)

    def found(
        self, name: str, way: Way, factor: int | None, fit: Fit | None = None
    ) -> list[dict[str, Any]]:
        """Detections of a set's classes in its images; by the plain detector without a fit."""
        photographs = self.sets[name]
        images = photographs.images
        key = {
            "detector": weights_sha256(self.model),
            "fit": None if fit is None else fit.key,
            "images": images.fingerprint,
            "way": [repr(way) if isinstance(way, partial) else way.__name__, factor],
        }

        def compute() -> dict[str, Any]:
            model = self.model
            if fit is not None:
                fit.run()
                model = fit.model.eval()
            rows = tqdm(range(len(images)), desc=f"{name}, {key['way']}", disable=None)
            return {"found": [way(model, images.read(row), factor).to_lists() for row in rows]}

        labels = labels_among(self.classes, photographs.classes)
        kept = Memo(self.cache / "yolox").get(key, compute)["found"]
        return [relabelled(image, labels) for image in kept]

    def table(self, name: str, factor: int, fits: Sequence[Fit]) -> dict[str, Any]:
        """Figures of every row on a set; a fit a seed."""
        judge = Judge(self.sets[name].boxes, self.sets[name].classes)
        rows = {
            "HR": [self.found(name, find, None)],
            "LR": [self.found(name, find, factor)],
            **{label: [self.found(name, way, factor)] for label, way in ENLARGED.items()},
            "LR through blocks": [self.found(name, find, factor, fit) for fit in fits],
            "HR through blocks": [self.found(name, find, None, fit) for fit in fits],
        }
        judged = {label: Evaluation(judge, found, []) for label, found in rows.items()}
        key = {"costs": fits[0].key, "detector": weights_sha256(self.model)}
        costs = Memo(self.cache / "yolox").get(key, lambda: self.costs(factor, fits[0]))
        return {
            label: row.row(judged["HR"], judged["LR"]) | costs.get(label, {})
            for label, row in judged.items()
        }

    def costs(self, factor: int, fit: Fit) -> dict[str, dict[str, float]]:
        """Arithmetic (10^9 multiplications) and time (ms) of an image, of each way to see LR."""
        fit.run()
        image = self.train.read(0)
        ways: dict[str, tuple[nn.Module, Way]] = {
            "LR": (self.model, find),
            "LR through blocks": (fit.model.eval(), find),
        }
        ways |= {label: (self.model, way) for label, way in ENLARGED.items()}
        took: dict[str, list[float]] = {label: [] for label in ways}
        costs = {}
        for label, (model, way) in ways.items():
            with FlopCounterMode(display=False) as counter:
                way(model, image, factor)
            costs[label] = counter.get_total_flops() / 2e9
        for _ in range(TIMED):
            for label, (model, way) in ways.items():
                start = time.perf_counter()
                way(model, image, factor)
                took[label].append(1e3 * (time.perf_counter() - start))
        return {
            label: {"GMACs": costs[label], "ms": statistics.median(took[label])} for label in ways
        }


def run(study: YoloxStudy, factors: Sequence[int], seeds: int) -> dict[str, Any]:
    """All tables, by set and by factor."""
    fits = {factor: [study.fit(factor, seed) for seed in range(seeds)] for factor in factors}
    return {
        "config": {
            "factors": list(factors),
            "seeds": seeds,
            "side": SIDE,
            "sites": list(SITES),
            "targets": list(TARGETS),
            "recipe": RECIPE.to_dict(),
            "resamples": RESAMPLES,
            "detector": weights_sha256(study.model),
            "threads": torch.get_num_threads(),
        },
        "images": {
            "train": len(study.train),
            **{name: len(part.images) for name, part in study.sets.items()},
        },
        "versions": {
            **versions(),
            **{name: version(name) for name in ("pycocotools", "onnx2torch", "onnx")},
        },
        "tables": {
            name: {str(factor): study.table(name, factor, fits[factor]) for factor in factors}
            for name in study.sets
        },
    }


def summary(results: Mapping[str, Any]) -> str:
    """A table a set and factor."""
    columns = [
        *TABLE,
        figure("GMACs", lambda value: "" if value is None else f"{value:.2f}", "GMACs"),
        figure("ms", lambda value: "" if value is None else f"{value:.0f}", "ms"),
    ]
    side = results["config"]["side"]
    return "\n".join(
        f"{name}, {results['images'][name]} images, as of {side // int(factor)} pixels "
        f"({factor} times smaller):\n\n{to_markdown(table.items(), columns)}"
        for name, tables in results["tables"].items()
        for factor, table in tables.items()
    )
