"""torchvision's classification models as backbones, with the transforms of their weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torchvision
import torchvision.models
from torch import nn

from featxfer import Backbone, Preprocessing
from featxfer_integrations._weights import BackboneError, load_by_name, read_state_dict


def model_names() -> Iterable[str]:
    """Names of torchvision's image classification models."""
    return torchvision.models.list_models(module=torchvision.models)  # type: ignore[no-any-return]


def has_model(name: str) -> bool:
    """Whether torchvision has an image classification model of that name."""
    return name in model_names()


def load(name: str, weights: str | Path) -> Backbone:
    """The model with its last classifier layer replaced by the identity: the pooled feature.

    For models with several classifier layers (VGG, AlexNet, MobileNetV3) that is the input of the
    last one; for SqueezeNet, whose classifier is a convolution, the pooled input of it.
    """
    if weights == "demo":
        raise BackboneError(f"weights: 'demo' is for timm's EfficientNet-Lite, got {name!r}")
    default = torchvision.models.get_model_weights(name).DEFAULT
    model = _create(name, default if weights == "pretrained" else None)
    classifier = find_classifier(model, len(default.meta["categories"]))
    if weights not in ("pretrained", "random"):
        load_by_name(model, read_state_dict(Path(weights)), classifier)
    model.set_submodule(classifier, nn.Identity())
    transforms = default.transforms()
    fixed = getattr(model, "image_size", None)
    host = f"torchvision {torchvision.__version__}"
    preprocessing = Preprocessing(tuple(transforms.mean), tuple(transforms.std), fixed)
    return Backbone(model.eval(), preprocessing, f"torchvision/{name}", str(weights), host)


def find_classifier(model: nn.Module, classes: int) -> str:
    """Name of the last linear layer or convolution that has `classes` outputs."""
    names = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == classes)
        or (isinstance(module, nn.Conv2d) and module.out_channels == classes)
    ]
    if not names:
        raise BackboneError(f"backbone: {type(model).__name__} has no layer with {classes} outputs")
    return str(names[-1])


def _create(name: str, weights: object) -> nn.Module:
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=weights)
    except OSError as error:
        raise BackboneError(
            f"weights: those of torchvision's {name} could not be downloaded: {error}; "
            "pass a local file where their host cannot be reached"
        ) from error
    return model
