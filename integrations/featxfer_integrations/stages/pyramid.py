"""Modules trained on images as they are read, through the whole model: detectors, and any host."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featxfer import BLOCK_RECIPE
from featxfer.console import tell
from featxfer_integrations.hosts.batch import Batch
from featxfer_integrations.mechanism.attach import transfer_disabled
from featxfer_integrations.mechanism.capture import take_enabled_feature
from featxfer_integrations.mechanism.shown import Show, Shown, ShownDistance
from featxfer_integrations.mechanism.site import PLANES, Site
from featxfer_integrations.mechanism.suffix import FrozenCopy
from featxfer_integrations.stages.base import Judged, Task, Training
from featxfer_integrations.stages.blocks import BlocksStage, ViewPairs

DETECTOR_RECIPE = dataclasses.replace(BLOCK_RECIPE, epochs=12, batch_size=4)
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


class ImagePairs(ViewPairs):
    """Pairs of an image's view and what the plain model shows of its HR view; see `ViewPairs`.

    Args:
        task: of the fit.
        network: the model with what is trained.
        images: indices of the images.
        vary: as `ViewPairs` has it; variants are mirror images.
    """

    def __init__(self, task: Task, network: FrozenCopy, images: Tensor, *, vary: bool) -> None:
        super().__init__(images, len(task.views), len(task.images), MIRRORED, vary=vary)
        self.task, self.network = task, network

    def take(self, indices: Tensor) -> tuple[Batch, Shown]:
        """Images of these rows, and what the plain model shows of their HR views."""
        task, given, wanted, chosen = self.task, [], [], []
        for row in indices.tolist():
            kind, index = divmod(row, len(task.images))
            view, mirrored = divmod(kind, MIRRORED)
            chosen.append(index)
            image = task.images.read(index)
            hr = task.views[0].hr(image)
            made = hr if view == len(task.views) else task.views[view].lr(image)
            given.append(made.flip(-1) if mirrored else made)
            wanted.append(hr.flip(-1) if mirrored else hr)
        return self._see(given, wanted, chosen)

    @torch.no_grad()
    def _see(
        self, given: Sequence[Tensor], wanted: Sequence[Tensor], chosen: Sequence[int]
    ) -> tuple[Batch, Shown]:
        host, model, count = self.task.host, self.network.host, len(given)
        both = host.batch(model, [*given, *wanted], self.task.preprocessing)
        lr, hr = both.part(slice(count)), both.part(slice(count, None))
        with transfer_disabled(model):
            shown = self.network(hr)
            boxes = self._boxes(hr, shown, chosen) if host.proposes(model) else []
            if boxes:
                hr = Batch(hr.images, hr.sizes, boxes)
                shown = self.network(hr)
        return Batch(lr.images, lr.sizes, boxes), shown

    def _boxes(self, hr: Batch, shown: Shown, chosen: Sequence[int]) -> list[Tensor]:
        """Boxes on each image that are compared."""
        task, found = self.task, []
        for row, index in enumerate(chosen):
            one = slice(row, row + 1)
            part = Shown({name: level[one] for name, level in shown.maps.items()}, {})
            chance = chance_of(task.seed, index)
            found.append(task.host.propose(self.network.host, hr.part(one), part, BOXES, chance))
        return found


class PyramidStage(BlocksStage):
    """Modules through the whole model, so that LR images show what HR images do.

    Args:
        task: of the fit.
        sites: of the modules, from the first to the last.
        show: what the model shows of a batch.
    """

    def __init__(self, task: Task, sites: Sequence[Site], show: Show) -> None:
        super().__init__(
            task, sites, FrozenCopy(task.model, show, task.fast_precision), DETECTOR_RECIPE
        )
        self.train, self.test = task.split(len(task.images))
        self.images = len(self.train)

    @property
    def described(self) -> list[Any]:
        """Sizes, precision and the constants."""
        return [*super().described, BOXES, PROBE]

    def training(self) -> Training:
        """How far is far, and statistics of maps, come from some images; the rest as it is read."""
        self.pairs, judged = (
            ImagePairs(self.task, self.network, images, vary=vary)
            for images, vary in ((self.train, True), (self.test, False))
        )
        order = self.pairs.order(torch.Generator().manual_seed(0))
        batch, _ = self.pairs.take(order[: self.recipe.batch_size])
        tell(f"training blocks takes about {self.seconds(batch, len(order))}")
        held_out = judged if len(self.test) else None
        size = self.recipe.batch_size
        return Training(self.network, self.pairs, self._objective(), held_out, size)

    @torch.no_grad()
    def _objective(self) -> ShownDistance:
        """From some images; gives modules their input statistics besides."""
        model, views = self.network.host, len(self.task.views)
        probe = self.train[:: -(-len(self.train) // PROBE)]
        maps: dict[str, list[Tensor]] = {site.name: [] for site in self.sites}
        spread: dict[str, list[float]] = {}
        vectors: dict[str, list[Tensor]] = {}
        for image in probe.tolist():
            for view in range(views + 1):
                batch, seen = self.pairs.one(image, view)
                for site in self.sites:
                    found = take_enabled_feature(model, site, batch.images)
                    rows = _positions(site, found)
                    maps[site.name].append(rows[:: -(-len(rows) // POSITIONS)].cpu())
            for name, level in seen.maps.items():  # of the HR view, whatever the view was
                spread.setdefault(name, []).append(float(level.var(correction=0)))
            for name, part in seen.vectors.items():
                vectors.setdefault(name, []).append(part.cpu())
        for site in self.sites:
            positions = torch.cat(maps[site.name])
            self.modules[site.name].set_input_statistics(_as_maps(site, positions))
        variances = {name: float(torch.tensor(parts).mean()) for name, parts in spread.items()}
        objectives = {}
        for name, parts in vectors.items():
            rows = torch.cat(parts)
            if bool((rows != rows[:1]).any()):
                k = max(1, min(self.task.options.clusters or 100, len(rows) // 10))
                objectives[name], _ = self.objective_of(rows, k)
        if self.task.host.proposes(model) and not objectives:
            warnings.warn(
                f"images: the detector proposes no boxes in {len(probe)} of them, so blocks learn "
                "from its maps alone",
                stacklevel=2,
            )
        return self.distance(variances, objectives)

    def judge(self) -> Judged:
        """What the modules do to held-out images, of each view: to boxes, or to parts of maps."""
        return self.reported(self.pairs)


def _positions(site: Site, found: Tensor) -> Tensor:
    """What passes a site as rows of channels, a position each."""
    if site.layout == "nchw":
        found = found.movedim(1, -1)
    if site.layout == "tokens":
        found = found[:, site.prefix :]
    return found.reshape(-1, found.shape[-1])


def _as_maps(site: Site, positions: Tensor) -> Tensor:
    """Rows of channels as one column of maps, or of tokens, of the layout of a site."""
    if site.layout not in PLANES:
        side = int(len(positions) ** 0.5)
        grid = positions[: side * side][None]
        prefix = grid.new_zeros(1, site.prefix, grid.shape[2])
        return torch.cat([prefix, grid], 1) if site.layout == "tokens" else positions
    column = positions[None, :, None]
    return column if site.layout == "nhwc" else column.movedim(-1, 1)
