"""The rows of the table: what is put into a trained detector, and how it came by it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from featxfer import (
    BaseDegradation,
    FeatureTransferHead,
    Images,
    assign,
    fit_features_head,
    kmeans,
    warm_start_head,
)
from featxfer_integrations import attach_transfer, fit_transfer, transfers_of
from featxfer_integrations.attach import find_places
from featxfer_integrations.boxes import MOST_ROWS, Sampler, fill_box_stores


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

    def fitted(self, *, branch: str | None = None, **options: object) -> nn.Module:
        """A copy that `fit_transfer` trained."""
        model = copy.deepcopy(self.detector)
        if branch is not None:
            attach_transfer(model, branch=branch)
        fit_transfer(
            model,
            self.images,
            degradation=self.view,
            cache=self.cache,
            seed=self.seed,
            **options,  # type: ignore[arg-type]
        )
        return model


def identity(setting: Setting) -> nn.Module:
    """Heads that have not been trained."""
    return attach_transfer(copy.deepcopy(setting.detector))


def blocks_and_heads(setting: Setting) -> nn.Module:
    """Blocks in the backbone, and heads on what comes through them."""
    model = attach_transfer(copy.deepcopy(setting.detector), where="backbone")
    attach_transfer(model)
    fit_transfer(
        model, setting.images, degradation=setting.view, cache=setting.cache, seed=setting.seed
    )
    return model


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
            head, hr, [lr], clustering, targets=[targets], objective="labels", seed=setting.seed
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
    """

    label: str
    run: Callable[[Setting], nn.Module]
    seeded: bool = True


METHODS: Mapping[str, Method] = {
    "identity": Method("heads, untrained", identity, seeded=False),
    "ridge": Method("ridge regression of boxes' features", ridge, seeded=False),
    "nearest": Method("heads: the paper's nearest labels", nearest),
    "boxes": Method("heads: class branch", lambda s: s.fitted(where="boxes")),
    "both": Method("heads: class and box branch", lambda s: s.fitted(branch="both")),
    "fpn": Method("blocks on the pyramid", lambda s: s.fitted(where="fpn")),
    "backbone": Method("blocks in the backbone", lambda s: s.fitted(where="backbone")),
    "all": Method("blocks in the backbone, heads", blocks_and_heads),
}
"""Methods by the name that `--methods` takes."""
