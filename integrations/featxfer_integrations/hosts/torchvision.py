"""torchvision's classification models, with the transforms of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torchvision
import torchvision.models
from torch import nn

from featxfer import Preprocessing
from featxfer_integrations.hosts import base
from featxfer_integrations.hosts.images import INPUT_SIZE, said_side
from featxfer_integrations.hosts.load import BackboneError
from featxfer_integrations.hosts.resolutions import block_places, ends, reductions
from featxfer_integrations.mechanism.site import CHILD, AttachError, Site


class Torchvision(base.Host):
    """torchvision's classification models."""

    name = "torchvision"
    behind = base.classifiers_behind

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
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.Identity):
                return Site("head", (name,), "input", base.input_width(layer), kind="head")
            if list(layer.parameters(recurse=False)):
                break
        raise AttachError(
            f"model: the last child {child!r} of torchvision's {type(model).__name__} ends in no "
            "linear layer; name the module whose output is the feature by site="
        )

    def stages(self, model: Any) -> list[str]:
        """The last layer of each resolution of the feature maps, from the highest one."""
        return list(ends(reductions(self, model, _layers(model))).values())

    def blocks(self, model: Any) -> list[str]:
        """Where `block_places` says, of the layers."""
        return block_places(reductions(self, model, _layers(model)))

    def model_names(self) -> Iterable[str]:
        """Names of torchvision's image classification models."""
        return torchvision.models.list_models(  # type: ignore[no-any-return]
            module=torchvision.models
        )

    def has_model(self, name: str) -> bool:
        """Whether torchvision has an image classification model of that name."""
        return name in self.model_names()

    def create(self, name: str, *, pretrained: bool) -> nn.Module:
        """A model of that name; `BackboneError` where its weights cannot be downloaded."""
        try:
            model: nn.Module = torchvision.models.get_model(
                name, weights="DEFAULT" if pretrained else None
            )
        except OSError as error:
            raise BackboneError(
                f"weights: those of torchvision's {name} could not be downloaded: {error}; "
                "pass a local file where their host cannot be reached"
            ) from error
        return model

    def classifier(self, model: Any) -> str:
        """The module name of the last classifier layer, of those that have several (VGG)."""
        return self.head(model).modules[0]

    def remove_classifier(self, model: Any) -> None:
        """The model returns the pooled feature, the input of its last classifier layer."""
        model.set_submodule(self.classifier(model), nn.Identity())

    def for_weights(self, model: Any, name: str) -> tuple[Preprocessing, int]:
        """Preprocessing and input size of a builder's default weights."""
        transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        fixed = getattr(model, "image_size", None)
        preprocessing = Preprocessing(tuple(transforms.mean), tuple(transforms.std), fixed)
        return preprocessing, fixed or transforms.crop_size[0]


HOST = Torchvision()


def _layers(model: Any) -> Iterator[str]:
    """The model's children, and the children of lists of layers among them."""
    if isinstance(model, torchvision.models.VisionTransformer):
        yield from (f"encoder.layers.{name}" for name, _ in model.encoder.layers.named_children())
        return
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from (f"{name}.{inner}" for inner, _ in child.named_children())
        yield name
