"""Features of the same boxes in HR and LR images, of a frozen detector: what its heads learn from.

R-CNNs: the detector's own proposals on the HR image, pooled from the maps of every view. Detectors
without proposals: positions of their pyramid. No labels are looked at: half of what is drawn is
balanced by the classes that the detector itself predicts on the HR image, the other half is drawn
by chance, so that background stays as common as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from tqdm import tqdm

from featxfer import BaseDegradation, Images
from featxfer.features.backbone import describe_module, frozen, sha256_of, weights_sha256
from featxfer.features.extract import agree, software_versions, tell
from featxfer.features.forward import Arithmetic, rounding_of
from featxfer.features.store import FeatureStore, Manifest, Rows, StoredRows, align
from featxfer_integrations._attach import (
    CHILD,
    AttachError,
    Place,
    disabled,
    is_attached,
    transfers_of,
)
from featxfer_integrations._fitting import libraries
from featxfer_integrations.torchvision_detection import box_places

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

DRAW = 2
"""Of the rule by which boxes are drawn: another rule is another key of the stores."""

KEPT = 5
"""Numbers that are kept of a box beside its features: its label and `Sample.drawn`."""


@dataclass(frozen=True)
class Sample:
    """Boxes or positions of one image at one place.

    Args:
        views: features `(b, d)`, a tensor a view.
        labels: what the detector predicts on the HR view, int64 `(b,)`; 0 is background.
        drawn: which boxes, float32 `(b, 4)`; of detectors without proposals the position's index
            in the first column. Later views take the same again.
    """

    views: list[Tensor]
    labels: Tensor
    drawn: Tensor


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
    def __call__(
        self, views: Sequence[Tensor], index: int, known: Mapping[str, Sample] | None = None
    ) -> dict[str, Sample]:
        """Samples by place.

        Args:
            views: uint8 `(3, h, w)`, of one size. The first is HR, and seen without blocks.
            index: of the image.
            known: what was drawn of it before, by place.
        """
        images, maps = levels_of(self.model, views)
        if hasattr(self.model, "roi_heads"):
            return self._boxes(images, maps, index, known or {})
        return self._positions(maps, index, known or {})

    def _boxes(
        self,
        images: ImageList,
        maps: dict[str, Tensor],
        index: int,
        known: Mapping[str, Sample],
    ) -> dict[str, Sample]:
        count, found = len(images.image_sizes), {}
        like = next(iter(maps.values()))
        if all(place.name in known for place in self.places):
            proposed = torch.empty(0, 4, device="cpu")
        else:
            proposed = self.propose(images, maps, index)
        for place in self.places:
            boxes = known[place.name].drawn.to(like) if place.name in known else proposed
            rows = [torch.empty(0, 0, device="cpu")] * count
            labels = torch.empty(0, dtype=torch.int64, device="cpu")
            if len(boxes):
                pooled, labels = self._pooled(place, maps, [boxes] * count, images.image_sizes)
                rows = [part.cpu() for part in pooled.chunk(count)]
            if place.name in known:
                labels = known[place.name].labels
            found[place.name] = Sample(rows, labels, boxes.float().cpu())
        return found

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
        self,
        place: Place,
        maps: dict[str, Tensor],
        boxes: list[Tensor],
        sizes: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        """Features at a place, view by view, and the labels of the first view."""
        with captured(self.model, [place]) as taken:
            logits = self._logits(maps, boxes, sizes)
        (rows,) = taken[place.name][:1] or [logits[:0, :0]]
        if len(taken[place.name]) != 1 or rows.ndim != 2 or len(rows) != len(logits):
            raise AttachError(f"where: {place.name!r} has no vector for each box")
        return rows, logits[: len(boxes[0])].argmax(1).cpu()

    def _logits(
        self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Tensor:
        """Class scores of boxes, of all images one after the other."""
        heads = self.model.roi_heads
        found = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, boxes, sizes)))
        logits: Tensor = found[0] if isinstance(found, tuple) else found
        return logits

    def _positions(
        self, maps: dict[str, Tensor], index: int, known: Mapping[str, Sample]
    ) -> dict[str, Sample]:
        towers = box_places(self.model)
        wanted = {place.name: place for place in [*towers, *self.places]}
        with captured(self.model, list(wanted.values())) as taken:
            logits = self.model.head(list(maps.values()))["cls_logits"]
        likely = self._likely(logits[0], taken, towers)
        samples: dict[str, Sample] = {}
        drawn: dict[str, Tensor] = {}
        for place in self.places:
            level = place.name.removeprefix(CLASS).removeprefix(REGRESSION)
            level = level if level in likely else ""
            nothing = torch.empty(0, device="cpu")
            labels, scores = likely.get(level, (nothing, nothing))
            seen = taken[place.name]
            count = sum(part[0, 0].numel() for part in seen if part.ndim == 4)
            if not count or count != len(labels):
                raise AttachError(f"where: {place.name!r} has no vector for each position")
            rows = torch.cat([part.flatten(2) for part in seen], 2).movedim(1, 2)
            if place.name in known:
                drawn[level] = known[place.name].drawn[:, 0].long()
            elif level not in drawn:
                chance = self.chance(index)
                drawn[level] = half_balanced(labels, scores, self.per_image, chance)
            chosen = drawn[level]
            kinds = known[place.name].labels if place.name in known else labels[chosen]
            which = F.pad(chosen[:, None].float(), (0, 3))
            rows = rows[:, chosen.to(rows.device)].cpu()
            samples[place.name] = Sample(list(rows), kinds, which)
        return samples

    def _likely(
        self, logits: Tensor, taken: Mapping[str, list[Tensor]], towers: Sequence[Place]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """By level: of each position the likeliest class, 0 for background, and its score."""
        if hasattr(self.model.head.classification_head, "module_list"):
            likely = logits.softmax(1)[:, 1:]
        else:
            likely = logits.sigmoid()
        scores, labels = (part.cpu() for part in likely.max(1))
        start, found = 0, {}
        for place in towers:
            anchors = self.model.get_submodule(place.inputs[0]).out_channels // logits.shape[1]
            positions = sum(part.shape[2] * part.shape[3] for part in taken[place.name])
            part = slice(start, start + anchors * positions)
            best, anchor = scores[part].reshape(positions, anchors).max(1)
            kinds = labels[part].reshape(positions, anchors).gather(1, anchor[:, None])[:, 0]
            found[place.name.removeprefix(CLASS)] = torch.where(best < OBJECT, 0, kinds + 1), best
            start += anchors * positions
        return found


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
    left = torch.ones(len(labels), dtype=torch.bool, device="cpu")
    left[first] = False
    others = left.nonzero()[:, 0]
    drawn = torch.randperm(len(others), generator=generator, device="cpu")[: count - len(first)]
    return torch.cat([first, others[drawn]])


@dataclass(frozen=True)
class BoxStores:
    """What is kept of all images at one place: a row an image, its boxes one after the other.

    Args:
        drawn: `per_image * KEPT` numbers: label, `NOTHING` for each box that is missing, and
            `Sample.drawn`.
        views: `per_image * d` numbers: of the HR view, of each LR view, and where there are blocks
            of the HR view as it is through them.
    """

    drawn: FeatureStore
    views: list[FeatureStore]

    @property
    def all(self) -> list[FeatureStore]:
        """Every store."""
        return [self.drawn, *self.views]

    @cached_property
    def _rows(self) -> list[StoredRows]:
        """What is in every store, once all are finished."""
        stored = [store.open_rows() for store in self.all]
        align(stored)
        return stored

    def read(self, images: Tensor, most: int, seed: int) -> tuple[list[Tensor], Tensor]:
        """Features of boxes in each view, `(n, d)`, and their labels; `most` of these images'.

        Where there are more, half are balanced over labels and the rest drawn by chance.
        """
        drawn, *views = self._rows
        labels = drawn.take(images).unflatten(1, (-1, KEPT))[..., 0].to(torch.int64)
        rows, slots = (labels != NOTHING).nonzero(as_tuple=True)
        generator = torch.Generator().manual_seed(seed)
        chances = torch.rand(len(rows), generator=generator, device="cpu")
        kept = half_balanced(labels[rows, slots], chances, most, generator).sort().values
        rows, slots = rows[kept], slots[kept]
        features = [_boxes_of(view, images, rows, slots, labels.shape[1]) for view in views]
        return features, labels[rows, slots]


def _boxes_of(
    stored: StoredRows, images: Tensor, rows: Tensor, slots: Tensor, per_image: int
) -> Tensor:
    parts = []
    for start in range(0, len(images), 256):
        mine = (rows >= start) & (rows < start + 256)
        if mine.any():
            part = stored.take(images[start : start + 256]).unflatten(1, (per_image, -1))
            parts.append(part[rows[mine] - start, slots[mine]])
    return torch.cat(parts).float() if parts else torch.empty(0, 0, device="cpu")


def fill_box_stores(
    sampler: Sampler, images: Images, degradations: Sequence[BaseDegradation], cache: Path
) -> dict[str, BoxStores]:
    """The finished stores of all places; what the cache has is not computed again.

    Of stores that have rows, one image is seen again: where its features are other ones, because
    code was edited that no key knows of, stderr says so and all are computed anew.

    Args:
        sampler: of the detector.
        images: see `featxfer.open_images`.
        degradations: of the LR views.
        cache: folder of the stores.

    Raises:
        ImageError: an image cannot be read.
        ValueError: features that are not finite; the image is named.
        StoreError, DiskError: as `FeatureStore`.
    """
    manifest = _manifest(sampler, images)
    stores = {}
    for place in sampler.places:
        common = {
            "place": [place.name, place.inputs[:1], place.outputs],
            "per_image": sampler.per_image,
            "seed": sampler.seed,
            "draw": [DRAW, OBJECT],
        }
        described = [
            {**common, "view": "drawn"},
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
    _forget_changed(sampler, images, degradations, stores)
    missing = sorted({part for store in every for part in store.missing_parts()})
    size = manifest.part_rows
    if missing:
        numbers = sum(sampler.widths[name] * len(place.views) for name, place in stores.items())
        gigabytes = 4e-9 * sampler.per_image * numbers * len(missing) * size
        tell(f"features of boxes take up to {1000 * gigabytes:,.0f} MB in {cache}")
    with tqdm(total=len(missing) * size, unit="img", desc="boxes", disable=None) as bar:
        for part in missing:
            _fill_part(sampler, images, degradations, stores, part, bar)
    return stores


def _fill_part(
    sampler: Sampler,
    images: Images,
    degradations: Sequence[BaseDegradation],
    stores: Mapping[str, BoxStores],
    part: int,
    bar: Any,
) -> None:
    """Computes a part of all stores; boxes that are on disk already are taken again."""
    known = {
        name: place.drawn.read_part(part).features.unflatten(1, (-1, KEPT))
        for name, place in stores.items()
        if part not in place.drawn.missing_parts()
    }
    samples: dict[str, list[Sample]] = {name: [] for name in stores}
    rows = range(part * PART_ROWS, min(len(images), (part + 1) * PART_ROWS))
    with frozen(sampler.model):
        for slot, index in enumerate(rows):
            bar.update()
            before = {name: _unpacked(kept[slot]) for name, kept in known.items()}
            for name, sample in _see(sampler, images, degradations, index, before).items():
                if not all(bool(torch.isfinite(rows).all()) for rows in sample.views):
                    raise ValueError(
                        f"images: features of {images.ids[index]} at {name!r} are not finite"
                    )
                samples[name].append(sample)
    ids = tuple(images.ids[index] for index in rows)
    for name, place in stores.items():
        shape = (len(ids), sampler.per_image, sampler.widths[name])
        packed = _packed(samples[name], shape, len(place.views))
        for store, features in zip(place.all, packed, strict=True):
            store.write_part(part, Rows(ids, features))


def _see(
    sampler: Sampler,
    images: Images,
    degradations: Sequence[BaseDegradation],
    index: int,
    known: Mapping[str, Sample],
) -> dict[str, Sample]:
    """Samples of one image by place."""
    image = images.read(index)
    hr = degradations[0].hr(image)
    through = [hr] if is_attached(sampler.model) else []
    return sampler([hr, *(view.lr(image) for view in degradations), *through], index, known)


def _forget_changed(
    sampler: Sampler,
    images: Images,
    degradations: Sequence[BaseDegradation],
    stores: Mapping[str, BoxStores],
) -> None:
    """Drops all finished parts if the first image of one has other features now, and says so."""
    every = [store for place in stores.values() for store in place.all]
    finished = set.intersection(*(set(store.parts()) for store in every))
    if not finished:
        return
    part = min(finished)
    kept = {name: [s.read_part(part) for s in place.all] for name, place in stores.items()}
    known = {
        name: _unpacked(rows[0].features[0].unflatten(0, (-1, KEPT))) for name, rows in kept.items()
    }
    with frozen(sampler.model):
        samples = _see(sampler, images, degradations, part * PART_ROWS, known)
    for name, (_, *before) in kept.items():
        shape = (1, sampler.per_image, sampler.widths[name])
        _, *now = _packed([samples[name]], shape, len(before))
        if all(agree(new[0], old.features[0]) for new, old in zip(now, before, strict=True)):
            continue
        tell(
            f"{stores[name].drawn.directory.parent} has other features of boxes at {name!r} of "
            f"image {images.ids[part * PART_ROWS]} than are computed now; all are computed anew"
        )
        for store in every:
            for index in store.parts():
                store.drop_part(index)
        return


def _unpacked(kept: Tensor) -> Sample:
    """What was drawn of one image, of its `(per_image, KEPT)` numbers."""
    there = kept[kept[:, 0] != NOTHING]
    return Sample([], there[:, 0].long(), there[:, 1:])


def _packed(
    samples: Sequence[Sample], shape: tuple[int, int, int], views_count: int
) -> list[Tensor]:
    """What was drawn and features, a row an image; `shape` is `(images, boxes, d)`."""
    drawn = torch.full((*shape[:2], KEPT), float(NOTHING), device="cpu")
    views = [torch.zeros(shape, device="cpu") for _ in range(views_count)]
    for row, sample in enumerate(samples):
        drawn[row, : len(sample.labels), 0] = sample.labels.float()
        drawn[row, : len(sample.labels), 1:] = sample.drawn
        for rows, features in zip(views, sample.views, strict=True):
            if len(features):
                rows[row, : len(features)] = features.float()
    return [drawn.flatten(1), *(rows.flatten(1) for rows in views)]


def _manifest(sampler: Sampler, images: Images) -> Manifest:
    model = sampler.model
    transform = model.transform
    return Manifest(
        view={},
        backbone=type(model).__name__,
        host=libraries(model),
        architecture_sha256=sha256_of(_described(model)),
        weights_sha256=weights_sha256(model),
        preprocessing={"mean": list(transform.image_mean), "std": list(transform.image_std)},
        precision=Arithmetic(rounding=rounding_of(next(model.parameters()).device)).name,
        images_fingerprint=images.fingerprint,
        image_count=len(images),
        part_rows=PART_ROWS,
        software=software_versions(),
    )


def detector_key(model: nn.Module) -> str:
    """A hash of all that detections hang on: layers, numbers that are no weights, and weights.

    The same in every process, before and after a run.
    """
    return sha256_of([*_described(model), weights_sha256(model)])


def _described(model: nn.Module) -> list[Any]:
    """Layers and settings of a detector, and what is attached, as JSON types."""
    attached = (
        {name: module.config for name, module in transfers_of(model).items()}
        if is_attached(model)
        else {}
    )
    return [describe_module(model, leave_out=CHILD), torchvision.__version__, attached]
