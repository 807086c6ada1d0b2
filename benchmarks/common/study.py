"""A model, a devkit, and the judge that all rows of the tables share."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common.fit import Fit
from benchmarks.common.memo import Memo, hash_key
from benchmarks.common.shell import cache_option, root_option, split_options, told_errors
from featxfer import (
    PROTOCOLS,
    Degradation,
    Features,
    Images,
    Protocol,
    VOCDevkit,
    extract_features,
    train_svms,
)
from featxfer.evaluation.metrics import AVERAGE_PRECISIONS
from featxfer.evaluation.svm import LinearSVMs, average_precisions
from featxfer.evaluation.voc import Labels
from featxfer_integrations import FitOptions, backbone_of, load_model

PARTS = ("train", "test")
"""What splits of a devkit are for."""

FEW = (1, 5, 10)
FEW_PROTOCOL = Protocol("few labels", (1.0,))
"""Too few labels to choose C by: C = 1, rows of unit length."""

REVISION = 2
"""Of what a figure depends on in this folder; another one computes all figures anew."""


Figures = dict[str, Any]
"""Of a row of a table, by name."""


@dataclass(frozen=True)
class Transferred:
    """What a method makes of the LR images of both splits, and of HR test images.

    `train` and `test_hr` are None where they mean nothing. `in_place`: whether these are features
    of the backbone still, which SVMs on HR features can be asked about.
    """

    train: Tensor | None
    test: Tensor
    test_hr: Tensor | None = None
    in_place: bool = True


@dataclass(frozen=True)
class Study:
    """A model that is never changed, and a devkit in VOC layout.

    Args:
        name: of the backbone, as `load_model` takes it.
        weights: as `load_model` takes them.
        devkit: of images and labels.
        cache: where finished work is kept.
        resize: how HR views are made; LR views too, but for their size.
        protocol: of the SVMs.
        ap: how average precision is taken, a name of `AVERAGE_PRECISIONS`.
        solver: of the SVMs.
        splits: of the devkit. Images of the first train heads and blocks, without labels, and SVMs,
            with labels; the second tests.

    Raises:
        DevkitError: no such split.
        ValueError: an image that is in both.
    """

    name: str
    weights: str
    devkit: VOCDevkit
    cache: Path
    resize: Degradation = field(default_factory=Degradation)
    protocol: Protocol = PROTOCOLS["vissl"]
    ap: str = "11point"
    solver: str = "batched"
    splits: tuple[str, str] = ("trainval", "test")

    def __post_init__(self) -> None:
        train, test = self.splits
        both = set(self.devkit.ids(train)) & set(self.devkit.ids(test))
        if both:
            raise ValueError(
                f"test_split: {len(both)} images of {test!r} are in {train!r} too, {min(both)} for "
                "one; wanted none"
            )

    @cached_property
    def model(self) -> nn.Module:
        """The plain model; copies of it are changed."""
        return load_model(self.name, self.weights)

    @cached_property
    def memo(self) -> Memo:
        """Finished figures."""
        return Memo(self.cache / "gap")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What every figure depends on."""
        return {
            "backbone": [self.name, backbone_of(self.model).weights_sha256],
            "hr": self.view(self.resize.hr_size).to_dict(),
            "ap": self.ap,
            "images": [self.images(part).fingerprint for part in PARTS],
            "labels": [hash_key({"y": self.labels(part).tolist()}) for part in PARTS],
            "protocol": dataclasses.asdict(self.protocol),
            "solver": self.solver,
            "revision": REVISION,
        }

    def copy(self) -> nn.Module:
        """A model to attach to."""
        return copy.deepcopy(self.model)

    def view(self, size: int) -> Degradation:
        """Down to `size` pixels and up again."""
        return dataclasses.replace(self.resize, lr_size=size)

    def fit(
        self,
        views: Sequence[Degradation],
        seed: int,
        site: str | Sequence[str] = "head",
        *,
        model: nn.Module | None = None,
        images: Images | None = None,
        options: FitOptions | None = None,
    ) -> Fit:
        """A fit of `model`, by default a copy of the plain one, on all images to train on."""
        arguments = {"degradation": views, "site": site, "options": options, "seed": seed}
        model, images = model or self.copy(), images or self.images("train")
        return Fit(model, images, self.cache, arguments)

    def split(self, part: str) -> str:
        """The devkit's name of a part, "train" or "test"."""
        return dict(zip(PARTS, self.splits, strict=True))[part]

    def images(self, part: str) -> Images:
        """Images of a part."""
        return self.devkit.images(self.split(part))

    def labels(self, part: str) -> Labels:
        """Labels of a part, `(n, classes)` in {1, 0, -1}."""
        return self.devkit.labels(self.split(part))

    def features(self, part: str, view: Degradation) -> Features:
        """Plain features after pool5, from the cache as far as it has them."""
        backbone = backbone_of(self.model)
        return extract_features(backbone, self.images(part), view, self.cache / "features")

    @property
    def counts(self) -> dict[str, int]:
        """Images by split."""
        return {split: len(self.devkit.ids(split)) for split in self.splits}

    def figures(self, key: Mapping[str, Any], compute: Any) -> dict[str, Any]:
        """Kept figures, or those that `compute()` gives."""
        return self.memo.get({**self.identity, **key}, compute)

    @cached_property
    def hr(self) -> tuple[Tensor, Tensor]:
        """Plain HR features of both splits."""
        train, test = (self.features(split, self.resize).hr for split in PARTS)
        return train, test

    @cached_property
    def deployed(self) -> LinearSVMs:
        """SVMs on plain HR features, which are never changed."""
        return self.svms(self.hr[0], self.labels("train"), self.protocol)

    @cached_property
    def few(self) -> dict[int, list[LinearSVMs]]:
        """The same with few labelled images a class, drawn three times."""
        return {
            m: [self.svms(*self.draw(self.hr[0], m, seed), FEW_PROTOCOL) for seed in range(3)]
            for m in FEW
        }

    def draw(self, rows: Tensor, count: int, seed: int) -> tuple[Tensor, Labels]:
        """`count` rows of each class, and their labels."""
        labels, rng = self.labels("train"), np.random.default_rng(seed)
        chosen = np.unique(
            np.concatenate(
                [
                    rng.permutation(np.flatnonzero(labels[:, c] == 1))[:count]
                    for c in range(labels.shape[1])
                ]
            )
        )
        return rows[torch.from_numpy(chosen)], labels[chosen]

    def svms(self, rows: Tensor, labels: Labels, protocol: Protocol) -> LinearSVMs:
        """SVMs on rows."""
        return train_svms(rows, labels, protocol, solver=self.solver)

    def judge(self, rows: Transferred) -> Figures:
        """Percentages.

        deploy, accuracy: SVMs on HR features, tested on `rows.test`; few-m: the same SVMs trained
        on m labelled images a class; retrain, retrain_accuracy: SVMs on `rows.train`, with the AP
        of each class by every definition; hr: SVMs on HR features tested on `rows.test_hr`.
        """
        truth = self.labels("test")
        found: Figures = {}
        if rows.in_place:
            found |= self.scores("deploy", "accuracy", self.deployed.decisions(rows.test), truth)
            for m, several in self.few.items():
                maps = [self.precision(svms.decisions(rows.test), truth) for svms in several]
                found[f"few-{m}"] = float(np.mean(maps))
        if rows.test_hr is not None:
            found |= self.scores("hr", "hr_accuracy", self.deployed.decisions(rows.test_hr), truth)
        if rows.train is not None:
            svms = self.svms(rows.train, self.labels("train"), self.protocol)
            decisions = svms.decisions(rows.test)
            found |= self.scores("retrain", "retrain_accuracy", decisions, truth)
            found["classes"] = {
                kind: [100 * ap for ap in average_precisions(decisions, truth, kind)]
                for kind in AVERAGE_PRECISIONS
            }
            found["svms"] = {
                "costs": list(svms.costs),
                "fits": svms.fits,
                "unconverged": svms.unconverged,
                "width": rows.train.shape[1],
            }
        return found

    def scores(self, name: str, accuracy: str, decisions: Any, truth: Labels) -> Figures:
        """mAP, and how often the largest decision value is of a class that is there, in %."""
        right = truth[np.arange(len(truth)), decisions.argmax(1)] == 1
        return {name: self.precision(decisions, truth), accuracy: 100 * float(right.mean())}

    def precision(self, decisions: Any, truth: Labels) -> float:
        """Mean average precision in %."""
        return 100 * float(np.mean(average_precisions(decisions, truth, self.ap)))


def with_study(run: Callable[..., None]) -> Callable[..., None]:
    """A command's options of a model, a devkit and SVMs; `run` gets them as its first argument."""

    @root_option
    @click.option("--backbone", default="timm/tf_efficientnet_lite0")
    @click.option("--weights", default="demo", help="pretrained, demo or a file.")
    @click.option("--hr-size", default=224, help="Side of the model's input, pixels.")
    @click.option("--protocol", default="vissl", type=click.Choice(list(PROTOCOLS)))
    @split_options
    @cache_option
    @functools.wraps(run)
    def command(
        root: Path,
        backbone: str,
        weights: str,
        hr_size: int,
        protocol: str,
        train_split: str,
        test_split: str,
        cache: Path,
        **given: Any,
    ) -> None:
        with told_errors():
            study = Study(
                backbone,
                weights,
                VOCDevkit(root),
                cache,
                Degradation(hr_size=hr_size),
                PROTOCOLS[protocol],
                splits=(train_split, test_split),
            )
            run(study, **given)

    return command


def subset(images: Images, indices: Sequence[int]) -> Images:
    """Some of the images, in that order."""
    chosen = list(indices)
    return dataclasses.replace(
        images,
        ids=tuple(images.ids[i] for i in chosen),
        read=lambda index: images.read(chosen[index]),
        fingerprint=hash_key({"of": images.fingerprint, "indices": chosen}),
        targets=None,
    )


def small(images: Images, size: int) -> Images:
    """The images as real LR photographs would come: `size` x `size` pixels, without an HR one."""
    shrink = Degradation(hr_size=size, lr_size=size)
    return dataclasses.replace(
        images,
        read=lambda index: shrink.hr(images.read(index)),
        fingerprint=hash_key({"of": images.fingerprint, "size": size}),
        targets=None,
    )
