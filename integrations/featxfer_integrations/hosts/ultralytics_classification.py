"""Ultralytics' classifiers."""

from __future__ import annotations

from typing import Any

from torch import nn
from ultralytics.nn.modules import Classify
from ultralytics.nn.tasks import ClassificationModel

from featxfer_integrations.hosts import base
from featxfer_integrations.hosts.images import INPUT_SIZE
from featxfer_integrations.hosts.resolutions import REDUCTIONS
from featxfer_integrations.hosts.ultralytics import Ultralytics
from featxfer_integrations.mechanism.site import AttachError, Site


class UltralyticsClassification(Ultralytics):
    """Those that end in a `Classify` layer."""

    name = "ultralytics classification"
    behind = base.classifiers_behind
    reductions = REDUCTIONS
    usual_size = INPUT_SIZE

    def owns(self, model: nn.Module) -> bool:
        """Whether it is one of them."""
        return isinstance(model, ClassificationModel)

    def head(self, model: Any) -> Site:
        """Before the linear layer of the last layer."""
        last = model.model[-1]
        if not isinstance(last, Classify):
            raise AttachError(
                f"model: its last layer is a {type(last).__name__}, wanted a Classify; name the "
                "module whose output is the feature by site="
            )
        name = f"model.{len(model.model) - 1}.linear"
        return Site("head", (name,), "input", last.linear.in_features, kind="head")


HOST = UltralyticsClassification()
