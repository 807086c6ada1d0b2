"""fit_transfer: a model and unlabelled HR images in, the model with a trained head out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featxfer import (
    BLOCK_RECIPE,
    FEATURES_RECIPE,
    OBJECTIVES,
    Backbone,
    BaseDegradation,
    Card,
    Degradation,
    EpochLog,
    FeatureTransferBlock,
    FeatureTransferHead,
    Images,
    Preprocessing,
    Recipe,
    ScaledDegradation,
    diagnose,
    extract_features,
    fit_features_head,
    fit_head,
    kmeans,
    open_images,
)
from featxfer.checks import check_choice, check_integer
from featxfer.features.backbone import describe_module, sha256_of
from featxfer.features.extract import (
    Features,
    check_readable,
    default_cache,
    fill_stores,
    software_versions,
    tell,
)
from featxfer.features.store import Rows, align
from featxfer.modules.hub import TransferModule
from featxfer.training.pseudo_labels import Clustering
from featxfer.training.unpaired import UNPAIRED, require_pot, unpaired_targets
from featxfer.views.images import ImageSource
from featxfer_integrations._attach import (
    CHILD,
    AttachError,
    Place,
    attached_at,
    black_image,
    check_host,
    gives_clusters,
    host_device,
    host_parameter,
    is_attached,
    pooled_feature,
    take_feature,
    transfers_of,
    with_layout,
)
from featxfer_integrations._fitting import (
    HELD_OUT,
    MINUTES,
    OBJECTIVE,
    WITHOUT_CLUSTERS,
    TransferFit,
    duration,
    epochs,
    libraries,
    put,
    refuse_void,
    reports,
    split,
    warn_if_useless,
)
from featxfer_integrations.attach import (
    INPUT_SIZE,
    backbone_sha256,
    detector_host,
    find_place,
    host_of,
    prove,
    weights_details,
)
from featxfer_integrations.deep import (
    BlockPlan,
    DeepFit,
    enough_crops,
    epoch_rows,
    estimate_seconds,
    extract_maps,
    maps_backbone,
    maps_bytes,
    new_blocks,
    open_rest,
    plan_blocks,
    train_blocks,
)

DEPTHS = ("auto", "pooled", "deep")
UNPAIRED_DEFAULT = "transport"
BATCH_SIZE = 64
LR_SIZE = 32
"""Side of the small image by default, pixels; less where the model's own images are smaller."""

D = TypeVar("D", bound=BaseDegradation)


def fit_transfer(
    model: nn.Module,
    images: ImageSource,
    *,
    degradation: BaseDegradation | Sequence[BaseDegradation] | None = None,
    depth: str = "auto",
    where: str | None = None,
    at: str | Sequence[str] | None = None,
    clusters: int | Sequence[int] | None = None,
    objective: str | None = None,
    warm_start: bool = False,
    lr_images: ImageSource | None = None,
    unpaired: str | None = None,
    recipe: Recipe | None = None,
    block_recipe: Recipe | None = None,
    crops: int | None = None,
    minutes: float | None = None,
    held_out: float | None = None,
    preprocessing: Preprocessing | None = None,
    cache: str | Path | None = None,
    batch_size: int | None = None,
    precision: str = "auto",
    on_error: str = "raise",
    seed: int = 0,
) -> TransferFit:
    """Trains blocks or a head on unlabelled HR images and leaves them attached.

    Features of the HR view and of each LR view are taken once and kept in the cache, HR features
    are clustered, and a head is trained towards the HR features of the same images, for HR inputs
    as well as LR ones, so that HR images come out as they went in. The model's own weights are
    never changed; the model is as it was until all is done, whatever happens before. What is
    attached at a place is trained anew, in its sizes, and stays the same object; where nothing is,
    a new head or block is attached.
    A head with output "clusters" is trained on the paper's pseudo-labels instead.

    With depth "deep", a `FeatureTransferBlock` after each of some stages is trained towards the
    same features, through the frozen layers behind it, and then the head, on what comes out, if one
    is attached: a head on top adds nothing on average (`benchmarks/gap`), so none is put there.
    Blocks gain most, since maps have not yet lost what the global pool loses. Maps at the
    first of these stages are computed once and kept in the cache. Interrupted training goes on when
    the same call is made again. How long it will take, and how much of the disk, is told on stderr
    before it begins.

    Detectors: depth "deep" trains blocks in the backbone (or where `where` or `at` says) so that
    the pyramid's maps of LR images, and the features of the detector's own proposals, are those of
    the HR image; depth "pooled" heads at `where="boxes"`, on features of the same boxes, or of
    positions of detectors without proposals, in both views, half of them balanced by the classes
    that the detector itself predicts and half by chance. Where something is attached already, that
    is trained: blocks first, then heads on what comes through them. `where="boxes"` trains heads
    alone, on what blocks that are attached give, and leaves the blocks as they are.

    An argument that cannot have an effect is refused: `crops` with depth "pooled" for one. With
    depth "auto" that may be known only once the time is estimated; nothing is trained by then.

    Args:
        model: as `attach_transfer` takes it.
        images: a folder, an ImageFolder tree, a list of files or a map-style Dataset, see
            `featxfer.open_images`; 100 images at the least make sense, labels are not looked at.
        degradation: how LR views are made, by default `Degradation(s, 32)` with s the size that the
            model is made for, 224 where it does not say; of detectors `ScaledDegradation()`.
            Several are served by one head.
        depth: "pooled": a head alone; "deep": blocks, and the head that is attached; "auto": deep
            where the model has a stage of maps for it, nothing else was asked for, and the estimate
            of the training time is within `minutes`.
        where: as in `attach_transfer`, for models that do not say where their feature is, and for
            detectors.
        at: where blocks go, as in `attach_transfer`, one place or several from the first to the
            last; by default after the last stages of 1/16 and of 1/32 of the image's size, as far
            as timm or torchvision tell them. New blocks are as wide as 9% of the model's arithmetic
            allows, 16 to 256 hidden channels.
        clusters: k; by default 100, or a tenth of the images where these are fewer than 1,000; an
            attached head with output "clusters" keeps its own. Several: as many clusterings, all
            of which teach; the head keeps the first one's centroids.
        objective: a name of `featxfer.OBJECTIVES`, for heads with output "features" and blocks; by
            default "prototypes".
        warm_start: whether the head begins with what ridge regression finds.
        lr_images: real LR images, of which no HR image is at hand, in the place of a degradation:
            they need not show what `images` show. They are resized to the degradation's hr_size
            and the head is trained towards targets that are made without pairs; depth "pooled"
            alone, and nothing is held out.
        unpaired: how: a name of `featxfer.UNPAIRED`, by default "transport"; with `lr_images`.
        recipe: by default `FEATURES_RECIPE`, or the paper's `Recipe()` for output "clusters"; for a
            detector `fit_detector.BOX_RECIPE`.
        block_recipe: by default `BLOCK_RECIPE`; for a detector `detector_blocks.DETECTOR_RECIPE`.
        crops: of each image, for blocks: random crops that are trained on besides the image and its
            mirror image, as many maps more in the cache; by default as many as bring the views of
            all images to about 10,000, 4 at the most.
        minutes: of depth "auto": the longest that blocks may train, by default 30.
        held_out: share of the images, in [0, 1), that is left out of training for the report, by
            default 0.1. For blocks they also tell, without labels, which epoch's weights are best,
            so the report of blocks is a little better than other images would have it.
        preprocessing: by default what the model says (timm) or ImageNet's mean and std.
        cache: folder for features; by default `$FEATXFER_CACHE` or `~/.cache/featxfer`.
        batch_size: images a forward pass, by default 64; not for detectors, which take them one by
            one.
        precision: "fp32", or "bf16" for autocast; "auto": "bf16" for maps and blocks where the
            hardware multiplies in it, "fp32" for the rest. Of a detector's heads "fp32" alone.
        on_error: "raise" at an image that cannot be read, or "skip" it and list it: what is skipped
            in one view is left out of all.
        seed: of the clusters, the head, the order of rows and the choice of held-out images.

    Raises:
        AttachError: as `attach_transfer`; with depth "deep" no stage of maps that a block fits,
            or a feature that hangs on more than these maps; blocks are attached elsewhere, which
            what is trained now would not know of; a model that does not run on RGB images of the
            degradation's size (one that takes one channel needs a module around it that makes it of
            three), or a feature that is neither a vector nor maps.
        ValueError: bad arguments, arguments without effect, features without variance, more
            clusters than images.
        ImageError, FileNotFoundError, StoreError, DiskError: as `open_images` and
            `extract_features`.
        DivergenceError: the loss became infinite.
        ImportError: `unpaired` is "transport" and POT is not installed.
    """
    check_host(model)
    check_choice("depth", depth, DEPTHS)
    check_choice("precision", precision, ("auto", "fp32", "bf16"))
    check_choice("on_error", on_error, ("raise", "skip"))
    _check_settings(held_out, minutes, recipe=recipe, block_recipe=block_recipe)
    for name, number in (("crops", crops), ("batch_size", batch_size)):
        if number is not None:
            check_integer(name, number, at_least=0 if name == "crops" else 1)
    counts = (clusters,) if isinstance(clusters, int | str | None) else tuple(clusters)
    _check_clusters(counts, objective)
    if depth != "auto":
        refuse_void(f"it is of depth='auto', not {depth!r}", minutes=minutes)
    if lr_images is None:
        refuse_void("it is of lr_images, of which there are none", unpaired=unpaired)
    cache = Path(cache or default_cache())
    share = HELD_OUT if held_out is None else held_out
    if detector_host(model) is not None:
        from featxfer_integrations.fit_detector import DetectorTask, fit_detector

        refuse_void(
            "it is not for detectors",
            lr_images=lr_images,
            crops=crops,
            preprocessing=preprocessing,
            batch_size=batch_size,
        )
        if len(counts) > 1:
            raise ValueError(f"clusters: got {counts}, wanted one number for a detector")
        of_detector = fit_detector(
            DetectorTask(
                model=model,
                images=open_images(images),
                views=_views(
                    ScaledDegradation() if degradation is None else degradation, ScaledDegradation
                ),
                depth=depth,
                where=where,
                at=at,
                clusters=counts[0],
                objective=objective,
                warm_start=warm_start,
                recipe=recipe,
                block_recipe=block_recipe,
                minutes=minutes,
                held_out=share,
                cache=cache,
                precision=precision,
                on_error=on_error,
                seed=seed,
            )
        )
        warn_if_useless(of_detector)
        return of_detector
    place = _place(model, where)
    backbone = host_backbone(model, place, preprocessing)
    if degradation is None:
        degradation = _own_view(model, backbone.preprocessing)
    views = _views(degradation, Degradation)
    of_blocks = {"block_recipe": block_recipe, "crops": crops}
    if lr_images is not None:
        of_pairs = {"minutes": minutes, "held_out": held_out, "at": at}
        refuse_void("lr_images train a head alone, without pairs", **of_pairs, **of_blocks)
        _check_unpaired(unpaired or UNPAIRED_DEFAULT, depth, len(views), attached_at(model, place))
    if depth == "auto" and where is not None:
        why = "where= with depth='auto' trains a head alone; for blocks say depth='deep'"
        refuse_void(why, at=at, minutes=minutes)
    _check_attached(attached_at(model, place), counts, objective, warm_start)
    plans = [] if lr_images is not None else plan_blocks(model, place, depth, where, at)
    if not plans:
        refuse_void("a head alone is trained here", at=at, **of_blocks)
    elif depth == "deep":
        _check_on_top(model, place, recipe, warm_start)
    _check_other_blocks(model, plans)
    place = _placed(model, place, views[0].hr_size)
    side = views[0].hr_size
    prove(model, [*(plan.place for plan in plans), place], black_image(model, side, side))
    task = _Task(
        model=model,
        place=place,
        backbone=dataclasses.replace(backbone, module=FeatureAt(model, place)),
        images=open_images(images),
        views=views,
        at=at,
        clusters=counts,
        objective=objective or OBJECTIVE,
        warm_start=warm_start,
        lr_images=(
            None if lr_images is None else (open_images(lr_images), unpaired or UNPAIRED_DEFAULT)
        ),
        recipe=recipe,
        block_recipe=block_recipe,
        crops=crops,
        minutes=(MINUTES if minutes is None else minutes) if depth == "auto" else None,
        held_out=share,
        seed=seed,
        cache=cache,
        precision=precision,
        options={"batch_size": BATCH_SIZE if batch_size is None else batch_size},
        on_error=on_error,
    )
    trained = _fit_deep(task, plans) if plans else None
    if trained is None:
        _check_other_blocks(model, [])
        trained = _fit_pooled(task)
    for module, modules_place in trained.modules:
        put(model, modules_place, module)
    if trained.checkpoint is not None:
        trained.checkpoint.unlink(missing_ok=True)
    warn_if_useless(trained.fit)
    return trained.fit


@dataclass(frozen=True)
class _Task:
    """What a fit is asked for, after all checks; `minutes` is None where blocks have to be."""

    model: nn.Module
    place: Place
    backbone: Backbone
    images: Images
    views: Sequence[Degradation]
    at: str | Sequence[str] | None
    clusters: tuple[int | None, ...]
    objective: str
    warm_start: bool
    lr_images: tuple[Images, str] | None
    recipe: Recipe | None
    block_recipe: Recipe | None
    crops: int | None
    minutes: float | None
    held_out: float
    seed: int
    cache: Path
    precision: str
    on_error: str
    options: dict[str, Any]

    @property
    def pooled_precision(self) -> str:
        """Of features after pool5."""
        return "fp32" if self.precision == "auto" else self.precision

    def ks(self, images: int) -> tuple[int, ...]:
        """The numbers of clusters for so many images."""
        return tuple(k or min(100, max(1, images // 10)) for k in self.clusters)

    def card(self, place: Place, fit: TransferFit, log: Sequence[EpochLog], **details: Any) -> Card:
        """The card of a module."""
        return Card(
            self.backbone.name,
            backbone_sha256(self.model, place),
            tuple(self.views) if self.lr_images is None else (),
            {
                "host": self.backbone.host,
                "preprocessing": dataclasses.asdict(self.backbone.preprocessing),
                "depth": fit.depth,
                "images": fit.images,
                "images_fingerprint": self.images.fingerprint,
                "images_depth": self.images.depth,
                "objective": self.objective,
                **self.place.described,
                "seed": self.seed,
                "diagnostics": [part.summary() for part in fit.diagnostics],
                "held_out": [
                    {**dataclasses.asdict(part), "cosine_gap_recovered": part.cosine_gap_recovered}
                    for part in fit.held_out
                ],
                "final_loss": log[-1].loss,
                "versions": software_versions(),
                **weights_details(self.model, place),
                **details,
            },
        )


@dataclass(frozen=True)
class _Trained:
    """The report, what goes where, and the checkpoint that is needed until it is there."""

    fit: TransferFit
    modules: list[tuple[TransferModule, Place]]
    checkpoint: Path | None = None


def _fit_pooled(task: _Task) -> _Trained:
    """A head alone, on features after pool5."""
    if task.lr_images is not None:
        return _fit_unpaired(task, *task.lr_images)
    precision = task.pooled_precision
    features = _of_the_same_images(
        [
            extract_features(
                task.backbone,
                task.images,
                view,
                task.cache / "features",
                precision=precision,
                on_error=task.on_error,
                **task.options,
            )
            for view in task.views
        ]
    )
    skipped = {name: reason for part in features for name, reason in part.skipped.items()}
    check_readable("images", skipped, len(task.images), task.on_error)
    hr, lr = features[0].hr, [part.lr for part in features]
    train, test = split(len(hr), task.held_out, task.seed)
    head = _new_head(task, hr.shape[1], len(train))
    recipe = task.recipe or (FEATURES_RECIPE if head.output == "features" else Recipe())
    clusterings = _clusterings(task, head, hr[train])
    log = _train(task, head, hr[train], [rows[train] for rows in lr], recipe, clusterings)
    clustering = clusterings[0]
    judged = [] if head.output == "clusters" or not len(test) else [*lr, hr]
    through = [head.transfer(rows[test]) for rows in judged]
    fit = TransferFit(
        log,
        [
            diagnose(head.scale(hr[train]), head.scale(rows[train]), clustering.centroids)
            for rows in lr
        ],
        reports(hr[test], [rows[test] for rows in lr], through, clustering),
        len(train),
        skipped,
    )
    head.card = task.card(
        task.place,
        fit,
        log,
        recipe=recipe.to_dict(),
        precision=precision,
    )
    return _Trained(fit, [(head, task.place)])


def _of_the_same_images(features: Sequence[Features]) -> list[Features]:
    """Of several degradations: without the images that one of them lacks, so that rows pair up."""
    if all(part.ids == features[0].ids for part in features):
        return list(features)
    known = set(features[0].ids).intersection(*(part.ids for part in features[1:]))
    kept = []
    for part in features:
        rows = [row for row, name in enumerate(part.ids) if name in known]
        ids = tuple(part.ids[row] for row in rows)
        kept.append(dataclasses.replace(part, ids=ids, hr=part.hr[rows], lr=part.lr[rows]))
    align([Rows(part.ids, part.hr) for part in kept])
    return kept


def _fit_deep(task: _Task, plans: Sequence[BlockPlan]) -> _Trained | None:
    """Blocks through the frozen layers behind them, then the head, if one is attached.

    None where training would take longer than it may.
    """
    model, first, view = task.model, plans[0].place, task.views[0]
    try:
        rest, shape = open_rest(model, first, task.place, view.hr_size, task.precision)
    except AttachError as error:
        if task.minutes is None:
            raise
        _give_blocks_up(task, str(error))
        return None
    blocks = new_blocks(model, plans, task.seed)
    for plan in plans:
        rest.attach(plan.place, blocks[plan.module])
    block_recipe = task.block_recipe or BLOCK_RECIPE
    kept = len(split(len(task.images), task.held_out, task.seed)[0])
    seconds = estimate_seconds(rest, shape, block_recipe, epoch_rows(kept, len(task.views)))
    if task.minutes is not None and seconds > 60 * task.minutes:
        _give_blocks_up(
            task,
            f"blocks would train for about {duration(seconds)}, over minutes={task.minutes:g}",
        )
        return None
    _check_on_top(model, task.place, task.recipe, task.warm_start)
    crops = enough_crops(len(task.images)) if task.crops is None else task.crops
    size = maps_bytes(shape, len(task.images), len(task.views), crops, rest.precision)
    tell(
        f"training blocks takes about {duration(seconds)}, after their maps are taken: "
        f"{size / 1e6:,.0f} MB in {task.cache / 'maps'}"
    )
    maps = extract_maps(
        maps_backbone(task.backbone, model, first),
        task.images,
        task.views,
        task.cache / "maps",
        shape,
        crops=crops,
        precision=rest.precision,
        on_error=task.on_error,
        **task.options,
    )
    train, test = split(len(maps.hr[0]), task.held_out, task.seed)
    with epochs(block_recipe, "training blocks") as advance:
        deep = train_blocks(
            rest,
            plans,
            blocks,
            maps,
            train,
            test,
            clusters=task.ks(len(train)),
            objective=task.objective,
            seed=task.seed,
            recipe=block_recipe,
            checkpoint=lambda key: task.cache / "training" / f"{key}.safetensors",
            callback=advance,
        )
    modules: list[tuple[TransferModule, Place]] = [(blocks[p.module], p.place) for p in plans]
    through = [pair[0][test] for pair in (*deep.lr_through, deep.hr_through)]
    log: list[EpochLog] = []
    recipe = task.recipe or FEATURES_RECIPE
    if attached_at(model, task.place) is not None:
        head, log = _fit_on_top(task, deep, train, recipe)
        through = [head.transfer(rows) for rows in through if len(test)]
        modules.append((head, task.place))
    hr = deep.hr[0]
    fit = TransferFit(
        log,
        [diagnose(hr[train], rows[train], deep.clusterings[0].centroids) for rows in deep.lr],
        reports(hr[test], [rows[test] for rows in deep.lr], through, deep.clusterings[0]),
        len(train),
        dict(maps.skipped),
        "deep",
        deep.log,
    )
    for plan in plans:
        blocks[plan.module].card = task.card(
            plan.place,
            fit,
            deep.log,
            recipe=block_recipe.to_dict(),
            precision=rest.precision,
            at=plan.module,
        )
    if log:
        head.card = task.card(
            task.place,
            fit,
            log,
            recipe=recipe.to_dict(),
            precision=rest.precision,
            after=[plan.module for plan in plans],
        )
    return _Trained(fit, modules, deep.checkpoint)


def _give_blocks_up(task: _Task, reason: str) -> None:
    """Says why a head alone is trained; `ValueError` where the caller asks for more of blocks."""
    asked = {"at": task.at, "block_recipe": task.block_recipe, "crops": task.crops}
    refuse_void(f"a head alone would be trained, since {reason}; say depth='deep'", **asked)
    tell(f"a head alone: {reason}")


def _check_on_top(model: nn.Module, place: Place, recipe: Recipe | None, warm_start: bool) -> None:
    """Raises `ValueError` for what is of a head where blocks are trained and no head is there."""
    if attached_at(model, place) is None:
        refuse_void(
            "blocks are trained, and no head is attached; attach_transfer(model) puts one there, "
            "depth='pooled' trains a head alone",
            recipe=recipe,
            warm_start=warm_start or None,
        )


def _fit_on_top(
    task: _Task, deep: DeepFit, train: Tensor, recipe: Recipe
) -> tuple[FeatureTransferHead, list[EpochLog]]:
    """A head on features that come out of trained blocks."""
    head = _new_head(task, deep.hr[0].shape[1], len(train))
    wanted = torch.cat([rows[train] for rows in deep.hr])
    given = [
        torch.cat([rows[train] for rows in pair]) for pair in (*deep.lr_through, deep.hr_through)
    ]
    return head, _train(task, head, wanted, given, recipe, deep.clusterings)


def _fit_unpaired(task: _Task, lr_images: Images, unpaired: str) -> _Trained:
    """A head alone, on the features of LR images that have no HR image."""
    precision, view = task.pooled_precision, task.views[0]
    rows = [
        fill_stores(
            task.backbone,
            images,
            view,
            task.cache / "features",
            precision=precision,
            views=["hr"],
            on_error=task.on_error,
            **task.options,
        )["hr"].read()
        for images in (task.images, lr_images)
    ]
    for name, part, images in zip(
        ("images", "lr_images"), rows, (task.images, lr_images), strict=True
    ):
        check_readable(name, part.skipped, len(images), task.on_error)
    hr, lr = (part.features.float() for part in rows)
    head = _new_head(task, hr.shape[1], len(hr))
    recipe = task.recipe or FEATURES_RECIPE
    clusterings = _clusterings(task, head, hr)
    targets = unpaired_targets(unpaired, hr, lr, clusterings[0])
    with epochs(recipe, "training the head") as advance:
        log = fit_features_head(
            head,
            hr,
            [lr],
            clusterings,
            targets=[targets],
            objective=task.objective,
            warm_start=task.warm_start,
            recipe=recipe,
            seed=task.seed,
            callback=advance,
        )
    fit = TransferFit(log, [], [], len(lr), {**rows[0].skipped, **rows[1].skipped})
    head.card = task.card(
        task.place,
        fit,
        log,
        recipe=recipe.to_dict(),
        precision=precision,
        unpaired=unpaired,
        lr_images_fingerprint=lr_images.fingerprint,
    )
    return _Trained(fit, [(head, task.place)])


def backbone_of(
    model: nn.Module, *, where: str | None = None, preprocessing: Preprocessing | None = None
) -> Backbone:
    """The model up to the place of its head, without the head, as a frozen feature extractor.

    For plain features of a model with its classifier (`extract_features`), its preprocessing, and
    the name and hash that a `Card` wants. Arguments and errors as those of `fit_transfer`.
    """
    check_host(model)
    return host_backbone(model, _place(model, where), preprocessing)


def host_backbone(
    model: nn.Module, place: Place, preprocessing: Preprocessing | None = None
) -> Backbone:
    """The model up to `place`, without what is attached, as a frozen feature extractor."""
    host = host_of(model)
    if preprocessing is None:
        preprocessing = Preprocessing() if host is None else host.preprocessing(model)
    name = type(model).__name__ if host is None else host.model_name(model)
    return _HostBackbone(
        FeatureAt(model, place), preprocessing, name, "the model's own", libraries(model)
    )


class FeatureAt(nn.Module):
    """Images `(n, 3, h, w)` -> the plain feature at a place, `(n, d)`; maps are averaged."""

    def __init__(self, model: nn.Module, place: Place) -> None:
        super().__init__()
        self.model = model
        self.place = place

    def forward(self, images: Tensor) -> Tensor:
        """What arrives at the place when the model runs.

        Where channels are in maps is asked once, of a square image: others may not tell.
        """
        like = host_parameter(self.model)
        images = images if like is None else images.to(like.dtype)
        feature = take_feature(self.model, self.place, images)
        if feature.ndim == 4 and self.place.layout is None:
            side = min(images.shape[2:])
            square = images.new_zeros(1, images.shape[1], side, side)
            self.place = with_layout(self.model, self.place, square)
        return pooled_feature(feature, self.place)


class _HostBackbone(Backbone):
    """Its hashes leave out what is attached and the classifier: features do not hang on them."""

    module: FeatureAt

    @property
    def weights_sha256(self) -> str:
        return backbone_sha256(self.module.model, self.module.place)

    @property
    def architecture_sha256(self) -> str:
        model, place = self.module.model, self.module.place
        return sha256_of([describe_module(model, leave_out=CHILD), place.name])


def _place(model: nn.Module, where: str | None) -> Place:
    """The named place, that of the one head which is attached, or where a new one would go."""
    if where is None and is_attached(model):
        transfers = transfers_of(model)
        heads = [
            p for n, p in transfers.places.items() if isinstance(transfers[n], FeatureTransferHead)
        ]
        if len(heads) == 1:
            return heads[0]
    place = find_place(model, where=where)
    if not isinstance(attached_at(model, place), FeatureTransferHead | None):
        raise AttachError(f"where: a block is attached at {place.name!r}, wanted a head")
    return place


def _placed(model: nn.Module, place: Place, size: int) -> Place:
    """The place with its layout; `AttachError` where such an image gives no feature."""
    like = host_parameter(model)
    image = torch.zeros(1, 3, size, size, device="cpu")
    image = image if like is None else image.to(like.device, like.dtype)
    try:
        return with_layout(model, dataclasses.replace(place, layout=None), image)
    except AttachError:
        raise
    except Exception as error:  # whatever a foreign model raises
        raise AttachError(
            f"degradation: the model does not run on an RGB image of {size} x {size} "
            f"({type(error).__name__}: {error}); set hr_size to a size that it takes, and put a "
            "module around one that takes other than 3 channels"
        ) from error


def _own_view(model: nn.Module, preprocessing: Preprocessing) -> Degradation:
    """Of the size that the model is made for."""
    host = host_of(model)
    size = preprocessing.input_size
    if size is None:
        size = INPUT_SIZE if host is None else host.input_size(model)
    return Degradation(hr_size=size, lr_size=min(LR_SIZE, size))


def _views(degradation: BaseDegradation | Sequence[BaseDegradation], kind: type[D]) -> list[D]:
    """Degradations of one kind and, where they have a size, of one size."""
    if not isinstance(degradation, BaseDegradation | Sequence):
        raise TypeError(f"degradation: got {degradation!r}, wanted a {kind.__name__} or several")
    several = [degradation] if isinstance(degradation, BaseDegradation) else list(degradation)
    if not several:
        raise ValueError("degradation: got none, wanted at least one")
    views = [view for view in several if isinstance(view, kind)]
    if len(views) < len(several):
        names = ", ".join(type(view).__name__ for view in several)
        raise ValueError(f"degradation: got {names}, wanted {kind.__name__} for this model")
    twice = next((view for view in views if views.count(view) > 1), None)
    if twice is not None:
        raise ValueError(f"degradation: got {twice.to_json()} twice, wanted it once")
    sizes = {view.hr_size for view in views if isinstance(view, Degradation)}
    if len(sizes) > 1:
        raise ValueError(f"degradation: got hr_size {sorted(sizes)}, wanted one for all")
    return views


def _check_settings(
    held_out: float | None, minutes: float | None, **recipes: Recipe | None
) -> None:
    if held_out is not None and not (isinstance(held_out, int | float) and 0 <= held_out < 1):
        raise ValueError(f"held_out: got {held_out!r}, wanted a share in [0, 1)")
    if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
        raise ValueError(f"minutes: got {minutes!r}, wanted > 0")
    for name, recipe in recipes.items():
        if not isinstance(recipe, Recipe | None):
            raise TypeError(f"{name}: got {type(recipe).__name__}, wanted a Recipe")


def _check_clusters(clusters: Sequence[int | None], objective: str | None) -> None:
    check_choice("objective", objective or OBJECTIVE, OBJECTIVES)
    if not clusters:
        raise ValueError("clusters: got none, wanted at least one number")
    for count in clusters:
        if count is not None:
            check_integer("clusters", count, at_least=1)
    if len(clusters) > 1 and objective in WITHOUT_CLUSTERS:
        raise ValueError(
            f"clusters: got {', '.join(map(str, clusters))} with objective={objective!r}, which "
            "looks at none; wanted one number, for the report"
        )


def _check_unpaired(
    unpaired: str, depth: str, degradations: int, attached: TransferModule | None
) -> None:
    """Of fits with `lr_images`."""
    check_choice("unpaired", unpaired, UNPAIRED)
    if depth == "deep":
        raise ValueError("lr_images: got some with depth='deep', which needs pairs")
    if degradations > 1:
        raise ValueError(
            f"degradation: got {degradations} with lr_images, which take its hr_size alone; "
            "wanted one"
        )
    if attached is not None and gives_clusters(attached):
        raise AttachError('lr_images: a head with output "clusters" is attached, wanted "features"')
    if unpaired == "transport":
        require_pot()


def _check_attached(
    attached: TransferModule | None,
    clusters: Sequence[int | None],
    objective: str | None,
    warm_start: bool,
) -> None:
    """Raises `ValueError` for what a head with output "clusters" cannot follow."""
    if attached is None or not gives_clusters(attached):
        return
    refuse_void(
        'the attached head has output "clusters" and is trained on pseudo-labels',
        objective=objective,
        warm_start=warm_start or None,
    )
    k = attached.config["clusters"]
    if tuple(clusters) not in ((None,), (k,)):
        got = ", ".join(map(str, clusters))
        raise ValueError(f"clusters: got {got}, the attached head gives {k} logits")


def _check_other_blocks(model: nn.Module, plans: Sequence[BlockPlan]) -> None:
    """Raises `AttachError` where blocks are attached that the training would not know of."""
    if not is_attached(model):
        return
    transfers, known = transfers_of(model), {plan.place.name for plan in plans}
    others = [
        name
        for name in transfers
        if isinstance(transfers[name], FeatureTransferBlock) and name not in known
    ]
    if others:
        raise AttachError(
            f"model: blocks are attached at {', '.join(others)}, and what is trained now would be "
            "trained without them; detach_transfer first, or name all places by at="
        )


def _new_head(task: _Task, width: int, images: int) -> FeatureTransferHead:
    """An untrained head in the sizes of the one that is attached, if one is."""
    attached = attached_at(task.model, task.place)
    config = {} if attached is None else attached.config
    k = task.ks(images)[0]
    if config.get("output") == "clusters":
        k = config["clusters"]
    with host_device(task.model):
        return FeatureTransferHead(
            **{**config, "in_features": width, "clusters": k}, seed=task.seed
        )


def _clusterings(task: _Task, head: FeatureTransferHead, hr: Tensor) -> list[Clustering]:
    """Of HR features as the paper's head has them, or of their directions."""
    if head.output == "clusters":
        return [kmeans(head.scale(hr), len(head.centroids), seed=task.seed)]
    directions = F.normalize(hr, dim=1)
    return [kmeans(directions, k, seed=task.seed) for k in task.ks(len(hr))]


def _train(
    task: _Task,
    head: FeatureTransferHead,
    hr: Tensor,
    lr: Sequence[Tensor],
    recipe: Recipe,
    clusterings: Sequence[Clustering],
) -> list[EpochLog]:
    with epochs(recipe, "training the head") as advance:
        if head.output == "features":
            return fit_features_head(
                head,
                hr,
                lr,
                clusterings,
                objective=task.objective,
                warm_start=task.warm_start,
                recipe=recipe,
                seed=task.seed,
                callback=advance,
            )
        rows, repeated = torch.cat(list(lr)), hr.repeat(len(lr), 1)
        head.set_input_statistics(rows)
        return fit_head(
            head, repeated, rows, clusterings[0], recipe=recipe, seed=task.seed, callback=advance
        )
