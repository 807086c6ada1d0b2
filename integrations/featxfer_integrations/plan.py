"""plan: what a fit is asked for, checked, as the stages that it runs."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from featxfer import (
    BaseDegradation,
    Degradation,
    ImageError,
    Images,
    open_images,
)
from featxfer.checks import check_integer
from featxfer.console import tell
from featxfer.features.backbone import frozen
from featxfer.features.extract import check_readable, default_cache, write_skipped
from featxfer.views.images import ImageSource
from featxfer_integrations.hosts import host_of
from featxfer_integrations.hosts.base import Host, ProbeError, black_image, find_sites
from featxfer_integrations.mechanism.attach import (
    attached_at,
    attached_sites,
    check_host,
    gives_clusters,
    is_attached,
)
from featxfer_integrations.mechanism.capture import run_host, watched
from featxfer_integrations.mechanism.proof import prove
from featxfer_integrations.mechanism.shown import Show, ShownAt, shown_by
from featxfer_integrations.mechanism.site import AttachError, Site
from featxfer_integrations.options import WITHOUT_CLUSTERS, FitOptions
from featxfer_integrations.stages.base import Stage, Task
from featxfer_integrations.stages.blocks import BlocksStage
from featxfer_integrations.stages.boxes import Boxes, BoxesStage
from featxfer_integrations.stages.heads import PooledStage
from featxfer_integrations.stages.maps import MapsStage
from featxfer_integrations.stages.pyramid import PyramidStage

Targets = Sequence[str] | Callable[[Any, Any], Any]


def plan(
    model: nn.Module,
    images: ImageSource,
    degradation: BaseDegradation | Sequence[BaseDegradation] | None,
    site: str | Sequence[str] | None,
    targets: Targets | None,
    options: FitOptions | None,
    cache: str | Path | None,
    seed: int,
) -> tuple[list[Stage], dict[str, str]]:
    """The stages of a fit, and the images that are left out; all checks that need no training."""
    check_host(model)
    options = FitOptions() if options is None else options
    if not isinstance(options, FitOptions):
        raise TypeError(f"options: got {type(options).__name__}, wanted FitOptions")
    check_integer("seed", seed, at_least=0)
    host = host_of(model)
    if host.detects:
        options.refuse("it is not for detectors", "crops", "preprocessing", "batch_size")
    preprocessing = options.preprocessing or host.preprocessing(model)
    if degradation is None:
        degradation = host.own_degradation(model, preprocessing)
    views = _views(host, degradation)
    square = host.image(model)
    if not host.detects:
        square = black_image(model, views[0].hr_size, views[0].hr_size)  # type: ignore[attr-defined]
        square = square[:, :1].repeat(1, 3, 1, 1)
    with _of_these_views():
        sites = _sites(host, model, site, square)
    goals = None if targets is None else _targets(host, model, targets, square)
    _check_effect(host, model, sites, options, goals)
    _check_others(host, model, sites)
    proved = (copy.deepcopy(model).float(), square.float()) if host.detects else (model, square)
    with _of_these_views():
        prove(proved[0], sites, proved[1])
    opened, skipped = open_images(images), dict[str, str]()
    folder = Path(cache or default_cache())
    if host.detects:
        opened, skipped = _readable(opened, folder, options.on_error)
    told = _told(targets)
    task = Task(model, host, opened, views, preprocessing, options, folder, seed, told)
    blocks, heads = ([s for s in sites if s.is_block == of] for of in (True, False))
    if host.detects:
        return _detector_stages(task, blocks, heads), skipped
    if goals is not None:
        return [_through(task, sites, goals, square)], skipped
    if not blocks:
        return [PooledStage(task, place) for place in heads], skipped
    shown = heads or [_head_of(host, model, square)]
    before = _through(task, blocks, ShownAt(shown), square)
    if not heads:
        return [before], skipped
    if not isinstance(before, MapsStage):
        raise AttachError(
            f"site: a head at {heads[0].name!r} cannot be trained behind blocks whose maps do "
            "not tell its feature alone; train the blocks, and leave the head away"
        )
    return [before, *(PooledStage(task, place, before) for place in heads)], skipped


def _through(task: Task, sites: Sequence[Site], show: Show, square: torch.Tensor) -> BlocksStage:
    """Modules towards what the model shows: on kept maps where that is right, else on images."""
    try:
        return MapsStage(task, sites, show, square)
    except AttachError as error:
        task.options.refuse(f"images are read anew each time: {error}", "crops", "batch_size")
        tell(f"images are read anew each time: {error}")
        images, skipped = _readable(task.images, task.cache, task.options.on_error)
        task = dataclasses.replace(task, images=images)
        stage = PyramidStage(task, sites, lambda model, batch: show(model, batch.images))
        stage.skipped = skipped
        return stage


def _detector_stages(task: Task, blocks: Sequence[Site], heads: Sequence[Site]) -> list[Stage]:
    outside = [site.asked for site in blocks if site.run is None]
    if outside:
        raise AttachError(
            f"site: blocks are trained through the backbone, and {outside[0]!r} is not in it"
        )
    stages: list[Stage] = []
    if blocks:
        stages.append(PyramidStage(task, blocks, task.host.show))
    known = {site.name for site in heads}
    standing = [site for site in attached_sites(task.model) if site.name not in known]
    boxes = Boxes(task, heads, [] if blocks else standing, stages[0] if stages else None)
    return [*stages, *(BoxesStage(task, site, boxes) for site in heads)]


@contextmanager
def _of_these_views() -> Iterator[None]:
    """Inside, a model that does not run on RGB images of the views' size is told as such."""
    try:
        yield
    except ProbeError as error:
        raise ProbeError(
            f"degradation: {str(error).removeprefix('model: ')}; set hr_size to a size that it "
            "takes, and put a module around one that takes other than 3 channels"
        ) from error


def _sites(
    host: Host, model: nn.Module, asked: str | Sequence[str] | None, square: torch.Tensor
) -> list[Site]:
    """Where modules are trained, in the order that an image passes them."""
    names: Sequence[Any] | None
    names = asked if isinstance(asked, list | tuple | None) else [asked]
    if names is not None:
        if not names:
            raise ValueError("site: got none, wanted a name or several")
        found = [s for name in names for s in find_sites(host, model, name, image=square)]
    elif is_attached(model):
        found = [host.measured(model, site, square) for site in attached_sites(model)]
    else:
        default = "blocks" if host.detects or host.blocks(model) else "head"
        found = find_sites(host, model, default, image=square)
    twice = next((site.asked for site in found if found.count(site) > 1), None)
    if twice is not None:
        raise ValueError(f"site: got {twice!r} twice, wanted each once")
    tokens = next((site for site in found if site.layout == "tokens" and not site.is_block), None)
    if tokens is not None:
        raise AttachError(f"site: {tokens.where} gives tokens, wanted a block there, got a head")
    return _in_order(host, model, found, square)


def _in_order(
    host: Host, model: nn.Module, sites: Sequence[Site], square: torch.Tensor
) -> list[Site]:
    if len(sites) < 2 or any(site.repeats for site in sites):
        return list(sites)
    passed: list[str] = []
    names = {name for site in sites for name in site.modules[:1]}
    with watched(model, names, after=lambda name, _: passed.append(name)), frozen(model):
        run_host(model, sites[0], square)
    place = {name: index for index, name in reversed(list(enumerate(passed)))}
    return sorted(sites, key=lambda site: place.get(next(iter(site.modules), ""), len(passed)))


def _head_of(host: Host, model: nn.Module, square: torch.Tensor) -> Site:
    """The pooled feature, towards which blocks are trained unless told."""
    try:
        return host.measured(model, host.head(model), square)
    except AttachError as error:
        raise AttachError(
            f"targets: wanted what LR images have to match, modules' names or a function, for a "
            f"{type(model).__name__} that has no pooled feature ({error})"
        ) from error


def _targets(host: Host, model: nn.Module, targets: Targets, square: torch.Tensor) -> Show:
    """What LR images have to match, as the caller says it."""
    if host.detects:
        raise ValueError(f"targets: got {targets!r}, a detector's are what its heads see")
    if callable(targets):
        return shown_by(targets)
    names: list[Any] = [*targets] if isinstance(targets, list | tuple) else [targets]
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"targets: got {targets!r}, wanted names of modules, or a function")
    return ShownAt([host.measured(model, host.sites(model, name)[0], square) for name in names])


def _told(targets: Targets | None) -> list[str]:
    """What a key says of targets: the names, or that of the function."""
    if callable(targets):
        kind = type(targets)
        named = getattr(targets, "__qualname__", kind.__qualname__)
        return ["function", f"{getattr(targets, '__module__', kind.__module__)}.{named}"]
    return [targets] if isinstance(targets, str) else list(targets or [])


def _views(
    host: Host, degradation: BaseDegradation | Sequence[BaseDegradation]
) -> list[BaseDegradation]:
    """Degradations of the host's kind and, where they have a size, of one size."""
    kind = host.degradation
    if not isinstance(degradation, BaseDegradation | Sequence):
        raise TypeError(f"degradation: got {degradation!r}, wanted a {kind.__name__} or several")
    several = [degradation] if isinstance(degradation, BaseDegradation) else list(degradation)
    if not several:
        raise ValueError("degradation: got none, wanted at least one")
    if not all(isinstance(view, kind) for view in several):
        names = ", ".join(type(view).__name__ for view in several)
        raise ValueError(f"degradation: got {names}, wanted {kind.__name__} for this model")
    twice = next((view for view in several if several.count(view) > 1), None)
    if twice is not None:
        raise ValueError(f"degradation: got {twice.to_json()} twice, wanted it once")
    sizes = {view.hr_size for view in several if isinstance(view, Degradation)}
    if len(sizes) > 1:
        raise ValueError(f"degradation: got hr_size {sorted(sizes)}, wanted one for all")
    return several


def _check_effect(
    host: Host, model: nn.Module, sites: Sequence[Site], options: FitOptions, goals: object
) -> None:
    """Raises `ValueError` for an option without effect on what is trained at these sites."""
    blocks = [site for site in sites if site.is_block or goals is not None]
    heads = [site for site in sites if site not in blocks]
    if not blocks:
        options.refuse("heads alone are trained", "block_recipe", "crops")
    if not heads:
        options.refuse("blocks alone are trained", "recipe")
    if host.detects and not blocks and options.precision == "bf16":
        options.refuse("heads of detectors are trained on features in float32", "precision")
    if host.detects and not heads:
        if not host.proposes(model):
            why = f"blocks are trained on maps: {type(model).__name__} proposes no boxes"
            options.refuse(why, "objective", "clusters")
        if options.objective in WITHOUT_CLUSTERS:
            options.refuse(f"blocks are trained with {options.objective!r}", "clusters")
    for site in sites:
        attached = attached_at(model, site)
        if attached is None or not gives_clusters(attached):
            continue
        if blocks:
            raise AttachError(
                'site: a head with output "clusters" is attached, wanted "features" behind blocks'
            )
        options.refuse('the attached head has output "clusters" and pseudo-labels', "objective")
        k = attached.config["clusters"]
        if options.clusters not in (None, k):
            raise ValueError(
                f"clusters: got {options.clusters}, the attached head gives {k} logits"
            )


def _check_others(host: Host, model: nn.Module, sites: Sequence[Site]) -> None:
    """Raises `AttachError` where something is attached that the training would not know of."""
    known, blocks = {site.name for site in sites}, any(site.is_block for site in sites)
    others = [
        site.name
        for site in attached_sites(model)
        if site.name not in known and not (host.detects and site.is_block and not blocks)
    ]
    if others:
        raise AttachError(
            f"model: something is attached at {', '.join(others)}, and what is trained now would "
            "be trained without it; detach_transfer first, or name all sites"
        )


def _readable(images: Images, cache: Path, on_error: str) -> tuple[Images, dict[str, str]]:
    """The images that can be read, and why others cannot, if they may be skipped.

    Raises `ValueError` if there are none.
    """
    skipped, kept = {}, []
    if on_error == "raise":
        return images, {}
    for index in tqdm(range(len(images)), desc="readable images", unit="img", disable=None):
        try:
            images.read(index)
        except ImageError as error:
            skipped[images.ids[index]] = str(error)
        else:
            kept.append(index)
    check_readable("images", skipped, len(images), on_error)
    if not skipped:
        return images, {}
    write_skipped(cache / f"skipped-{images.fingerprint[:16]}.json", skipped, len(images))
    said = f"{images.fingerprint} without {json.dumps(sorted(skipped))}"
    readable = dataclasses.replace(
        images,
        ids=tuple(images.ids[index] for index in kept),
        read=lambda row: images.read(kept[row]),
        fingerprint=hashlib.sha256(said.encode()).hexdigest(),
        targets=None,
    )
    return readable, skipped
