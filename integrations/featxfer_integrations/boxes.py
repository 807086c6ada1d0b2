"""Features of the same boxes in HR and LR images, of a frozen detector: what its heads learn from.

R-CNNs: the detector's own proposals on the HR image, pooled from the maps of every view. Detectors
without proposals: positions of their pyramid. No labels are looked at: half of what is drawn is
balanced by the classes that the detector itself predicts on the HR image, the other half is drawn
by chance, so that background stays as common as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from tqdm import tqdm

from featxfer import BaseDegradation, FeatureStore, ImageError, Images
from featxfer.backbone import frozen, weights_sha256
from featxfer.features import software_versions
from featxfer.store import Manifest, Rows, StoredRows
from featxfer_integrations._attach import AttachError, Place, disabled, is_attached

CLASS, REGRESSION = "boxes_class", "boxes_regression"
"""How places of detectors without proposals are named, before the level."""

PER_IMAGE = 64
"""Boxes or positions of an image, at each place."""

MOST_ROWS = 65_536
"""Boxes or positions that a head is trained on, at the most."""

PART_ROWS = 32
"""Images a part of a store."""

OBJECT = 0.05
"""Scores from here on are of objects; below, a position is background."""

NOTHING = -1
"""Label of what is missing to `PER_IMAGE`."""


@dataclass(frozen=True)
class Sample:
    """Boxes or positions of one image at one place.

    Args:
        views: features `(b, d)`, a tensor a view.
        labels: what the detector predicts on the HR view, int64 `(b,)`; 0 is background.
    """

    views: list[Tensor]
    labels: Tensor


class Sampler:
    """Draws boxes on the HR view of an image and gives their features in all views.

    Args:
        model: a detector as `torchvision_detection` knows it, with blocks in its backbone or none,
            and no heads.
        places: of heads.
        per_image: how many boxes are drawn, at each place.
        seed: of what is drawn by chance.
    """

    def __init__(
        self, model: nn.Module, places: Sequence[Place], *, per_image: int = PER_IMAGE, seed: int
    ) -> None:
        self.model: Any = model
        self.places, self.per_image, self.seed = places, per_image, seed
        unknown = [place.name for place in places if place.width is None]
        assert not unknown, unknown
        self.widths = {place.name: place.width or 0 for place in places}

    @torch.no_grad()
    def __call__(self, views: Sequence[Tensor], index: int) -> dict[str, Sample]:
        """Samples by place.

        Args:
            views: uint8 `(3, h, w)`, of one size. The first is HR, and seen without blocks.
            index: of the image.
        """
        images, maps = levels_of(self.model, views)
        if hasattr(self.model, "roi_heads"):
            return self._boxes(images, maps, index)
        return self._positions(maps, index)

    def _boxes(self, images: ImageList, maps: dict[str, Tensor], index: int) -> dict[str, Sample]:
        boxes = self.propose(images, maps, index)
        count = len(images.image_sizes)
        if not len(boxes):
            return {
                place.name: Sample([torch.empty(0, 0)] * count, torch.empty(0, dtype=torch.int64))
                for place in self.places
            }
        rows, labels = self._pooled(maps, [boxes] * count, images.image_sizes)
        return {
            place.name: Sample([part.cpu() for part in rows[place.name].chunk(count)], labels)
            for place in self.places
        }

    def propose(self, images: ImageList, maps: dict[str, Tensor], index: int) -> Tensor:
        """Boxes `(b, 4)` on the first image, `per_image` of those proposed; `index` is its own."""
        first = {name: level[:1] for name, level in maps.items()}
        sizes = images.image_sizes[:1]
        proposed, _ = self.model.rpn(ImageList(images.tensors[:1], sizes), first)
        boxes: Tensor = proposed[0]
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
        if not len(boxes):
            return boxes
        scores, labels = self._logits(first, [boxes], sizes).softmax(1).max(1)
        chosen = half_balanced(labels.cpu(), scores.cpu(), self.per_image, self.chance(index))
        return boxes[chosen.to(boxes.device)]

    def chance(self, index: int) -> torch.Generator:
        """What draws in an image: the same every time."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + index)

    def _pooled(
        self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Features at each place, view by view, and the labels of the first view."""
        with captured(self.model, self.places) as taken:
            logits = self._logits(maps, boxes, sizes)
        labels = logits[: len(boxes[0])].argmax(1).cpu()
        rows = {}
        for place in self.places:
            if len(taken[place.name]) != 1 or taken[place.name][0].ndim != 2:
                raise AttachError(f"where: {place.name!r} has no vector for each box")
            rows[place.name] = taken[place.name][0]
        return rows, labels

    def _logits(
        self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Tensor:
        """Class scores of boxes, of all images one after the other."""
        heads = self.model.roi_heads
        found = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, sizes)))
        logits: Tensor = found[0] if isinstance(found, tuple) else found
        return logits

    def _positions(self, maps: dict[str, Tensor], index: int) -> dict[str, Sample]:
        with captured(self.model, self.places) as taken:
            logits = self.model.head(list(maps.values()))["cls_logits"]
        if hasattr(self.model.head.classification_head, "module_list"):
            likely = logits[0].softmax(1)[:, 1:]
        else:
            likely = logits[0].sigmoid()
        scores, labels = likely.max(1)
        start, samples, chosen = 0, {}, {}
        for place in self.places:
            rows = torch.cat([level.flatten(2) for level in taken[place.name]], 2).movedim(1, 2)
            positions = rows.shape[1]
            level = place.name.removeprefix(CLASS).removeprefix(REGRESSION)
            if place.name.startswith(CLASS):
                conv = self.model.get_submodule(place.inputs[0])
                anchors = conv.out_channels // logits.shape[2]
                part = slice(start, start + anchors * positions)
                best, anchor = scores[part].reshape(positions, anchors).max(1)
                kinds = labels[part].reshape(positions, anchors).gather(1, anchor[:, None])[:, 0]
                kinds = torch.where(best < OBJECT, 0, kinds + 1).cpu()
                start += anchors * positions
                best, chance = best.cpu(), self.chance(index)
                chosen[level] = half_balanced(kinds, best, self.per_image, chance), kinds
            indices, kinds = chosen[level]
            rows = rows[:, indices.to(rows.device)].cpu()
            samples[place.name] = Sample(list(rows), kinds[indices])
        return samples


def levels_of(model: nn.Module, views: Sequence[Tensor]) -> tuple[ImageList, dict[str, Tensor]]:
    """Views, uint8 `(3, h, w)`, as the detector's transform gives them, and the backbone's maps.

    The first view is seen without blocks, the others with those that are in the backbone.
    """
    detector: Any = model
    like = next(detector.parameters())
    pixels = [view.to(like.device, like.dtype) / 255 for view in views]
    images, _ = detector.transform(pixels)
    if not is_attached(detector):
        return images, _named(detector.backbone(images.tensors))
    with disabled(detector):
        first = _named(detector.backbone(images.tensors[:1]))
    others = _named(detector.backbone(images.tensors[1:]))
    return images, {name: torch.cat([level, others[name]]) for name, level in first.items()}


def _named(maps: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"0": maps} if isinstance(maps, Tensor) else dict(maps)


@contextmanager
def captured(model: nn.Module, places: Sequence[Place]) -> Iterator[dict[str, list[Tensor]]]:
    """What arrives at places inside, by place, in the order that it does."""
    taken: dict[str, list[Tensor]] = {place.name: [] for place in places}

    def before(_: nn.Module, args: Any, *, name: str) -> None:
        taken[name].append(args[0])

    def after(_: nn.Module, __: Any, output: Any, *, name: str) -> None:
        taken[name].append(output)

    handles = []
    for place in places:
        for module in place.inputs[:1]:
            hook = partial(before, name=place.name)
            handles.append(model.get_submodule(module).register_forward_pre_hook(hook))
        for module in place.outputs:
            hook = partial(after, name=place.name)
            handles.append(model.get_submodule(module).register_forward_hook(hook))
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def balanced(labels: Tensor, scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, of each label in turn as long as it lasts."""
    order = scores.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    for label in labels.unique():
        mine = order[labels[order] == label]
        ranks[mine] = torch.arange(len(mine), device=ranks.device)
    return order[ranks[order].argsort(stable=True)][:count]


def half_balanced(labels: Tensor, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count`: up to half of them balanced over objects' labels, the rest by chance.

    With all of them balanced, heads take background for rarer than it is, and HR images lose more.
    """
    objects = (labels > 0).nonzero()[:, 0]
    first = objects[balanced(labels[objects], scores[objects], count // 2)]
    left = torch.ones(len(labels), dtype=torch.bool)
    left[first] = False
    others = left.nonzero()[:, 0]
    drawn = torch.randperm(len(others), generator=generator)[: count - len(first)]
    return torch.cat([first, others[drawn]])


@dataclass(frozen=True)
class BoxStores:
    """What is kept of all images at one place: a row an image, its boxes one after the other.

    Args:
        labels: `per_image` labels, `NOTHING` for each box that is missing.
        views: `per_image * d` numbers: of the HR view, of each LR view, and where there are blocks
            of the HR view as it is through them.
    """

    labels: FeatureStore
    views: list[FeatureStore]

    @property
    def all(self) -> list[FeatureStore]:
        """Every store."""
        return [self.labels, *self.views]

    def read(self, images: Tensor, most: int, seed: int) -> tuple[list[Tensor], Tensor]:
        """Features of boxes in each view, `(n, d)`, and their labels; `most` of these images'.

        Where there are more, half are balanced over labels and the rest drawn by chance.
        """
        stored = self.labels.open_rows()
        labels = stored.take(images).to(torch.int64)
        rows, slots = (labels != NOTHING).nonzero(as_tuple=True)
        generator = torch.Generator().manual_seed(seed)
        chances = torch.rand(len(rows), generator=generator)
        kept = half_balanced(labels[rows, slots], chances, most, generator).sort().values
        rows, slots = rows[kept], slots[kept]
        views = [
            _boxes_of(store.open_rows(), images, rows, slots, labels.shape[1])
            for store in self.views
        ]
        return views, labels[rows, slots]


def _boxes_of(
    stored: StoredRows, images: Tensor, rows: Tensor, slots: Tensor, per_image: int
) -> Tensor:
    parts = []
    for start in range(0, len(images), 256):
        mine = (rows >= start) & (rows < start + 256)
        if mine.any():
            part = stored.take(images[start : start + 256]).unflatten(1, (per_image, -1))
            parts.append(part[rows[mine] - start, slots[mine]])
    return torch.cat(parts).float() if parts else torch.empty(0, 0)


def fill_box_stores(
    sampler: Sampler,
    images: Images,
    degradations: Sequence[BaseDegradation],
    cache: Path,
    *,
    on_error: str = "raise",
) -> dict[str, BoxStores]:
    """The finished stores of all places; what the cache has is not computed again.

    Args:
        sampler: of the detector.
        images: see `featxfer.open_images`.
        degradations: of the LR views.
        cache: folder of the stores.
        on_error: "raise" at an image that cannot be read, or "skip" it.

    Raises:
        ImageError: an image cannot be read and `on_error` is "raise".
        ValueError: features that are not finite; the image is named.
        StoreError, DiskError: as `FeatureStore`.
    """
    manifest = _manifest(sampler, images)
    stores = {}
    for place in sampler.places:
        common = {"place": place.name, "per_image": sampler.per_image, "seed": sampler.seed}
        described = [
            {**common, "view": "labels"},
            {**common, **degradations[0].describe_view("hr")},
            *({**common, **degradation.describe_view("lr")} for degradation in degradations),
        ]
        if is_attached(sampler.model):
            described.append({**described[1], "through": "blocks"})
        filled = [
            FeatureStore(cache, dataclasses.replace(manifest, view=view)) for view in described
        ]
        stores[place.name] = BoxStores(filled[0], filled[1:])
    every = [store for place in stores.values() for store in place.all]
    missing = sorted({part for store in every for part in store.missing_parts()})
    size = manifest.part_rows
    with tqdm(total=len(missing) * size, unit="img", desc="boxes", disable=None) as bar:
        for part in missing:
            _fill_part(sampler, images, degradations, stores, part, on_error, bar)
    return stores


def _fill_part(
    sampler: Sampler,
    images: Images,
    degradations: Sequence[BaseDegradation],
    stores: Mapping[str, BoxStores],
    part: int,
    on_error: str,
    bar: Any,
) -> None:
    ids: list[str] = []
    skipped: dict[str, str] = {}
    samples: dict[str, list[Sample]] = {name: [] for name in stores}
    through = is_attached(sampler.model)
    with frozen(sampler.model):
        for index in range(part * PART_ROWS, min(len(images), (part + 1) * PART_ROWS)):
            bar.update()
            try:
                image = images.read(index)
            except ImageError as error:
                if on_error == "raise":
                    raise
                skipped[images.ids[index]] = str(error)
                continue
            hr = degradations[0].hr(image)
            views = [hr, *(view.lr(image) for view in degradations), *([hr] if through else [])]
            for name, sample in sampler(views, index).items():
                if not all(bool(torch.isfinite(rows).all()) for rows in sample.views):
                    raise ValueError(
                        f"images: features of {images.ids[index]} at {name!r} are not finite"
                    )
                samples[name].append(sample)
            ids.append(images.ids[index])
    for name, place in stores.items():
        shape = (len(ids), sampler.per_image, sampler.widths[name])
        rows_of = _as_rows(samples[name], shape, len(place.views))
        for store, rows in zip(place.all, rows_of, strict=True):
            store.write_part(part, Rows(tuple(ids), rows, skipped))


def _as_rows(
    samples: Sequence[Sample], shape: tuple[int, int, int], views_count: int
) -> list[Tensor]:
    """Labels and features of some images, a row an image; `shape` is `(images, boxes, d)`."""
    labels = torch.full(shape[:2], float(NOTHING))
    views = [torch.zeros(shape) for _ in range(views_count)]
    for row, sample in enumerate(samples):
        labels[row, : len(sample.labels)] = sample.labels.float()
        for rows, features in zip(views, sample.views, strict=True):
            if len(features):
                rows[row, : len(features)] = features.float()
    return [labels, *(rows.flatten(1) for rows in views)]


def _manifest(sampler: Sampler, images: Images) -> Manifest:
    model = sampler.model
    layers = [repr(module) for _, module in model.named_children()]
    transform = model.transform
    return Manifest(
        view={},
        backbone=type(model).__name__,
        host=f"torchvision {torchvision.__version__}",
        architecture_sha256=hashlib.sha256(
            "\n".join([*layers, settings(model)]).encode()
        ).hexdigest(),
        weights_sha256=weights_sha256(model),
        preprocessing={"mean": list(transform.image_mean), "std": list(transform.image_std)},
        precision="fp32",
        images_fingerprint=images.fingerprint,
        image_count=len(images),
        part_rows=PART_ROWS,
        software=software_versions(),
    )


def settings(model: nn.Module) -> str:
    """Numbers that proposals hang on and that are neither weights nor layers, as JSON."""
    known = vars(nn.Module())
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in known and isinstance(value, int | float | str | list | tuple | dict):
                found[f"{name}.{key}"] = repr(value)
    return json.dumps(found, sort_keys=True)
