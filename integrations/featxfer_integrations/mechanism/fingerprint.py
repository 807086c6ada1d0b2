"""What a trained module hangs on: the model up to its site, features, weights and libraries."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from featxfer import ArtifactError, Backbone, Card, Preprocessing
from featxfer.features.backbone import describe_module, sha256_of, weights_sha256
from featxfer_integrations.hosts import host_of
from featxfer_integrations.hosts.base import Host
from featxfer_integrations.mechanism.attach import attached_sites, host_parameter, transfers_of
from featxfer_integrations.mechanism.capture import in_dtype, take_feature
from featxfer_integrations.mechanism.site import CHILD, Site

LOWER_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes that weights are rounded to when a model is deployed."""


class FeatureAt(nn.Module):
    """The plain feature at a site, whose layout is known: what is attached is left out.

    A row is all the numbers that pass where `flat`, else maps averaged over their plane.
    """

    def __init__(self, model: nn.Module, site: Site, *, flat: bool = False) -> None:
        super().__init__()
        self.model, self.site, self.flat = model, site, flat

    def forward(self, images: Tensor) -> Tensor:
        """Images `(n, 3, h, w)` -> what arrives at the site when the model runs, `(n, d)`."""
        feature = take_feature(self.model, self.site, in_dtype(self.model, images))
        return feature.flatten(1) if self.flat else self.site.pool(feature)


class _HostBackbone(Backbone):
    """Its hashes leave out what is attached and the classifier: features do not hang on them."""

    module: FeatureAt

    @property
    def weights_sha256(self) -> str:
        model = self.module.model
        return backbone_sha256(host_of(model), model, self.module.site)

    @property
    def architecture_sha256(self) -> str:
        described = describe_module(self.module.model, leave_out=CHILD)
        return sha256_of([described, self.module.site.name, self.module.flat])


def backbone_at(
    host: Host, model: nn.Module, site: Site, preprocessing: Preprocessing, *, flat: bool = False
) -> Backbone:
    """The model up to `site`, without what is attached, as a frozen feature extractor."""
    module, name = FeatureAt(model, site, flat=flat), host.model_name(model)
    return _HostBackbone(module, preprocessing, name, "the model's own", libraries(model))


def backbone_sha256(
    host: Host, model: nn.Module, site: Site, dtype: torch.dtype | None = None
) -> str:
    """Hash of the model's weights that what is trained at `site` hangs on, see `weights_sha256`.

    Without what is attached, the classifiers or predictors, and what else runs behind the feature.
    """
    hooked = site.modules if site.side == "output" else ()
    behind = [name for name in (CHILD, *host.behind(model, site)) if name not in hooked]
    own = {name for name, _ in model.named_parameters(recurse=False)}
    left_out = [name if name in own else f"{name}." for name in behind]
    return weights_sha256(model, leave_out=tuple(left_out), dtype=dtype)


def architecture_sha256(model: nn.Module, keep: Sequence[Site] | None = None) -> str:
    """Hash of layers and settings, and of what is attached at all sites, or at those to `keep`."""
    kept = attached_sites(model) if keep is None else keep
    attached = {site.name: transfers_of(model)[site.name].config for site in kept}
    return sha256_of([describe_module(model, leave_out=CHILD), attached])


def model_sha256(model: nn.Module, keep: Sequence[Site] | None = None) -> str:
    """A hash of all that a model's results hang on: layers, settings, libraries and weights.

    The same in every process, before and after a run. `keep` as `architecture_sha256` has it.
    """
    attached = {site.name for site in attached_sites(model)}
    others = attached - {site.name for site in keep} if keep is not None else ()
    weights = weights_sha256(model, leave_out=tuple(f"{CHILD}.{name}." for name in others))
    return sha256_of([architecture_sha256(model, keep), libraries(model), weights])


def weights_details(host: Host, model: nn.Module, site: Site) -> dict[str, Any]:
    """For a card: the dtype of the weights, and their hash in the dtypes that have less room."""
    said = _dtype_name(model)
    lower = {said: LOWER_DTYPES[said]} if said in LOWER_DTYPES else LOWER_DTYPES
    hashes = {name: backbone_sha256(host, model, site, dtype) for name, dtype in lower.items()}
    return {"dtype": said, "sha256_in": hashes}


def check_weights(host: Host, model: nn.Module, site: Site, card: Card, source: str) -> None:
    """Raises `ArtifactError` for a card of other weights, in whatever dtype either has them."""
    now, trained = _dtype_name(model), str(card.details.get("dtype", "float32"))
    wanted, rounded = card.backbone_sha256, card.details.get("sha256_in", {})
    lower = now if now in LOWER_DTYPES else trained
    dtype = LOWER_DTYPES.get(lower)
    if lower in rounded or lower != trained:  # in mixed precision only some weights are in it
        wanted = str(rounded.get(lower, ""))
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
