"""Blocks in a detector's backbone or on its pyramid, trained through the layers behind them."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from featxfer import (
    BaseDegradation,
    EpochLog,
    FeatureTransferBlock,
    Images,
    PseudoLabelTrainer,
    Recipe,
    kmeans,
)
from featxfer.evaluation.pairs import compare_pairs
from featxfer.training.objectives import Objective, make_objective
from featxfer_integrations._attach import (
    CHILD,
    Place,
    disabled,
    install,
    is_attached,
    remove_all,
    take_enabled_feature,
)
from featxfer_integrations._fitting import HeldOutPairs
from featxfer_integrations.boxes import Sampler

DETECTOR_RECIPE = Recipe(
    epochs=12,
    batch_size=4,
    learning_rate=4e-3,
    weight_decay=0.05,
    optimizer="adamw",
    schedule="one-cycle",
)
"""For blocks in a detector."""

HR_SHARE = 0.5
"""Of each epoch's images, how many are seen as HR images too."""

PROBE = 16
"""Images whose maps give a block its input statistics, and levels their variance."""

POSITIONS = 4_096
"""Of an image's maps, at the most, that give a block its input statistics."""

REPORTED = 4_096
"""Boxes or parts of maps of held-out images that are reported on, at the most."""

BOXES = 16
"""Boxes of an image that are compared, where the detector proposes some."""


@dataclass(frozen=True)
class Batch:
    """Images as the backbone takes them, and boxes on them.

    Args:
        images: `(n, 3, h, w)`.
        boxes: `(b, 4)` of each image, or nothing where the detector proposes none.
        sizes: of each image before it was padded.
    """

    images: Tensor
    boxes: list[Tensor]
    sizes: list[tuple[int, int]]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        boxes = [part.to(device) for part in self.boxes]
        return dataclasses.replace(self, images=self.images.to(device), boxes=boxes)


@dataclass(frozen=True)
class Seen:
    """What a detector's heads see: the pyramid's maps and the features of boxes, if there are any.

    Args:
        levels: `(n, c, h, w)` each, by name.
        boxes: `(b, d)` of all images, one after the other.
    """

    levels: dict[str, Tensor]
    boxes: Tensor | None

    def to(self, device: torch.device) -> Seen:
        """The same on a device."""
        boxes = None if self.boxes is None else self.boxes.to(device)
        return Seen({name: level.to(device) for name, level in self.levels.items()}, boxes)


class Pyramid(nn.Module):
    """A copy of a detector up to what its heads see, frozen but for the blocks in it.

    Args:
        model: the detector; what is attached to it is left out. The copy is in float32.
        precision: "fp32", or "bf16" for autocast of the backbone.
    """

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.host: Any = copy.deepcopy(model)
        if is_attached(self.host):
            remove_all(self.host)
        self.host.eval().requires_grad_(False).float()
        self.precision = precision

    def attach(self, place: Place, block: FeatureTransferBlock) -> None:
        """Makes a block act at its place."""
        block.requires_grad_(True)
        install(self.host, place, block)

    def train(self, mode: bool = True) -> Pyramid:
        """Sets the blocks to training or eval mode, and nothing else."""
        self.training = mode
        if is_attached(self.host):
            self.host.get_submodule(CHILD).train(mode)
        return self

    def forward(self, batch: Batch) -> Seen:
        """What the heads see, through the blocks."""
        levels = self.levels(batch.images)
        return Seen(levels, self.features_of(batch.boxes, levels, batch.sizes))

    def levels(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of the backbone with its pyramid, by name, float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            maps = self.host.backbone(images)
        named = {"0": maps} if isinstance(maps, Tensor) else maps
        return {name: level.float() for name, level in named.items()}

    def features_of(
        self, boxes: list[Tensor], levels: dict[str, Tensor], sizes: list[tuple[int, int]]
    ) -> Tensor | None:
        """Features of boxes, before the predictor, or None where there are no boxes."""
        if not sum(map(len, boxes)):
            return None
        heads = self.host.roi_heads
        features: Tensor = heads.box_head(heads.box_roi_pool(levels, boxes, sizes)).flatten(1)
        return features


class PyramidDistance:
    """How far what the heads see is from what they see of the HR image (ours).

    The mean over levels of the squared distance of maps, divided by the variance of HR maps, and
    `box_weight` times an objective of the boxes' features.

    Args:
        variances: of each level's HR maps, > 0.
        boxes: of features `(b, d)`, or None.
        box_weight: >= 0.
    """

    def __init__(
        self, variances: Sequence[float], boxes: Objective | None, box_weight: float = 0.1
    ) -> None:
        self.variances, self.boxes, self.box_weight = list(variances), boxes, box_weight

    def __call__(self, outputs: Seen, targets: Seen) -> tuple[Tensor, Tensor]:
        """The loss, a scalar with gradient, and for how many images boxes are right, on average."""
        parts = [
            (level - goal).square().mean() / variance
            for level, goal, variance in zip(
                outputs.levels.values(), targets.levels.values(), self.variances, strict=True
            )
        ]
        loss = torch.stack(parts).mean()
        right = torch.zeros((), device=loss.device)
        if self.boxes is not None and outputs.boxes is not None and targets.boxes is not None:
            of_boxes, hits = self.boxes(outputs.boxes, targets.boxes)
            loss = loss + self.box_weight * of_boxes
            right = hits / len(targets.boxes) * len(next(iter(outputs.levels.values())))
        return loss, right.round()

    def check(self, outputs: Any, targets: Any, rows: int) -> None:
        """Nothing: both are made by the same module."""


class Views:
    """Rows of a trainer: every image once an epoch in each LR view, and some in HR.

    Images are mirrored by chance where `vary`. What is wanted of each is what the plain detector
    sees of its HR view.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        images: Images,
        degradations: Sequence[BaseDegradation],
        chosen: Tensor,
        *,
        hr_share: float,
        seed: int,
        vary: bool = True,
    ) -> None:
        self.pyramid, self.images, self.chosen = pyramid, images, chosen
        self.degradations, self.hr_share, self.vary = degradations, hr_share, vary
        self.sampler = Sampler(pyramid.host, [], per_image=BOXES, seed=seed)

    def order(self, generator: torch.Generator) -> Tensor:
        """Indices of an epoch: `2 * (view * len(images) + image) + mirrored`."""
        count, total = len(self.chosen), len(self.images)
        shares = [count] * len(self.degradations) + [round(count * self.hr_share)]
        shuffled = partial(torch.randperm, generator=generator, device="cpu")
        rows = torch.cat(
            [
                view * total + self.chosen[shuffled(count)[:share]]
                for view, share in enumerate(shares)
            ]
        )
        rows = 2 * rows
        if self.vary:
            rows += torch.randint(2, rows.shape, generator=generator, device="cpu")
        return rows[shuffled(len(rows))]

    def take(self, indices: Tensor) -> tuple[Batch, Seen]:
        """Images of these rows, and what the plain detector sees of their HR views."""
        given, wanted, chosen = [], [], []
        for row in indices.tolist():
            view, index = divmod(row // 2, len(self.images))
            chosen.append(index)
            image = self.images.read(index)
            hr = self.degradations[0].hr(image)
            made = hr if view == len(self.degradations) else self.degradations[view].lr(image)
            mirror = bool(row % 2)
            given.append(made.flip(-1) if mirror else made)
            wanted.append(hr.flip(-1) if mirror else hr)
        return self._see(given, wanted, chosen)

    @torch.no_grad()
    def _see(
        self, given: Sequence[Tensor], wanted: Sequence[Tensor], chosen: Sequence[int]
    ) -> tuple[Batch, Seen]:
        """Images as the backbone takes them, and what the plain detector sees of others."""
        host, count = self.pyramid.host, len(given)
        like = next(host.parameters())
        pixels = [image.to(like.device, like.dtype) / 255 for image in (*given, *wanted)]
        images, _ = host.transform(pixels)
        hr, sizes = images.tensors[count:], images.image_sizes[count:]
        with disabled(host):
            levels = self.pyramid.levels(hr)
            boxes = self._propose(hr, levels, sizes, chosen) if hasattr(host, "roi_heads") else []
            features = self.pyramid.features_of(boxes, levels, sizes)
        return Batch(images.tensors[:count], boxes, sizes), Seen(levels, features)

    def _propose(
        self,
        images: Tensor,
        levels: dict[str, Tensor],
        sizes: list[tuple[int, int]],
        chosen: Sequence[int],
    ) -> list[Tensor]:
        """Boxes on each image."""
        return [
            self.sampler.propose(
                ImageList(images[row : row + 1], sizes[row : row + 1]),
                {name: level[row : row + 1] for name, level in levels.items()},
                index,
            )
            for row, index in enumerate(chosen)
        ]


def train_detector_blocks(
    pyramid: Pyramid,
    blocks: Mapping[str, FeatureTransferBlock],
    places: Sequence[Place],
    images: Images,
    degradations: Sequence[BaseDegradation],
    train: Tensor,
    test: Tensor,
    *,
    objective: str = "prototypes",
    clusters: int = 100,
    seed: int = 0,
    recipe: Recipe | None = None,
    hr_share: float = HR_SHARE,
    checkpoint: Path | None = None,
    callback: Callable[[EpochLog], object] | None = None,
) -> tuple[list[EpochLog], list[HeldOutPairs]]:
    """Trains untrained blocks so that LR images look to the detector's heads as HR ones do.

    Args:
        pyramid: of the detector, with the blocks attached.
        blocks: by the name of their place.
        places: from the first to the last.
        images: unlabelled.
        degradations: of the LR views.
        train: indices of the images to train on.
        test: indices of those held out: the blocks of the best epoch on them are kept.
        objective: of the boxes' features, a name of `featxfer.OBJECTIVES`.
        clusters: of the boxes' features, at the most.
        seed: of the clusters and of the order of rows.
        recipe: by default `DETECTOR_RECIPE`.
        hr_share: of the images, the share that each epoch sees as HR images too.
        checkpoint: a file that training goes on from, and that stays; None: cannot be resumed.
        callback: called after each epoch.

    Returns:
        An entry an epoch, and what the blocks do to held-out images, a degradation each.

    Raises:
        ValueError: maps without variance.
        DivergenceError, CheckpointError, DiskError: as `PseudoLabelTrainer.fit_rows`.
    """
    recipe = recipe or DETECTOR_RECIPE
    rows = Views(pyramid, images, degradations, train, hr_share=hr_share, seed=seed)
    judged = None
    if len(test):
        judged = Views(pyramid, images, degradations, test, hr_share=1.0, seed=seed, vary=False)
    goal = _prepare(rows, blocks, places, objective, clusters, seed)
    trainer = PseudoLabelTrainer(pyramid, recipe, objective=goal, seed=seed)
    log = trainer.fit_rows(
        rows,
        held_out=judged,
        held_out_batch=recipe.batch_size,
        checkpoint=checkpoint,
        callback=callback,
    )
    pyramid.eval()
    if judged is None:
        return log, []
    reports = [_report(judged, view) for view in range(len(degradations))]
    return log, [report for report in reports if report is not None]


@torch.no_grad()
def _report(rows: Views, view: int) -> HeldOutPairs | None:
    """What blocks do to the images of one view: to features of boxes, or of parts of the maps.

    None where boxes are wanted and no image has any.
    """
    pyramid, total = rows.pyramid, len(rows.images)
    found: list[list[Tensor]] = [[], [], [], []]
    for image in rows.chosen.tolist():
        for start, kind in ((0, view), (2, len(rows.degradations))):
            batch, wanted = rows.take(torch.tensor([2 * (kind * total + image)], device="cpu"))
            if wanted.boxes is None and hasattr(pyramid.host, "roi_heads"):
                continue
            with disabled(pyramid.host):
                before = pyramid(batch)
            for index, seen in enumerate((before, pyramid(batch))):
                found[start + index].append(_vectors(seen).cpu())
    if not found[0]:
        return None
    lr, lr_after, hr, hr_after = (torch.cat(part) for part in found)
    if len(hr) > REPORTED:
        chance = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(hr), generator=chance, device="cpu")[:REPORTED]
        lr, lr_after, hr, hr_after = (part[chosen] for part in (lr, lr_after, hr, hr_after))
    directions = nn.functional.normalize(hr, dim=1)
    centroids = kmeans(directions, max(1, min(100, len(hr) // 10)), seed=0).centroids
    return HeldOutPairs(
        compare_pairs(hr, lr, centroids),
        compare_pairs(hr, lr_after, centroids),
        float(torch.cosine_similarity(hr_after, hr).mean()),
        len(hr),
    )


def _vectors(seen: Seen) -> Tensor:
    """Features of boxes; where there are none, means over sixteen parts of each level.

    Of levels as wide as the first one.
    """
    if seen.boxes is not None:
        return seen.boxes
    levels = list(seen.levels.values())
    parts = [
        nn.functional.adaptive_avg_pool2d(level, 4).flatten(2).movedim(1, 2).flatten(0, 1)
        for level in levels
        if level.shape[1] == levels[0].shape[1]
    ]
    return torch.cat(parts)


@torch.no_grad()
def _prepare(
    rows: Views,
    blocks: Mapping[str, FeatureTransferBlock],
    places: Sequence[Place],
    objective: str,
    clusters: int,
    seed: int,
) -> PyramidDistance:
    """Gives blocks their input statistics, and says how far is far: from some images."""
    pyramid, total = rows.pyramid, len(rows.images)
    probe = rows.chosen[:: -(-len(rows.chosen) // PROBE)]
    maps: dict[str, list[Tensor]] = {place.name: [] for place in places}
    spread: list[Tensor] = []
    features: list[Tensor] = []
    for image in probe.tolist():
        for view in range(len(rows.degradations) + 1):
            batch, seen = rows.take(torch.tensor([2 * (view * total + image)], device="cpu"))
            for place in places:
                found = take_enabled_feature(pyramid.host, place, batch.images)
                channels_last = blocks[place.name].layout == "nhwc"
                rows_of = (found if channels_last else found.movedim(1, -1)).flatten(0, 2)
                maps[place.name].append(rows_of[:: -(-len(rows_of) // POSITIONS)].cpu())
        levels = list(seen.levels.values())
        spread.append(torch.stack([level.var(correction=0) for level in levels]))
        if seen.boxes is not None:
            features.append(seen.boxes.cpu())
    for place in places:
        joined = torch.cat(maps[place.name])[None, :, None]
        channels_last = blocks[place.name].layout == "nhwc"
        blocks[place.name].set_input_statistics(joined if channels_last else joined.movedim(-1, 1))
    variances = torch.stack(spread).mean(0)
    if not bool((variances > 0).all()):
        raise ValueError("images: the detector's maps of them do not vary")
    of_boxes = None
    boxes = torch.cat(features) if features else torch.empty(0, 0, device="cpu")
    if len(boxes) >= 2 and float(boxes.var(0).sum()) > 0:
        k = max(1, min(clusters, len(boxes) // 10))
        centroids = kmeans(nn.functional.normalize(boxes, dim=1), k, seed=seed).centroids
        variance = float((boxes - boxes.mean(0)).square().sum(1).mean())
        of_boxes = make_objective(objective, [centroids], variance)
    elif hasattr(pyramid.host, "roi_heads"):
        warnings.warn(
            f"images: the detector proposes no boxes in {len(probe)} of them, so blocks learn from "
            "its maps alone",
            stacklevel=2,
        )
    return PyramidDistance(variances.tolist(), of_boxes)


def estimate_seconds(rows: Views, recipe: Recipe) -> float:
    """Seconds that training will take: of one step, the second, times all steps."""
    order = rows.order(torch.Generator().manual_seed(0))
    took = 0.0
    for _ in range(2):
        start = time.perf_counter()
        batch, _ = rows.take(order[: recipe.batch_size])
        seen = rows.pyramid(batch)
        torch.stack([level.square().mean() for level in seen.levels.values()]).sum().backward()
        rows.pyramid.zero_grad(set_to_none=True)
        if batch.images.is_cuda:
            torch.cuda.synchronize(batch.images.device)
        took = time.perf_counter() - start
    return took * recipe.epochs * math.ceil(len(order) / recipe.batch_size)
