"""Blocks after early stages, trained through the frozen rest of the model; used by fit_transfer."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featxfer import (
    BLOCK_RECIPE,
    Degradation,
    EpochLog,
    FeatureTransferBlock,
    Preprocessing,
    PseudoLabelTrainer,
    Recipe,
    kmeans,
    make_objective,
)
from featxfer.backbone import Backbone
from featxfer.features import fill_stores
from featxfer.images import Images, flipped
from featxfer.pseudo_labels import Clustering
from featxfer.store import FeatureStore, StoredRows
from featxfer_integrations._attach import Place, host_parameter, take_feature
from featxfer_integrations._replay import Rest

HR_SHARE = 0.5
"""Of each epoch's images, how many are seen as HR images too."""

PROBE = 64
"""Images whose maps give a block its input statistics."""

SAMPLE = 16
"""Images whose features are compared with the model's own before training."""


@dataclass(frozen=True)
class BlockPlan:
    """Where a block goes, and of what shape its maps are."""

    module: str
    place: Place
    channels: int
    layout: str


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
    """The maps of all images at one place, on disk: HR and each degradation, as is and flipped.

    Args:
        shape: of one image's maps.
        hr: as is, and flipped.
        lr: the same, a degradation each.
    """

    shape: tuple[int, ...]
    hr: tuple[StoredRows, StoredRows]
    lr: Sequence[tuple[StoredRows, StoredRows]]

    def take(self, rows: StoredRows, indices: Tensor) -> Tensor:
        """Maps `(len(indices), *shape)` of one view."""
        maps: Tensor = rows.take(indices).unflatten(1, self.shape)
        return maps

    @property
    def views(self) -> list[tuple[StoredRows, StoredRows]]:
        """LR views, then HR."""
        return [*self.lr, self.hr]


def extract_maps(
    backbone: Backbone,
    images: Images,
    degradations: Sequence[Degradation],
    cache: Path,
    shape: tuple[int, ...],
    **options: object,
) -> Maps:
    """Maps of all views, from the cache as far as it has them; errors as `extract_features`."""

    def rows(store: FeatureStore) -> StoredRows:
        return store.open_rows()

    pairs: list[dict[str, list[FeatureStore]]] = []
    for degradation in degradations:
        stores = [
            fill_stores(backbone, view, degradation, cache, **options)  # type: ignore[arg-type]
            for view in (images, flipped(images))
        ]
        pairs.append({view: [store[view] for store in stores] for view in ("hr", "lr")})
    hr = tuple(rows(store) for store in pairs[0]["hr"])
    lr = [tuple(rows(store) for store in pair["lr"]) for pair in pairs]
    return Maps(shape, hr, lr)  # type: ignore[arg-type]


class _Views:
    """Rows of a trainer: every image once an epoch in each LR view, and some in HR, by chance
    flipped; held-out rows as they are.
    """

    def __init__(
        self, maps: Maps, targets: Sequence[Tensor], images: Tensor, hr_share: float, flip: bool
    ) -> None:
        self.maps, self.targets, self.images = maps, targets, images
        self.hr_share, self.flip = hr_share, flip
        self.total = len(targets[0])

    def order(self, generator: torch.Generator) -> Tensor:
        count, views = len(self.images), len(self.maps.lr)
        shares = [count] * views + [round(count * self.hr_share)]
        chosen = [
            (view * 2) * self.total
            + self.images[torch.randperm(count, generator=generator)[:share]]
            for view, share in enumerate(shares)
        ]
        rows = torch.cat(chosen)
        if self.flip:
            rows = rows + self.total * torch.randint(0, 2, rows.shape, generator=generator)
        return rows[torch.randperm(len(rows), generator=generator)]

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        views, images = indices // self.total, indices % self.total
        maps = torch.empty(len(indices), *self.maps.shape)
        for view in views.unique().tolist():
            mine = views == view
            rows = self.maps.views[view // 2][view % 2]
            maps[mine] = self.maps.take(rows, images[mine]).float()
        flips = views % 2
        stacked = torch.stack([t[images] for t in self.targets])
        return maps, stacked[flips, torch.arange(len(images))]


@dataclass(frozen=True)
class DeepFit:
    """Trained blocks, and the features that the model has with them.

    Args:
        blocks: by the module that they follow.
        log: an entry an epoch.
        clusterings: of the directions of HR features.
        hr: features of HR views as the model has them: as is, and flipped.
        lr: of LR views without blocks, as is, a degradation each.
        hr_through: of HR views through the blocks: as is, and flipped.
        lr_through: of LR views through the blocks: as is, and flipped, a degradation each.
        seconds: of training, as told before and as it was.
    """

    blocks: dict[str, FeatureTransferBlock]
    log: list[EpochLog]
    clusterings: list[Clustering]
    hr: tuple[Tensor, Tensor]
    lr: list[Tensor]
    hr_through: tuple[Tensor, Tensor]
    lr_through: list[tuple[Tensor, Tensor]]
    seconds: tuple[float, float]


class TooLongError(RuntimeError):
    """Training would take longer than it may."""


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
    minutes: float | None = None,
    hr_share: float = HR_SHARE,
    checkpoint: Callable[[str], Path] | None = None,
    tell: Callable[[float], object] | None = None,
    callback: Callable[[EpochLog], object] | None = None,
) -> DeepFit:
    """Trains untrained blocks towards the HR features of the same images, through `rest`.

    Args:
        rest: the model behind the first place.
        plans: the places, from the first to the last.
        blocks: an untrained block a place, by module.
        maps: at the first place.
        train: indices of the images to train on.
        test: indices of the images held out: the blocks of the best epoch on them are kept.
        clusters: k, of one clustering or several.
        objective: a name of `featxfer.OBJECTIVES`.
        seed: of the clusters and of the order of rows.
        recipe: by default `BLOCK_RECIPE`.
        minutes: the longest that training may take, by what one step takes; None: any time.
        hr_share: of the images, the share that each epoch sees as HR images too.
        checkpoint: from a key of all that training hangs on to a file; none: cannot be resumed.
        tell: called with the estimate in seconds before training.
        callback: called after each epoch.

    Raises:
        TooLongError: the estimate is over `minutes`; nothing was trained.
        ValueError: HR features without variance, more clusters than images.
        DivergenceError, CheckpointError, DiskError: as `PseudoLabelTrainer.fit_rows`.
    """
    recipe = recipe or BLOCK_RECIPE
    hr = (_features(rest, maps, maps.hr[0]), _features(rest, maps, maps.hr[1]))
    lr = [_features(rest, maps, rows[0]) for rows in maps.lr]
    directions = F.normalize(hr[0][train], dim=1)
    clusterings = [kmeans(directions, k, seed=seed) for k in clusters]
    variance = float((hr[0][train] - hr[0][train].mean(0)).square().sum(1).mean())
    goal = make_objective(objective, [part.centroids for part in clusterings], variance)
    for plan in plans:
        block = blocks[plan.module]
        block.set_input_statistics(_probe(rest, plan, maps, train))
        rest.attach(plan.place, block)
    rows = _Views(maps, hr, train, hr_share, flip=True)
    judged = _Views(maps, hr, test, 1.0, flip=False) if len(test) else None
    trainer = PseudoLabelTrainer(rest, recipe, objective=goal, seed=seed)
    expected = _estimate(trainer, rows)
    if minutes is not None and expected > 60 * minutes:
        raise TooLongError(
            f"blocks would train for about {expected / 60:.0f} minutes, over minutes={minutes:g}"
        )
    if tell is not None:
        tell(expected)
    start = time.perf_counter()
    path = None
    if checkpoint is not None:
        path = checkpoint(
            _key(
                [hr[0], *lr, train, *(part.centroids for part in clusterings)],
                [objective, *(block.config for block in blocks.values())],
                recipe,
                seed,
                hr_share,
            )
        )
    log = trainer.fit_rows(rows, held_out=judged, checkpoint=path, callback=callback)
    took = time.perf_counter() - start
    rest.eval()
    through = [
        (_features(rest, maps, plain), _features(rest, maps, mirrored))
        for plain, mirrored in maps.views
    ]
    if path is not None:
        path.unlink(missing_ok=True)
    return DeepFit(
        dict(blocks), log, clusterings, hr, lr, through[-1], through[:-1], (expected, took)
    )


@torch.no_grad()
def _features(rest: Rest, maps: Maps, rows: StoredRows, batch: int = 128) -> Tensor:
    """Features of all images of one view, as `rest` is now; `(n, d)` on the CPU."""
    device = next(rest.parameters()).device
    return torch.cat(
        [
            rest(maps.take(rows, part).to(device, torch.float32)).cpu()
            for part in torch.arange(len(rows)).split(batch)
        ]
    )


@torch.no_grad()
def _probe(rest: Rest, plan: BlockPlan, maps: Maps, train: Tensor) -> Tensor:
    """LR and HR maps at a place, of some images."""
    indices = train[:: -(-len(train) // PROBE)]
    first = torch.cat([maps.take(rows[0], indices) for rows in maps.views]).float()
    device = next(rest.parameters()).device
    return rest.maps_at(plan.place, first.to(device))


def _estimate(trainer: PseudoLabelTrainer, rows: _Views) -> float:
    """Seconds that training will take, from two forward and backward passes without an update."""
    device = next(trainer.head.parameters()).device
    order = rows.order(torch.Generator().manual_seed(0))
    batches = order.split(trainer.recipe.batch_size)
    took = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            start = time.perf_counter()
            inputs, targets = (part.to(device) for part in rows.take(batches[0]))
            loss, _right = trainer.objective(trainer.head(inputs), targets)
            loss.backward()
            trainer.optimizer.zero_grad(set_to_none=True)
            took.append(time.perf_counter() - start)
    return took[-1] * len(order) / len(batches[0]) * trainer.recipe.epochs


def _key(
    tensors: Sequence[Tensor],
    configs: Sequence[object],
    recipe: Recipe,
    seed: int,
    hr_share: float,
) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    said = [list(configs), recipe.to_dict(), seed, hr_share, torch.__version__]
    digest.update(json.dumps(said).encode())
    return digest.hexdigest()[:32]


def map_shape(model: nn.Module, place: Place, image: Tensor) -> tuple[int, ...]:
    """Shape of one image's maps at a place."""
    like = host_parameter(model)
    with torch.no_grad():
        maps = take_feature(model, place, image if like is None else image.to(like))
    return tuple(maps.shape[1:])


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    fast: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return fast


def preprocess(preprocessing: Preprocessing, pixels: Tensor, model: nn.Module) -> Tensor:
    """Images as the model takes them, on its device."""
    like = host_parameter(model)
    images = preprocessing(pixels)
    return images if like is None else images.to(like.device, like.dtype)
