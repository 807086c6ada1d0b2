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

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from featxfer import (
    Backbone,
    BaseDegradation,
    FeatureTransferHead,
    Preprocessing,
)
from featxfer.features.backbone import sha256_of
from featxfer.modules.base import TransferModule
from featxfer.views.images import ImageSource
from featxfer_integrations.hosts import host_of
from featxfer_integrations.hosts.base import find_sites
from featxfer_integrations.mechanism.attach import (
    attached_at,
    attached_sites,
    check_host,
    install,
)
from featxfer_integrations.mechanism.fingerprint import backbone_at
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.options import FitOptions
from featxfer_integrations.plan import Targets, plan
from featxfer_integrations.report import TransferFit, warn_if_useless
from featxfer_integrations.stages.base import Trained, run_stage
from featxfer_integrations.stages.blocks import BlocksStage
from featxfer_integrations.stages.heads import PooledStage


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
    stages, skipped = plan(model, images, degradation, site, targets, options, cache, seed)
    trained = [run_stage(stage) for stage in stages]
    for part in trained:
        for place in part.stage.sites:
            _put(model, place, part.stage.modules[place.name])
    for part in trained:
        part.checkpoint.unlink(missing_ok=True)
    for part in trained:
        warn_if_useless(f"{part.stage.what} {part.stage.verb}", part.judged.held_out)
    return _report(trained, skipped)


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
    stages, _ = plan(model, images, degradation, site, targets, options, None, seed)
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


def _report(trained: Sequence[Trained], skipped: dict[str, str]) -> TransferFit:
    heads, blocks = (
        [part for part in trained if isinstance(part.stage, BlocksStage) == of_blocks]
        for of_blocks in (False, True)
    )
    for part in trained:
        skipped = skipped | part.stage.skipped
    last = trained[-1].judged.held_out if isinstance(trained[-1].stage, PooledStage) else None
    return TransferFit(
        [entry for part in heads for entry in part.log],
        [found for part in heads or trained for found in part.judged.diagnostics],
        [found for part in trained for found in part.judged.held_out] if last is None else last,
        trained[0].stage.images,
        skipped,
        [entry for part in blocks for entry in part.log],
    )


def backbone_of(
    model: nn.Module, *, site: str | None = None, preprocessing: Preprocessing | None = None
) -> Backbone:
    """The model up to the site of its head, without the head, as a frozen feature extractor.

    For plain features of a model with its classifier (`extract_features`), its preprocessing, and
    the name and hash that a `Card` wants. Arguments and errors as those of `fit_transfer`.
    """
    check_host(model)
    host = host_of(model)
    heads = [place for place in attached_sites(model) if not place.is_block]
    if site is None and len(heads) == 1:
        (place,) = heads
    else:
        (place,) = find_sites(host, model, site or "head", kind="head")
    place = host.measured(model, place)
    return backbone_at(host, model, place, preprocessing or host.preprocessing(model))
