"""torchvision's detectors: where heads and blocks go, and what of the model is run for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FeaturePyramidNetwork

from featxfer import Preprocessing
from featxfer.checks import check_choice
from featxfer.features.backbone import frozen
from featxfer_integrations.hosts.pyramids import run_backbone
from featxfer_integrations.hosts.torchvision_boxes import TOWERS, DetectorHost
from featxfer_integrations.mechanism.capture import watched
from featxfer_integrations.mechanism.site import Lens, Site, no_site

BRANCHES = ("class", "both")
"""Of the predictor: what a head at `site="boxes"` acts on."""

INPUT_SIZE = 256
"""Side of the image that a backbone is tried on, in pixels, where the detector has no fixed one."""


class TorchvisionDetection(DetectorHost):
    """torchvision's detectors, and those made by hand of their classes."""

    name = "torchvision detection"
    site = "boxes"
    left_out = FeaturePyramidNetwork

    def owns(self, model: nn.Module) -> bool:
        """Whether it is one of torchvision's four kinds of detectors."""
        return isinstance(model, GeneralizedRCNN | RetinaNet | FCOS | SSD)

    def model_name(self, model: Any) -> str:
        """The model's class: torchvision's models do not keep their builder's name."""
        return f"torchvision/{type(model).__name__}"

    def preprocessing(self, model: Any) -> Preprocessing:
        """Mean and std of the detector's own transform."""
        transform = model.transform
        return Preprocessing(tuple(transform.image_mean), tuple(transform.image_std), None)

    def input_size(self, model: Any) -> int:
        """Side of the images that the backbone is tried on, in pixels."""
        transform = model.transform
        return max(transform.fixed_size) if transform.fixed_size else INPUT_SIZE

    def sites(self, model: Any, name: str, branch: str = "class") -> list[Site]:
        """What "boxes", "backbone", "fpn", one of their sites, a stage or a module stands for.

        Raises `AttachError` with candidates for another name, `ValueError` for such a branch.
        """
        check_choice("branch", branch, BRANCHES)
        if name.startswith("boxes_regression"):
            branch = "both"
        if branch != "class" and not name.startswith("boxes"):
            raise ValueError(f"branch: got {branch!r}, which is for site='boxes', not {name!r}")
        if name in ("backbone", "blocks"):
            return [self.after(model, inner, kind="block") for inner in self.blocks(model)]
        named = box_sites(model, branch) if name.startswith("boxes") else []
        named += _level_sites(model) if name.startswith("fpn") else []
        found = [site for site in named if name in ("boxes", "fpn", site.name)]
        if not found and not name.startswith("stage") and name not in dict(model.named_modules()):
            wanted = "'boxes', 'backbone', 'fpn', one of their sites or the name of a module"
            raise no_site(model, f"site: got {name!r}, wanted {wanted}")
        return found or super().sites(model, name)

    def behind(self, model: Any, site: Site) -> tuple[str, ...]:
        """All but the backbone for what is in it; else the predictors, and heads of other kinds."""
        if all(name.startswith("backbone") for name in site.modules):
            return tuple(name for name, _ in model.named_children() if name != "backbone")
        if isinstance(model, GeneralizedRCNN):
            heads = model.get_submodule("roi_heads").named_children()
            before = ("box_roi_pool", "box_head")
            return tuple(f"roi_heads.{name}" for name, _ in heads if name not in before)
        last = [name for found in box_sites(model, "both") for name in found.modules]
        return (*last, *(site.modules if site.side == "input" else ()))

    def answers(self, model: Any, batch: Any) -> Any:
        """All that the heads say of images, before anything is left out for its score."""
        heads = ("rpn.head", "roi_heads") if isinstance(model, GeneralizedRCNN) else ("head",)
        said: list[Any] = []
        names = [name for name, _ in model.named_modules() if name.startswith(heads)]
        with watched(model, names, after=lambda _, output: said.append(output)):
            said.append(model(list(batch)))
        return said


HOST = TorchvisionDetection()


def box_sites(model: nn.Module, branch: str = "class") -> list[Site]:
    """Where the features of boxes, or of positions, meet the predictor.

    R-CNNs: one place, before the class scores, or with branch "both" after `box_head`. Others: at
    each position before the last convolutions of the classification branch (and of the regression
    branch, at places of their own); SSD has one a level.
    """
    if isinstance(model, GeneralizedRCNN):
        return [_roi_site(model, branch)]
    sites: list[Site] = []
    for name, tower in TOWERS.items():
        if branch == "both" or name == "boxes_class":
            sites += _dense_sites(model, name, f"head.{tower}", branch)
    return sites


def _roi_site(model: nn.Module, branch: str) -> Site:
    """R-CNN's place."""
    modules = dict(model.named_modules())
    scores = modules.get("roi_heads.box_predictor.cls_score")
    if not isinstance(scores, nn.Linear):
        raise no_site(
            model,
            "model: wanted a linear layer roi_heads.box_predictor.cls_score; "
            "name the module whose output is the boxes' feature by site=",
        )
    if branch == "class":
        classes = ("roi_heads.box_predictor.cls_score",)
        return _head_site("boxes", classes, scores.in_features, branch)
    if "roi_heads.box_head" not in modules:
        raise no_site(model, "branch: no module roi_heads.box_head, which 'both' goes after")
    return _head_site("boxes", ("roi_heads.box_head",), scores.in_features, branch, "output")


def _dense_sites(model: nn.Module, name: str, path: str, branch: str) -> Iterator[Site]:
    """Before the last convolutions of a tower, a place for each level that has its own."""
    modules = dict(model.named_modules())
    if path not in modules:
        raise no_site(model, f"model: wanted a module {path}; name another by site=")
    levels = modules.get(f"{path}.module_list")
    if levels is not None:
        for level, layers in levels.named_children():
            inner = layers.named_modules(prefix=f"{path}.module_list.{level}")
            *_, (last, layer) = ((n, m) for n, m in inner if isinstance(m, nn.Conv2d))
            yield _head_site(f"{name}{level}", (last,), layer.in_channels, branch)
        return
    children = modules[path].named_children()
    widths = {f"{path}.{n}": m.in_channels for n, m in children if isinstance(m, nn.Conv2d)}
    if not widths:
        raise no_site(model, f"model: {path} ends in no convolution; name a module by site=")
    yield _head_site(name, tuple(widths), next(iter(widths.values())), branch)


def _head_site(
    name: str, modules: tuple[str, ...], width: int, branch: str, side: str = "input"
) -> Site:
    return Site(name, modules, side, width, kind="head", asked=name, branch=branch, repeats=True)


def _level_sites(model: nn.Module) -> list[Site]:
    """After the backbone with its pyramid: a place for a block at each level."""
    with frozen(model):
        output = run_backbone(model, HOST.image(model))
    is_one = isinstance(output, Tensor)
    levels = {(): output} if is_one else {(level,): maps for level, maps in output.items()}
    return [
        Site(
            f"fpn{index}",
            ("backbone",),
            width=maps.shape[1],
            layout="nchw",
            extent=tuple(maps.shape[2:]),
            kind="block",
            lens=Lens(path),
            asked=f"fpn{index}",
            run=run_backbone,
        )
        for index, (path, maps) in enumerate(levels.items())
    ]
