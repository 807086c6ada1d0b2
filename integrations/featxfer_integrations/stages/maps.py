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

from featxfer import (
    BLOCK_RECIPE,
    Backbone,
    Images,
    diagnose,
    fill_stores,
)
from featxfer.console import tell
from featxfer.evaluation.pairs import report_pairs
from featxfer.features.extract import check_readable
from featxfer.features.store import MappedRows, align
from featxfer.views.augment import cropped, flipped
from featxfer_integrations.mechanism.attach import host_device, transfer_disabled
from featxfer_integrations.mechanism.fingerprint import backbone_at
from featxfer_integrations.mechanism.shown import Show, Shown, ShownDistance
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.mechanism.suffix import Suffix
from featxfer_integrations.stages.base import Judged, Task, Training
from featxfer_integrations.stages.blocks import BlocksStage, ViewPairs, hr_rows

ENOUGH, MOST_CROPS = 10_000, 4
"""Views of the images that crops are to make up, and crops of an image at the most."""

PROBE = 64
"""Images whose maps give a module its input statistics, and shown maps their variance."""

WHOLE = 2
"""Variants that are not cropped, the first ones: the image and its mirror image."""


@dataclass(frozen=True)
class Maps:
    """The maps of all images at one site, on disk: HR and each degradation.

    Row i of each is of the same image.

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
    """The maps of all images at a site, from the cache as far as it has them.

    An image that could not be read in one view, if only that once, is left out of all.

    Args:
        backbone: up to the site (`backbone_at`), flat.
        images: see `featxfer.open_images`.
        degradations: of one hr_size.
        cache: folder of the maps.
        shape: of one image's maps.
        crops: how many crops of each image there are besides.
        on_error: as `extract_features` has it; errors as there.
        **options: precision, batch_size of `extract_features`.
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


def _digest(tensors: Iterable[Tensor]) -> str:
    """A hash of float32 tensors on the CPU."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class MapPairs(ViewPairs):
    """Pairs of maps and what the plain model shows of the HR image.

    Each time an image is as it is, mirrored or cropped, by chance; held-out ones are as they are.

    Args:
        suffix: tells what is shown where that is not kept.
        maps: on disk.
        targets: vectors of HR views, a variant each, by name: kept, since they are small.
        images: indices of the images.
        vary: as `ViewPairs` has it.
        shows_maps: whether maps are shown besides, which `suffix` gives each time anew.
    """

    def __init__(
        self,
        suffix: Suffix,
        maps: Maps,
        targets: Mapping[str, Tensor],
        images: Tensor,
        *,
        vary: bool,
        shows_maps: bool,
    ) -> None:
        super().__init__(images, len(maps.lr), len(maps.hr[0]), len(maps.hr), vary=vary)
        self.suffix, self.maps, self.targets, self.shows_maps = suffix, maps, targets, shows_maps

    def take(self, indices: Tensor) -> tuple[Tensor, Shown]:
        """Maps of these rows, and what the plain model shows of their HR views."""
        kinds, images = indices // self.total, indices % self.total
        maps, variants = self._maps(kinds, images), kinds % self.variants
        vectors = {name: rows[variants, images] for name, rows in self.targets.items()}
        if not self.shows_maps:
            return maps, Shown({}, vectors)
        hr = self._maps(variants + self.views * self.variants, images)
        with torch.no_grad(), transfer_disabled(self.suffix.host):
            return maps, self.suffix(hr.to(host_device(self.suffix.host)))

    def _maps(self, kinds: Tensor, images: Tensor) -> Tensor:
        maps = torch.empty(len(kinds), *self.maps.shape, device="cpu")
        for kind in kinds.unique().tolist():
            mine = kinds == kind
            view, variant = divmod(kind, self.variants)
            maps[mine] = self.maps.take(self.maps.views[view][variant], images[mine])
        return maps


class MapsStage(BlocksStage):
    """Modules at sites whose maps are kept on disk, towards what the model shows.

    Args:
        task: of the fit.
        sites: from the first to the last.
        show: what LR images have to match.
        image: a square one of the views' size.

    Raises:
        AttachError: what is shown hangs on more than the maps at the first site.
    """

    def __init__(self, task: Task, sites: Sequence[Site], show: Show, image: Tensor) -> None:
        chance = torch.Generator().manual_seed(0)
        noise = torch.rand(image.shape, generator=chance, device="cpu").to(image)
        self.suffix = Suffix(task.model, sites[0], show, noise, task.fast_precision)
        super().__init__(task, sites, self.suffix, BLOCK_RECIPE)
        usual = min(MOST_CROPS, max(0, ENOUGH // len(task.images) - WHOLE))
        self.crops = usual if task.options.crops is None else task.options.crops

    @property
    def described(self) -> list[Any]:
        """Sizes, precision, crops and the constants."""
        return [*super().described, self.crops, WHOLE, PROBE]

    def training(self) -> Training:
        """Takes the maps; the model's own HR vectors and statistics of maps come from them."""
        task, suffix = self.task, self.suffix
        self._tell_costs()
        self.maps = maps = extract_maps(
            backbone_at(task.host, task.model, self.sites[0], task.preprocessing, flat=True),
            task.images,
            task.views,
            task.cache / "maps",
            suffix.shape,
            crops=self.crops,
            precision=suffix.precision,
            on_error=task.options.on_error,
            batch_size=task.options.batch_size or 64,
        )
        self.skipped = dict(maps.skipped)
        self.train, self.test = train, test = task.split(len(maps.hr[0]))
        self.images = len(train)
        self.hr = [shown_of(suffix, maps, rows) for rows in maps.hr]
        self.lr = [shown_of(suffix, maps, rows[0]) for rows in maps.lr]
        objective = self._objective()
        for site in self.sites:
            self.modules[site.name].set_input_statistics(self._probe(site))
        targets = {name: torch.stack([part[name] for part in self.hr]) for name in self.hr[0]}
        self.pairs, judged = (
            MapPairs(suffix, maps, targets, rows, vary=vary, shows_maps=bool(objective.variances))
            for rows, vary in ((train, True), (test, False))
        )
        digest = _digest([rows for part in (*self.hr, *self.lr) for rows in part.values()])
        return Training(suffix, self.pairs, objective, judged if len(test) else None, digest=digest)

    def _tell_costs(self) -> None:
        """How long training will take, and how much of the disk the maps."""
        task, suffix = self.task, self.suffix
        kept = len(task.split(len(task.images))[0])
        rows = kept * len(task.views) + hr_rows(kept)
        chance = torch.Generator().manual_seed(0)
        shape = (min(self.recipe.batch_size, rows), *suffix.shape)
        noise = torch.randn(shape, generator=chance, device="cpu").to(host_device(suffix.host))
        views = len(task.images) * (len(task.views) + 1) * (WHOLE + self.crops)
        size = views * math.prod(suffix.shape) * (2 if suffix.precision == "bf16" else 4)
        tell(
            f"training blocks takes about {self.seconds(noise, rows)}, after their maps are taken: "
            f"{size / 1e6:,.0f} MB in {task.cache / 'maps'}"
        )

    def _objective(self) -> ShownDistance:
        """Of vectors by all HR images to train on; of maps by some."""
        objectives, self.clusterings = {}, {}
        for name, every in self.hr[0].items():
            rows = every[self.train]
            k = self.task.options.k(len(rows))
            objectives[name], self.clusterings[name] = self.objective_of(rows, k)
        some = self.maps.take(self.maps.hr[0], self._some())
        with torch.no_grad():
            shown = self.suffix(some.to(host_device(self.suffix.host)))
        spread = {name: float(part.var(correction=0)) for name, part in shown.maps.items()}
        return self.distance(spread, objectives)

    def _some(self) -> Tensor:
        return self.train[:: -(-len(self.train) // PROBE)]

    @torch.no_grad()
    def _probe(self, site: Site) -> Tensor:
        """LR and HR maps at a site, of some images."""
        first = torch.cat([self.maps.take(rows[0], self._some()) for rows in self.maps.views])
        return self.suffix.maps_at(site, first.to(host_device(self.suffix.host)))

    def judge(self) -> Judged:
        """Of the first vectors that are shown; of parts of maps where none are."""
        shown = [
            [shown_of(self.suffix, self.maps, rows) for rows in view[:WHOLE]]
            for view in self.maps.views
        ]
        self.hr_through, self.lr_through = shown[-1], shown[:-1]
        name = next(iter(self.hr[0]), None)
        if name is None:
            return self.reported(self.pairs)
        centroids, test, hr = self.clusterings[name].centroids, self.test, self.hr[0][name]
        hr_after = self.hr_through[0][name][test]
        reports = [
            report_pairs(hr[test], lr[name][test], after[0][name][test], hr_after, centroids)
            for lr, after in zip(self.lr, self.lr_through, strict=True)
            if len(test)
        ]
        train = self.train
        found = [diagnose(hr[train], rows[name][train], centroids) for rows in self.lr]
        return Judged(reports, found)
