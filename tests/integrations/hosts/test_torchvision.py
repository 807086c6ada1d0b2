"""torchvision: every classification model, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision.models
from torch import nn

from tests.integrations.hosts.contract import (
    Host,
    check_contract,
    fill_zeros,
    run_with_input_of,
)

OVER_100_M_PARAMETERS = (
    *("convnext_large", "efficientnet_v2_l", "wide_resnet101_2"),
    *("regnet_x_32gf", "regnet_y_32gf", "regnet_y_128gf"),
    *("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
    *("vit_l_16", "vit_l_32", "vit_h_14"),
)
TORCHVISION_SIDES = {"maxvit_t": 224, "inception_v3": 96, "vit_h_14": 56}
TORCHVISION_HEADLESS = {
    "resnet18": "fc",
    "shufflenet_v2_x0_5": "fc",
    "densenet121": "classifier",
    "mobilenet_v2": "classifier",
    "mobilenet_v3_small": "classifier.3",
    "squeezenet1_1": "classifier",
    "convnext_tiny": "classifier",
    "efficientnet_b0": "classifier.1",
    "swin_t": "head",
    "vit_b_32": "heads",
}
TORCHVISION = [
    pytest.param(name, marks=[pytest.mark.slow] if name in OVER_100_M_PARAMETERS else [])
    for name in torchvision.models.list_models(module=torchvision.models)
]


def torchvision_host(name: str, side: int = 64, headless: str | None = None) -> Host:
    """With `headless`, that module is replaced by the identity."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": side} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False}  # their own initialisation warns and takes minutes
    model: Any = fill_zeros(torchvision.models.get_model(name, weights=None, **options).eval())
    images = torch.randn(1, 3, side, side)
    if headless is not None:
        model.set_submodule(headless, nn.Identity())
    kinds = (nn.Linear, nn.Conv2d) if headless is None else nn.Identity
    classifier = [module for module in model.modules() if isinstance(module, kinds)][-1]
    return Host(model, images, lambda: run_with_input_of(classifier, model, images))


def test_all_of_torchvision() -> None:
    assert len(TORCHVISION) >= 80


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    host = torchvision_host(name, TORCHVISION_SIDES.get(name, 64))
    parameters = sum(value.numel() for value in host.model.parameters())
    assert (parameters > 100_000_000) == (name in OVER_100_M_PARAMETERS)
    check_contract(host)


@pytest.mark.parametrize("name", TORCHVISION_HEADLESS)
def test_torchvision_headless(name: str) -> None:
    check_contract(torchvision_host(name, headless=TORCHVISION_HEADLESS[name]))
