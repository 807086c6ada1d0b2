"""fit_transfer for detectors: heads on boxes and blocks in the backbone, without labels."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from featxfer import (
    FEATURES_RECIPE,
    BaseDegradation,
    Card,
    EpochLog,
    FeatureTransferBlock,
    FeatureTransferHead,
    ImageError,
    Images,
    Recipe,
    diagnose,
    fit_features_head,
    kmeans,
)
from featxfer.checks import check_integer
from featxfer.features.extract import check_readable, software_versions, tell, write_skipped
from featxfer.features.forward import bf16_is_fast
from featxfer.modules.hub import TransferModule
from featxfer.training.pseudo_labels import LabelDiagnostics
from featxfer_integrations._attach import (
    AttachError,
    Place,
    attached_at,
    host_device,
    is_attached,
    transfers_of,
)
from featxfer_integrations._fitting import (
    MINUTES,
    OBJECTIVE,
    WITHOUT_CLUSTERS,
    HeldOutPairs,
    TransferFit,
    duration,
    epochs,
    libraries,
    put,
    refuse_void,
    reports,
    split,
)
from featxfer_integrations.attach import (
    backbone_sha256,
    find_places,
    host_of,
    maps_at,
    probe_image,
    prove,
    weights_details,
)
from featxfer_integrations.boxes import DRAW, MOST_ROWS, Sampler, detector_key, fill_box_stores
from featxfer_integrations.deep import BlockPlan, new_blocks
from featxfer_integrations.detector_blocks import (
    BOXES,
    DETECTOR_RECIPE,
    HR_SHARE,
    PROBE,
    Pyramid,
    Views,
    estimate_seconds,
    train_detector_blocks,
)

BOX_RECIPE = dataclasses.replace(FEATURES_RECIPE, epochs=20)
"""For heads in a detector, whose boxes of the training images they fit too closely with more."""


@dataclass(frozen=True)
class DetectorTask:
    """What a fit of a detector is asked for, after all checks that need no image.

    Args:
        model: the detector.
        images: unlabelled HR images.
        views: degradations that keep an image's size.
        depth: as of `fit_transfer`.
        where: as of `attach_transfer`, or None.
        at: as of `fit_transfer`.
        clusters: k, or None.
        objective: a name of `featxfer.OBJECTIVES`, or None.
        warm_start: of heads, as of `fit_transfer`.
        recipe: of heads.
        block_recipe: of blocks.
        minutes: of depth "auto": the longest that blocks may train, or None.
        held_out: share of the images.
        cache: folder.
        precision: as of `fit_transfer`.
        on_error: as of `fit_transfer`.
        seed: as of `fit_transfer`.
    """

    model: nn.Module
    images: Images
    views: Sequence[BaseDegradation]
    depth: str
    where: str | None
    at: str | Sequence[str] | None
    clusters: int | None
    objective: str | None
    warm_start: bool
    recipe: Recipe | None
    block_recipe: Recipe | None
    minutes: float | None
    held_out: float
    cache: Path
    precision: str
    on_error: str
    seed: int

    def split(self) -> tuple[Tensor, Tensor]:
        """Indices of the images to train on, and of those held out."""
        return split(len(self.images), self.held_out, self.seed)


def fit_detector(task: DetectorTask) -> TransferFit:
    """Trains blocks, or heads, or what is attached, and leaves it attached; see `fit_transfer`."""
    check_integer("seed", task.seed, at_least=0)
    places = _places(task)
    if _is_chosen(task):
        refuse_void("what is trained here is said, however long it takes", minutes=task.minutes)
        _refuse_void(task, places)
    standing = _standing(task.model, places)
    full = copy.deepcopy(task.model).float()  # half precision is not for every operation on CPUs
    prove(full, places, probe_image(full))
    task, skipped = _readable(task)
    plans = [_plan(task.model, place) for place in places if place.block]
    heads = [place for place in places if not place.block]
    precision = task.precision
    if precision == "auto":
        device = next(task.model.parameters()).device
        precision = "bf16" if bf16_is_fast(device) else "fp32"
    pyramid = Pyramid(task.model, precision)
    for place, block in standing:
        pyramid.attach(place, copy.deepcopy(block))
    fits = []
    if plans:
        fitted = _fit_blocks(task, pyramid, plans, may_give_up=not _is_chosen(task))
        if fitted is None:
            heads, pyramid = find_places(task.model, where="boxes"), Pyramid(task.model, precision)
        else:
            fits.append(fitted)
    if heads:
        blocks = [place.name for place, _ in standing]
        blocks += [plan.place.name for plan in plans if fits]
        fits.append(_fit_heads(task, pyramid.host, heads, blocks))
    for fitted in fits:
        for module, place in fitted.modules:
            put(task.model, place, module)
    for fitted in fits:
        if fitted.checkpoint is not None:
            fitted.checkpoint.unlink(missing_ok=True)
    return TransferFit(
        [entry for fitted in fits for entry in fitted.fit.log],
        [part for fitted in fits for part in fitted.fit.diagnostics],
        [part for fitted in fits for part in fitted.fit.held_out],
        fits[0].fit.images,
        skipped,
        fits[0].fit.depth,
        fits[0].fit.blocks_log,
    )


@dataclass(frozen=True)
class _Fitted:
    """A report, what goes where, and the checkpoint that is needed until it is there."""

    fit: TransferFit
    modules: list[tuple[TransferModule, Place]]
    checkpoint: Path | None = None


def _readable(task: DetectorTask) -> tuple[DetectorTask, dict[str, str]]:
    """The task with the images that can be read, and why others cannot, if they may be skipped.

    Raises `ValueError` if there are none.
    """
    images, skipped, kept = task.images, {}, []
    if task.on_error == "raise":
        return task, {}
    for index in tqdm(range(len(images)), desc="readable images", unit="img", disable=None):
        try:
            images.read(index)
        except ImageError as error:
            skipped[images.ids[index]] = str(error)
        else:
            kept.append(index)
    check_readable("images", skipped, len(images), task.on_error)
    if not skipped:
        return task, {}
    write_skipped(task.cache / f"skipped-{images.fingerprint[:16]}.json", skipped, len(images))
    said = f"{images.fingerprint} without {json.dumps(sorted(skipped))}"
    readable = Images(
        tuple(images.ids[index] for index in kept),
        lambda row: images.read(kept[row]),
        hashlib.sha256(said.encode()).hexdigest(),
        depth=images.depth,
    )
    return dataclasses.replace(task, images=readable), skipped


def _is_chosen(task: DetectorTask) -> bool:
    """Whether the caller says what to train."""
    asked = task.where is not None or task.at is not None or is_attached(task.model)
    return asked or task.depth != "auto"


def _refuse_void(task: DetectorTask, places: Sequence[Place], since: str = "") -> None:
    """Raises `ValueError` for an argument without effect on what is trained at these places."""
    if not any(place.block for place in places):
        refuse_void(
            f"heads alone are trained{since}, on features in float32",
            block_recipe=task.block_recipe,
            precision="bf16" if task.precision == "bf16" else None,
        )
    if not all(place.block for place in places):
        return
    refuse_void(
        f"blocks alone are trained{since}",
        recipe=task.recipe,
        warm_start=task.warm_start or None,
    )
    if not hasattr(task.model, "roi_heads"):
        refuse_void(
            f"blocks alone are trained{since}, on maps: {type(task.model).__name__} proposes no "
            "boxes",
            objective=task.objective,
            clusters=task.clusters,
        )
    if task.objective in WITHOUT_CLUSTERS:
        why = f"blocks alone are trained{since}, with objective={task.objective!r}"
        refuse_void(why, clusters=task.clusters)


def _places(task: DetectorTask) -> list[Place]:
    """Places to train at: those named, or all that are attached, or those of the depth."""
    model = task.model
    if task.at is not None and task.where is not None:
        raise ValueError("where, at: got both, wanted one of them for a detector")
    if task.at is not None:
        names = [task.at] if isinstance(task.at, str) else list(task.at)
        if not names:
            raise ValueError("at: got none, wanted the name of a module or several")
        places = [place for name in names for place in find_places(model, at=name)]
    elif task.where is not None:
        places = find_places(model, where=task.where)
    elif is_attached(model):
        places = list(transfers_of(model).places.values())
    else:
        places = find_places(model, where="boxes" if task.depth == "pooled" else "backbone")
    blocks = [place.name for place in places if place.block]
    if task.depth == "pooled" and blocks:
        raise ValueError(f"depth: got 'pooled', but blocks go to {', '.join(blocks)}")
    if task.depth == "deep" and not blocks:
        raise ValueError(f"depth: got 'deep', but a head goes to {places[0].name!r}")
    outside = [place.module for place in places if place.block and place.run is None]
    if outside:
        raise AttachError(
            f"at: blocks are trained through the backbone, and {outside[0]!r} is not in it"
        )
    others = [place.name for place in _others(model, places) if blocks or not place.block]
    if others:
        raise AttachError(
            f"model: something is attached at {', '.join(others)}, and what is trained now would "
            "be trained without it; detach_transfer first"
        )
    return [_with_width(model, place) for place in places]


def _others(model: nn.Module, places: Sequence[Place]) -> list[Place]:
    """Where something is attached besides these places."""
    known = {place.name for place in places}
    attached = transfers_of(model).places.values() if is_attached(model) else ()
    return [place for place in attached if place.name not in known]


def _standing(
    model: nn.Module, places: Sequence[Place]
) -> list[tuple[Place, FeatureTransferBlock]]:
    """Blocks that are attached and stay as they are while heads are trained on what they give."""
    attached = [(place, attached_at(model, place)) for place in _others(model, places)]
    return [
        (place, module) for place, module in attached if isinstance(module, FeatureTransferBlock)
    ]


def _with_width(model: nn.Module, place: Place) -> Place:
    """A place of a head that says how wide the feature there is."""
    attached = attached_at(model, place)
    if place.block or place.width is not None:
        return place
    if not isinstance(attached, FeatureTransferHead):
        raise AttachError(
            f"where: the width at {place.name!r} is not known; attach a head first: "
            f"attach_transfer(model, where={place.module!r}, in_features=...)"
        )
    return dataclasses.replace(place, width=attached.in_features)


def _plan(model: nn.Module, place: Place) -> BlockPlan:
    return BlockPlan(place.name, place, *maps_at(model, place))


def _fit_blocks(
    task: DetectorTask, pyramid: Pyramid, plans: Sequence[BlockPlan], *, may_give_up: bool
) -> _Fitted | None:
    """Blocks; None where they would train longer than they may. Leaves them in the pyramid."""
    model, recipe = task.model, task.block_recipe or DETECTOR_RECIPE
    blocks = new_blocks(model, plans, task.seed)
    for plan in plans:
        pyramid.attach(plan.place, blocks[plan.module])
    train, test = task.split()
    rows = Views(pyramid, task.images, task.views, train, hr_share=HR_SHARE, seed=task.seed)
    seconds = estimate_seconds(rows, recipe)
    minutes = MINUTES if task.minutes is None else task.minutes
    if may_give_up and seconds > 60 * minutes:
        reason = f"blocks would train for about {duration(seconds)}, over minutes={minutes:g}"
        _refuse_void(task, find_places(model, where="boxes"), f", since {reason}")
        tell(f"heads alone: {reason}")
        return None
    if may_give_up:
        _refuse_void(task, [plan.place for plan in plans], ", since there is the time for them")
    objective = task.objective or OBJECTIVE
    tell(f"training blocks takes about {duration(seconds)}")
    key = [
        detector_key(pyramid.host),
        task.images.fingerprint,
        [view.to_json() for view in task.views],
        [[p.place.name, p.place.outputs, p.place.level, blocks[p.module].config] for p in plans],
        recipe.to_dict(),
        [task.seed, task.held_out, objective, task.clusters, pyramid.precision],
        [HR_SHARE, BOXES, PROBE, DRAW],
        [next(pyramid.parameters()).device.type, libraries(model), software_versions()],
    ]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    checkpoint = task.cache / "training" / f"{name}.safetensors"
    with epochs(recipe, "training blocks") as advance:
        log, held_out = train_detector_blocks(
            pyramid,
            blocks,
            [plan.place for plan in plans],
            task.images,
            task.views,
            train,
            test,
            objective=objective,
            clusters=task.clusters or 100,
            seed=task.seed,
            recipe=recipe,
            checkpoint=checkpoint,
            callback=advance,
        )
    fit = TransferFit([], [], held_out, len(train), {}, "deep", log)
    for plan in plans:
        blocks[plan.module].card = _card(
            task, plan.place, fit, log, recipe, precision=pyramid.precision
        )
    return _Fitted(fit, [(blocks[plan.module], plan.place) for plan in plans], checkpoint)


def _fit_heads(
    task: DetectorTask, host: nn.Module, places: Sequence[Place], after: Sequence[str]
) -> _Fitted:
    """Heads on boxes or positions, as the host has them, with the blocks `after` that are in it."""
    depth = "deep" if after else "pooled"
    recipe = task.recipe or BOX_RECIPE
    sampler = Sampler(host, places, seed=task.seed)
    folder = task.cache / "boxes"
    stores = fill_box_stores(sampler, task.images, task.views, folder)
    train, test = task.split()
    log: list[EpochLog] = []
    diagnostics: list[LabelDiagnostics] = []
    held_out: list[HeldOutPairs] = []
    modules: list[tuple[TransferModule, Place]] = []
    for place in places:
        kept = stores[place.name]
        views, labels = kept.read(train, MOST_ROWS, task.seed)
        if not len(labels):
            raise ValueError(
                f"images: the detector finds no box at {place.name!r} in any of {len(train)} images"
            )
        hr, given = views[0], views[1:]
        k = task.clusters or min(100, max(1, len(hr) // 10))
        if k > len(hr):
            raise ValueError(
                f"clusters: got {k}, wanted at most the {len(hr)} boxes at {place.name!r}"
            )
        clustering = kmeans(F.normalize(hr, dim=1), k, seed=task.seed)
        attached = attached_at(task.model, place)
        config = {} if attached is None else attached.config
        sizes = {"in_features": hr.shape[1], "clusters": k}
        with host_device(task.model):
            head = FeatureTransferHead(**{**config, **sizes}, seed=task.seed)
        with epochs(recipe, f"training the head of {place.name}") as advance:
            of_head = fit_features_head(
                head,
                hr,
                given,
                clustering,
                objective=task.objective or OBJECTIVE,
                warm_start=task.warm_start,
                recipe=recipe,
                seed=task.seed,
                callback=advance,
            )
        log += of_head
        lr = given[: len(task.views)]
        diagnostics += [diagnose(hr, rows, clustering.centroids) for rows in lr]
        found: list[HeldOutPairs] = []
        judged, _ = kept.read(test, MOST_ROWS // 16, task.seed)
        if len(judged[0]):
            low = judged[1 : 1 + len(task.views)]
            hr_again = judged[-1] if depth == "deep" else judged[0]
            through = [head.transfer(rows) for rows in (*low, hr_again)]
            found = reports(judged[0], low, through, clustering)
        held_out += found
        fit = TransferFit(of_head, diagnostics, found, len(train), {}, depth)
        head.card = _card(
            task, place, fit, of_head, recipe, boxes=len(hr), precision="fp32", after=list(after)
        )
        modules.append((head, place))
    fit = TransferFit(log, diagnostics, held_out, fit.images, fit.skipped, depth)
    return _Fitted(fit, modules)


def _card(
    task: DetectorTask,
    place: Place,
    fit: TransferFit,
    log: Sequence[EpochLog],
    recipe: Recipe,
    **details: Any,
) -> Card:
    host = host_of(task.model)
    assert host is not None
    return Card(
        host.model_name(task.model),
        backbone_sha256(task.model, place),
        tuple(task.views),
        {
            "host": libraries(task.model),
            "preprocessing": dataclasses.asdict(host.preprocessing(task.model)),
            "depth": fit.depth,
            "images": fit.images,
            "images_fingerprint": task.images.fingerprint,
            "images_depth": task.images.depth,
            "objective": task.objective or OBJECTIVE,
            **place.described,
            "seed": task.seed,
            "recipe": recipe.to_dict(),
            "held_out": [
                {**dataclasses.asdict(part), "cosine_gap_recovered": part.cosine_gap_recovered}
                for part in fit.held_out
            ],
            "final_loss": log[-1].loss,
            "versions": software_versions(),
            **weights_details(task.model, place),
            **details,
        },
    )
