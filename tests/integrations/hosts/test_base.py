"""Models are asked for the images that they take."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision.models
from torch import Tensor, nn

from featxfer import Degradation
from featxfer_integrations import (
    AttachError,
    attach_transfer,
    host_of,
)
from featxfer_integrations.hosts.images import usual_degradation
from tests.integrations.models import make_branched


def test_models_of_one_channel_and_small_ones_are_probed_as_they_say() -> None:
    attach_transfer(make_branched(channels=1), site="norm")
    small = torchvision.models.VisionTransformer(64, 16, 1, 2, 32, 32, num_classes=3).eval()
    attach_transfer(small, site="conv_proj", hidden_features=16)
    assert small(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    named = make_branched()
    named.image_size = 2  # under the kernel's three
    with pytest.raises(AttachError, match="does not run on an image of 3 x 2 x 2"):
        attach_transfer(named, site="norm")
    named.image_size = (64, 32)
    attach_transfer(named, site="pool")


@pytest.mark.parametrize(
    ("name", "options", "size", "fixed"),
    [
        ("test_vit", {"img_size": 64, "dynamic_img_size": False}, 64, 64),
        ("test_vit", {"img_size": 64}, 64, None),
        ("test_resnet", {}, 160, None),
        ("swin_tiny_patch4_window7_224", {"img_size": 56}, 56, 56),
    ],
)
def test_timm_models_are_asked_for_their_size(
    name: str, options: dict[str, Any], size: int, fixed: int | None
) -> None:
    model = timm.create_model(name, **options)
    assert host_of(model).input_size(model) == size
    assert host_of(model).preprocessing(model).input_size == fixed


def test_timm_models_of_two_sides_are_refused_by_square_views() -> None:
    model = timm.create_model("test_vit", img_size=(64, 96))
    attach_transfer(model)
    with pytest.raises(AttachError, match=r"model: it takes images of \(64, 96\), wanted square"):
        host_of(model).input_size(model)


def test_torchvision_models_are_asked_for_their_size() -> None:
    model = torchvision.models.efficientnet_b1()
    assert host_of(model).input_size(model) == 240
    attach_transfer(model)
    model.classifier[1] = nn.Linear(1280, 3)
    assert host_of(model).input_size(model) == 240
    resnet = torchvision.models.resnet18()
    assert host_of(resnet).input_size(resnet) == 224


@pytest.mark.parametrize(("size", "lr_size"), [(224, 32), (64, 32), (32, 8), (16, 4), (2, 1)])
def test_small_images_are_smaller_than_the_models_own(size: int, lr_size: int) -> None:
    assert usual_degradation(size) == Degradation(hr_size=size, lr_size=lr_size)


def test_a_grid_is_told_by_patches_or_fixed() -> None:
    """Where no convolution makes patches, nothing tells the proportion of other images."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.norm = nn.Linear(3 * 16, 8), nn.LayerNorm(8)
            self.image_size = 16

        def forward(self, images: Tensor) -> Tensor:
            tokens = nn.functional.unfold(images, 4, stride=4).mT
            found: Tensor = self.norm(self.patches(tokens))
            return found

    model = Linear().eval()
    attach_transfer(model, site="patches")
    assert model(torch.rand(1, 3, 16, 16)).shape == (1, 16, 8)
    with pytest.raises(ValueError, match=r"maps: got shape \(1, 64, 8\), wanted tokens"):
        model(torch.rand(1, 3, 16, 64))
