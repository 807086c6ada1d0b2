"""fit_transfer: a model and unlabelled HR images in, the model with a trained head out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featxfer import (
    BLOCK_RECIPE,
    FEATURES_RECIPE,
    OBJECTIVES,
    UNPAIRED,
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
    unpaired_targets,
)
from featxfer._checks import check_choice, check_integer
from featxfer.backbone import describe_module, sha256_of
from featxfer.features import default_cache, fill_stores, software_versions
from featxfer.hub import TransferModule
from featxfer.images import ImageSource
from featxfer.labels import Clustering
from featxfer.unpaired import require_pot
from featxfer_integrations._attach import (
    CHILD,
    AttachError,
    Place,
    attached_at,
    channel_axis,
    check_host,
    gives_clusters,
    host_parameter,
    is_attached,
    take_feature,
    transfers_of,
)
from featxfer_integrations._fitting import (
    TransferFit,
    duration,
    epochs,
    put,
    reports,
    split,
    tell,
    warn_if_useless,
)
from featxfer_integrations.attach import (
    backbone_sha256,
    detector_host,
    find_place,
    host_of,
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
    objective: str = "prototypes",
    warm_start: bool = False,
    lr_images: ImageSource | None = None,
    unpaired: str = "transport",
    recipe: Recipe | None = None,
    block_recipe: Recipe | None = None,
    crops: int | None = None,
    minutes: float = 30.0,
    held_out: float = 0.1,
    preprocessing: Preprocessing | None = None,
    cache: str | Path | None = None,
    batch_size: int = 64,
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

    Args:
        model: as `attach_transfer` takes it.
        images: a folder, an ImageFolder tree, a list of files or a map-style Dataset, see
            `featxfer.open_images`; 100 images at the least make sense, labels are not looked at.
        degradation: how LR views are made, by default `Degradation()`, of detectors
            `ScaledDegradation()`; several are served by one head.
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
        objective: a name of `featxfer.OBJECTIVES`, for heads with output "features" and blocks.
        warm_start: whether the head begins with what ridge regression finds.
        lr_images: real LR images, of which no HR image is at hand, in the place of a degradation:
            they need not show what `images` show. They are resized to the model's size and the
            head is trained towards targets that are made without pairs; depth "pooled" alone.
        unpaired: how: a name of `featxfer.UNPAIRED`. Used with `lr_images`.
        recipe: by default `FEATURES_RECIPE`, or the paper's `Recipe()` for output "clusters"; for a
            detector `fit_detector.BOX_RECIPE`.
        block_recipe: by default `BLOCK_RECIPE`; for a detector `detector_blocks.DETECTOR_RECIPE`.
        crops: of each image, for blocks: random crops that are trained on besides the image and its
            mirror image, as many maps more in the cache; by default as many as bring the views of
            all images to about 10,000, 4 at the most.
        minutes: of depth "auto": the longest that blocks may train.
        held_out: share of the images, in [0, 1), that is left out of training for the report. For
            blocks they also tell, without labels, which epoch's weights are best, so the report of
            blocks is a little better than other images would have it.
        preprocessing: by default what the model says (timm) or ImageNet's mean and std.
        cache: folder for features; by default `$FEATXFER_CACHE` or `~/.cache/featxfer`.
        batch_size: images a forward pass; detectors take them one by one.
        precision: "fp32", or "bf16" for autocast; "auto": "bf16" for maps and blocks where the
            hardware multiplies in it, "fp32" for the rest.
        on_error: "raise" at an image that cannot be read, or "skip" it and list it.
        seed: of the clusters, the head, the order of rows and the choice of held-out images.

    Raises:
        AttachError: as `attach_transfer`; with depth "deep" no stage of maps that a block fits,
            or a feature that hangs on more than these maps; blocks are attached elsewhere, which
            what is trained now would not know of.
        ValueError: bad arguments, features without variance, more clusters than images.
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
    if crops is not None:
        check_integer("crops", crops, at_least=0)
    counts = (clusters,) if isinstance(clusters, int | str | None) else tuple(clusters)
    _check_clusters(counts)
    cache = Path(cache or default_cache())
    if detector_host(model) is not None:
        from featxfer_integrations.fit_detector import DetectorTask, fit_detector

        check_choice("objective", objective, OBJECTIVES)
        for name, value in (
            ("lr_images", lr_images),
            ("crops", crops),
            ("preprocessing", preprocessing),
        ):
            if value is not None:
                raise ValueError(f"{name}: got {value!r}, which is not for detectors")
        if len(counts) > 1:
            raise ValueError(f"clusters: got {counts}, wanted one number for a detector")
        of_detector = fit_detector(
            DetectorTask(
                model=model,
                images=open_images(images),
                views=_views(degradation, ScaledDegradation),
                depth=depth,
                where=where,
                at=at,
                clusters=counts[0],
                objective=objective,
                warm_start=warm_start,
                recipe=recipe,
                block_recipe=block_recipe,
                minutes=minutes,
                held_out=held_out,
                cache=cache,
                precision=precision,
                on_error=on_error,
                seed=seed,
            )
        )
        warn_if_useless(of_detector)
        return of_detector
    place = _place(model, where)
    views = _views(degradation, Degradation)
    names = (objective, unpaired, None if lr_images is None else depth)
    _check_objective(*names, attached_at(model, place))
    plans = [] if lr_images is not None else plan_blocks(model, place, depth, where, at)
    _check_other_blocks(model, plans)
    opened = open_images(images)
    task = _Task(
        model=model,
        place=place,
        backbone=host_backbone(model, place, preprocessing),
        images=opened,
        views=views,
        clusters=counts,
        objective=objective,
        warm_start=warm_start,
        lr_images=None if lr_images is None else (open_images(lr_images), unpaired),
        held_out=held_out,
        seed=seed,
        cache=cache,
        precision=precision,
        options={"batch_size": batch_size, "on_error": on_error},
    )
    trained = None
    if plans:
        longest = minutes if depth == "auto" else None
        trained = _fit_deep(task, plans, recipe, block_recipe, crops, longest)
    if trained is None:
        _check_other_blocks(model, [])
        trained = _fit_pooled(task, recipe)
    for module, modules_place in trained.modules:
        put(model, modules_place, module)
    warn_if_useless(trained.fit)
    return trained.fit


@dataclass(frozen=True)
class _Task:
    """What a fit is asked for, after all checks."""

    model: nn.Module
    place: Place
    backbone: Backbone
    images: Images
    views: Sequence[Degradation]
    clusters: tuple[int | None, ...]
    objective: str
    warm_start: bool
    lr_images: tuple[Images, str] | None
    held_out: float
    seed: int
    cache: Path
    precision: str
    options: dict[str, Any]

    @property
    def pooled_precision(self) -> str:
        """Of features after pool5."""
        return "fp32" if self.precision == "auto" else self.precision

    def ks(self, images: int) -> tuple[int, ...]:
        """The numbers of clusters for so many images."""
        return tuple(k or min(100, max(1, images // 10)) for k in self.clusters)

    def card(self, fit: TransferFit, log: Sequence[EpochLog], **details: Any) -> Card:
        """The card of a module."""
        return Card(
            self.backbone.name,
            str(details.pop("sha256")),
            tuple(self.views) if self.lr_images is None else (),
            {
                "host": self.backbone.host,
                "preprocessing": dataclasses.asdict(self.backbone.preprocessing),
                "depth": fit.depth,
                "images": fit.images,
                "images_fingerprint": self.images.fingerprint,
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
                **details,
            },
        )


@dataclass(frozen=True)
class _Trained:
    """The report, and what goes where."""

    fit: TransferFit
    modules: list[tuple[TransferModule, Place]]


def _fit_pooled(task: _Task, recipe: Recipe | None) -> _Trained:
    """A head alone, on features after pool5."""
    if task.lr_images is not None:
        return _fit_unpaired(task, recipe, *task.lr_images)
    precision = task.pooled_precision
    features = [
        extract_features(
            task.backbone,
            task.images,
            view,
            task.cache / "features",
            precision=precision,
            **task.options,
        )
        for view in task.views
    ]
    hr, lr = features[0].hr, [part.lr for part in features]
    train, test = split(len(hr), task.held_out, task.seed)
    head = _new_head(task, hr.shape[1], len(train))
    recipe = recipe or (FEATURES_RECIPE if head.output == "features" else Recipe())
    clusterings = _clusterings(task, head, hr[train])
    log = _train(task, head, hr[train], [rows[train] for rows in lr], recipe, clusterings)
    clustering = clusterings[0]
    through = [] if head.output == "clusters" else [head.transfer(rows[test]) for rows in (*lr, hr)]
    fit = TransferFit(
        log,
        [diagnose(hr[train], rows[train], clustering.centroids) for rows in lr],
        reports(hr[test], [rows[test] for rows in lr], through, clustering),
        len(train),
        features[0].skipped,
    )
    head.card = task.card(
        fit,
        log,
        sha256=task.backbone.weights_sha256,
        recipe=recipe.to_dict(),
        precision=precision,
    )
    return _Trained(fit, [(head, task.place)])


def _fit_deep(
    task: _Task,
    plans: Sequence[BlockPlan],
    recipe: Recipe | None,
    block_recipe: Recipe | None,
    crops: int | None,
    minutes: float | None,
) -> _Trained | None:
    """Blocks through the frozen layers behind them, then the head, if one is attached.

    None where training would take longer than it may.
    """
    model, first, view = task.model, plans[0].place, task.views[0]
    try:
        rest, shape = open_rest(model, first, task.place, view.hr_size, task.precision)
    except AttachError as error:
        if minutes is None:
            raise
        tell(f"a head alone: {error}")
        return None
    blocks = new_blocks(model, plans, task.seed)
    for plan in plans:
        rest.attach(plan.place, blocks[plan.module])
    block_recipe = block_recipe or BLOCK_RECIPE
    kept = len(split(len(task.images), task.held_out, task.seed)[0])
    seconds = estimate_seconds(rest, shape, block_recipe, epoch_rows(kept, len(task.views)))
    if minutes is not None and seconds > 60 * minutes:
        tell(
            f"a head alone: blocks would train for about {duration(seconds)}, "
            f"over minutes={minutes:g}"
        )
        return None
    crops = enough_crops(len(task.images)) if crops is None else crops
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
    if attached_at(model, task.place) is not None:
        recipe = recipe or FEATURES_RECIPE
        head, log = _fit_on_top(task, deep, train, recipe)
        through = [head.transfer(rows) for rows in through]
        modules.append((head, task.place))
    hr = deep.hr[0]
    fit = TransferFit(
        log,
        [diagnose(hr[train], rows[train], deep.clusterings[0].centroids) for rows in deep.lr],
        reports(hr[test], [rows[test] for rows in deep.lr], through, deep.clusterings[0]),
        len(train),
        dict(maps.hr[0].skipped),
        "deep",
        deep.log,
    )
    for plan in plans:
        blocks[plan.module].card = task.card(
            fit,
            deep.log,
            sha256=backbone_sha256(model, plan.place),
            recipe=block_recipe.to_dict(),
            precision=rest.precision,
            at=plan.module,
        )
    if log:
        assert recipe is not None
        head.card = task.card(
            fit,
            log,
            sha256=task.backbone.weights_sha256,
            recipe=recipe.to_dict(),
            precision=rest.precision,
            after=[plan.module for plan in plans],
        )
    return _Trained(fit, modules)


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


def _fit_unpaired(task: _Task, recipe: Recipe | None, lr_images: Images, unpaired: str) -> _Trained:
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
            **task.options,
        )["hr"].read()
        for images in (task.images, lr_images)
    ]
    hr, lr = (part.features.float() for part in rows)
    head = _new_head(task, hr.shape[1], len(hr))
    recipe = recipe or FEATURES_RECIPE
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
        fit,
        log,
        sha256=task.backbone.weights_sha256,
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
    library = type(model).__module__.partition(".")[0]
    with suppress(PackageNotFoundError):
        library = f"{library} {version(library)}"
    return _HostBackbone(FeatureAt(model, place), preprocessing, name, "the model's own", library)


class FeatureAt(nn.Module):
    """Images `(n, 3, h, w)` -> the plain feature at a place, `(n, d)`; maps are averaged."""

    def __init__(self, model: nn.Module, place: Place) -> None:
        super().__init__()
        self.model = model
        self.place = place

    def forward(self, images: Tensor) -> Tensor:
        """What arrives at the place when the model runs."""
        like = host_parameter(self.model)
        feature = take_feature(
            self.model, self.place, images if like is None else images.to(like.dtype)
        )
        if feature.ndim == 4:
            return feature.mean((2, 3) if channel_axis(tuple(feature.shape)) == 1 else (1, 2))
        return feature


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


def _views(
    degradation: BaseDegradation | Sequence[BaseDegradation] | None, kind: type[D]
) -> list[D]:
    """Degradations of one kind and, where they have a size, of one size."""
    if degradation is None:
        return [kind()]
    if not isinstance(degradation, BaseDegradation | Sequence):
        raise TypeError(f"degradation: got {degradation!r}, wanted a {kind.__name__} or several")
    several = [degradation] if isinstance(degradation, BaseDegradation) else list(degradation)
    if not several:
        raise ValueError("degradation: got none, wanted at least one")
    views = [view for view in several if isinstance(view, kind)]
    if len(views) < len(several):
        names = ", ".join(type(view).__name__ for view in several)
        raise ValueError(f"degradation: got {names}, wanted {kind.__name__} for this model")
    sizes = {view.hr_size for view in views if isinstance(view, Degradation)}
    if len(sizes) > 1:
        raise ValueError(f"degradation: got hr_size {sorted(sizes)}, wanted one for all")
    return views


def _check_settings(held_out: float, minutes: float, **recipes: Recipe | None) -> None:
    if not isinstance(held_out, int | float) or not 0 <= held_out < 1:
        raise ValueError(f"held_out: got {held_out!r}, wanted a share in [0, 1)")
    if not isinstance(minutes, int | float) or not minutes > 0:
        raise ValueError(f"minutes: got {minutes!r}, wanted > 0")
    for name, recipe in recipes.items():
        if not isinstance(recipe, Recipe | None):
            raise TypeError(f"{name}: got {type(recipe).__name__}, wanted a Recipe")


def _check_clusters(clusters: Sequence[int | None]) -> None:
    if not clusters:
        raise ValueError("clusters: got none, wanted at least one number")
    for count in clusters:
        if count is not None:
            check_integer("clusters", count, at_least=1)


def _check_objective(
    objective: str, unpaired: str, depth: str | None, attached: TransferModule | None
) -> None:
    """`depth` is None where images are paired."""
    check_choice("objective", objective, OBJECTIVES)
    check_choice("unpaired", unpaired, UNPAIRED)
    if depth == "deep":
        raise ValueError("lr_images: got some with depth='deep', which needs pairs")
    if attached is not None and gives_clusters(attached) and depth is not None:
        raise AttachError('lr_images: a head with output "clusters" is attached, wanted "features"')
    if depth is not None and unpaired == "transport":
        require_pot()


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
        if task.clusters not in ((None,), (k,)):
            got = ", ".join(map(str, task.clusters))
            raise ValueError(f"clusters: got {got}, the attached head gives {k} logits")
    return FeatureTransferHead(**{**config, "in_features": width, "clusters": k}, seed=task.seed)


def _clusterings(task: _Task, head: FeatureTransferHead, hr: Tensor) -> list[Clustering]:
    """Of HR features as the paper's head has them, or of their directions."""
    if head.output == "clusters":
        return [kmeans(hr, len(head.centroids), seed=task.seed)]
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
