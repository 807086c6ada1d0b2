"""torchvision's classification models as backbones, with the transforms of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torchvision
import torchvision.models
from torch import Tensor, nn

from featxfer import Backbone, Preprocessing
from featxfer.features.backbone import frozen
from featxfer_integrations._attach import (
    CHILD,
    DEEP_REDUCTIONS,
    AttachError,
    Place,
    black_image,
    channel_axis,
    said_side,
)
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
    default = torchvision.models.get_model_weights(name).DEFAULT
    model = _create(name, weights)
    classifier = find_classifier(model, len(default.meta["categories"]))
    if weights not in ("pretrained", "random"):
        load_by_name(model, read_state_dict(Path(weights)), classifier)
    model.set_submodule(classifier, nn.Identity())
    transforms = default.transforms()
    fixed = getattr(model, "image_size", None)
    host = f"torchvision {torchvision.__version__}"
    normalisation = Preprocessing(tuple(transforms.mean), tuple(transforms.std), fixed)
    size = fixed or transforms.crop_size[0]
    return Backbone(model.eval(), normalisation, f"torchvision/{name}", str(weights), host, size)


def load_model(name: str, weights: str | Path) -> nn.Module:
    """The model with its classifier, in eval mode."""
    model = _create(name, weights)
    if weights not in ("pretrained", "random"):
        load_by_name(model, read_state_dict(Path(weights)), "")
    return model.eval()


def model_name(model: nn.Module) -> str:
    """The model's class: torchvision's models do not keep their builder's name."""
    return f"torchvision/{type(model).__name__}"


def preprocessing(model: nn.Module) -> Preprocessing:
    """ImageNet's mean and std, as of most weights: the model does not keep its own."""
    return Preprocessing(input_size=getattr(model, "image_size", None))


def input_size(model: nn.Module) -> int:
    """Side of the images that the model is made for, in pixels.

    The model's own, or that which the one set of torchvision's weights for a model of so many
    parameters was made for; else 224.
    """
    said = said_side(model)
    if said is not None:
        return said
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(f"{CHILD}."))
    with suppress(AttachError):
        place = pooled_place(model)
        if place.width is not None:  # as many classes as the weights have, whatever it has now
            classifier = model.get_submodule(place.inputs[0])
            count -= sum(parameter.numel() for parameter in classifier.parameters())
            count += 1000 * (place.width + 1)
    sizes = {
        int(weights.transforms.keywords["crop_size"])
        for builder in model_names()
        for weights in torchvision.models.get_model_weights(builder)
        if weights.meta["num_params"] == count
    }
    return sizes.pop() if len(sizes) == 1 else 224


def behind(model: nn.Module, place: Place) -> tuple[str, ...]:
    """The classifier."""
    if not place.inputs:
        with suppress(AttachError):
            place = pooled_place(model)
    return place.inputs


def pooled_place(model: nn.Module) -> Place:
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
        return Place("pooled", width, inputs=(name,))
    raise AttachError(
        f"model: the last child {child!r} of torchvision's {type(model).__name__} ends in no "
        "linear layer; name the module whose output is the feature by where="
    )


def stage_module(model: nn.Module, stage: int) -> str:
    """The last layer of each resolution of the feature maps, from the highest one."""
    layers = list(_layers_by_resolution(model).values())
    if stage >= len(layers):
        names = ", ".join(f"stage{index} = {name}" for index, name in enumerate(layers))
        raise AttachError(
            f"at: {type(model).__name__} has no stage{stage}; it has {names or 'none'}"
        )
    return layers[stage]


def deep_modules(model: nn.Module) -> list[str]:
    """The last layer that gives maps of each deep reduction, where there is one."""
    last = _layers_by_resolution(model)
    return [last[reduction] for reduction in DEEP_REDUCTIONS if reduction in last]


def _layers_by_resolution(model: nn.Module) -> dict[int, str]:
    """Names of the last layers that give maps of 1/2, 1/4, ... of the image; from one run.

    Layers are the model's children, and the children of lists of layers among them.
    """
    size = input_size(model)
    last: dict[int, str] = {}

    def note(_: nn.Module, __: object, output: object, *, name: str) -> None:
        shape = tuple(output.shape) if isinstance(output, Tensor) else ()
        if len(shape) == 4 and 1 < shape[4 - channel_axis(shape)] < size:
            last[round(size / shape[4 - channel_axis(shape)])] = name

    handles = [
        layer.register_forward_hook(partial(note, name=name)) for name, layer in _layers(model)
    ]
    try:
        with frozen(model):
            model(black_image(model, size, size))
    finally:
        for handle in handles:
            handle.remove()
    return dict(sorted(last.items()))


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from ((f"{name}.{inner}", layer) for inner, layer in child.named_children())
        yield name, child


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
