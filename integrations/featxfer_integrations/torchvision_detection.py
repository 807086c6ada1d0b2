"""torchvision's detectors: where a head or blocks go, and what of the model is run for them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import FeaturePyramidNetwork

from featxfer import Preprocessing
from featxfer.checks import check_choice
from featxfer.features.backbone import frozen
from featxfer_integrations._attach import (
    CHILD,
    AttachError,
    Place,
    black_image,
    module_place,
    no_place,
)

BRANCHES = ("class", "both")
"""Of the predictor: what a head at `where="boxes"` acts on."""

BACKBONE_REDUCTIONS = (8, 16, 32)
"""Blocks go where the backbone's last maps of so many times less than the image's size end."""

INPUT_SIZE = 256
"""Side of the image that a backbone is tried on, in pixels, where the detector has no fixed one."""


def places(model: nn.Module, where: str, branch: str) -> list[Place]:
    """The places of "boxes", "backbone" or "fpn", or the one of that name; none for other names.

    Raises:
        AttachError: the detector has no such place; candidates are listed.
        ValueError: another branch.
    """
    check_choice("branch", branch, BRANCHES)
    if where.startswith("boxes_regression"):
        branch = "both"
    if branch != "class" and not where.startswith("boxes"):
        raise ValueError(f"branch: got {branch!r}, which is for heads at 'boxes', not {where!r}")
    if where == "boxes":
        return box_places(model, branch)
    if where == "backbone":
        return [block_place(model, name) for name in deep_modules(model)]
    if where == "fpn":
        return level_places(model)
    named = box_places(model, branch) if where.startswith("boxes") else []
    named += level_places(model) if where.startswith("fpn") else []
    return [place for place in named if place.name == where]


def box_places(model: nn.Module, branch: str = "class") -> list[Place]:
    """Where the features of boxes, or of positions, meet the predictor.

    R-CNNs: one place, before the class scores, or with branch "both" after `box_head`. Others: at
    each position before the last convolutions of the classification branch (and of the regression
    branch, at places of their own); SSD has one a level.
    """
    if isinstance(model, GeneralizedRCNN):
        return [_roi_place(model, branch)]
    towers = {"boxes_class": "classification_head", "boxes_regression": "regression_head"}
    if branch == "class":
        del towers["boxes_regression"]
    return [
        dataclasses.replace(place, branch=branch)
        for name, tower in towers.items()
        for place in _dense_places(model, name, tower)
    ]


def _roi_place(model: nn.Module, branch: str) -> Place:
    """R-CNN's place."""
    modules = dict(model.named_modules())
    scores = modules.get("roi_heads.box_predictor.cls_score")
    if not isinstance(scores, nn.Linear):
        raise no_place(
            model,
            "model: wanted a linear layer roi_heads.box_predictor.cls_score; "
            "name the module whose output is the boxes' feature by where=",
        )
    if branch == "class":
        return Place("boxes", scores.in_features, ("roi_heads.box_predictor.cls_score",))
    if "roi_heads.box_head" not in modules:
        raise no_place(model, "branch: no module roi_heads.box_head, which 'both' goes after")
    return Place("boxes", scores.in_features, outputs=("roi_heads.box_head",), branch=branch)


def _dense_places(model: nn.Module, name: str, tower: str) -> Iterator[Place]:
    """Before the last convolutions of a tower, a place for each level that has its own."""
    path = f"head.{tower}"
    modules = dict(model.named_modules())
    if path not in modules:
        raise no_place(model, f"model: wanted a module {path}; name another by where=")
    levels = modules.get(f"{path}.module_list")
    if levels is not None:
        for level, layers in levels.named_children():
            last = [n for n, layer in layers.named_modules() if isinstance(layer, nn.Conv2d)][-1]
            inner = f"{path}.module_list.{level}" + (f".{last}" if last else "")
            yield Place(f"{name}{level}", _channels(modules[inner]), (inner,))
        return
    last = [n for n, layer in modules[path].named_children() if isinstance(layer, nn.Conv2d)]
    if not last:
        raise no_place(model, f"model: {path} ends in no convolution; name a module by where=")
    inputs = tuple(f"{path}.{layer}" for layer in last)
    yield Place(name, _channels(modules[inputs[0]]), inputs)


def _channels(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Conv2d)
    return layer.in_channels


def level_places(model: nn.Module) -> list[Place]:
    """After the backbone with its pyramid: a place for a block at each level."""
    output = _try_backbone(model)
    if isinstance(output, Tensor):
        return [Place("fpn0", output.shape[1], outputs=("backbone",), run=run_backbone, block=True)]
    return [
        Place(
            f"fpn{index}",
            maps.shape[1],
            outputs=("backbone",),
            level=level,
            run=run_backbone,
            block=True,
        )
        for index, (level, maps) in enumerate(output.items())
    ]


def block_place(model: nn.Module, name: str) -> Place:
    """After a module of the backbone."""
    place = module_place(model, name)
    inside = name.startswith("backbone.")
    return dataclasses.replace(place, block=True, run=run_backbone if inside else None)


def run_backbone(model: nn.Module, images: Tensor) -> object:
    """The maps of the pyramid, of images as the backbone takes them."""
    backbone: Any = model.backbone
    return backbone(images)


def behind(model: nn.Module, place: Place) -> tuple[str, ...]:
    """All but the backbone for what is in it; else the predictors, and heads of other kinds."""
    if all(name.startswith("backbone") for name in (*place.inputs, *place.outputs)):
        names = (name for name, _ in model.named_children())
        return tuple(name for name in names if name not in ("backbone", CHILD))
    if isinstance(model, GeneralizedRCNN):
        heads = model.get_submodule("roi_heads").named_children()
        before = ("box_roi_pool", "box_head")
        return tuple(f"roi_heads.{name}" for name, _ in heads if name not in before)
    last = [name for found in box_places(model, "both") for name in found.inputs]
    return (*last, *place.inputs)


def answers(model: nn.Module, images: Tensor) -> Any:
    """All that the heads say of images, before anything is left out for its score."""
    heads = ["rpn.head", "roi_heads"] if isinstance(model, GeneralizedRCNN) else ["head"]
    said: list[Any] = []
    handles = []
    for name, module in model.named_modules():
        if name.startswith(tuple(heads)):
            handles.append(module.register_forward_hook(lambda *args: said.append(args[-1])))
    try:
        said.append(model(list(images)))
    finally:
        for handle in handles:
            handle.remove()
    return said


def _try_backbone(model: nn.Module) -> Any:
    size = input_size(model)
    with frozen(model):
        return run_backbone(model, black_image(model, size, size))


def input_size(model: nn.Module) -> int:
    """Side of the images that the backbone is tried on, in pixels."""
    transform: Any = model.transform
    return max(transform.fixed_size) if transform.fixed_size else INPUT_SIZE


def pooled_place(model: nn.Module) -> Place:
    """None: a detector has no pooled feature."""
    raise AttachError(f"model: {type(model).__name__} is a detector and has no pooled feature")


def stage_module(model: nn.Module, stage: int) -> str:
    """The last module of the backbone of each resolution, from the highest one."""
    modules = list(_modules_by_reduction(model).values())
    if stage >= len(modules):
        names = ", ".join(f"stage{index} = {name}" for index, name in enumerate(modules))
        raise AttachError(f"at: the backbone has no stage{stage}; it has {names or 'none'}")
    return modules[stage]


def deep_modules(model: nn.Module) -> list[str]:
    """The last modules of the backbone that give maps of 1/8, 1/16 and 1/32 of the image."""
    last = _modules_by_reduction(model)
    found = [last[reduction] for reduction in BACKBONE_REDUCTIONS if reduction in last]
    if not found:
        raise no_place(model, "where: the backbone has no maps of 1/8 to 1/32 of the image's size")
    return found


def _modules_by_reduction(model: nn.Module) -> dict[int, str]:
    """Names of the backbone's last modules of each resolution, by how much it is reduced.

    From one run. Modules inside of a pyramid are left out, and those inside of modules that give
    maps themselves and are no lists of layers. Where a module's maps are what the backbone returns
    of a resolution, as SSD's are, it is that resolution's last: later ones are not seen there.
    """
    size, backbone = input_size(model), model.get_submodule("backbone")
    reductions: dict[str, int] = {}
    maps: dict[str, Tensor] = {}

    def note(_: nn.Module, __: object, output: object, *, name: str) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and 1 < output.shape[2] < size:
            reductions[name] = 2 ** round(math.log2(size / output.shape[2]))
            maps[name] = output

    handles = [
        module.register_forward_hook(partial(note, name=name))
        for name, module in backbone.named_modules(prefix="backbone")
    ]
    try:
        returned = _try_backbone(model)
    finally:
        for handle in handles:
            handle.remove()
    stages = set(_stages(backbone, "backbone", reductions))
    last = {reduction: name for name, reduction in reductions.items() if name in stages}
    levels = [] if isinstance(returned, Tensor) else list(returned.values())
    for name in stages:
        if any(maps[name] is level for level in levels):
            last[reductions[name]] = name
    return dict(sorted(last.items()))


def _stages(module: nn.Module, path: str, giving: Container[str]) -> Iterator[str]:
    """Names of modules that give maps, and of those in lists of layers among them."""
    for name, child in module.named_children():
        inner = f"{path}.{name}"
        if isinstance(child, FeaturePyramidNetwork):
            continue
        if inner not in giving or isinstance(child, nn.Sequential):
            yield from _stages(child, inner, giving)
        if inner in giving:
            yield inner


def model_name(model: nn.Module) -> str:
    """The model's class: torchvision's models do not keep their builder's name."""
    return f"torchvision/{type(model).__name__}"


def preprocessing(model: nn.Module) -> Preprocessing:
    """Mean and std of the detector's own transform."""
    transform: Any = model.transform
    return Preprocessing(tuple(transform.image_mean), tuple(transform.image_std), None)
