"""What stages of blocks share: their width, an epoch's views, how far is far, the time it takes."""

from __future__ import annotations

import copy
import math
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from featxfer import FeatureTransferBlock, Recipe, kmeans
from featxfer.checks import variance_of
from featxfer.evaluation.pairs import HeldOutPairs, report_pairs
from featxfer.features.backbone import frozen
from featxfer.modules.base import TransferModule
from featxfer.training.objectives import make_objective
from featxfer.training.pseudo_labels import LabelDiagnostics
from featxfer_integrations.hosts.base import Host, ProbeError
from featxfer_integrations.hosts.images import black_image
from featxfer_integrations.mechanism.attach import host_device, transfer_disabled
from featxfer_integrations.mechanism.capture import run_host
from featxfer_integrations.mechanism.shown import Shown, ShownDistance
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.mechanism.suffix import FrozenCopy
from featxfer_integrations.stages.base import Stage, Task

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

    Of a detector it is the arithmetic of its backbone. It is that of the model's own image, or of
    one of `side`, the views' size in pixels, where a model does not say its own.
    """
    image = host.image(model)
    try:
        sites = [host.measured(model, site, image) for site in sites]
    except ProbeError:
        if side is None:
            raise
        image = black_image(model, side, side)
        sites = [host.measured(model, site, image) for site in sites]
    # the counter stumbles over parameters that are passed to modules
    still = copy.deepcopy(model).requires_grad_(False)
    with frozen(still), FlopCounterMode(display=False) as counter:
        run_host(still, sites[0], image)
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


class BlocksStage(Stage):
    """Modules that are trained in a frozen copy of the model, towards what it shows of HR images.

    They act at `sites`, from the first to the last; the recipe is the `usual` one unless told. Rows
    of pairs are `(view * variants + variant) * total + image`: views are LR ones and then HR.

    Attributes:
        train, test: indices of the images.
        total: images in all.
        variants: of each view of an image (mirrored, cropped), the first as it is.
    """

    what, verb = "blocks", "do"
    train: Tensor
    test: Tensor
    total: int
    variants: int

    def __init__(
        self, task: Task, sites: Sequence[Site], network: FrozenCopy, usual: Recipe
    ) -> None:
        super().__init__(task, sites)
        self.network, self.recipe = network, task.options.block_recipe or usual
        self.views = len(task.views)
        self.modules = new_modules(task, sites)
        for site in sites:
            network.attach(site, self.modules[site.name])
        self.details = {"precision": network.precision}

    @abstractmethod
    def take(self, indices: Tensor) -> tuple[Any, Shown]:
        """What the network gets of these rows, and what the plain model shows of their HR views."""

    def row(self, image: Any, view: int) -> Any:
        """The row of an image as it is, in an LR view or in HR, the last one."""
        return view * self.variants * self.total + image

    def one(self, image: int, view: int) -> tuple[Any, Shown]:
        """The pair of one image as it is, in an LR view or in HR, the last one."""
        return self.take(torch.tensor([self.row(image, view)], device="cpu"))

    def pairs(self) -> tuple[ViewPairs, ViewPairs | None]:
        """Of the images to train on, and of those held out, if any are."""
        held_out = ViewPairs(self, self.test, vary=False) if len(self.test) else None
        return ViewPairs(self, self.train, vary=True), held_out

    @property
    def described(self) -> list[Any]:
        """Sizes, precision and constants."""
        configs = [self.modules[site.name].config for site in self.sites]
        return [configs, self.network.precision, HR_SHARE]

    def distance(
        self, variances: Mapping[str, float], vectors: Mapping[str, tuple[Tensor, int]]
    ) -> ShownDistance:
        """Of all that is shown: maps of these variances, HR vectors `(n, d)` in k clusters.

        Raises `ValueError` for what does not vary.
        """
        self.centroids, objectives = {}, {}
        for name, (rows, k) in vectors.items():
            variance = variance_of("hr", rows)
            centroids = kmeans(F.normalize(rows, dim=1), k, seed=self.task.seed).centroids
            objectives[name] = make_objective(self.task.objective, centroids, variance)
            self.centroids[name] = centroids
        if not all(value > 0 for value in variances.values()):
            raise ValueError("images: the model's maps of them do not vary")
        return ShownDistance(variances, objectives)

    def judge(self) -> tuple[list[HeldOutPairs], list[LabelDiagnostics]]:
        """What the modules do to held-out images, of each view: to boxes, or to parts of maps.

        Nothing where none are held out, or boxes are wanted and no image has any.
        """
        seen = [self._seen(view) for view in range(self.views + 1)]
        if not seen[-1]:
            return [], []
        views = [[torch.cat(rows) for rows in zip(*view, strict=True)] for view in seen]
        count = len(views[-1][0])
        if count > REPORTED:
            chance = torch.Generator().manual_seed(0)
            chosen = torch.randperm(count, generator=chance, device="cpu")[:REPORTED]
            views = [[rows[chosen] for rows in view] for view in views]
        *several, (hr, hr_after) = views
        k = max(1, min(100, len(hr) // 10))
        centroids = kmeans(F.normalize(hr, dim=1), k, seed=0).centroids
        return [report_pairs(hr, lr, lr_after, hr_after, centroids) for lr, lr_after in several], []

    @torch.no_grad()
    def _seen(self, view: int) -> list[tuple[Tensor, Tensor]]:
        """Rows of each held-out image in a view: of the plain model, and through the modules."""
        found = []
        for image in self.test.tolist():
            given, wanted = self.one(image, view)
            batch = given.to(host_device(self.network.host))
            if getattr(batch, "boxes", None) and not wanted.vectors:
                continue
            with transfer_disabled(self.network.host):
                plain = self.network(batch).rows().cpu()
            found.append((plain, self.network(batch).rows().cpu()))
        return found

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
        whole = took * self.recipe.epochs * math.ceil(rows / self.recipe.batch_size)
        return f"{whole:.0f} seconds" if whole < 120 else f"{whole / 60:.0f} minutes"


class ViewPairs:
    """A stage's pairs of some images for a trainer: each once an epoch in each LR view, some in HR.

    Where they `vary`, variants are drawn by chance and HR views by `HR_SHARE`; else every image is
    seen as it is in each view, as those held out are.
    """

    def __init__(self, stage: BlocksStage, images: Tensor, *, vary: bool) -> None:
        self.stage, self.images, self.vary, self.take = stage, images, vary, stage.take

    def order(self, generator: torch.Generator) -> Tensor:
        """Rows of an epoch, int64."""
        stage, count = self.stage, len(self.images)
        shares = [count] * stage.views + [hr_rows(count) if self.vary else count]
        shuffled = partial(torch.randperm, generator=generator, device="cpu")
        chosen = [stage.row(self.images[shuffled(count)[:n]], v) for v, n in enumerate(shares)]
        rows = torch.cat(chosen)
        if self.vary:
            drawn = torch.randint(stage.variants, rows.shape, generator=generator, device="cpu")
            rows += stage.total * drawn
        return rows[shuffled(len(rows))]
