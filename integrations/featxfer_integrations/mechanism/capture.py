"""The one collector of what passes the modules of a model while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from featxfer_integrations.mechanism.attach import host_parameter, is_attached, transfer_disabled
from featxfer_integrations.mechanism.site import AttachError, Site


@contextmanager
def watched(
    model: nn.Module,
    names: Iterable[str],
    *,
    before: Callable[[str, Any], object] | None = None,
    after: Callable[[str, Any], object] | None = None,
) -> Iterator[None]:
    """Inside, each run of these modules is told: the name, with the arguments or the result.

    Of those in this thread: the model may be in use in others.
    """
    handles, thread = [], threading.get_ident()
    for name in names:
        module = model.get_submodule(name)
        if before is not None:
            handles.append(module.register_forward_pre_hook(partial(_tell, thread, before, name)))
        if after is not None:
            handles.append(module.register_forward_hook(partial(_tell, thread, after, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tell(
    thread: int, tell: Callable[[str, Any], object], name: str, _: nn.Module, *passed: Any
) -> None:
    """A hook: `passed` is the arguments, or these and the result."""
    if torch.compiler.is_compiling() or threading.get_ident() == thread:
        tell(name, passed[-1])


@contextmanager
def captured(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[str, list[Any]]]:
    """What arrives inside at each site's first module, in the order that it does."""
    taken: dict[str, list[Any]] = {site.name: [] for site in sites}

    def note(side: str, name: str, value: Any) -> None:
        value = value[0] if side == "input" and value else value
        for site in sites:
            if (site.side, site.modules[0]) == (side, name):
                taken[site.name].append(site.lens.get(value))

    inputs, outputs = (
        dict.fromkeys(site.modules[0] for site in sites if site.side == side)
        for side in ("input", "output")
    )
    with (
        watched(model, inputs, before=partial(note, "input")),
        watched(model, outputs, after=partial(note, "output")),
    ):
        yield taken


def run_host(host: nn.Module, site: Site, images: Any) -> object:
    """Runs as much of the host as the site needs."""
    return host(images) if site.run is None else site.run(host, images)


@contextmanager
def plain(host: nn.Module) -> Iterator[None]:
    """Inside, what is attached to the host, if anything is, is left out."""
    with transfer_disabled(host) if is_attached(host) else nullcontext():
        yield


def take_feature(host: nn.Module, site: Site, images: Any) -> Tensor:
    """The plain feature at a site, as it passes there; what is attached is left out."""
    with plain(host):
        return take_enabled_feature(host, site, images)


def take_enabled_feature(host: nn.Module, site: Site, images: Any) -> Tensor:
    """As `take_feature`, with what is attached before the site in use.

    Raises `AttachError` where no tensor passes, or a module that is to run once runs again.
    """
    found = passed(host, site, images)
    if not isinstance(found, Tensor):
        raise no_tensor(site)
    return found


def passed(host: nn.Module, site: Site, images: Any) -> Any:
    """What the lens of a site gives of what passes first; errors as `take_enabled_feature`."""
    if site.feature is not None:
        return site.feature(host, images)
    with captured(host, [site]) as taken:
        run_host(host, site, images)
    found = taken[site.name]
    if not found:
        raise no_tensor(site)
    if len(found) > 1 and not site.repeats:
        raise AttachError(
            f"site: {site.where} runs {len(found)} times for an image, wanted a module that runs "
            "once"
        )
    return found[0]


def no_tensor(site: Site) -> AttachError:
    """The error of a site that no tensor passes."""
    return AttachError(f"site: no tensor passes {site.where} when the model runs")


def in_dtype(model: nn.Module, images: Tensor) -> Tensor:
    """Images in the model's dtype."""
    like = host_parameter(model)
    return images if like is None else images.to(like.dtype)
