"""plan: what a fit is asked for, checked, as the stages that it runs."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from featxfer import BaseDegradation, Degradation, ImageError, Preprocessing, open_images
from featxfer.checks import check_integer
from featxfer.console import tell
from featxfer.features.backbone import frozen
from featxfer.features.extract import check_readable, default_cache, write_skipped
from featxfer.views.images import ImageSource
from featxfer_integrations.hosts import checked, host_of
from featxfer_integrations.hosts.base import Host, ProbeError, find_sites
from featxfer_integrations.hosts.images import black_image
from featxfer_integrations.mechanism.attach import (
    attached_at,
    attached_sites,
    gives_clusters,
    is_attached,
)
from featxfer_integrations.mechanism.capture import run_host, watched
from featxfer_integrations.mechanism.proof import prove
from featxfer_integrations.mechanism.shown import Show, ShownAt, check_shown, shown_by
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
) -> list[Stage]:
    """The stages of a fit, after all checks that need no training."""
    model = checked(model)
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
    views = _views(host.degradation, degradation)
    square = host.image(model)
    if isinstance(views[0], Degradation):
        square = black_image(model, views[0].hr_size, views[0].hr_size)
    square = square if host.detects else square[:, :1].repeat(1, 3, 1, 1)  # images are RGB
    asked = _Asked(model, host, options, square)
    try:
        sites = asked.sites(site)
        goals, told = asked.goals(targets)
        asked.check_effect(sites, goals is not None)
        asked.check_others(sites)
        asked.prove(sites, goals, views[0], preprocessing)
    except ProbeError as error:
        raise ProbeError(
            f"degradation: {type(model).__name__} {str(error).removeprefix('model: it ')}; set "
            f"hr_size to a size that it takes ({host.input_size(model)} by what it says), and put "
            "a module around one that takes other than 3 channels"
        ) from error
    opened, folder = open_images(images), Path(cache or default_cache())
    task = Task(model, host, opened, views, preprocessing, options, folder, seed, told)
    if host.detects:
        return _detector_stages(task, sites)
    if goals is not None:
        return [_through(task, sites, goals, square)]
    blocks, heads = ([s for s in sites if s.is_block == of] for of in (True, False))
    if not blocks:
        return [PooledStage(task, place) for place in heads]
    first = _through(task, blocks, ShownAt(heads or asked.targets()), square)
    if isinstance(first, MapsStage):
        return [first, *(PooledStage(task, place, first) for place in heads)]
    if heads:
        raise AttachError(
            f"site: a head at {heads[0].name!r} cannot be trained behind blocks whose maps do "
            "not tell its feature alone; train the blocks, and leave the head away"
        )
    return [first]


def _through(task: Task, sites: Sequence[Site], show: Show, square: torch.Tensor) -> BlocksStage:
    """Modules towards what the model shows: on kept maps where that is right, else on images."""
    try:
        return MapsStage(task, sites, show, square)
    except AttachError as error:
        task.options.refuse(f"images are read anew each time: {error}", "crops", "batch_size")
        tell(f"images are read anew each time: {error}")
        return PyramidStage(_readable(task), sites, lambda model, batch: show(model, batch.images))


def _detector_stages(task: Task, sites: Sequence[Site]) -> list[Stage]:
    blocks, heads = ([s for s in sites if s.is_block == of] for of in (True, False))
    outside = [site.asked for site in blocks if site.run is None]
    if outside:
        raise AttachError(
            f"site: blocks are trained through the backbone, and {outside[0]!r} is not in it"
        )
    if heads and type(task.host).sampler is Host.sampler:
        raise AttachError(
            f"site: got {heads[0].asked!r}, where a head goes, which of a "
            f"{type(task.model).__name__} is not trained; wanted blocks in its backbone"
        )
    task = _readable(task)
    first = PyramidStage(task, blocks, task.host.show) if blocks else None
    standing = [s for s in attached_sites(task.model) if s.is_block and first is None]
    boxes = Boxes(task, heads, standing, first)
    stages: list[Stage] = [BoxesStage(task, site, boxes) for site in heads]
    return stages if first is None else [first, *stages]


def _views(
    kind: type[BaseDegradation], degradation: BaseDegradation | Sequence[BaseDegradation]
) -> list[BaseDegradation]:
    """Degradations of the host's kind and, where they have a size, of one size."""
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


@dataclass(frozen=True)
class _Asked:
    """A model that is to be fitted, of a host and with options, and a square image of the views."""

    model: nn.Module
    host: Host
    options: FitOptions
    square: torch.Tensor

    def sites(self, asked: str | Sequence[str] | None) -> list[Site]:
        """Where modules are trained, in the order that an image passes them."""
        host, model, square = self.host, self.model, self.square
        names: Any = asked if isinstance(asked, list | tuple | None) else [asked]
        if names is None and is_attached(model):
            found = [host.measured(model, site, square) for site in attached_sites(model)]
        else:
            if names is None:
                names = ["blocks" if host.detects or host.blocks(model) else "head"]
            if not names:
                raise ValueError("site: got none, wanted a name or several")
            found = [s for name in names for s in find_sites(host, model, name, image=square)]
        for site in found:
            if found.count(site) > 1:
                raise ValueError(f"site: got {site.asked!r} twice, wanted each once")
            if site.layout == "tokens" and not site.is_block:
                raise AttachError(
                    f"site: {site.where} gives tokens, wanted a block there, got a head"
                )
        return self._in_order(found)

    def _in_order(self, sites: list[Site]) -> list[Site]:
        if len(sites) < 2 or any(site.repeats for site in sites):
            return sites
        passed: list[str] = []
        names = {name for site in sites for name in site.modules[:1]}
        with (
            watched(self.model, names, after=lambda name, _: passed.append(name)),
            frozen(self.model),
        ):
            run_host(self.model, sites[0], self.square)
        place = {name: index for index, name in reversed(list(enumerate(passed)))}
        return sorted(sites, key=lambda site: place.get(next(iter(site.modules), ""), len(passed)))

    def targets(self) -> list[Site]:
        """What blocks are trained towards unless told: what the host says, the pooled feature."""
        try:
            targets = self.host.targets(self.model)
            found = [self.host.measured(self.model, site, self.square) for site in targets]
            tokens = [site.where for site in found if site.layout == "tokens" and not site.is_block]
            if tokens:
                raise AttachError(f"tokens pass {tokens[0]}")
        except AttachError as error:
            raise AttachError(
                f"targets: wanted what LR images have to match, modules' names or a function, for "
                f"a {type(self.model).__name__} that has no pooled feature ({error})"
            ) from error
        return found

    def goals(self, targets: Targets | None) -> tuple[Show | None, list[str]]:
        """What LR images have to match, as the caller says it; and what a key says of that."""
        host, model = self.host, self.model
        if targets is None:
            return None, []
        if host.detects:
            raise ValueError(f"targets: got {targets!r}, a detector's are what its heads see")
        if callable(targets):
            kind = type(targets)
            named = getattr(targets, "__qualname__", kind.__qualname__)
            module = getattr(targets, "__module__", kind.__module__)
            return shown_by(targets), ["function", f"{module}.{named}"]
        names: list[Any] = [*targets] if isinstance(targets, list | tuple) else [targets]
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError(f"targets: got {targets!r}, wanted names of modules, or a function")
        try:
            sites = [host.measured(model, host.sites(model, n)[0], self.square) for n in names]
        except AttachError as error:
            raise AttachError(f"targets{str(error).removeprefix('site')}") from error
        return ShownAt(sites), names

    def check_effect(self, sites: Sequence[Site], has_goals: bool) -> None:
        """Raises `ValueError` for an option without effect on what is trained at these sites."""
        options, host = self.options, self.host
        blocks = [site for site in sites if site.is_block or has_goals]
        heads = [site for site in sites if site not in blocks]
        if not blocks:
            options.refuse("heads alone are trained", "block_recipe", "crops")
        if not heads:
            options.refuse("blocks alone are trained", "recipe")
        if host.detects and not blocks and options.precision == "bf16":
            options.refuse("heads of detectors are trained on features in float32", "precision")
        if host.detects and not heads:
            if not host.proposes(self.model):
                kind = type(self.model).__name__
                why = f"blocks are trained on maps: {kind} proposes no boxes"
                options.refuse(why, "objective", "clusters")
            if options.objective in WITHOUT_CLUSTERS:
                options.refuse(f"blocks are trained with {options.objective!r}", "clusters")
        for attached in (attached_at(self.model, site) for site in sites):
            if attached is None or not gives_clusters(attached):
                continue
            if blocks:
                raise AttachError(
                    'site: a head with output "clusters" is attached, wanted "features" behind '
                    "blocks"
                )
            options.refuse('the attached head has output "clusters" and pseudo-labels', "objective")
            k = attached.config["clusters"]
            if options.clusters not in (None, k):
                raise ValueError(
                    f"clusters: got {options.clusters}, the attached head gives {k} logits"
                )

    def prove(
        self,
        sites: Sequence[Site],
        goals: Show | None,
        view: BaseDegradation,
        preprocessing: Preprocessing,
    ) -> None:
        """Tries, without a photograph, what LR images are to match and whether modules act."""
        host, model, square = self.host, self.model, self.square
        if goals is not None:
            chance, shape = torch.Generator().manual_seed(0), (3, *square.shape[2:])
            noise = torch.randint(256, shape, generator=chance, dtype=torch.uint8, device="cpu")
            pair = host.batch(model, [view.hr(noise), view.lr(noise)], preprocessing)
            check_shown(goals, model, pair.images)
        whole = copy.deepcopy(model).float() if host.detects else model
        prove(whole, sites, square.float() if host.detects else square, goals)

    def check_others(self, sites: Sequence[Site]) -> None:
        """Raises `AttachError` where what is attached would not be known to the training."""
        known, blocks = {site.name for site in sites}, any(site.is_block for site in sites)
        others = [
            site.name
            for site in attached_sites(self.model)
            if site.name not in known and not (self.host.detects and site.is_block and not blocks)
        ]
        if others:
            raise AttachError(
                f"model: something is attached at {', '.join(others)}, and what is trained now "
                "would be trained without it; detach_transfer first, or name all sites"
            )


def _readable(task: Task) -> Task:
    """The task with the images that can be read, where others may be skipped.

    Raises `ValueError` if there are none.
    """
    images, skipped, kept = task.images, dict[str, str](), []
    if task.options.on_error == "raise":
        return task
    for index in tqdm(range(len(images)), desc="readable images", unit="img", disable=None):
        try:
            images.read(index)
        except ImageError as error:
            skipped[images.ids[index]] = str(error)
        else:
            kept.append(index)
    check_readable("images", skipped, len(images), task.options.on_error)
    if not skipped:
        return task
    write_skipped(task.cache / f"skipped-{images.fingerprint[:16]}.json", skipped, len(images))
    said = f"{images.fingerprint} without {json.dumps(sorted(skipped))}"
    readable = replace(
        images,
        ids=tuple(images.ids[index] for index in kept),
        read=lambda row: images.read(kept[row]),
        fingerprint=hashlib.sha256(said.encode()).hexdigest(),
        targets=None,
    )
    return replace(task, images=readable, skipped=skipped)
