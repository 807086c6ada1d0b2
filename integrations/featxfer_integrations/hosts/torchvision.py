"""torchvision's classification models, with the transforms of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torchvision
import torchvision.models
from torch import Tensor, nn

from featxfer import Backbone, Preprocessing
from featxfer.features.backbone import frozen
from featxfer_integrations.hosts.base import (
    INPUT_SIZE,
    Host,
    black_image,
    classifiers_behind,
    said_side,
)
from featxfer_integrations.hosts.weights import BackboneError, load_by_name, read_state_dict
from featxfer_integrations.mechanism.capture import watched
from featxfer_integrations.mechanism.site import CHILD, PLANES, AttachError, Site

REDUCTIONS = (16, 32)
"""Blocks go after the last layer that gives maps so many times smaller than the image."""


class Torchvision(Host):
    """torchvision's classification models."""

    name = "torchvision"

    def owns(self, model: nn.Module) -> bool:
        """Whether its class, or a base of it, is one of `torchvision.models` itself."""
        names = (cls.__module__.split(".") for cls in type(model).__mro__)
        return any(name[:2] == ["torchvision", "models"] and len(name) == 3 for name in names)

    def model_name(self, model: Any) -> str:
        """The model's class: torchvision's models do not keep their builder's name."""
        return f"torchvision/{type(model).__name__}"

    def preprocessing(self, model: Any) -> Preprocessing:
        """ImageNet's mean and std, as of most weights: the model does not keep its own."""
        return Preprocessing(input_size=getattr(model, "image_size", None))

    def input_size(self, model: Any) -> int:
        """The model's own, or that of the one set of weights of so many parameters."""
        said = said_side(model)
        if said is not None:
            return said
        count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(f"{CHILD}."))
        with suppress(AttachError):
            site = self.head(model)
            if site.width is not None:  # as many classes as the weights have, whatever it has now
                classifier = model.get_submodule(site.modules[0])
                count -= sum(parameter.numel() for parameter in classifier.parameters())
                count += 1000 * (site.width + 1)
        sizes = {
            int(weights.transforms.keywords["crop_size"])
            for builder in self.model_names()
            for weights in torchvision.models.get_model_weights(builder)
            if weights.meta["num_params"] == count
        }
        return sizes.pop() if len(sizes) == 1 else INPUT_SIZE

    def head(self, model: Any) -> Site:
        """Before the last layer with weights of the last child, or the `Identity` in its stead."""
        *_, (child, last) = ((n, c) for n, c in model.named_children() if n != CHILD)
        for name, layer in reversed(list(last.named_modules(prefix=child))):
            width = None
            if isinstance(layer, nn.Linear):
                width = layer.in_features
            elif isinstance(layer, nn.Conv2d):
                width = layer.in_channels
            elif not isinstance(layer, nn.Identity):
                if list(layer.parameters(recurse=False)):
                    break
                continue
            return Site("head", (name,), "input", width, kind="head")
        raise AttachError(
            f"model: the last child {child!r} of torchvision's {type(model).__name__} ends in no "
            "linear layer; name the module whose output is the feature by site="
        )

    def stages(self, model: Any) -> list[str]:
        """The last layer of each resolution of the feature maps, from the highest one."""
        return list(self._layers_by_reduction(model).values())

    def blocks(self, model: Any) -> list[str]:
        """The last layer that gives maps of each deep reduction, where there is one."""
        last = self._layers_by_reduction(model)
        return [last[reduction] for reduction in REDUCTIONS if reduction in last]

    def _layers_by_reduction(self, model: nn.Module) -> dict[int, str]:
        """Names of the last layers that give maps of 1/2, 1/4, ... of the image; from one run.

        Layers are the model's children, and the children of lists of layers among them.
        """
        size = self.input_size(model)
        last: dict[int, str] = {}

        def note(name: str, output: object) -> None:
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            if len(shape) == 4:
                nhwc = shape[1] == shape[2] != shape[3]
                side = shape[PLANES["nhwc" if nhwc else "nchw"][0]]
                if 1 < side < size:
                    last[round(size / side)] = name

        with watched(model, _layers(model), after=note), frozen(model):
            model(black_image(model, size, size))
        return dict(sorted(last.items()))

    def behind(self, model: Any, site: Site) -> tuple[str, ...]:
        """The classifier."""
        return classifiers_behind(self, model, site)

    def model_names(self) -> Iterable[str]:
        """Names of torchvision's image classification models."""
        return torchvision.models.list_models(  # type: ignore[no-any-return]
            module=torchvision.models
        )

    def has_model(self, name: str) -> bool:
        """Whether torchvision has an image classification model of that name."""
        return name in self.model_names()

    def load(self, name: str, weights: str | Path) -> Backbone:
        """The model with its last classifier layer replaced by the identity: the pooled feature.

        For models with several classifier layers (VGG, AlexNet, MobileNetV3) that is the input of
        the last one; for SqueezeNet, whose classifier is a convolution, the pooled input of it.
        """
        default = torchvision.models.get_model_weights(name).DEFAULT
        model = _create(name, weights)
        classifier = _find_classifier(model, len(default.meta["categories"]))
        if weights not in ("pretrained", "random"):
            load_by_name(model, read_state_dict(Path(weights)), classifier)
        model.set_submodule(classifier, nn.Identity())
        transforms = default.transforms()
        fixed = getattr(model, "image_size", None)
        return Backbone(
            model.eval(),
            Preprocessing(tuple(transforms.mean), tuple(transforms.std), fixed),
            f"torchvision/{name}",
            str(weights),
            f"torchvision {torchvision.__version__}",
            fixed or transforms.crop_size[0],
        )

    def load_model(self, name: str, weights: str | Path) -> nn.Module:
        """The model with its classifier, in eval mode."""
        model = _create(name, weights)
        if weights not in ("pretrained", "random"):
            load_by_name(model, read_state_dict(Path(weights)), "")
        return model.eval()


HOST = Torchvision()


def _layers(model: nn.Module) -> Iterator[str]:
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from (f"{name}.{inner}" for inner, _ in child.named_children())
        yield name


def _find_classifier(model: nn.Module, classes: int) -> str:
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


def _create(name: str, weights: str | Path) -> nn.Module:
    """With its default weights if these are "pretrained", else as torchvision initialises it."""
    if weights == "demo":
        raise BackboneError(f"weights: 'demo' is for timm's EfficientNet-Lite, got {name!r}")
    try:
        model: nn.Module = torchvision.models.get_model(
            name, weights="DEFAULT" if weights == "pretrained" else None
        )
    except OSError as error:
        raise BackboneError(
            f"weights: those of torchvision's {name} could not be downloaded: {error}; "
            "pass a local file where their host cannot be reached"
        ) from error
    return model
