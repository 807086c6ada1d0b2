"""Blocks after early stages, trained through the frozen rest of the model; used by fit_transfer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from featxfer import (
    BLOCK_RECIPE,
    Degradation,
    EpochLog,
    FeatureTransferBlock,
    PseudoLabelTrainer,
    Recipe,
    kmeans,
)
from featxfer.checks import variance_of
from featxfer.features.backbone import Backbone, frozen
from featxfer.features.extract import check_readable, fill_stores, software_versions
from featxfer.features.forward import bf16_is_fast
from featxfer.features.store import FeatureStore, StoredRows, align
from featxfer.training.objectives import make_objective
from featxfer.training.pseudo_labels import Clustering
from featxfer.views.images import Images, cropped, flipped
from featxfer_integrations._attach import (
    AttachError,
    Place,
    attached_at,
    gives_clusters,
    host_device,
    host_parameter,
    run_host,
    take_feature,
)
from featxfer_integrations._replay import Rest
from featxfer_integrations.attach import (
    find_place,
    host_of,
    maps_at,
    probe_image,
)

HR_SHARE = 0.5
"""Of each epoch's images, how many are seen as HR images too."""

SHARE = 0.09
"""Of the model's arithmetic, what new blocks may take together."""

WIDEST, NARROWEST = 256, 16
"""Hidden channels of new blocks."""

ENOUGH, MOST_CROPS = 10_000, 4
"""Views of the images that crops are to make up, and crops of an image at the most."""

PROBE = 64
"""Images whose maps give a block its input statistics."""

WHOLE = 2
"""Variants that are not cropped, the first ones: the image and its mirror image."""


@dataclass(frozen=True)
class BlockPlan:
    """Where a block goes, and the shape of its maps: `side` for the model's own image size."""

    module: str
    place: Place
    channels: int
    layout: str
    side: int


def block_width(model: nn.Module, plans: Sequence[BlockPlan]) -> int:
    """Hidden channels of new blocks: as wide as `SHARE` of the model's arithmetic allows.

    Of a detector it is the arithmetic of its backbone.

    Args:
        model: runs on `probe_image`.
        plans: where the blocks go, with the sides of maps of `probe_image`.
    """
    with frozen(model), FlopCounterMode(display=False) as counter:
        run_host(model, plans[0].place, probe_image(model))
    allowed = SHARE * counter.get_total_flops() / 2
    with torch.device("meta"):
        for width in range(WIDEST, NARROWEST, -8):
            blocks = [FeatureTransferBlock(plan.channels, width) for plan in plans]
            costs = [b.macs(p.side, p.side) for b, p in zip(blocks, plans, strict=True)]
            if sum(costs) <= allowed:
                return width
    return NARROWEST


def plan_blocks(
    model: nn.Module, pooled: Place, depth: str, where: str | None, at: str | Sequence[str] | None
) -> list[BlockPlan]:
    """Where blocks go; none for a head alone.

    Args:
        model: the host.
        pooled: the place of its feature.
        depth: as of `fit_transfer`.
        where: as of `fit_transfer`.
        at: as of `fit_transfer`.

    Raises:
        AttachError, ValueError: as `fit_transfer`.
    """
    if depth == "pooled" and at is not None:
        raise ValueError(f"at: got {at!r} with depth='pooled', which trains no block")
    if depth == "pooled" or (depth == "auto" and where is not None):
        return []
    attached = attached_at(model, pooled)
    if attached is not None and gives_clusters(attached):
        if depth == "auto":
            return []
        raise AttachError('depth: a head with output "clusters" is attached, wanted "features"')
    host = host_of(model)
    names = [at] if isinstance(at, str) else list(at or [])
    if not names:
        names = [] if host is None else host.deep_modules(model)
        if not names and depth == "auto":
            return []
        if not names:
            raise AttachError(
                f"at: {type(model).__name__} names no stage of maps of 1/16 or 1/32 of the image's "
                "size; name a stage or a module"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"at: got {', '.join(names)}, wanted each place once")
    plans = []
    for name in names:
        place = find_place(model, at=name)
        if not isinstance(attached_at(model, place), FeatureTransferBlock | None):
            raise AttachError(f"at: a head is attached at {place.name!r}, wanted a block")
        try:
            plans.append(BlockPlan(name, place, *maps_at(model, place)))
        except AttachError:
            if depth == "auto" and at is None:
                return []
            raise
    _check_order(model, plans)
    return plans


def _check_order(model: nn.Module, plans: Sequence[BlockPlan]) -> None:
    """Raises `ValueError` unless places are named in the order that an image passes them."""
    if len(plans) < 2:
        return
    passed: list[str] = []
    handles = [
        model.get_submodule(plan.place.outputs[0]).register_forward_hook(
            lambda *_, name=plan.module: passed.append(name)
        )
        for plan in plans
    ]
    try:
        with frozen(model):
            run_host(model, plans[0].place, probe_image(model))
    finally:
        for handle in handles:
            handle.remove()
    names = [plan.module for plan in plans]
    if names != passed:
        raise ValueError(
            f"at: got {', '.join(names)}, wanted the first place first: {', '.join(passed)}"
        )


def new_blocks(
    model: nn.Module, plans: Sequence[BlockPlan], seed: int
) -> dict[str, FeatureTransferBlock]:
    """Untrained blocks by module, in the sizes of those that are attached, where some are.

    They are on the model's device, and in float32 whatever the model is in.
    """
    width = block_width(model, plans)
    blocks = {}
    for plan in plans:
        attached = attached_at(model, plan.place)
        config = {"hidden_channels": width} if attached is None else attached.config
        sizes = {"channels": plan.channels, "layout": plan.layout}
        with host_device(model):
            blocks[plan.module] = FeatureTransferBlock(**{**config, **sizes}, seed=seed)
    return blocks


class MapAt(nn.Module):
    """Images -> the plain maps at a place, a row an image."""

    def __init__(self, model: nn.Module, place: Place) -> None:
        super().__init__()
        self.model, self.place = model, place

    def forward(self, images: Tensor) -> Tensor:
        """Rows `(n, c * h * w)` in the order that the place has them."""
        like = host_parameter(self.model)
        images = images if like is None else images.to(like.dtype)
        return take_feature(self.model, self.place, images).flatten(1)


@dataclass(frozen=True)
class Maps:
    """The maps of all images at one place, on disk: HR and each degradation.

    Row i of each is of the same image.

    Args:
        shape: of one image's maps.
        hr: of the images as they are, of mirrored ones, and of crops.
        lr: the same, a degradation each.
        skipped: image name -> why it could not be read, in one of them or in all.
        keys: of their stores, which stand for all that the maps depend on.
    """

    shape: tuple[int, ...]
    hr: tuple[StoredRows, ...]
    lr: Sequence[tuple[StoredRows, ...]]
    skipped: Mapping[str, str]
    keys: tuple[str, ...]

    def take(self, rows: StoredRows, indices: Tensor) -> Tensor:
        """Maps `(len(indices), *shape)` of one view."""
        maps: Tensor = rows.take(indices).unflatten(1, self.shape)
        return maps

    @property
    def views(self) -> list[tuple[StoredRows, ...]]:
        """LR views, then HR."""
        return [*self.lr, self.hr]


def extract_maps(
    backbone: Backbone,
    images: Images,
    degradations: Sequence[Degradation],
    cache: Path,
    shape: tuple[int, ...],
    *,
    crops: int = 0,
    on_error: str = "raise",
    **options: object,
) -> Maps:
    """The maps of all images behind a stage, from the cache as far as it has them.

    An image that could not be read in one view, if only that once, is left out of all.

    Args:
        backbone: up to the stage (`maps_backbone`).
        images: see `featxfer.open_images`.
        degradations: of one hr_size.
        cache: folder of the maps.
        shape: of one image's maps.
        crops: how many crops of each image there are besides.
        on_error: as `extract_features` has it; errors as there.
        **options: precision, batch_size of `extract_features`.
    """
    variants = [images, flipped(images), *(cropped(images, draw) for draw in range(crops))]
    views: list[list[FeatureStore]] = []
    for degradation in degradations:
        filled = [
            fill_stores(
                backbone,
                variant,
                degradation,
                cache,
                on_error=on_error,
                **options,  # type: ignore[arg-type]
            )
            for variant in variants
        ]
        views += [[stores[view] for stores in filled] for view in ("hr", "lr")]
    views = [views[0], *views[1::2]]
    opened = [[store.open_rows() for store in stores] for stores in views]
    every = [rows for view in opened for rows in view]
    skipped = {name: reason for rows in every for name, reason in rows.skipped.items()}
    check_readable("images", skipped, len(images), on_error)
    hr, *lr = (tuple(_without(rows, skipped) for rows in view) for view in opened)
    align([rows for view in (hr, *lr) for rows in view])
    keys = tuple(store.manifest.key for stores in views for store in stores)
    return Maps(shape, hr, lr, skipped, keys)


def _without(rows: StoredRows, skipped: Collection[str]) -> StoredRows:
    """Rows without some images; parts that have none of these stay on disk."""
    if not any(name in skipped for name in rows.ids):
        return rows
    parts, start = [], 0
    for part in rows.parts:
        ids = rows.ids[start : start + len(part)]
        start += len(part)
        kept = [row for row, name in enumerate(ids) if name not in skipped]
        if kept:
            parts.append(part if len(kept) == len(ids) else part[kept])
    ids = tuple(name for name in rows.ids if name not in skipped)
    return StoredRows(ids, parts, rows.skipped)


def open_rest(
    model: nn.Module, stage: Place, pooled: Place, size: int, precision: str = "auto"
) -> tuple[Rest, tuple[int, ...]]:
    """The model behind `stage` as a module of its own, and the shape of one image's maps there.

    Args:
        model: the host; what is attached to it is left out.
        stage: the place of the maps.
        pooled: the place of the feature.
        size: side of the images, pixels.
        precision: "fp32", "bf16", or "auto": "bf16" where the hardware multiplies in it.

    Raises:
        AttachError: the feature hangs on more than these maps.
    """
    like = host_parameter(model)
    if precision == "auto":
        fast = bf16_is_fast(torch.device("cpu") if like is None else like.device)
        precision = "bf16" if fast else "fp32"
    chance = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, size, size, generator=chance, device="cpu")
    if like is not None:
        image = image.to(like.device, like.dtype)
    rest = Rest(model, stage, pooled, image, precision)
    with frozen(model):
        shape = tuple(take_feature(model, stage, image).shape[1:])
    return rest, shape


def maps_backbone(backbone: Backbone, model: nn.Module, stage: Place) -> Backbone:
    """The backbone of a host, up to the maps behind a stage."""
    return dataclasses.replace(backbone, module=MapAt(model, stage))


class _Views:
    """Rows of a trainer: every image once an epoch in each LR view, and some in HR.

    Each time an image is as it is, mirrored or cropped, by chance; held-out images are as they are.
    """

    def __init__(
        self, maps: Maps, targets: Sequence[Tensor], images: Tensor, hr_share: float, *, vary: bool
    ) -> None:
        self.maps, self.images, self.hr_share, self.vary = maps, images, hr_share, vary
        self.targets = torch.stack(list(targets))
        self.variants, self.total = self.targets.shape[:2]

    def order(self, generator: torch.Generator) -> Tensor:
        count, views = len(self.images), len(self.maps.lr)
        shares = [count] * views + [round(count * self.hr_share)]
        shuffled = partial(torch.randperm, generator=generator, device="cpu")
        chosen = [
            (view * self.variants) * self.total + self.images[shuffled(count)[:share]]
            for view, share in enumerate(shares)
        ]
        rows = torch.cat(chosen)
        if self.vary:
            which = torch.randint(self.variants, rows.shape, generator=generator, device="cpu")
            rows += self.total * which
        return rows[shuffled(len(rows))]

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        kinds, images = indices // self.total, indices % self.total
        maps = torch.empty(len(indices), *self.maps.shape, device="cpu")
        for kind in kinds.unique().tolist():
            mine = kinds == kind
            view, variant = divmod(kind, self.variants)
            maps[mine] = self.maps.take(self.maps.views[view][variant], images[mine]).float()
        return maps, self.targets[kinds % self.variants, images]


@dataclass(frozen=True)
class DeepFit:
    """Trained blocks, and the features that the model has with them.

    Args:
        blocks: by the module that they follow.
        log: an entry an epoch.
        clusterings: of the directions of HR features.
        hr: features of HR views as the model has them, of the images and of their mirror images.
        lr: of LR views without blocks, of the images as they are, a degradation each.
        hr_through: of HR views through the blocks, of the images and of their mirror images.
        lr_through: of LR views, the same, a degradation each.
        checkpoint: the file that training would go on from, wanted until the blocks are attached;
            None where there is none.
    """

    blocks: dict[str, FeatureTransferBlock]
    log: list[EpochLog]
    clusterings: list[Clustering]
    hr: list[Tensor]
    lr: list[Tensor]
    hr_through: list[Tensor]
    lr_through: list[list[Tensor]]
    checkpoint: Path | None


def train_blocks(
    rest: Rest,
    plans: Sequence[BlockPlan],
    blocks: Mapping[str, FeatureTransferBlock],
    maps: Maps,
    train: Tensor,
    test: Tensor,
    *,
    clusters: Sequence[int],
    objective: str = "prototypes",
    seed: int,
    recipe: Recipe | None = None,
    hr_share: float = HR_SHARE,
    checkpoint: Callable[[str], Path] | None = None,
    callback: Callable[[EpochLog], object] | None = None,
) -> DeepFit:
    """Trains untrained blocks towards the HR features of the same images, through `rest`.

    Args:
        rest: the model behind the first place, with the blocks attached.
        plans: the places, from the first to the last.
        blocks: an untrained block a place, by module.
        maps: at the first place.
        train: indices of the images to train on.
        test: indices of the images held out: the blocks of the best epoch on them are kept.
        clusters: k, of one clustering or several.
        objective: a name of `featxfer.OBJECTIVES`.
        seed: of the clusters and of the order of rows.
        recipe: by default `BLOCK_RECIPE`.
        hr_share: of the images, the share that each epoch sees as HR images too.
        checkpoint: from a key of all that training hangs on to a file, that stays; none: cannot be
            resumed.
        callback: called after each epoch.

    Raises:
        ValueError: HR features without variance, more clusters than images.
        DivergenceError, CheckpointError, DiskError: as `PseudoLabelTrainer.fit_rows`.
    """
    recipe = recipe or BLOCK_RECIPE
    hr = [features_of(rest, maps, rows) for rows in maps.hr]
    lr = [features_of(rest, maps, rows[0]) for rows in maps.lr]
    variance = variance_of("hr", hr[0][train])
    directions = F.normalize(hr[0][train], dim=1)
    clusterings = [kmeans(directions, k, seed=seed) for k in clusters]
    goal = make_objective(objective, [part.centroids for part in clusterings], variance)
    for plan in plans:
        blocks[plan.module].set_input_statistics(_probe(rest, plan, maps, train))
    rows = _Views(maps, hr, train, hr_share, vary=True)
    judged = _Views(maps, hr, test, 1.0, vary=False) if len(test) else None
    trainer = PseudoLabelTrainer(rest, recipe, objective=goal, seed=seed)
    path = None
    if checkpoint is not None:
        tensors = [*hr, *lr, train, test, *(part.centroids for part in clusterings)]
        said = [
            maps.keys,
            [[plan.module, plan.place.outputs, plan.layout] for plan in plans],
            [rest.pooled.name, rest.pooled.inputs, rest.pooled.outputs, rest.pooled.layout],
            [blocks[plan.module].config for plan in plans],
            [objective, recipe.to_dict(), seed, hr_share, WHOLE, PROBE],
            [rest.precision, next(rest.parameters()).device.type, software_versions()],
        ]
        path = checkpoint(_key(tensors, said))
    log = trainer.fit_rows(rows, held_out=judged, checkpoint=path, callback=callback)
    rest.eval()
    through = [[features_of(rest, maps, rows) for rows in view[:WHOLE]] for view in maps.views]
    return DeepFit(dict(blocks), log, clusterings, hr[:WHOLE], lr, through[-1], through[:-1], path)


@torch.no_grad()
def features_of(rest: Rest, maps: Maps, rows: StoredRows, batch: int = 128) -> Tensor:
    """Features of all images of one view, as `rest` is now; `(n, d)` on the CPU."""
    device = next(rest.parameters()).device
    return torch.cat(
        [
            rest(maps.take(rows, part).to(device, torch.float32)).cpu()
            for part in torch.arange(len(rows), device="cpu").split(batch)
        ]
    )


@torch.no_grad()
def _probe(rest: Rest, plan: BlockPlan, maps: Maps, train: Tensor) -> Tensor:
    """LR and HR maps at a place, of some images."""
    indices = train[:: -(-len(train) // PROBE)]
    first = torch.cat([maps.take(rows[0], indices) for rows in maps.views]).float()
    device = next(rest.parameters()).device
    return rest.maps_at(plan.place, first.to(device))


def estimate_seconds(rest: Rest, shape: tuple[int, ...], recipe: Recipe, rows: int) -> float:
    """Seconds that training will take: of two steps on noise, the second, times all steps.

    Args:
        rest: with untrained blocks attached.
        shape: of one image's maps.
        recipe: of the training.
        rows: of one epoch.
    """
    device = next(rest.parameters()).device
    count = min(recipe.batch_size, rows)
    chance = torch.Generator().manual_seed(0)
    maps = torch.randn(count, *shape, generator=chance, device="cpu").to(device)
    took = 0.0
    for _ in range(2):
        start = time.perf_counter()
        rest(maps).square().mean().backward()
        rest.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - start
    return took * recipe.epochs * rows / count


def enough_crops(images: int) -> int:
    """Crops of each image that bring the image and its mirror image to about `ENOUGH` views."""
    return min(MOST_CROPS, max(0, ENOUGH // images - WHOLE))


def maps_bytes(
    shape: tuple[int, ...], images: int, degradations: int, crops: int, precision: str
) -> int:
    """Bytes that the maps of all views and variants take on disk."""
    rows = images * (degradations + 1) * (WHOLE + crops)
    return rows * math.prod(shape) * (2 if precision == "bf16" else 4)


def epoch_rows(images: int, degradations: int, hr_share: float = HR_SHARE) -> int:
    """Rows of one epoch of blocks."""
    return images * degradations + round(images * hr_share)


def _key(tensors: Sequence[Tensor], said: object) -> str:
    """A hash of tensors and of JSON types."""
    digest = hashlib.sha256(json.dumps(said).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
