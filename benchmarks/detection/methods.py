"""The rows of the table: what is put into a trained detector, and how it came by it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.common.fit import Fit
from benchmarks.common.method import Method
from benchmarks.common.ridge import warm_start_head
from benchmarks.gap.controls import train_head
from featxfer import BaseDegradation, Clustering, FeatureTransferHead, Images, assign, kmeans
from featxfer.checks import variance_of
from featxfer.training.objectives import make_objective
from featxfer_integrations import (
    FitOptions,
    attach_transfer,
    host_of,
    transfers_of,
)
from featxfer_integrations.hosts.base import find_sites
from featxfer_integrations.stages.boxes import BOX_RECIPE, MOST_ROWS, BoxFeatures
from featxfer_integrations.stages.pyramid import DETECTOR_RECIPE


@dataclass(frozen=True)
class Setting:
    """What a method is given.

    Args:
        detector: trained on HR images; methods copy it.
        images: unlabelled HR images.
        view: how LR images are made.
        cache: folder.
        seed: of the method.
    """

    detector: nn.Module
    images: Images
    view: BaseDegradation
    cache: Path
    seed: int

    def fit(
        self,
        site: str | list[str] | None,
        *,
        model: nn.Module | None = None,
        branch: str | None = None,
        **options: Any,
    ) -> Fit:
        """A fit of a copy of the detector, or of `model` itself, with these `FitOptions`."""
        model = copy.deepcopy(self.detector) if model is None else model
        if branch is not None:
            attach_transfer(model, branch=branch)
        chosen = FitOptions(**options)
        arguments = {"degradation": self.view, "site": site, "options": chosen, "seed": self.seed}
        return Fit(model, self.images, self.cache, arguments)


DetectionMethod = Method[[Setting], nn.Module]
"""From a setting to a detector."""


def fitted(label: str, site: str | list[str] | None, **given: Any) -> DetectionMethod:
    """What `fit_transfer` trains at a site; other arguments as of `Setting.fit`."""

    def run(setting: Setting) -> nn.Module:
        fit = setting.fit(site, **given)
        fit.run()
        return fit.model

    return Method((label,), run, choices=lambda setting: setting.fit(site, **given).key)


def blocks_alone(setting: Setting) -> nn.Module:
    """Blocks in the backbone, for what comes after them."""
    fit = setting.fit("backbone")
    fit.run()
    return fit.model


def blocks_and_heads(setting: Setting) -> nn.Module:
    """Those blocks, and heads on what comes through them."""
    fit = setting.fit("boxes", model=blocks_alone(setting))
    fit.run()
    return fit.model


def ridge(head: FeatureTransferHead, hr: Tensor, lr: Tensor, _: Clustering, seed: int) -> None:
    """In the heads' place: ridge regression of HR features of boxes on LR ones, of full rank."""
    inputs, targets = torch.cat([lr, hr]), torch.cat([hr, hr])
    head.set_input_statistics(inputs)
    warm_start_head(head, inputs, targets)


def nearest(
    head: FeatureTransferHead, hr: Tensor, lr: Tensor, clustering: Clustering, seed: int
) -> None:
    """Trains on the paper's labels: the centroid that is nearest to the LR feature."""
    centroids = clustering.centroids
    targets = centroids[assign(normalize(lr, dim=1), centroids)]
    objective = make_objective("labels", centroids, variance_of("hr", hr))
    rows = torch.cat([lr, hr]), torch.cat([targets, hr])
    train_head(head, rows, centroids, objective, recipe=BOX_RECIPE, seed=seed)


def _by_hand(
    label: str,
    train: Callable[[FeatureTransferHead, Tensor, Tensor, Clustering, int], None],
    times: int | None = None,
) -> DetectionMethod:
    """Heads that `train` trains on the features of boxes, `times` as wide inside as these."""

    def run(setting: Setting) -> nn.Module:
        model, host = copy.deepcopy(setting.detector), host_of(setting.detector)
        sites = find_sites(host, model, "boxes")
        boxes = BoxFeatures(
            host,
            setting.detector,
            sites,
            setting.images,
            [setting.view],
            seed=setting.seed,
            cache=setting.cache / "boxes",
        )
        boxes.fill()
        for site in sites:
            (hr, lr), _ = boxes.read(site, torch.arange(len(setting.images)), MOST_ROWS)
            hidden = None if times is None else times * hr.shape[1]
            k = min(100, max(1, len(hr) // 10))
            clustering = kmeans(normalize(hr, dim=1), k, seed=setting.seed)
            head = FeatureTransferHead(hr.shape[1], k, hidden, seed=setting.seed)
            train(head, hr, lr, clustering, setting.seed)
            attach_transfer(model, head, site=site.asked)
        transfers_of(model).eval()
        return model

    return Method((label,), run, choices=lambda setting: setting.fit("boxes").key)


METHODS: Mapping[str, DetectionMethod] = {
    "identity": Method(
        ("heads, untrained",),
        lambda setting: attach_transfer(copy.deepcopy(setting.detector)),
        seeded=False,
        choices=lambda setting: setting.fit("boxes").key,
    ),
    "ridge": _by_hand("ridge regression of boxes' features", ridge, times=2),
    "nearest": _by_hand("heads: the paper's nearest labels", nearest),
    "boxes": fitted("heads: class branch", "boxes"),
    "both": fitted("heads: class and box branch", None, branch="both"),
    "fpn": fitted("blocks on the pyramid", "fpn"),
    "all": Method(
        ("blocks in the backbone, heads",),
        blocks_and_heads,
        choices=lambda setting: [setting.fit(site).key for site in ("backbone", "boxes")],
    ),
    "backbone": Method(
        ("blocks in the backbone",),
        blocks_alone,
        choices=lambda setting: setting.fit("backbone").key,
    ),
}
"""Methods by the name that `--methods` takes."""


def _blocks(
    label: str,
    stages: tuple[int, ...] = (2, 3, 4),
    *,
    epochs: float = 1,
    rate: float = 1,
    objective: str | None = None,
) -> DetectionMethod:
    """Blocks after stages, trained at times the usual number of epochs and rate.

    An objective is of boxes: `fit_transfer` refuses one for a detector that proposes none.
    """
    recipe = dataclasses.replace(
        DETECTOR_RECIPE,
        epochs=round(epochs * DETECTOR_RECIPE.epochs),
        learning_rate=rate * DETECTOR_RECIPE.learning_rate,
    )
    sites = [f"stage{stage}" for stage in stages]
    return fitted(label, sites, block_recipe=recipe, objective=objective)


def _heads(label: str, epochs: float) -> DetectionMethod:
    """Heads on boxes, trained for times the usual number of epochs."""
    recipe = dataclasses.replace(BOX_RECIPE, epochs=round(epochs * BOX_RECIPE.epochs))
    return fitted(label, "boxes", recipe=recipe)


TUNING: Mapping[str, DetectionMethod] = {
    "default": _blocks("blocks after 1/8, 1/16 and 1/32"),
    "all": _blocks("after 1/4, 1/8, 1/16 and 1/32", (1, 2, 3, 4)),
    "early": _blocks("after 1/4 and 1/8", (1, 2)),
    "late": _blocks("after 1/16 and 1/32", (3, 4)),
    "last": _blocks("after 1/32 alone", (4,)),
    "half": _blocks("default, half the epochs", epochs=0.5),
    "twice": _blocks("default, twice the epochs", epochs=2),
    "slow": _blocks("default, half the learning rate", rate=0.5),
    "fast": _blocks("default, twice the learning rate", rate=2),
    "regression": _blocks("default, boxes by regression", objective="regression"),
    "heads": _heads("heads: class branch", 1),
    "heads-half": _heads("heads, half the epochs", 0.5),
    "heads-twice": _heads("heads, twice the epochs", 2),
    "heads-four": _heads("heads, four times the epochs", 4),
}
"""What transfers hang on: by the name for `--methods` with `--tune`. All blocks cost the same."""
