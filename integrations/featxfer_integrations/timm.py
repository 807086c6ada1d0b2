"""timm's models as backbones, by what `pretrained_cfg` and timm's own accessors say of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from featxfer import Backbone, Preprocessing
from featxfer_integrations._attach import (
    DEEP_REDUCTIONS,
    AttachError,
    Place,
    gives_clusters,
    hook_modules,
    said_side,
    transfers_of,
    unhook_modules,
)
from featxfer_integrations._weights import (
    BackboneError,
    load_by_name,
    load_demo,
    read_state_dict,
)


def model_names() -> Iterable[str]:
    """All of timm's model names, without weights' tags."""
    return timm.list_models()  # type: ignore[no-any-return]


def has_model(name: str) -> bool:
    """Whether timm has it; a weights' tag may follow a dot."""
    return bool(timm.is_model(name.split(".")[0]))


def load(name: str, weights: str | Path) -> Backbone:
    """The model with its classifier reset: it returns the pooled, pre-logits feature."""
    model: Any = _load(name, weights, with_classifier=False)
    model.reset_classifier(0)
    host = f"timm {timm.__version__}"
    return Backbone(
        model.eval(), preprocessing(model), f"timm/{name}", str(weights), host, input_size(model)
    )


def load_model(name: str, weights: str | Path) -> nn.Module:
    """The model with its classifier, in eval mode."""
    return _load(name, weights, with_classifier=True).eval()


def model_name(model: Any) -> str:
    """As `load_backbone` takes it; a model made by hand goes by its class."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return f"timm/{cfg.get('architecture') or type(model).__name__}"


def preprocessing(model: Any) -> Preprocessing:
    """Mean, std and, where the model takes no other, the input size that it was made for."""
    config = resolve_model_data_config(model)
    fixed = model.pretrained_cfg.get("fixed_input_size") and not any(
        getattr(module, "strict_img_size", None) is False for module in model.modules()
    )
    size = input_size(model) if fixed else None
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), size)


def input_size(model: Any) -> int:
    """Side of the images that the model is made for, in pixels: its own, or that of its weights."""
    return said_side(model) or int(resolve_model_data_config(model)["input_size"][-1])


def behind(model: Any, place: Place) -> tuple[str, ...]:
    """The classifiers."""
    if not place.inputs:
        with suppress(AttachError):
            place = pooled_place(model)
    return place.inputs


def pooled_place(model: Any) -> Place:
    """Before `get_classifier()` and after `forward_head(pre_logits=True)`.

    Headless, it is what `forward_head` returns.
    """
    if not hasattr(model, "forward_head") or not hasattr(model, "get_classifier"):
        raise AttachError(
            f"model: timm's {type(model).__name__} has no classification head; name the module "
            "whose output is the feature by where=, or a stage by at="
        )
    classifiers = _classifiers(model)
    widths = {_input_width(module) for module in classifiers.values()} - {None}
    if len(widths) > 1:
        raise AttachError(
            f"model: the classifiers of timm's {type(model).__name__} take features of several "
            f"widths, {sorted(map(str, widths))}; one head fits one width"
        )
    said = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
    return Place(
        "pooled",
        next(iter(widths), said),
        inputs=tuple(classifiers),
        methods={"forward_head": _forward_head, "reset_classifier": _reset_classifier},
        feature=_pre_logits,
    )


def stage_module(model: Any, stage: int) -> str:
    """The module of entry `stage` of `feature_info`, as `out_indices=(stage,)` counts them."""
    info = getattr(model, "feature_info", None) or []
    entries = list(getattr(info, "info", info))
    if stage >= len(entries) or "module" not in entries[stage]:
        names = [f"stage{i} = {e['module']}" for i, e in enumerate(entries) if "module" in e]
        raise AttachError(
            f"at: timm's {type(model).__name__} has no stage{stage}; "
            f"it has {', '.join(names) or 'none'}"
        )
    return str(entries[stage]["module"])


def deep_modules(model: Any) -> list[str]:
    """The last entry of `feature_info` of each deep reduction, where it names its module."""
    info = getattr(model, "feature_info", None) or []
    last = {e.get("reduction"): e.get("module") for e in getattr(info, "info", info)}
    return [str(last[reduction]) for reduction in DEEP_REDUCTIONS if last.get(reduction)]


def _classifiers(model: Any) -> dict[str, nn.Module]:
    """The classifiers by name; none of a headless model."""
    names = {module: name for name, module in model.named_modules()}
    try:
        classifier = model.get_classifier()
    except AttributeError:  # some families name a layer that is gone when they are headless
        classifier = None
    found = [_without_pooling(model, module) for module in _flat(classifier)]
    return {names[m]: m for m in found if m in names and not isinstance(m, nn.Identity)}


def _flat(found: Any) -> list[nn.Module]:
    """The modules of nested tuples and lists."""
    if isinstance(found, nn.ModuleList | tuple | list):
        return [module for part in found for module in _flat(part)]
    return [found] if isinstance(found, nn.Module) else []


def _without_pooling(model: Any, found: nn.Module) -> nn.Module:
    """Of a whole head, which knows `pre_logits`, the layer that the weights call classifier."""
    if "pre_logits" not in inspect.signature(found.forward).parameters:
        return found
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    layer: nn.Module = model.get_submodule(name) if isinstance(name, str) else found
    return layer


def _input_width(classifier: nn.Module) -> int | None:
    for layer in classifier.modules():
        if isinstance(layer, nn.Linear):
            return int(layer.in_features)
        if isinstance(layer, nn.Conv2d):
            return int(layer.in_channels)
    return None


def _pre_logits(model: Any, images: Tensor) -> Tensor:
    feature: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return feature


def _forward_head(model: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the model's own: pre-logits and headless results are transferred."""
    result = type(model).forward_head(model, x, *args, **kwargs)
    pre_logits = args[0] if args else kwargs.get("pre_logits", False)
    transfers = transfers_of(model)
    if pre_logits or not transfers.places["pooled"].inputs:
        return transfers.transfer("pooled", result)
    return result


def _reset_classifier(model: Any, num_classes: int, *args: Any, **kwargs: Any) -> None:
    """In place of the model's own: the new classifier sees transferred features as well.

    Where the model refuses, or the head does not fit the new classifiers, it is left headless.
    """
    head = transfers_of(model)["pooled"]
    if num_classes and gives_clusters(head):
        raise AttachError(
            f"reset_classifier: timm's classifiers take {head.in_features} features, the attached "
            f"head gives {head.out_features} cluster logits; put a layer of your own on them, or "
            "detach_transfer first"
        )
    pooling = getattr(model, "global_pool", None)
    pooling = pooling if isinstance(pooling, str) else getattr(pooling, "pool_type", None)
    unhook_modules(model, "pooled")
    try:
        type(model).reset_classifier(model, num_classes, *args, **kwargs)
        place = pooled_place(model)
        if place.width != head.in_features:
            raise AttachError(
                f"reset_classifier: the new classifier takes {place.width} features, the attached "
                f"head gives {head.in_features}; detach_transfer first"
            )
        hook_modules(model, place)
    except Exception:
        type(model).reset_classifier(model, 0, pooling)
        hook_modules(model, pooled_place(model))
        raise


def _load(name: str, weights: str | Path, *, with_classifier: bool) -> nn.Module:
    model = _create(name, pretrained=weights == "pretrained")
    if weights == "demo":
        load_demo(model, name)
    elif weights not in ("pretrained", "random"):
        left_out = "" if with_classifier else _classifier(model, name)
        load_by_name(model, read_state_dict(Path(weights)), left_out)
    return model


def _create(name: str, *, pretrained: bool) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # hub, network and file errors of many kinds
        raise BackboneError(
            f"weights: timm's {name} could not be made: {error}; "
            "pass a local file where its hub cannot be reached"
        ) from error
    return model


def _classifier(model: Any, name: str) -> str:
    """The classifier's module name; of a distilled model, with two, what both begin with."""
    classifier = model.pretrained_cfg.get("classifier")
    if classifier is None:
        raise BackboneError(f"backbone: timm's {name} names no classifier")
    return str(classifier if isinstance(classifier, str) else classifier[0])
