"""fit_transfer: a model and unlabelled HR images in, the model with trained modules out.

Stages are planned, and each is trained towards what the plain model shows of the HR view of the
same image:

- blocks: on maps at the first site, which are kept in the cache, through the frozen layers behind
  it. They gain most, since maps have not yet lost what the global pool loses;
- a head: on pooled features, for HR inputs as well as LR ones, so that HR images come out as they
  went in. With output "clusters" on the paper's pseudo-labels;
- blocks in a detector, and where what is shown hangs on more than the maps at a site: on images as
  they are read, so that a detector's pyramid, and the features of its own proposals, are those of
  the HR image;
- heads of a detector: on features of the same boxes in both views, half of them balanced by the
  classes that the detector itself predicts and half by chance.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from featxfer import Backbone, BaseDegradation, EpochLog, FeatureTransferHead, Preprocessing
from featxfer.evaluation.pairs import HeldOutPairs
from featxfer.features.backbone import sha256_of
from featxfer.modules.base import TransferModule
from featxfer.training.pseudo_labels import LabelDiagnostics
from featxfer.views.images import ImageSource
from featxfer_integrations.hosts import checked, host_of
from featxfer_integrations.hosts.base import find_sites
from featxfer_integrations.mechanism.attach import (
    attached_at,
    attached_sites,
    install,
    transfers_of,
)
from featxfer_integrations.mechanism.fingerprint import backbone_at
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.options import FitOptions
from featxfer_integrations.plan import Targets, plan
from featxfer_integrations.stages.base import Stage
from featxfer_integrations.stages.blocks import BlocksStage
from featxfer_integrations.stages.heads import PooledStage


@dataclass(frozen=True)
class TransferFit:
    """What `fit_transfer` found.

    Args:
        log: of the heads' training, an entry an epoch; empty if no head was trained.
        diagnostics: of the pseudo-labels, a degradation each.
        held_out: of what was trained, a degradation each; empty where no pairs were held out, and
            for output "clusters", which is not in the space of HR features. Of detectors first of
            the blocks and then of each head, and a pair is a box or a position.
        images: how many were trained on.
        skipped: image name -> why it could not be read.
        blocks_log: of the blocks' training, an entry an epoch.
    """

    log: list[EpochLog] = field(default_factory=list)
    diagnostics: list[LabelDiagnostics] = field(default_factory=list)
    held_out: list[HeldOutPairs] = field(default_factory=list)
    images: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    blocks_log: list[EpochLog] = field(default_factory=list)


def warn_if_useless(what: str, held_out: Sequence[HeldOutPairs]) -> None:
    """Warns where there is no gap, or held-out LR features come no nearer to their HR features."""
    for part in held_out:
        if part.before.cosine > 1 - 1e-6:
            message = "LR features are the HR features: there is no gap to recover"
        elif part.after.cosine <= part.before.cosine:
            message = (
                f"{what} not help: held-out cosine {part.before.cosine:.3f} before, "
                f"{part.after.cosine:.3f} after"
            )
        else:
            continue
        warnings.warn(message, stacklevel=3)


def fit_transfer(
    model: nn.Module,
    images: ImageSource,
    *,
    degradation: BaseDegradation | Sequence[BaseDegradation] | None = None,
    site: str | Sequence[str] | None = None,
    targets: Targets | None = None,
    options: FitOptions | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
) -> TransferFit:
    """Trains blocks or a head on unlabelled HR images and leaves them attached.

    The model's own weights are never changed; the model is as it was until all is done, whatever
    happens before. What is attached at a site is trained anew, in its sizes, and stays the same
    object. How long blocks will train is told on stderr; interrupted, the same call goes on.

    Args:
        model: as `attach_transfer` takes it.
        images: see `featxfer.open_images`; 100 at the least make sense, labels are not looked at.
        degradation: how LR views are made, one or several, by default `Degradation(s, 32)` with s
            the size that the model is made for; of detectors `ScaledDegradation()`.
        site: one name or several, see `attach_transfer`; heads are trained on what comes through
            the blocks. None: what is attached; where nothing is, blocks if the host has a site for
            them, else a head.
        targets: what LR images have to match, by default the pooled feature, or what a detector's
            heads see: names of modules, or a function from the model and a batch `(n, 3, s, s)` to
            a tensor or several, `(n, d)`, tokens or maps.
        options: how, see `FitOptions`.
        cache: folder, by default `$FEATXFER_CACHE` or `~/.cache/featxfer`.
        seed: of clusters, modules, the order of rows and the choice of held-out images.

    Raises:
        AttachError: as `attach_transfer`; something is attached elsewhere, which what is trained
            would not know of; a model that does not run on RGB images of the degradation's size;
            one without a pooled feature, without `targets`.
        ValueError, TypeError: bad arguments, options without effect, features without variance.
        ImageError, FileNotFoundError, StoreError, DiskError: as `extract_features`.
        DivergenceError: the loss became infinite.
    """
    stages = plan(model, images, degradation, site, targets, options, cache, seed)
    for stage in stages:
        stage.run()
    inner = stages[0].task.model
    for stage in stages:
        for place in stage.sites:
            _put(inner, place, stage.modules[place.name])
    if inner is not model:
        transfers_of(inner).share()
    for stage in stages:
        stage.checkpoint.unlink(missing_ok=True)
    for stage in stages:
        warn_if_useless(f"{stage.what} {stage.verb}", stage.held_out)
    return _report(stages)


def fit_key(
    model: nn.Module,
    images: ImageSource,
    *,
    degradation: BaseDegradation | Sequence[BaseDegradation] | None = None,
    site: str | Sequence[str] | None = None,
    targets: Targets | None = None,
    options: FitOptions | None = None,
    seed: int = 0,
) -> str:
    """A hash of all that the same call of `fit_transfer` hangs on; nothing is trained.

    For results that are kept. Arguments and errors as there; of a function as `targets` nothing can
    be told but its name.
    """
    stages = plan(model, images, degradation, site, targets, options, None, seed)
    return sha256_of([stage.key() for stage in stages])[:32]


def _put(model: nn.Module, site: Site, module: TransferModule) -> None:
    """Attaches what was trained, or gives what it learned to what is attached."""
    attached = attached_at(model, site)
    if attached is None:
        for parameter in module.parameters():  # as a loaded one has it: the same bits come out
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        install(model, site, module)
        return
    if isinstance(attached, FeatureTransferHead) and isinstance(module, FeatureTransferHead):
        attached.centroids = torch.empty_like(module.centroids).to(attached.centroids)
    attached.load_state_dict(module.state_dict())
    attached.card = module.card


def _report(stages: Sequence[Stage]) -> TransferFit:
    blocks = [stage for stage in stages if isinstance(stage, BlocksStage)]
    heads = [stage for stage in stages if stage not in blocks]
    told = stages[-1:] if isinstance(stages[-1], PooledStage) else stages
    return TransferFit(
        [entry for stage in heads for entry in stage.log],
        [found for stage in heads or stages for found in stage.diagnostics],
        [found for stage in told for found in stage.held_out],
        stages[0].images,
        {name: why for stage in stages for name, why in stage.skipped.items()},
        [entry for stage in blocks for entry in stage.log],
    )


def backbone_of(
    model: nn.Module, *, site: str | None = None, preprocessing: Preprocessing | None = None
) -> Backbone:
    """The model up to the site of its head, without the head, as a frozen feature extractor.

    For plain features of a model with its classifier (`extract_features`), its preprocessing, and
    the name and hash that a `Card` wants. Arguments and errors as those of `fit_transfer`.
    """
    model = checked(model)
    host = host_of(model)
    heads = [place for place in attached_sites(model) if not place.is_block]
    if site is None and len(heads) == 1:
        (place,) = heads
    else:
        (place,) = find_sites(host, model, site or "head", kind="head")
    place = host.measured(model, place)
    return backbone_at(host, model, place, preprocessing or host.preprocessing(model))
