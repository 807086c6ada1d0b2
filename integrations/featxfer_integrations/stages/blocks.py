"""What stages of blocks share: their width, an epoch's views, how far is far, the time it takes."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from featxfer import Clustering, FeatureTransferBlock, Recipe, kmeans
from featxfer.checks import variance_of
from featxfer.evaluation.pairs import HeldOutPairs, report_pairs
from featxfer.features.backbone import frozen
from featxfer.modules.base import TransferModule
from featxfer.training.objectives import Objective, make_objective
from featxfer_integrations.hosts.base import Host, ProbeError, black_image
from featxfer_integrations.mechanism.attach import host_device, transfer_disabled
from featxfer_integrations.mechanism.capture import run_host
from featxfer_integrations.mechanism.shown import Shown, ShownDistance
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.mechanism.suffix import FrozenCopy
from featxfer_integrations.report import duration
from featxfer_integrations.stages.base import Judged, Stage, Task

REPORTED = 4_096
"""Boxes or parts of maps of held-out images that are reported on, at the most."""

HR_SHARE = 0.5
"""Of each epoch's images, how many are seen as HR images too."""

SHARE = 0.09
"""Of the model's arithmetic, what new blocks may take together."""

WIDEST, NARROWEST = 256, 16
"""Hidden channels of new blocks."""


def block_width(host: Host, model: nn.Module, sites: Sequence[Site], side: int | None) -> int:
    """Hidden channels of new blocks: as wide as `SHARE` of the model's arithmetic allows.

    Of a detector it is the arithmetic of its backbone.

    Args:
        host: of the model.
        model: runs on `host.image`, or on images of `side`.
        sites: of blocks; the extents of their maps are taken of that image.
        side: of the views, pixels, for a model that does not say its own; None for detectors.
    """
    image = host.image(model)
    try:
        sites = [host.measured(model, site, image) for site in sites]
    except ProbeError:
        if side is None:
            raise
        image = black_image(model, side, side)
        sites = [host.measured(model, site, image) for site in sites]
    with frozen(model), FlopCounterMode(display=False) as counter:
        run_host(model, sites[0], image)
    allowed = SHARE * counter.get_total_flops() / 2
    with torch.device("meta"):
        for width in range(WIDEST, NARROWEST, -8):
            blocks = [FeatureTransferBlock(hidden_channels=width, **site.sizes) for site in sites]
            costs = [b.macs(*(s.extent or (1, 1))) for b, s in zip(blocks, sites, strict=True)]
            if sum(costs) <= allowed:
                return width
    return NARROWEST


def new_modules(task: Task, sites: Sequence[Site]) -> dict[str, TransferModule]:
    """Untrained modules by site; blocks share a width, in the sizes of those that are attached."""
    blocks = [site for site in sites if site.is_block]
    side = getattr(task.views[0], "hr_size", None)
    width = block_width(task.host, task.model, blocks, side) if blocks else 0
    usual = {True: {"hidden_channels": width}, False: {}}
    return {site.name: task.new(site, usual[site.is_block]) for site in sites}


def hr_rows(images: int) -> int:
    """Of so many images, how many each epoch sees as HR images too."""
    return round(images * HR_SHARE)


class ViewPairs(ABC):
    """Pairs for a trainer: every image once an epoch in each LR view, and some in HR, the last.

    Args:
        images: indices of the images.
        views: how many LR views there are.
        total: images in all.
        variants: of each view of an image (mirrored, cropped), the first as it is.
        vary: whether variants are drawn by chance and HR views by `HR_SHARE`, or every image is
            seen as it is in each view, as those held out are.
    """

    def __init__(
        self, images: Tensor, views: int, total: int, variants: int, *, vary: bool
    ) -> None:
        self.images, self.views, self.total, self.variants = images, views, total, variants
        self.vary = vary

    def order(self, generator: torch.Generator) -> Tensor:
        """Rows of an epoch, int64: `(view * variants + variant) * total + image`."""
        count = len(self.images)
        shares = [count] * self.views + [hr_rows(count) if self.vary else count]
        shuffled = partial(torch.randperm, generator=generator, device="cpu")
        chosen = [self.row(self.images[shuffled(count)[:n]], v) for v, n in enumerate(shares)]
        rows = torch.cat(chosen)
        if self.vary:
            drawn = torch.randint(self.variants, rows.shape, generator=generator, device="cpu")
            rows += self.total * drawn
        return rows[shuffled(len(rows))]

    def row(self, image: Any, view: int) -> Any:
        """The row of an image as it is, in an LR view or in HR, the last one."""
        return view * self.variants * self.total + image

    def one(self, image: int, view: int) -> tuple[Any, Shown]:
        """The pair of one image as it is, in an LR view or in HR, the last one."""
        return self.take(torch.tensor([self.row(image, view)], device="cpu"))

    @abstractmethod
    def take(self, indices: Tensor) -> tuple[Any, Shown]:
        """What the network gets of these rows, and what the plain model shows of their HR views."""


class BlocksStage(Stage):
    """Modules that are trained in a frozen copy of the model, towards what it shows of HR images.

    Args:
        task: of the fit.
        sites: of the modules, from the first to the last.
        network: the frozen copy.
        usual: recipe, unless told.
    """

    what, verb = "blocks", "do"
    test: Tensor

    def __init__(
        self, task: Task, sites: Sequence[Site], network: FrozenCopy, usual: Recipe
    ) -> None:
        super().__init__(task, sites)
        self.network, self.recipe = network, task.options.block_recipe or usual
        self.modules = new_modules(task, sites)
        for site in sites:
            network.attach(site, self.modules[site.name])
        self.details = {"precision": network.precision}

    @property
    def described(self) -> list[Any]:
        """Sizes, precision and constants."""
        configs = [self.modules[site.name].config for site in self.sites]
        return [configs, self.network.precision, HR_SHARE]

    def objective_of(self, rows: Tensor, k: int) -> tuple[Objective, Clustering]:
        """The objective by name of HR vectors `(n, d)` that vary, and its clusters."""
        variance = variance_of("hr", rows)
        clustering = kmeans(F.normalize(rows, dim=1), k, seed=self.task.seed)
        return make_objective(self.task.objective, clustering.centroids, variance), clustering

    def distance(
        self, variances: Mapping[str, float], objectives: Mapping[str, Objective]
    ) -> ShownDistance:
        """Of all that is shown; `ValueError` for maps that do not vary."""
        if not all(value > 0 for value in variances.values()):
            raise ValueError("images: the model's maps of them do not vary")
        return ShownDistance(variances, objectives)

    @torch.no_grad()
    def reported(self, pairs: ViewPairs) -> Judged:
        """What the modules do to held-out images, of each view: to boxes, or to parts of maps.

        Nothing of a view where boxes are wanted and no image has any.
        """
        found = [self._report(pairs, view) for view in range(pairs.views)] if len(self.test) else []
        return Judged([part for part in found if part is not None])

    def _report(self, pairs: ViewPairs, view: int) -> HeldOutPairs | None:
        parts: list[list[Tensor]] = [[] for _ in range(4)]
        for image in self.test.tolist():
            for start, kind in ((0, view), (2, pairs.views)):
                given, wanted = pairs.one(image, kind)
                batch = given.to(host_device(self.network.host))
                if getattr(batch, "boxes", None) and not wanted.vectors:
                    continue
                with transfer_disabled(self.network.host):
                    before = self.network(batch)
                for index, seen in enumerate((before, self.network(batch))):
                    parts[start + index].append(seen.rows().cpu())
        if not parts[0]:
            return None
        lr, lr_after, hr, hr_after = (torch.cat(part) for part in parts)
        if len(hr) > REPORTED:
            chance = torch.Generator().manual_seed(0)
            chosen = torch.randperm(len(hr), generator=chance, device="cpu")[:REPORTED]
            lr, lr_after, hr, hr_after = (p[chosen] for p in (lr, lr_after, hr, hr_after))
        k = max(1, min(100, len(hr) // 10))
        centroids = kmeans(F.normalize(hr, dim=1), k, seed=0).centroids
        return report_pairs(hr, lr, lr_after, hr_after, centroids)

    def seconds(self, batch: Any, rows: int) -> str:
        """How long training will take, for people: of two steps, the second, times all steps."""
        network, took = self.network, 0.0
        for _ in range(2):
            start = time.perf_counter()
            shown = network(batch)
            parts = [*shown.maps.values(), *shown.vectors.values()]
            torch.stack([part.square().mean() for part in parts]).sum().backward()
            network.zero_grad(set_to_none=True)
            device = host_device(network.host)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = time.perf_counter() - start
        return duration(took * self.recipe.epochs * math.ceil(rows / self.recipe.batch_size))
