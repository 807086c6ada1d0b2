"""Heads on features of the same boxes in HR and LR images, which are kept on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
from featxfer_integrations.mechanism.fingerprint import architecture_sha256, libraries, model_sha256
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.mechanism.suffix import FrozenCopy
from featxfer_integrations.stages.base import Task
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

    `model` is a frozen detector, with blocks in it or none, and no heads; `cache` the folder of the
    stores.
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
        self.model, self.images, self.views, self.cache = model, images, list(views), cache
        self.seed, self.count = seed, 1 + len(views) + is_attached(model)
        self.shapes = {s.name: (PER_IMAGE, 1 + self.count * (s.width or 0)) for s in sites}
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
            self.stores[site.name] = FeatureStore(cache, dataclasses.replace(manifest, view=view))

    def fill(self, on_error: str = "raise") -> None:
        """Computes what the stores lack; errors as `extract_features`."""
        missing = max(len(store.missing_parts()) for store in self.stores.values())
        if missing:
            size = 4e-6 * sum(map(math.prod, self.shapes.values())) * missing * PART_ROWS
            tell(f"features of boxes take up to {size:,.0f} MB in {self.cache}")
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
        samples = []
        for index, views in zip(indices, prepared, strict=True):
            samples.append(self.sampler(views, chance_of(self.seed, index)))
            advance(len(names))
        return [(name, torch.stack([self._row(s[name], name) for s in samples])) for name in names]

    def _row(self, sample: Sample, site: str) -> Tensor:
        row = torch.zeros(self.shapes[site], device="cpu")
        row[:, 0] = NOTHING
        count = len(sample.labels)
        if count:
            row[:count, 0] = sample.labels.float()
            row[:count, 1:] = torch.cat([view.float() for view in sample.views], 1)
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
        stored = self._rows[site.name].take(images).unflatten(1, self.shapes[site.name])
        kinds = stored[..., 0].long()
        rows, slots = (kinds != NOTHING).nonzero(as_tuple=True)
        labels = kinds[rows, slots]
        generator = torch.Generator().manual_seed(self.seed)
        chances = torch.rand(len(rows), generator=generator, device="cpu")
        kept = half_balanced(labels, chances, most, generator).sort().values
        found = stored[rows[kept], slots[kept], 1:]
        return list(found.chunk(self.count, dim=1)), labels[kept]


@dataclass(eq=False)
class Boxes:
    """The features of boxes at all `sites` of heads of a fit, taken when first asked for.

    They come through `blocks`, which are trained before; where there are none through those at
    `standing`, which are attached and stay as they are.
    """

    task: Task
    sites: Sequence[Site]
    standing: Sequence[Site]
    blocks: PyramidStage | None

    @property
    def after(self) -> list[str]:
        """Names of the blocks that they come through."""
        return [site.name for site in (self.blocks.sites if self.blocks else self.standing)]

    @property
    def described(self) -> list[Any]:
        """What the features come through, as JSON types."""
        standing = model_sha256(self.task.model, keep=self.standing)
        return [self.after, standing, None if self.blocks is None else self.blocks.key()]

    @cached_property
    def features(self) -> BoxFeatures:
        """All of them; kept in the cache."""
        task = self.task
        if self.blocks is not None:
            network: FrozenCopy = self.blocks.network
        else:
            network = FrozenCopy(task.model, task.host.show, "fp32", self.standing)
        features = BoxFeatures(
            task.host,
            network.host.eval(),
            self.sites,
            task.images,
            task.views,
            seed=task.seed,
            cache=task.cache / "boxes",
        )
        features.fill(task.options.on_error)
        return features


class BoxesStage(HeadStage):
    """A head at one of a detector's sites, towards the features of the same boxes in HR images."""

    def __init__(self, task: Task, site: Site, boxes: Boxes) -> None:
        super().__init__(task, site, BOX_RECIPE)
        self.boxes, self.what = boxes, f"the head of {site.name}"

    @property
    def described(self) -> list[Any]:
        """How boxes are drawn, and what they come through."""
        return [self.config, PER_IMAGE, MOST_ROWS, DRAW, self.boxes.described]

    def rows(self) -> tuple[HeadRows, HeadRows]:
        """Features of boxes of the images to train on, and of those held out."""
        features, site = self.boxes.features, self.site
        self.skipped |= features.skipped
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
        views = len(self.task.views)
        to_train, to_judge = (
            HeadRows(hr, given[:views], hr, given) for hr, *given in (found, judged)
        )
        return to_train, to_judge
