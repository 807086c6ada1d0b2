"""Heads on features of the same boxes in HR and LR images, which are kept on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featxfer import FEATURES_RECIPE, BaseDegradation, Images
from featxfer.console import tell
from featxfer.features.backbone import weights_sha256
from featxfer.features.extract import software_versions
from featxfer.features.fill import fill_rows
from featxfer.features.forward import Arithmetic, rounding_of
from featxfer.features.store import FeatureStore, Manifest, MappedRows
from featxfer_integrations.hosts.base import Host
from featxfer_integrations.hosts.batch import Sample, half_balanced
from featxfer_integrations.mechanism.attach import host_device, is_attached
from featxfer_integrations.mechanism.fingerprint import (
    architecture_sha256,
    libraries,
    model_sha256,
)
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.mechanism.suffix import FrozenCopy
from featxfer_integrations.stages.base import Stage, Task
from featxfer_integrations.stages.heads import HeadRows, HeadStage
from featxfer_integrations.stages.pyramid import PyramidStage, chance_of

BOX_RECIPE = dataclasses.replace(FEATURES_RECIPE, epochs=20)
"""For heads in a detector, whose boxes of the training images they fit too closely with more."""

PER_IMAGE = 64
"""Boxes or positions of an image, at each site."""

MOST_ROWS = 65_536
"""Boxes or positions that a head is trained on, at the most."""

PART_ROWS = 32
"""Images a part of a store."""

NOTHING = -1
"""Label of what is missing to `PER_IMAGE`."""

DRAW = 3
"""Of the rule by which boxes are drawn: another rule is another key of the stores."""


class BoxFeatures:
    """Features of boxes of all images, at the sites of heads, on disk: a row an image and site.

    A row is `PER_IMAGE` boxes, one after the other, of each its label (`NOTHING` where it is
    missing) and its features in the HR view, in each LR view, and where blocks are attached in the
    HR view as it is through them.

    Args:
        host: of the model.
        model: a frozen detector, with blocks in it or none, and no heads.
        sites: of heads, with their widths.
        images: see `featxfer.open_images`.
        views: degradations.
        seed: of what is drawn by chance.
        cache: folder of the stores.
    """

    def __init__(
        self,
        host: Host,
        model: nn.Module,
        sites: Sequence[Site],
        images: Images,
        views: Sequence[BaseDegradation],
        *,
        seed: int,
        cache: Path,
    ) -> None:
        self.model, self.sites, self.images, self.views = model, list(sites), images, list(views)
        self.seed, self.count = seed, 1 + len(views) + is_attached(model)
        self.sampler = host.sampler(model, sites, PER_IMAGE)
        manifest = Manifest(
            view={},
            backbone=host.model_name(model),
            host=libraries(model),
            architecture_sha256=architecture_sha256(model),
            weights_sha256=weights_sha256(model),
            preprocessing=dataclasses.asdict(host.preprocessing(model)),
            precision=Arithmetic(rounding=rounding_of(host_device(model))).name,
            images_fingerprint=images.fingerprint,
            image_count=len(images),
            part_rows=PART_ROWS,
            software=software_versions(),
        )
        self.stores = {}
        for site in sites:
            view = {
                "view": "boxes",
                "site": [site.name, site.modules[:1], site.side],
                "views": [view.to_dict() for view in views],
                "drawn": [PER_IMAGE, seed, DRAW],
            }
            described = dataclasses.replace(manifest, view=view)
            self.stores[site.name] = FeatureStore(cache, described)

    def fill(self, on_error: str = "raise") -> None:
        """Computes what the stores lack; errors as `extract_features`."""
        missing = max(len(store.missing_parts()) for store in self.stores.values())
        if missing:
            numbers = sum(self.count * (site.width or 0) for site in self.sites)
            gigabytes = 4e-9 * PER_IMAGE * numbers * missing * PART_ROWS
            folder = next(iter(self.stores.values())).directory.parent
            tell(f"features of boxes take up to {1000 * gigabytes:,.0f} MB in {folder}")
        fill_rows(
            self.stores,
            self.images,
            lambda image, names: self._views_of(image),
            self._compute,
            on_error=on_error,
            desc="boxes",
        )

    def _views_of(self, image: Tensor) -> list[Tensor]:
        hr = self.views[0].hr(image)
        again = [hr] if is_attached(self.model) else []
        return [hr, *(view.lr(image) for view in self.views), *again]

    def _compute(
        self,
        indices: Sequence[int],
        prepared: Sequence[list[Tensor]],
        names: Sequence[str],
        advance: Callable[[int], object],
    ) -> Iterable[tuple[str, Tensor]]:
        """Rows of images at each site."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for index, views in zip(indices, prepared, strict=True):
            samples = self.sampler(views, chance_of(self.seed, index))
            for site in self.sites:
                if site.name in found:
                    found[site.name].append(self._row(samples[site.name], site.width or 0))
            advance(len(names))
        return [(name, torch.stack(rows)) for name, rows in found.items()]

    def _row(self, sample: Sample, width: int) -> Tensor:
        row = torch.zeros(PER_IMAGE, 1 + self.count * width, device="cpu")
        row[:, 0] = NOTHING
        row[: len(sample.labels), 0] = sample.labels.float()
        if len(sample.labels):
            row[: len(sample.labels), 1:] = torch.cat([p.float() for p in sample.views], 1)
        return row.flatten()

    @cached_property
    def _rows(self) -> dict[str, MappedRows]:
        """What is in every store, once all are finished, of images that could be read in all."""
        opened = {name: store.open_rows() for name, store in self.stores.items()}
        skipped = {n: why for rows in opened.values() for n, why in rows.skipped.items()}
        return {name: rows.without(skipped) for name, rows in opened.items()}

    @property
    def skipped(self) -> dict[str, str]:
        """Image name -> why it could not be read."""
        return {n: why for rows in self._rows.values() for n, why in rows.skipped.items()}

    def __len__(self) -> int:
        """Images that could be read in all views."""
        return len(next(iter(self._rows.values())))

    def read(self, site: Site, images: Tensor, most: int) -> tuple[list[Tensor], Tensor]:
        """Features of boxes in each view, `(n, d)`, and their labels; `most` of these images'.

        Where there are more, half are balanced over labels and the rest drawn by chance.
        """
        stored, several = self._rows[site.name], images.split(256)
        shape = (PER_IMAGE, 1 + self.count * (site.width or 0))
        kinds = [stored.take(part).unflatten(1, shape)[..., 0] for part in several]
        labels = torch.cat([torch.empty(0, PER_IMAGE, device="cpu"), *kinds]).long()
        rows, slots = (labels != NOTHING).nonzero(as_tuple=True)
        generator = torch.Generator().manual_seed(self.seed)
        chances = torch.rand(len(rows), generator=generator, device="cpu")
        kept = half_balanced(labels[rows, slots], chances, most, generator).sort().values
        rows, slots = rows[kept], slots[kept]
        found = [torch.empty(0, shape[1], device="cpu")]
        for index, part in enumerate(several):
            mine = rows // 256 == index
            if mine.any():
                taken = stored.take(part).unflatten(1, shape)
                found.append(taken[rows[mine] % 256, slots[mine]])
        return list(torch.cat(found)[:, 1:].chunk(self.count, dim=1)), labels[rows, slots]


class Boxes:
    """The features of boxes that all heads of a fit are trained on, taken when first asked for.

    Args:
        task: of the fit.
        sites: of all heads of the fit.
        standing: sites of blocks that are attached, and stay as they are.
        blocks: blocks that are trained before, if any are.
    """

    def __init__(
        self, task: Task, sites: Sequence[Site], standing: Sequence[Site], blocks: Stage | None
    ) -> None:
        self.task, self.sites, self.standing, self.blocks = task, list(sites), standing, blocks
        self.after = [site.name for site in (standing if blocks is None else blocks.sites)]

    @property
    def described(self) -> list[Any]:
        """What the features come through, as JSON types."""
        standing = model_sha256(self.task.model, keep=self.standing)
        return [self.after, standing, None if self.blocks is None else self.blocks.key()]

    @cached_property
    def features(self) -> BoxFeatures:
        """All of them; kept in the cache."""
        task = self.task
        if isinstance(self.blocks, PyramidStage):
            model = self.blocks.network.host
        else:
            model = FrozenCopy(task.model, task.host.show, "fp32", self.standing).host
        features = BoxFeatures(
            task.host,
            model.eval(),
            self.sites,
            task.images,
            task.views,
            seed=task.seed,
            cache=task.cache / "boxes",
        )
        features.fill(task.options.on_error)
        return features


class BoxesStage(HeadStage):
    """A head at one of a detector's sites, towards the features of the same boxes in HR images.

    Args:
        task: of the fit.
        site: of the head.
        boxes: features at all sites of heads of the fit.
    """

    usual = BOX_RECIPE

    def __init__(self, task: Task, site: Site, boxes: Boxes) -> None:
        super().__init__(task, site)
        self.boxes, self.what = boxes, f"the head of {site.name}"

    @property
    def described(self) -> list[Any]:
        """How boxes are drawn, and what they come through."""
        config = None if self.attached is None else self.attached.config
        return [config, PER_IMAGE, MOST_ROWS, DRAW, self.boxes.described]

    def rows(self) -> tuple[HeadRows, HeadRows]:
        """Features of boxes of the images to train on, and of those held out."""
        features, site = self.boxes.features, self.site
        self.skipped = features.skipped
        train, test = self.task.split(len(features))
        self.images = len(train)
        found, labels = features.read(site, train, MOST_ROWS)
        if not len(labels):
            raise ValueError(
                f"images: the detector finds no box at {site.name!r} in any of {len(train)} images"
            )
        k = self.task.options.k(len(labels))
        if k > len(labels):
            raise ValueError(
                f"clusters: got {k}, wanted at most the {len(labels)} boxes at {site.name!r}"
            )
        self.details = {"boxes": len(labels), "precision": "fp32", "after": self.boxes.after}
        judged, _ = features.read(site, test, MOST_ROWS // 16)
        return self._as_rows(found), self._as_rows(judged)

    def _as_rows(self, views: list[Tensor]) -> HeadRows:
        hr, *given = views
        lr = given[: len(self.task.views)]
        return HeadRows(hr, lr, hr, given, given[-1] if self.boxes.after else hr)
