"""What a trained module hangs on: the weights before its site, their dtype, the libraries."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from featxfer import ArtifactError, Card
from featxfer.features.backbone import describe_module, sha256_of, weights_sha256
from featxfer_integrations.hosts.base import Host
from featxfer_integrations.mechanism.attach import attached_sites, host_parameter, transfers_of
from featxfer_integrations.mechanism.site import CHILD, Site

LOWER_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes that weights are rounded to when a model is deployed."""


def backbone_sha256(
    host: Host, model: nn.Module, site: Site, dtype: torch.dtype | None = None
) -> str:
    """Hash of the model's weights that what is trained at `site` hangs on, see `weights_sha256`.

    Without what is attached, the classifiers or predictors, and what else runs behind the feature.
    """
    return weights_sha256(model, leave_out=_left_out(host, model, site), dtype=dtype)


def _left_out(host: Host, model: nn.Module, site: Site) -> tuple[str, ...]:
    """Beginnings of the names of weights that what is trained at `site` does not hang on."""
    hooked = site.modules if site.side == "output" else ()
    behind = host.behind(model, site)
    return tuple(f"{name}." for name in (CHILD, *behind) if name not in hooked)


def architecture_sha256(model: nn.Module, keep: Sequence[Site] | None = None) -> str:
    """Hash of a model's layers and settings, and of what is attached and its sizes.

    `keep`: the sites of what counts of it, by default all.
    """
    attached = {}
    for site in attached_sites(model) if keep is None else keep:
        attached[site.name] = transfers_of(model)[site.name].config
    return sha256_of([describe_module(model, leave_out=CHILD), attached])


def model_sha256(model: nn.Module, keep: Sequence[Site] | None = None) -> str:
    """A hash of all that a model's results hang on: layers, settings, libraries and weights.

    The same in every process, before and after a run. `keep` as `architecture_sha256` has it.
    """
    kept = [site.name for site in (attached_sites(model) if keep is None else keep)]
    others = [site.name for site in attached_sites(model) if site.name not in kept]
    weights = weights_sha256(model, leave_out=tuple(f"{CHILD}.{name}." for name in others))
    return sha256_of([architecture_sha256(model, keep), libraries(model), weights])


def weights_details(host: Host, model: nn.Module, site: Site) -> dict[str, Any]:
    """For a card: the dtype of the weights, and their hash in the dtypes that have less room."""
    said = _dtype_name(model)
    lower = {} if said in LOWER_DTYPES else LOWER_DTYPES
    left_out = _left_out(host, model, site)
    hashes = {n: weights_sha256(model, leave_out=left_out, dtype=d) for n, d in lower.items()}
    return {"dtype": said, "sha256_in": hashes}


def check_weights(host: Host, model: nn.Module, site: Site, card: Card, source: str) -> None:
    """Raises `ArtifactError` for a card of other weights, in whatever dtype either has them."""
    now, trained = _dtype_name(model), str(card.details.get("dtype", "float32"))
    wanted, dtype = card.backbone_sha256, None
    if now in LOWER_DTYPES and now != trained:  # this model's weights were rounded since
        wanted = str(card.details.get("sha256_in", {}).get(now, ""))
    elif trained in LOWER_DTYPES:
        dtype = LOWER_DTYPES[trained]
    got = backbone_sha256(host, model, site, dtype)
    if got != wanted:
        of = f"in {trained}" if wanted else f"in {trained} alone"
        raise ArtifactError(
            f"{source} for backbone {card.backbone} with weights {card.backbone_sha256[:12]} "
            f"{of}, wanted weights {got[:12]} in {now}"
        )


def _dtype_name(model: nn.Module) -> str:
    like = host_parameter(model)
    return "float32" if like is None else str(like.dtype).removeprefix("torch.")


def libraries(model: nn.Module) -> str:
    """The packages whose modules a model is made of, torch's aside, with their versions."""
    found = {
        type(module).__module__.partition(".")[0]
        for name, module in model.named_modules()
        if name.partition(".")[0] != CHILD
    }
    described = []
    for library in sorted(found - {"torch"}) or ["torch"]:
        known = ""
        with suppress(PackageNotFoundError):
            known = f" {version(library)}"
        described.append(f"{library}{known}")
    return ", ".join(described)
