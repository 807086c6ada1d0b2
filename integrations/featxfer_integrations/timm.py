"""timm's models as backbones, by what `pretrained_cfg` and timm's own accessors say of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import nn

from featxfer import Backbone, Preprocessing
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
    model: Any = _create(name, pretrained=weights == "pretrained")
    if weights == "demo":
        load_demo(model, name)
    elif weights not in ("pretrained", "random"):
        load_by_name(model, read_state_dict(Path(weights)), _classifier(model, name))
    config = resolve_model_data_config(model)
    model.reset_classifier(0)
    fixed = config["input_size"][-1] if model.pretrained_cfg.get("fixed_input_size") else None
    host = f"timm {timm.__version__}"
    preprocessing = Preprocessing(tuple(config["mean"]), tuple(config["std"]), fixed)
    return Backbone(model.eval(), preprocessing, f"timm/{name}", str(weights), host)


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
