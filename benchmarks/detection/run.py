"""The table: every method, every degradation, every seed, judged on test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from benchmarks.common.markdown import Column, figure, label, to_markdown
from benchmarks.common.memo import Memo
from benchmarks.common.versions import versions
from benchmarks.detection.detectors import TRAINING, trained
from benchmarks.detection.judge import COLUMNS, Detections, Judge
from benchmarks.detection.methods import DetectionMethod, Setting
from benchmarks.detection.pictures import side_by_side
from featxfer import BaseDegradation, Images, ScaledDegradation, VOCDevkit
from featxfer.evaluation.coco import CocoSet
from featxfer.evaluation.voc import ObjectBoxes
from featxfer.features.backbone import describe_module, sha256_of, weights_sha256
from featxfer_integrations.stages.boxes import BOX_RECIPE
from featxfer_integrations.stages.pyramid import DETECTOR_RECIPE

RESAMPLES = 200
"""Of the test images, for the intervals."""

BATCH = 4

CURVE = (2, 4, 8, 12, 16, 24, 32)
"""How many times smaller images are of which the plain detector's AP is told."""


@dataclass(frozen=True)
class CocoSplits:
    """Sets in COCO's layout, of the same classes, in a devkit's place: by the split's name."""

    sets: Mapping[str, CocoSet]

    def __post_init__(self) -> None:
        if len({part.classes for part in self.sets.values()}) > 1:
            raise ValueError("--coco: got sets of other classes, wanted those trained on")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names."""
        return next(iter(self.sets.values())).classes

    def images(self, split: str) -> Images:
        """Of a split."""
        return self.sets[split].images

    def boxes(self, split: str) -> Sequence[ObjectBoxes]:
        """The objects of each image."""
        return self.sets[split].boxes


@dataclass(frozen=True)
class DetectionStudy:
    """A detector, images and a judge.

    Args:
        kind: of the detector, a name of `detectors.KINDS`.
        devkit: images and boxes.
        cache: where finished work is kept.
        weights: of the backbone, as `load_model` takes them.
        train: the split that trains the detector, with labels, and then, without, what is put into
            it.
        test: the split that judges.
    """

    kind: str
    devkit: VOCDevkit | CocoSplits
    cache: Path
    weights: str = "demo"
    train: str = "trainval"
    test: str = "test"

    @cached_property
    def detector(self) -> nn.Module:
        """Trained on HR images."""
        images, objects = self.devkit.images(self.train), self.devkit.boxes(self.train)
        with tqdm(total=TRAINING.epochs, desc=f"training {self.kind}", disable=None) as bar:
            return trained(
                self.kind,
                images,
                objects,
                self.devkit.classes,
                self.cache,
                weights=self.weights,
                recipe=TRAINING,
                callback=lambda entry: bar.update(entry.epoch + 1 - bar.n),
            )

    @cached_property
    def weights_sha256(self) -> str:
        """Of the detector, its layers and settings."""
        return sha256_of([describe_module(self.detector), weights_sha256(self.detector)])

    @cached_property
    def judge(self) -> Judge:
        """Of the test images."""
        return Judge(self.devkit.boxes(self.test), self.devkit.classes)

    @torch.no_grad()
    def detect(self, model: nn.Module, view: BaseDegradation | None) -> list[dict[str, Any]]:
        """What a detector finds in the test images, seen as HR or by `view`."""
        images, found = self.devkit.images(self.test), []
        device = next(model.parameters()).device
        for start in tqdm(range(0, len(images), BATCH), desc="test images", disable=None):
            rows = range(start, min(start + BATCH, len(images)))
            pixels = [images.read(row) for row in rows]
            seen = [image if view is None else view.lr(image) for image in pixels]
            for part in model.eval()([(image.float() / 255).to(device) for image in seen]):
                detections = Detections(
                    part["boxes"].cpu().double().numpy(),
                    part["scores"].cpu().double().numpy(),
                    part["labels"].cpu().numpy() - 1,
                )
                found.append(detections.to_lists())
        return found

    def row(
        self, method: DetectionMethod | None, view: BaseDegradation | None, seed: int
    ) -> dict[str, Any]:
        """Detections of a method on LR images and on HR ones; of the plain detector for None."""
        memo = Memo(self.cache / "detection")
        judged = self.devkit.images(self.test).fingerprint
        if method is None or view is None:
            seen = None if view is None else view.to_dict()
            key = {"detector": self.weights_sha256, "view": seen, "judged": judged}
            return memo.get(key, lambda: {"lr": self.detect(self.detector, view)})
        images = self.devkit.images(self.train)
        setting = Setting(self.detector, images, view, self.cache, seed)

        def compute() -> dict[str, Any]:
            model = method.run(setting)
            return {"lr": self.detect(model, view), "hr": self.detect(model, None)}

        key = {"method": method.label, "fit": method.choices(setting), "judged": judged}
        return memo.get(key, compute)


def run(
    study: DetectionStudy, methods: Sequence[DetectionMethod], factors: Sequence[float], seeds: int
) -> dict[str, Any]:
    """All tables, a factor each."""
    plain = study.row(None, None, 0)["lr"]
    hr = Evaluation(study.judge, [plain], [])
    tables: dict[str, Any] = {}
    for factor in factors:
        view = ScaledDegradation(factor)
        lr = Evaluation(study.judge, [study.row(None, view, 0)["lr"]], [])
        table = {"HR": hr.row(hr, lr), "LR": lr.row(hr, lr)}
        for method in methods:
            rows = [study.row(method, view, seed) for seed in method.seeds(seeds)]
            evaluation = Evaluation(
                study.judge, [row["lr"] for row in rows], [row["hr"] for row in rows]
            )
            table[method.label] = evaluation.row(hr, lr)
        tables[f"{factor:g}"] = table
    curve = {"1": plain} | {
        f"{factor:g}": study.row(None, ScaledDegradation(factor), 0)["lr"] for factor in CURVE
    }
    return {
        "config": {
            "detector": study.kind,
            "classes": list(study.devkit.classes),
            "factors": list(factors),
            "seeds": seeds,
            "methods": [method.label for method in methods],
            "splits": [study.train, study.test],
            "resamples": RESAMPLES,
            "recipes": {
                "detector": TRAINING.to_dict(),
                "heads": BOX_RECIPE.to_dict(),
                "blocks": DETECTOR_RECIPE.to_dict(),
            },
        },
        "images": {split: len(study.devkit.images(split)) for split in (study.train, study.test)},
        "versions": {**versions(), "pycocotools": version("pycocotools")},
        "curve": {
            factor: Evaluation(study.judge, [found], []).figures[0]
            for factor, found in curve.items()
        },
        "tables": tables,
    }


def picture(study: DetectionStudy, method: DetectionMethod, factor: float, count: int = 3) -> bytes:
    """The first test images as HR, LR and LR with a method of seed 0, and what is found; a PNG."""
    view, images = ScaledDegradation(factor), study.devkit.images(study.test)
    seen = {
        "HR": (None, study.row(None, None, 0)),
        f"LR, {factor:g} times smaller": (view, study.row(None, view, 0)),
        f"LR, {method.label}": (view, study.row(method, view, 0)),
    }
    chosen = range(min(count, len(images)))
    photographs = [
        {
            name: (
                images.read(row) if lr is None else lr.lr(images.read(row)),
                Detections.from_lists(found["lr"][row]),
            )
            for name, (lr, found) in seen.items()
        }
        for row in chosen
    ]
    return side_by_side(photographs, [study.judge.objects[row] for row in chosen])


class Evaluation:
    """A row's detections, a list of images a seed, and figures of them.

    Args:
        judge: of the images.
        lr: detections of LR images.
        hr: detections of HR images, none for the plain detector.
    """

    def __init__(
        self,
        judge: Judge,
        lr: Sequence[Sequence[Mapping[str, Any]]],
        hr: Sequence[Sequence[Mapping[str, Any]]],
    ) -> None:
        self.judge = judge
        self.found = [[Detections.from_lists(dict(image)) for image in seed] for seed in lr]
        self.found_hr = [[Detections.from_lists(dict(image)) for image in seed] for seed in hr]
        self.evaluated = [judge.evaluate(seed) for seed in self.found]

    @cached_property
    def figures(self) -> list[dict[str, float]]:
        """`COLUMNS` of each seed, percent."""
        return [part.figures() for part in self.evaluated]

    @cached_property
    def resampled(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """AP over `RESAMPLES` draws of the images, a mean over seeds."""
        rng = np.random.default_rng(0)
        draws = [
            rng.integers(len(self.judge.objects), size=len(self.judge.objects))
            for _ in range(RESAMPLES)
        ]
        return np.array([np.mean([part.ap(draw) for part in self.evaluated]) for draw in draws])

    def row(self, hr: Evaluation, lr: Evaluation) -> dict[str, Any]:
        """Figures in percent; of the gap in AP between `lr` and `hr` also the 95% interval.

        The interval is over draws of the images in which there is a gap.
        """
        found: dict[str, Any] = {
            name: float(np.mean([part[name] for part in self.figures])) for name in COLUMNS
        }
        found["AP of seeds"] = [part["AP"] for part in self.figures]
        found["VOC AP50"] = float(np.mean([self.judge.voc_ap50(seed) for seed in self.found]))
        low, high = lr.figures[0]["AP"], hr.figures[0]["AP"]
        if high > low:
            found["gap"] = 100 * (found["AP"] - low) / (high - low)
            if self is not hr and self is not lr:
                kept = hr.resampled > lr.resampled
                found["draws with a gap"] = int(kept.sum())
                gained, lost = (part.resampled[kept] - lr.resampled[kept] for part in (self, hr))
                if kept.any():
                    low_end, high_end = np.quantile(100 * gained / lost, [0.025, 0.975])
                    found |= {"gap low": float(low_end), "gap high": float(high_end)}
        if self.found_hr:
            aps = [self.judge.evaluate(seed).figures()["AP"] for seed in self.found_hr]
            found["HR loses"] = high - float(np.mean(aps))
        return found


def summary(results: Mapping[str, Any]) -> str:
    """The plain detector over resolutions, and a table a factor."""
    curve = results["curve"].items()
    by_factor: list[Column[str]] = [
        (factor, lambda name, found=found: _number(found[name]))  # type: ignore[misc]
        for factor, found in curve
    ]
    parts = [to_markdown(("AP", "AP50"), [("times smaller", str), *by_factor])]
    columns = [*TABLE, figure("HR loses, AP", _number, "HR loses")]
    for factor, table in results["tables"].items():
        heading = f"LR: {factor} times smaller, and back:\n\n"
        parts.append(heading + to_markdown(table.items(), columns))
    return "\n".join(parts)


def _interval(figures: Mapping[str, Any]) -> str:
    if "gap low" not in figures:
        return ""
    return f"{figures['gap low']:.0f} to {figures['gap high']:.0f}"


def _number(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.1f}"


TABLE: Sequence[Column[Any]] = (
    label(),
    *(figure(name, _number, name) for name in (*COLUMNS, "VOC AP50")),
    figure("gap in AP, %", _number, "gap"),
    ("95%", lambda row: _interval(row[1])),
)
"""Columns of rows that `Evaluation.row` made, by their labels."""
