"""The rows of the table: what is put into a trained detector, and how it came by it."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.memo import hash_key
from benchmarks.versions import versions
from featxfer import BaseDegradation, FeatureTransferHead, Images, assign, fit_features_head, kmeans
from featxfer.training.trainer import warm_start_head
from featxfer_integrations import (
    attach_transfer,
    fit_transfer,
    load_transfers,
    save_transfers,
    transfers_of,
)
from featxfer_integrations.attach import find_places
from featxfer_integrations.boxes import (
    DRAW,
    MOST_ROWS,
    OBJECT,
    PER_IMAGE,
    Sampler,
    detector_key,
    fill_box_stores,
)
from featxfer_integrations.detector_blocks import BOXES, DETECTOR_RECIPE, HR_SHARE, PROBE
from featxfer_integrations.fit_detector import BOX_RECIPE


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

    def to_dict(self) -> dict[str, Any]:
        """What the outcome of a method hangs on, as JSON types."""
        return {
            "detector": detector_key(self.detector),
            "images": self.images.fingerprint,
            "view": self.view.to_dict(),
            "seed": self.seed,
            "recipes": [BOX_RECIPE.to_dict(), DETECTOR_RECIPE.to_dict()],
            "boxes": [DRAW, PER_IMAGE, MOST_ROWS, OBJECT],
            "blocks": [BOXES, HR_SHARE, PROBE],
        }

    def fitted(self, model: nn.Module | None = None, **options: Any) -> nn.Module:
        """A copy of the detector, or `model` itself, with what `fit_transfer` trains at it."""
        model = copy.deepcopy(self.detector) if model is None else model
        fit_transfer(
            model,
            self.images,
            degradation=self.view,
            cache=self.cache,
            seed=self.seed,
            **options,
        )
        return model


def identity(setting: Setting) -> nn.Module:
    """Heads that have not been trained."""
    return attach_transfer(copy.deepcopy(setting.detector))


def blocks_alone(setting: Setting) -> nn.Module:
    """Blocks in the backbone; the cache keeps them, for what comes after them."""
    key = {**setting.to_dict(), "where": "backbone", "versions": versions()}
    folder = setting.cache / "detection" / "transfers" / hash_key(key)
    if folder.is_dir():
        return load_transfers(copy.deepcopy(setting.detector), folder)
    model = setting.fitted(where="backbone")
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_transfers(model, unfinished)
    unfinished.rename(folder)
    return model


def blocks_and_heads(setting: Setting) -> nn.Module:
    """Those blocks, and heads on what comes through them."""
    return setting.fitted(blocks_alone(setting), where="boxes")


def both_branches(setting: Setting) -> nn.Module:
    """Heads on the class and the box branch."""
    return setting.fitted(attach_transfer(copy.deepcopy(setting.detector), branch="both"))


def ridge(setting: Setting) -> nn.Module:
    """In the heads' place: ridge regression of HR features of boxes on LR ones, of full rank."""

    def fit(head: FeatureTransferHead, hr: torch.Tensor, lr: torch.Tensor) -> None:
        inputs, targets = torch.cat([lr, hr]), torch.cat([hr, hr])
        head.set_input_statistics(inputs)
        warm_start_head(head, inputs, targets)

    return _by_hand(setting, 2, fit)


def nearest(setting: Setting) -> nn.Module:
    """Heads trained on the paper's labels: the centroid that is nearest to the LR feature."""

    def fit(head: FeatureTransferHead, hr: torch.Tensor, lr: torch.Tensor) -> None:
        k = min(100, max(1, len(hr) // 10))
        clustering = kmeans(nn.functional.normalize(hr, dim=1), k, seed=setting.seed)
        labels = assign(nn.functional.normalize(lr, dim=1), clustering.centroids)
        targets = clustering.centroids[labels]
        fit_features_head(
            head,
            hr,
            [lr],
            clustering,
            targets=[targets],
            objective="labels",
            recipe=BOX_RECIPE,
            seed=setting.seed,
        )

    return _by_hand(setting, None, fit)


def _by_hand(
    setting: Setting,
    times: int | None,
    fit: Callable[[FeatureTransferHead, torch.Tensor, torch.Tensor], None],
) -> nn.Module:
    """Heads that `fit` trains on the features of boxes, `times` as wide inside as the feature."""
    model = copy.deepcopy(setting.detector)
    places = find_places(model, where="boxes")
    sampler = Sampler(model, places, seed=setting.seed)
    folder = setting.cache / "boxes"
    stores = fill_box_stores(sampler, setting.images, [setting.view], folder)
    everything = torch.arange(len(setting.images))
    for place in places:
        (hr, lr), _ = stores[place.name].read(everything, MOST_ROWS, setting.seed)
        hidden = None if times is None else times * hr.shape[1]
        k = min(100, max(1, len(hr) // 10))
        head = FeatureTransferHead(hr.shape[1], k, hidden, seed=setting.seed)
        fit(head, hr, lr)
        attach_transfer(model, head, where=place.name)
    transfers_of(model).eval()
    return model


@dataclass(frozen=True)
class Method:
    """A row.

    Args:
        label: of the row.
        run: from a setting to a detector.
        seeded: whether the seed changes it.
        choices: what it hangs on besides its label and setting, as JSON types.
    """

    label: str
    run: Callable[[Setting], nn.Module]
    seeded: bool = True
    choices: Mapping[str, Any] = field(default_factory=dict)


METHODS: Mapping[str, Method] = {
    "identity": Method("heads, untrained", identity, seeded=False),
    "ridge": Method("ridge regression of boxes' features", ridge),
    "nearest": Method("heads: the paper's nearest labels", nearest),
    "boxes": Method("heads: class branch", lambda s: s.fitted(where="boxes")),
    "both": Method("heads: class and box branch", both_branches),
    "fpn": Method("blocks on the pyramid", lambda s: s.fitted(where="fpn")),
    "all": Method("blocks in the backbone, heads", blocks_and_heads),
    "backbone": Method("blocks in the backbone", blocks_alone),
}
"""Methods by the name that `--methods` takes."""


def _blocks(
    label: str,
    stages: tuple[int, ...] = (2, 3, 4),
    *,
    epochs: float = 1,
    rate: float = 1,
    objective: str | None = None,
) -> Method:
    """Blocks after stages, trained at times the usual number of epochs and rate.

    An objective is of boxes: `fit_transfer` refuses one for a detector that proposes none.
    """
    recipe = dataclasses.replace(
        DETECTOR_RECIPE,
        epochs=round(epochs * DETECTOR_RECIPE.epochs),
        learning_rate=rate * DETECTOR_RECIPE.learning_rate,
    )

    def run(setting: Setting) -> nn.Module:
        places = [f"stage{stage}" for stage in stages]
        return setting.fitted(at=places, block_recipe=recipe, objective=objective)

    choices = {"stages": stages, "recipe": recipe.to_dict(), "objective": objective or "prototypes"}
    return Method(label, run, choices=choices)


def _heads(label: str, epochs: float) -> Method:
    """Heads on boxes, trained for times the usual number of epochs."""
    recipe = dataclasses.replace(BOX_RECIPE, epochs=round(epochs * BOX_RECIPE.epochs))

    def run(setting: Setting) -> nn.Module:
        return setting.fitted(where="boxes", recipe=recipe)

    return Method(label, run, choices={"recipe": recipe.to_dict()})


TUNING: Mapping[str, Method] = {
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
