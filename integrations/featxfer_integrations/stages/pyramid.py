"""Modules trained on images as they are read, through the whole model: detectors, and any host."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from featxfer import BLOCK_RECIPE
from featxfer.console import tell
from featxfer_integrations.hosts.batch import Batch
from featxfer_integrations.mechanism.attach import transfer_disabled
from featxfer_integrations.mechanism.capture import take_enabled_feature
from featxfer_integrations.mechanism.shown import Show, Shown, ShownDistance
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.mechanism.suffix import FrozenCopy
from featxfer_integrations.stages.base import Task, Training
from featxfer_integrations.stages.blocks import BlocksStage

DETECTOR_RECIPE = replace(BLOCK_RECIPE, epochs=12, batch_size=4)
"""For modules that are trained through the whole model."""

PROBE = 16
"""Images whose maps give a module its input statistics, and what is shown its variance."""

POSITIONS = 4_096
"""Of an image's maps, at the most, that give a module its input statistics."""

BOXES = 16
"""Boxes of an image that are compared, where a detector proposes some."""

MIRRORED = 2
"""Variants of an image: as it is, and its mirror image."""


def chance_of(seed: int, index: int) -> torch.Generator:
    """What draws in an image: the same every time."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


class PyramidStage(BlocksStage):
    """Modules through the whole model, so that LR images show what HR images do."""

    def __init__(self, task: Task, sites: Sequence[Site], show: Show) -> None:
        network = FrozenCopy(task.model, show, task.fast_precision)
        super().__init__(task, sites, network, DETECTOR_RECIPE)
        self.total, self.variants = len(task.images), MIRRORED
        self.train, self.test = task.split(self.total)
        self.images = len(self.train)

    @property
    def described(self) -> list[Any]:
        """Sizes, precision and the constants."""
        return [*super().described, BOXES, PROBE]

    def training(self) -> Training:
        """How far is far, and statistics of maps, come from some images; the rest as it is read."""
        pairs, held_out = self.pairs()
        order, size = pairs.order(torch.Generator().manual_seed(0)), self.recipe.batch_size
        batch, _ = self.take(order[:size])
        tell(f"training blocks takes about {self.seconds(batch, len(order))}")
        return Training(self.network, pairs, self._objective(), held_out, size)

    @torch.no_grad()
    def take(self, indices: Tensor) -> tuple[Batch, Shown]:
        """Images of these rows, and what the plain model shows of their HR views."""
        task, given, wanted, chosen = self.task, [], [], []
        for row in indices.tolist():
            kind, index = divmod(row, self.total)
            view, mirrored = divmod(kind, self.variants)
            image = task.images.read(index)
            hr = task.views[0].hr(image)
            made = hr if view == self.views else task.views[view].lr(image)
            chosen.append(index)
            given.append(made.flip(-1) if mirrored else made)
            wanted.append(hr.flip(-1) if mirrored else hr)
        model, boxes = self.network.host, list[Tensor]()
        both = task.host.batch(model, [*given, *wanted], task.preprocessing)
        lr, hr_batch = both.part(slice(len(given))), both.part(slice(len(given), None))
        with transfer_disabled(model):
            shown = self.network(hr_batch)
            if task.host.proposes(model):
                boxes = self._boxes(hr_batch, shown, chosen)
                shown = self.network(replace(hr_batch, boxes=boxes))
        return replace(lr, boxes=boxes), shown

    def _boxes(self, hr: Batch, shown: Shown, chosen: Sequence[int]) -> list[Tensor]:
        """Boxes on each image that are compared."""
        task, found = self.task, []
        for row, index in enumerate(chosen):
            one = slice(row, row + 1)
            part = Shown({name: level[one] for name, level in shown.maps.items()}, {})
            chance = chance_of(task.seed, index)
            found.append(task.host.propose(self.network.host, hr.part(one), part, BOXES, chance))
        return found

    @torch.no_grad()
    def _objective(self) -> ShownDistance:
        """From some images; gives modules their input statistics besides."""
        model, host, clusters = self.network.host, self.task.host, self.task.options.clusters
        probe = self.train[:: -(-self.images // PROBE)].tolist()
        positions: dict[str, list[Tensor]] = defaultdict(list)
        vectors: dict[str, list[Tensor]] = defaultdict(list)
        spread: dict[str, list[float]] = defaultdict(list)
        for image in probe:
            for view in range(self.views + 1):
                batch, seen = self.one(image, view)
                for site in self.sites:
                    rows = _positions(site, take_enabled_feature(model, site, batch.images))
                    positions[site.name].append(rows[:: -(-len(rows) // POSITIONS)].cpu())
            for name, level in seen.maps.items():  # of the HR view, whatever the view was
                spread[name].append(float(level.var(correction=0)))
            for name, part in seen.vectors.items():
                vectors[name].append(part.cpu())
        for site in self.sites:
            rows = torch.cat(positions[site.name])
            if site.layout == "tokens":  # as many as make a square
                rows = rows[: math.isqrt(len(rows)) ** 2]
            self.modules[site.name].set_input_statistics(rows)
        variances = {name: float(torch.tensor(parts).mean()) for name, parts in spread.items()}
        joined = {name: torch.cat(parts) for name, parts in vectors.items()}
        varying = {
            name: (rows, max(1, min(clusters or 100, len(rows) // 10)))
            for name, rows in joined.items()
            if bool((rows != rows[:1]).any())
        }
        if host.proposes(model) and not varying:
            warnings.warn(
                f"images: the detector proposes no boxes in {len(probe)} of them, so blocks learn "
                "from its maps alone",
                stacklevel=2,
            )
        return self.distance(variances, varying)


def _positions(site: Site, found: Tensor) -> Tensor:
    """What passes a site as rows of channels, a position each."""
    if site.layout == "nchw":
        found = found.movedim(1, -1)
    if site.layout == "tokens":
        found = found[:, site.prefix :]
    return found.reshape(-1, found.shape[-1])
