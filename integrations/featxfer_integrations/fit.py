"""fit_transfer: a model and unlabelled HR images in, the model with a trained head out."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from featxfer import (
    FEATURES_RECIPE,
    Backbone,
    Card,
    Degradation,
    EpochLog,
    FeatureTransferHead,
    Preprocessing,
    Recipe,
    diagnose,
    extract_features,
    fit_features_head,
    fit_head,
    kmeans,
    open_images,
)
from featxfer.features import Features, default_cache, software_versions
from featxfer.images import ImageSource
from featxfer.pairs import PairAgreement, compare_pairs
from featxfer.pseudo_labels import Clustering, LabelDiagnostics
from featxfer_integrations._attach import (
    CHILD,
    AttachError,
    Place,
    attached_at,
    channel_axis,
    check_host,
    host_parameter,
    install,
    is_attached,
    take_feature,
    transfers_of,
)
from featxfer_integrations.attach import backbone_sha256, find_place, host_of


@dataclass(frozen=True)
class HeldOutPairs:
    """What a head does to pairs of views that it was not trained on.

    Args:
        before: plain LR features against the HR features of the same images.
        after: transferred LR features against the same.
        hr_cosine: mean cosine of HR features before and after the head: 1 is unharmed.
        pairs: how many.
    """

    before: PairAgreement
    after: PairAgreement
    hr_cosine: float
    pairs: int

    @property
    def cosine_gap_recovered(self) -> float:
        """Share of the cosine distance between LR and HR that the head takes away; 1 is all."""
        gap = 1 - self.before.cosine
        return (self.after.cosine - self.before.cosine) / gap if gap > 0 else 0.0


@dataclass(frozen=True)
class TransferFit:
    """What `fit_transfer` found.

    Args:
        log: an entry an epoch.
        diagnostics: of the pseudo-labels, a degradation each.
        held_out: of the trained head, a degradation each; empty where no pairs were held out, and
            for output "clusters", which is not in the space of HR features.
        images: how many the head was trained on.
        skipped: image name -> why it could not be read.
    """

    log: list[EpochLog]
    diagnostics: list[LabelDiagnostics]
    held_out: list[HeldOutPairs]
    images: int
    skipped: dict[str, str]


def fit_transfer(
    model: nn.Module,
    images: ImageSource,
    *,
    degradation: Degradation | Sequence[Degradation] = Degradation(),  # noqa: B008 - frozen value
    where: str | None = None,
    clusters: int | None = None,
    recipe: Recipe | None = None,
    held_out: float = 0.1,
    preprocessing: Preprocessing | None = None,
    cache: str | Path | None = None,
    batch_size: int = 64,
    precision: str = "fp32",
    on_error: str = "raise",
    seed: int = 0,
) -> TransferFit:
    """Trains a head on unlabelled HR images and leaves it attached to the model.

    Features of the HR view and of each LR view are taken once and kept in the cache, HR features
    are clustered, and a head is trained towards the HR features of the same images, for HR inputs
    as well as LR ones, so that HR images come out as they went in. The model's own weights are
    never changed; the model is as it was until all is done, whatever happens before. The head that
    is attached at the place is trained anew, in its sizes, and stays the same object; where nothing
    is, a new head is attached.
    A head with output "clusters" is trained on the paper's pseudo-labels instead.

    Args:
        model: as `attach_transfer` takes it.
        images: a folder, an ImageFolder tree, a list of files or a map-style Dataset, see
            `featxfer.open_images`; 100 images at the least make sense, labels are not looked at.
        degradation: how LR views are made; several are served by one head.
        where: as in `attach_transfer`, for models that do not say where their feature is.
        clusters: k; by default 100, or a tenth of the images where these are fewer than 1,000; an
            attached head with output "clusters" keeps its own.
        recipe: by default `FEATURES_RECIPE`, or the paper's `Recipe()` for output "clusters".
        held_out: share of the images, in [0, 1), that is left out of training for the report.
        preprocessing: by default what the model says (timm) or ImageNet's mean and std.
        cache: folder for features; by default `$FEATXFER_CACHE` or `~/.cache/featxfer`.
        batch_size: images a forward pass.
        precision: "fp32", or "bf16" for autocast, in extraction.
        on_error: "raise" at an image that cannot be read, or "skip" it and list it.
        seed: of the clusters, the head, the order of rows and the choice of held-out images.

    Raises:
        AttachError: as `attach_transfer`; a block, which this function does not train.
        ValueError: bad arguments, features without variance, more clusters than images.
        ImageError, FileNotFoundError, StoreError, DiskError: as `open_images` and
            `extract_features`.
        DivergenceError: the loss became infinite.
    """
    check_host(model)
    place = _place(model, where)
    views = [degradation] if isinstance(degradation, Degradation) else list(degradation)
    _check_settings(views, held_out)
    backbone = host_backbone(model, place, preprocessing)
    folder = Path(cache or default_cache()) / "features"
    opened = open_images(images)
    features = [
        extract_features(
            backbone,
            opened,
            view,
            folder,
            batch_size=batch_size,
            precision=precision,
            on_error=on_error,
        )
        for view in views
    ]
    train, test = _split(len(features[0].ids), held_out, seed)
    head = _new_head(model, place, features[0].hr.shape[1], clusters, len(train), seed)
    recipe = recipe or (FEATURES_RECIPE if head.output == "features" else Recipe())
    log, clustering = _train(head, features, train, recipe, seed)
    fitted = TransferFit(
        log,
        [diagnose(part.hr[train], part.lr[train], clustering.centroids) for part in features],
        _reports(head, features, test, clustering),
        len(train),
        features[0].skipped,
    )
    head.card = Card(
        backbone.name,
        backbone.weights_sha256,
        tuple(views),
        {
            "host": backbone.host,
            "preprocessing": dataclasses.asdict(backbone.preprocessing),
            "images": fitted.images,
            "images_fingerprint": opened.fingerprint,
            "recipe": recipe.to_dict(),
            "seed": seed,
            "precision": precision,
            "diagnostics": [part.summary() for part in fitted.diagnostics],
            "held_out": [
                {**dataclasses.asdict(part), "cosine_gap_recovered": part.cosine_gap_recovered}
                for part in fitted.held_out
            ],
            "final_loss": log[-1].loss,
            "versions": software_versions(),
        },
    )
    _put(model, place, head)
    _warn_if_useless(fitted)
    return fitted


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
        layers = [
            f"{name} {module!r}"
            for name, module in self.module.model.named_children()
            if name != CHILD
        ]
        text = "\n".join([type(self.module.model).__qualname__, self.module.place.name, *layers])
        return hashlib.sha256(text.encode()).hexdigest()


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


def _check_settings(views: Sequence[Degradation], held_out: float) -> None:
    if not views:
        raise ValueError("degradation: got none, wanted at least one")
    sizes = {view.hr_size for view in views}
    if len(sizes) > 1:
        raise ValueError(f"degradation: got hr_size {sorted(sizes)}, wanted one for all")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: got {held_out!r}, wanted a share in [0, 1)")


def _split(count: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of those held out, both in order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    kept = min(count, max(1, count - round(count * held_out)))
    return order[:kept].sort().values, order[kept:].sort().values


def _new_head(
    model: nn.Module, place: Place, width: int, clusters: int | None, images: int, seed: int
) -> FeatureTransferHead:
    """An untrained head in the sizes of the one that is attached, if one is."""
    attached = attached_at(model, place)
    config = {} if attached is None else attached.config
    k = clusters or min(100, max(1, images // 10))
    if config.get("output") == "clusters":
        k = config["clusters"]
        if clusters not in (None, k):
            raise ValueError(f"clusters: got {clusters}, the attached head gives {k} logits")
    return FeatureTransferHead(**{**config, "in_features": width, "clusters": k}, seed=seed)


def _train(
    head: FeatureTransferHead,
    features: Sequence[Features],
    train: Tensor,
    recipe: Recipe,
    seed: int,
) -> tuple[list[EpochLog], Clustering]:
    hr, lr = features[0].hr[train], [part.lr[train] for part in features]
    with tqdm(total=recipe.epochs, desc="training the head", unit="epoch", disable=None) as bar:

        def advance(_: EpochLog) -> None:
            bar.update()

        if head.output == "features":
            clustering = kmeans(F.normalize(hr, dim=1), len(head.centroids), seed=seed)
            log = fit_features_head(
                head, hr, lr, clustering, recipe=recipe, seed=seed, callback=advance
            )
        else:
            clustering = kmeans(hr, len(head.centroids), seed=seed)
            rows, repeated = torch.cat(lr), hr.repeat(len(lr), 1)
            head.set_input_statistics(rows)
            log = fit_head(
                head, repeated, rows, clustering, recipe=recipe, seed=seed, callback=advance
            )
    return log, clustering


def _reports(
    head: FeatureTransferHead, features: Sequence[Features], test: Tensor, clustering: Clustering
) -> list[HeldOutPairs]:
    if not len(test) or head.output != "features":
        return []
    hr, centroids = features[0].hr[test], clustering.centroids
    hr_cosine = float(F.cosine_similarity(head.transfer(hr), hr).mean())
    views = [part.lr[test] for part in features]
    return [
        HeldOutPairs(
            compare_pairs(hr, lr, centroids),
            compare_pairs(hr, head.transfer(lr), centroids),
            hr_cosine,
            len(test),
        )
        for lr in views
    ]


def _put(model: nn.Module, place: Place, head: FeatureTransferHead) -> None:
    """Attaches the trained head, or gives what it learned to the one that is attached."""
    attached = attached_at(model, place)
    if isinstance(attached, FeatureTransferHead):
        attached.centroids = torch.empty_like(head.centroids).to(attached.centroids)
        attached.load_state_dict(head.state_dict())
        attached.card = head.card
    else:
        install(model, place, head)


def _warn_if_useless(fitted: TransferFit) -> None:
    """Warns where the head brings held-out LR features no nearer to their HR features."""
    for part in fitted.held_out:
        if part.after.cosine <= part.before.cosine:
            warnings.warn(
                f"the head does not help: held-out cosine {part.before.cosine:.3f} before, "
                f"{part.after.cosine:.3f} after",
                stacklevel=3,
            )
