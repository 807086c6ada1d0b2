"""find_sites: from a name to sites whose widths and layouts are known."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from featxfer_integrations.hosts.base import Host, ProbeError
from featxfer_integrations.mechanism.attach import attached_at, transfers_of
from featxfer_integrations.mechanism.site import AttachError, Site


def find_sites(
    host: Host,
    model: nn.Module,
    name: str | None = None,
    branch: str = "class",
    *,
    kind: str | None = None,
    width: int | None = None,
    image: torch.Tensor | None = None,
) -> list[Site]:
    """The sites that a name stands for, with their widths and layouts.

    Args:
        host: of the model.
        model: is run on a black image where it does not say them.
        name: as of `attach_transfer`.
        branch: as of `attach_transfer`.
        kind: "head" or "block", what is to be put there; None: by what passes.
        width: of the feature, where it is known.
        image: a square one to run the model on, by default as the model says.

    Raises:
        AttachError, ValueError, TypeError: as `attach_transfer`.
    """
    if not isinstance(name, str | None):
        raise TypeError(f"site: got {name!r}, wanted a name")
    found, known_modules = [], dict(model.named_modules())
    for site in host.sites(model, host.site if name is None else name, branch):
        missing = [module for module in site.modules if module not in known_modules]
        if missing:
            raise AttachError(
                f"site: host {host.name!r} has {site.name!r} at {missing[0]!r}, which is no module "
                f"of this {type(model).__name__}"
            )
        known = attached_at(model, site)
        if known is not None:
            site = transfers_of(model).sites[site.name]
        is_told = site.width is not None and (site.layout is not None or site.kind == "head")
        if not is_told or (image is not None and not site.repeats):
            try:
                site = host.measured(model, site, image)
            except ProbeError:
                if width is None:
                    raise
                site = replace(site, width=width, kind=site.kind or "head")
        if width not in (None, site.width):
            raise ValueError(f"in_features: got {width}, the model says {site.width}")
        found.append(_of_kind(site, kind))
    return found


def _of_kind(site: Site, kind: str | None) -> Site:
    """The site for what is to be put there, where both a head and a block may be."""
    if kind is None or site.kind is not None or (kind == "block" and site.layout == "rows"):
        kind = "block" if site.is_block else "head"
    return replace(site, kind=kind)
