"""timm's models, by what `pretrained_cfg` and timm's own accessors say of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from featxfer import Preprocessing
from featxfer_integrations.hosts import base
from featxfer_integrations.hosts.images import said_side
from featxfer_integrations.hosts.load import BackboneError
from featxfer_integrations.hosts.resolutions import block_places
from featxfer_integrations.mechanism import attach
from featxfer_integrations.mechanism.site import AttachError, Site


class Timm(base.Host):
    """timm's models."""

    name = "timm"
    behind = base.classifiers_behind

    def owns(self, model: nn.Module) -> bool:
        """Whether its class, or a base of it, is timm's."""
        return base.is_of(model, "timm")

    def model_name(self, model: Any) -> str:
        """As `load_backbone` takes it; a model made by hand goes by its class."""
        cfg = getattr(model, "pretrained_cfg", None) or {}
        return f"timm/{cfg.get('architecture') or type(model).__name__}"

    def preprocessing(self, model: Any) -> Preprocessing:
        """Mean, std and, where the model takes no other, the input size that it was made for."""
        config = resolve_model_data_config(model)
        fixed = model.pretrained_cfg.get("fixed_input_size") and not any(
            getattr(module, "strict_img_size", None) is False for module in model.modules()
        )
        size = self.input_size(model) if fixed else None
        return Preprocessing(tuple(config["mean"]), tuple(config["std"]), size)

    def input_size(self, model: Any) -> int:
        """The model's own, or that of its weights."""
        return said_side(model) or int(resolve_model_data_config(model)["input_size"][-1])

    def head(self, model: Any) -> Site:
        """Before `get_classifier()` and after `forward_head(pre_logits=True)`.

        Headless, it is what `forward_head` returns.
        """
        if not hasattr(model, "forward_head") or not hasattr(model, "get_classifier"):
            raise AttachError(
                f"model: timm's {type(model).__name__} has no classification head; name the module "
                "whose output is the feature, or a stage, by site="
            )
        classifiers = _classifiers(model)
        widths = {base.input_width(module) for module in classifiers.values()} - {None}
        if len(widths) > 1:
            raise AttachError(
                f"model: the classifiers of timm's {type(model).__name__} take features of several "
                f"widths, {sorted(map(str, widths))}; one head fits one width"
            )
        said = getattr(model, "head_hidden_size", None) or getattr(model, "num_features", None)
        return Site(
            "head",
            tuple(classifiers),
            "input",
            next(iter(widths), said),
            kind="head",
            methods={"forward_head": _forward_head, "reset_classifier": _reset_classifier},
            feature=_pre_logits,
        )

    def stages(self, model: Any) -> list[str]:
        """The modules of `feature_info`, as `out_indices` counts them."""
        return [str(entry["module"]) for entry in _entries(model)]

    def blocks(self, model: Any) -> list[str]:
        """Where `block_places` says, of the entries of `feature_info` that name their module."""
        return block_places({str(e["module"]): e.get("reduction", 0) for e in _entries(model)})

    def prefix_tokens(self, model: Any) -> int:
        """Class and register tokens."""
        return int(getattr(model, "num_prefix_tokens", 0))

    def measured(self, model: Any, site: Site, image: Tensor | None = None) -> Site:
        """As `Host.measured`; CaiT and ConViT add their class token behind most blocks."""
        found = super().measured(model, site, image)
        if found.layout == "tokens" and found.extent is None:
            found = super().measured(model, replace(site, prefix=0), image)
        return found

    def model_names(self) -> Iterable[str]:
        """All of timm's model names, without weights' tags."""
        return timm.list_models()  # type: ignore[no-any-return]

    def has_model(self, name: str) -> bool:
        """Whether timm has it; a weights' tag may follow a dot."""
        return bool(timm.is_model(name.split(".")[0]))

    def create(self, name: str, *, pretrained: bool) -> nn.Module:
        """A model of that name; `BackboneError` where that fails."""
        try:
            model: nn.Module = timm.create_model(name, pretrained=pretrained)
        except Exception as error:  # hub, network and file errors of many kinds
            raise BackboneError(
                f"weights: timm's {name} could not be made: {error}; "
                "pass a local file where its hub cannot be reached"
            ) from error
        return model

    def classifier(self, model: Any) -> str:
        """The classifier's module name; of a distilled model, with two, what both begin with."""
        classifier = model.pretrained_cfg.get("classifier")
        if classifier is None:
            raise BackboneError(f"backbone: {self.model_name(model)} names no classifier")
        return str(classifier if isinstance(classifier, str) else classifier[0])

    def remove_classifier(self, model: Any) -> None:
        """The model returns the pooled, pre-logits feature."""
        model.reset_classifier(0)

    def for_weights(self, model: Any, name: str) -> tuple[Preprocessing, int]:
        """Preprocessing and input size of the weights: the model knows them."""
        return self.preprocessing(model), self.input_size(model)


HOST = Timm()


def _entries(model: Any) -> list[dict[str, Any]]:
    """Those entries of `feature_info` that name a module that is there, and no list of modules."""
    info = getattr(model, "feature_info", None) or []
    known = {n: m for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList)}
    return [entry for entry in getattr(info, "info", info) if entry.get("module") in known]


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


def _pre_logits(model: Any, images: Tensor) -> Tensor:
    feature: Tensor = model.forward_head(model.forward_features(images), pre_logits=True)
    return feature


def _forward_head(model: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the model's own: pre-logits and headless results are transferred."""
    result = type(model).forward_head(model, x, *args, **kwargs)
    pre_logits = args[0] if args else kwargs.get("pre_logits", False)
    transfers = attach.transfers_of(model)
    if pre_logits or not transfers.sites["head"].modules:
        return transfers.transfer("head", result)
    return result


def _reset_classifier(model: Any, num_classes: int, *args: Any, **kwargs: Any) -> None:
    """In place of the model's own: the new classifier sees transferred features as well.

    Where the model refuses, or the head does not fit the new classifiers, it is left headless.
    """
    head = attach.transfers_of(model)["head"]
    if num_classes and attach.gives_clusters(head):
        raise AttachError(
            f"reset_classifier: timm's classifiers take {head.in_features} features, the attached "
            f"head gives {head.out_features} cluster logits; put a layer of your own on them, or "
            "detach_transfer first"
        )
    pooling = getattr(model, "global_pool", None)
    pooling = pooling if isinstance(pooling, str) else getattr(pooling, "pool_type", None)
    attach.unhook_modules(model, "head")
    try:
        type(model).reset_classifier(model, num_classes, *args, **kwargs)
        site = HOST.head(model)
        if site.width != head.in_features:
            raise AttachError(
                f"reset_classifier: the new classifier takes {site.width} features, the attached "
                f"head gives {head.in_features}; detach_transfer first"
            )
        attach.hook_modules(model, site)
    except Exception:
        type(model).reset_classifier(model, 0, pooling)
        attach.hook_modules(model, HOST.head(model))
        raise
