"""Modules after early stages, trained on kept maps through the frozen rest of the model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featxfer import BLOCK_RECIPE, Backbone, Images, diagnose, fill_stores
from featxfer.console import tell
from featxfer.evaluation.pairs import HeldOutPairs, report_pairs
from featxfer.features.extract import check_readable
from featxfer.features.store import MappedRows, align
from featxfer.training.pseudo_labels import LabelDiagnostics
from featxfer.views.augment import cropped, flipped
from featxfer_integrations.mechanism.attach import host_device, transfer_disabled
from featxfer_integrations.mechanism.fingerprint import backbone_at
from featxfer_integrations.mechanism.shown import Show, Shown
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.mechanism.suffix import Suffix
from featxfer_integrations.stages.base import Task, Training
from featxfer_integrations.stages.blocks import BlocksStage, hr_rows

ENOUGH, MOST_CROPS = 10_000, 4
"""Views of the images that crops are to make up, and crops of an image at the most."""

PROBE = 64
"""Images whose maps give a module its input statistics, and shown maps their variance."""

WHOLE = 2
"""Variants that are not cropped, the first ones: the image and its mirror image."""


@dataclass(frozen=True)
class Maps:
    """The maps of all images at one site, on disk; row i of each is of the same image.

    Args:
        shape: of one image's maps.
        hr: of the images as they are, of mirrored ones, and of crops.
        lr: the same, a degradation each.
        skipped: image name -> why it could not be read, in one of them or in all.
    """

    shape: tuple[int, ...]
    hr: tuple[MappedRows, ...]
    lr: Sequence[tuple[MappedRows, ...]]
    skipped: Mapping[str, str]

    def take(self, rows: MappedRows, indices: Tensor) -> Tensor:
        """Maps `(len(indices), *shape)` of one view, float32."""
        maps: Tensor = rows.take(indices).unflatten(1, self.shape).float()
        return maps

    @property
    def views(self) -> list[tuple[MappedRows, ...]]:
        """LR views, then HR."""
        return [*self.lr, self.hr]


def extract_maps(
    backbone: Backbone,
    images: Images,
    degradations: Sequence[Any],
    cache: Path,
    shape: tuple[int, ...],
    *,
    crops: int = 0,
    on_error: str = "raise",
    **options: Any,
) -> Maps:
    """The maps of all images, and of `crops` of each, from the cache as far as it has them.

    An image that could not be read in one view, if only that once, is left out of all. The backbone
    is flat and ends at the site; degradations have one hr_size; `on_error` and `options` are
    arguments of `fill_stores`, errors as there.
    """
    variants = [images, flipped(images), *(cropped(images, draw) for draw in range(crops))]
    views = []
    for degradation in degradations:
        filled = [
            fill_stores(backbone, variant, degradation, cache, on_error=on_error, **options)
            for variant in variants
        ]
        views += [[stores[view] for stores in filled] for view in ("hr", "lr")]
    views = [views[0], *views[1::2]]
    opened = [[store.open_rows() for store in stores] for stores in views]
    every = [rows for view in opened for rows in view]
    skipped = {name: reason for rows in every for name, reason in rows.skipped.items()}
    check_readable("images", skipped, len(images), on_error)
    hr, *lr = (tuple(rows.without(skipped) for rows in view) for view in opened)
    align([rows for view in (hr, *lr) for rows in view])
    return Maps(shape, hr, lr, skipped)


@torch.no_grad()
def shown_of(
    suffix: Suffix, maps: Maps, rows: MappedRows, batch: int = 128
) -> Mapping[str, Tensor]:
    """Vectors that `suffix`, as it is now, shows of all images of one view; on the CPU."""
    device = host_device(suffix.host)
    parts = [
        suffix(maps.take(rows, part).to(device)).vectors
        for part in torch.arange(len(rows), device="cpu").split(batch)
    ]
    return {name: torch.cat([p[name].cpu() for p in parts]) for name in parts[0]}


class MapsStage(BlocksStage):
    """Modules at sites whose maps are kept on disk, towards what the model shows.

    `image` is a square one of the views' size. Raises `AttachError` where what is shown hangs on
    more than the maps at the first site.

    Attributes:
        hr, lr, through: vectors that the plain model, and the trained one, shows of all images.
        targets: of `hr`, by name `(variants, images, d)`: kept, since they are small.
        shows_maps: whether maps are shown besides, which the network gives each time anew.
    """

    network: Suffix

    def __init__(self, task: Task, sites: Sequence[Site], show: Show, image: Tensor) -> None:
        chance = torch.Generator().manual_seed(0)
        noise = torch.rand(image.shape, generator=chance, device="cpu").to(image)
        suffix = Suffix(task.model, sites[0], show, noise, task.fast_precision)
        super().__init__(task, sites, suffix, BLOCK_RECIPE)
        usual = min(MOST_CROPS, max(0, ENOUGH // len(task.images) - WHOLE))
        self.crops = usual if task.options.crops is None else task.options.crops
        self.variants = WHOLE + self.crops

    @property
    def described(self) -> list[Any]:
        """Sizes, precision, crops and the constants."""
        return [*super().described, self.crops, WHOLE, PROBE]

    def training(self) -> Training:
        """Takes the maps; the model's own vectors and statistics of maps come from them."""
        task, suffix = self.task, self.network
        self._tell_costs()
        self.maps = maps = extract_maps(
            backbone_at(task.host, task.model, self.sites[0], task.preprocessing, flat=True),
            task.images,
            task.views,
            task.cache / "maps",
            suffix.shape,
            crops=self.crops,
            precision=suffix.precision,
            **task.reading,
        )
        self.skipped = dict(maps.skipped)
        self.total = len(maps.hr[0])
        self.train, self.test = task.split(self.total)
        self.images = len(self.train)
        self.hr = [shown_of(suffix, maps, rows) for rows in maps.hr]
        self.lr = [shown_of(suffix, maps, rows[0]) for rows in maps.lr]
        some = self.train[:: -(-self.images // PROBE)]
        probe = [maps.take(view[0], some) for view in maps.views]
        device, k = host_device(suffix.host), task.options.k(self.images)
        with torch.no_grad():
            shown = suffix(probe[-1].to(device)).maps
            objective = self.distance(
                {name: float(part.var(correction=0)) for name, part in shown.items()},
                {name: (rows[self.train], k) for name, rows in self.hr[0].items()},
            )
            for site in self.sites:
                found = suffix.maps_at(site, torch.cat(probe).to(device))
                self.modules[site.name].set_input_statistics(found)
        self.targets = {n: torch.stack([part[n] for part in self.hr]) for n in self.hr[0]}
        self.shows_maps = bool(shown)
        digest = _digest([rows for part in (*self.hr, *self.lr) for rows in part.values()])
        pairs, held_out = self.pairs()
        return Training(suffix, pairs, objective, held_out, digest=digest)

    def take(self, indices: Tensor) -> tuple[Tensor, Shown]:
        """Maps of these rows, and what the plain model shows of their HR views."""
        kinds, images = indices // self.total, indices % self.total
        maps, variants = self._maps(kinds, images), kinds % self.variants
        vectors = {name: rows[variants, images] for name, rows in self.targets.items()}
        if not self.shows_maps:
            return maps, Shown({}, vectors)
        hr = self._maps(variants + self.views * self.variants, images)
        with torch.no_grad(), transfer_disabled(self.network.host):
            return maps, self.network(hr.to(host_device(self.network.host)))

    def _maps(self, kinds: Tensor, images: Tensor) -> Tensor:
        maps = torch.empty(len(kinds), *self.maps.shape, device="cpu")
        for kind in kinds.unique().tolist():
            mine = kinds == kind
            view, variant = divmod(kind, self.variants)
            maps[mine] = self.maps.take(self.maps.views[view][variant], images[mine])
        return maps

    def _tell_costs(self) -> None:
        """How long training will take, and how much of the disk the maps."""
        task, suffix = self.task, self.network
        kept = len(task.split(len(task.images))[0])
        rows = kept * self.views + hr_rows(kept)
        shape = (min(self.recipe.batch_size, rows), *suffix.shape)
        maps = torch.ones(shape, device=host_device(suffix.host))
        views = len(task.images) * (self.views + 1) * self.variants
        size = views * math.prod(suffix.shape) * (2 if suffix.precision == "bf16" else 4)
        tell(
            f"training blocks takes about {self.seconds(maps, rows)}, after their maps are taken: "
            f"{size / 1e6:,.0f} MB in {task.cache / 'maps'}"
        )

    def judge(self) -> tuple[list[HeldOutPairs], list[LabelDiagnostics]]:
        """Of the first vectors that are shown; of parts of maps where none are."""
        self.through = [
            [shown_of(self.network, self.maps, rows) for rows in view[:WHOLE]]
            for view in self.maps.views
        ]
        name = next(iter(self.hr[0]), None)
        if name is None:
            return super().judge()
        train, test, centroids = self.train, self.test, self.centroids[name]
        hr, lr = self.hr[0][name], [rows[name] for rows in self.lr]
        *lr_after, hr_after = (view[0][name][test] for view in self.through)
        reports = [
            report_pairs(hr[test], before[test], after, hr_after, centroids)
            for before, after in zip(lr, lr_after, strict=True)
            if len(test)
        ]
        return reports, [diagnose(hr[train], rows[train], centroids) for rows in lr]


def _digest(tensors: Iterable[Tensor]) -> str:
    """A hash of float32 tensors on the CPU."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
