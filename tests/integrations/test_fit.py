from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from featxfer import (
    Degradation,
    FeatureTransferBlock,
    Preprocessing,
    Recipe,
    ScaledDegradation,
    extract_features,
    open_images,
)
from featxfer_integrations import (
    attach_transfer,
    backbone_of,
    detach_transfer,
    fit_key,
    load_backbone,
    transfers_of,
)
from tests.integrations.fitting import (
    BLOCKS,
    LR,
    QUICK,
    SCALED,
    arguments,
    assert_holds,
    assert_untouched,
    fit_blocks,
    fit_detector,
    fit_head,
    state_of,
    told_of_epochs,
)


def test_features_are_those_of_load_backbone(drawings: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaded = load_backbone("timm/test_resnet", "random")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    backbone = backbone_of(model)
    assert backbone.weights_sha256 == loaded.weights_sha256
    assert backbone.preprocessing == loaded.preprocessing
    images = open_images(drawings)
    one, two = (
        extract_features(b, images, LR, tmp_path / str(i)) for i, b in enumerate((backbone, loaded))
    )
    assert torch.equal(one.lr, two.lr)


@pytest.mark.filterwarnings("ignore:.* not help", "ignore:LR features are the HR")
def test_sites_unless_told(
    model: nn.Module, by_hand: Any, drawings: Path, discs: Path, tmp_path: Path
) -> None:
    """What is attached; else blocks where the host has a site for them; else a head."""
    few, view = sorted(drawings.iterdir())[:12], Degradation(hr_size=64, lr_size=16)
    short = dataclasses.replace(BLOCKS, epochs=1)
    torch.manual_seed(0)
    other = timm.create_model("test_resnet").eval()
    fit_blocks(other, few, tmp_path, site=None, block_recipe=short, degradation=view)
    assert set(transfers_of(other)) == {"layer3", "layer4"}
    attach_transfer(model)
    fit_head(model, few, tmp_path, site=None, recipe=Recipe(epochs=1))
    assert set(transfers_of(model)) == {"head"}
    flat = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8
    )
    fit_head(flat, few, tmp_path, site=None, degradation=None, recipe=Recipe(epochs=1))
    assert set(transfers_of(flat)) == {"head"}
    detector = by_hand("retinanet")
    attach_transfer(detector, site="fpn1", hidden_features=8)
    fit_detector(detector, discs, tmp_path, "blocks")
    assert set(transfers_of(detector)) == {"fpn1"}


def test_a_vit_has_blocks_of_tokens(drawings: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = timm.create_model("test_vit", num_classes=3).eval(), torch.randn(2, 3, 160, 160)
    plain = model(images)
    view, few = Degradation(hr_size=160, lr_size=32), sorted(drawings.iterdir())[:12]
    fitted = fit_blocks(model, few, tmp_path, site="blocks.1", degradation=view, held_out=0.0)
    assert len(fitted.blocks_log) == 6
    (block,) = transfers_of(model).values()
    assert isinstance(block, FeatureTransferBlock)
    assert (block.config["layout"], block.config["prefix_tokens"]) == ("tokens", 1)
    assert not torch.equal(model(images), plain)


@pytest.mark.filterwarnings("ignore:blocks do not help")
def test_sites_are_trained_in_the_order_that_an_image_passes_them(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    other = copy.deepcopy(model)
    fit_blocks(model, drawings, tmp_path, site=["layer2", "layer1"])
    fit_blocks(other, drawings, tmp_path / "other", site=["layer1", "layer2"])
    assert list(transfers_of(model)) == list(transfers_of(other)) == ["layer1", "layer2"]
    assert_holds(model, state_of(other))


@pytest.mark.filterwarnings("ignore:.* not help")
@pytest.mark.parametrize("site", ["head", "layer1"])
def test_torchs_default_device_does_not_matter(
    model: nn.Module, drawings: Path, tmp_path: Path, site: str
) -> None:
    """The device without memory stands for a GPU: what is made there by mistake cannot be used."""
    other = copy.deepcopy(model)
    alone = {"block_recipe": None, "crops": None, "recipe": QUICK} if site == "head" else {}
    for host, device in ((model, "cpu"), (other, "meta")):
        with torch.device(device):
            fit_blocks(host, drawings, tmp_path / device, site=site, **alone)
    assert_holds(model, state_of(other))


def test_a_key_is_that_of_the_call_and_of_nothing_else(
    model: nn.Module, by_hand: Any, drawings: Path, discs: Path, tmp_path: Path
) -> None:
    """Each change is another key; the same call is the same key, and trains nothing."""
    files = [tmp_path / path.name for path in sorted(drawings.iterdir())[:12]]
    for path in files:
        path.write_bytes((drawings / path.name).read_bytes())

    def key(**given: Any) -> str:
        usual = {"site": "layer1", "degradation": LR, "clusters": 4, "crops": 0}
        usual["precision"] = "fp32"
        with told_of_epochs(lambda *_: pytest.fail("something is trained")):
            return fit_key(model, files, **arguments(**{**usual, **given}))

    state = state_of(model)
    keys = [key()]
    assert key() == keys[0]
    assert key(batch_size=8) == key(block_recipe=None) == keys[0]
    changes: list[dict[str, Any]] = [
        {"site": "layer2"},
        {"site": ["layer1", "layer2"]},
        {"site": ["layer1", "head"]},
        {"site": ["layer1", "head"], "recipe": QUICK},
        {"site": "head", "crops": None},
        {"site": "head", "crops": None, "precision": "bf16"},
        {"targets": ["layer2"]},
        {"targets": ["layer2", "fc"]},
        {"targets": named_target},
        {"degradation": Degradation(32, 16)},
        {"degradation": [LR, Degradation(32, 16)]},
        {"crops": 1},
        {"seed": 1},
        {"held_out": 0.5},
        {"clusters": 5},
        {"objective": "labels"},
        {"precision": "bf16"},
        {"block_recipe": BLOCKS},
        {"block_recipe": dataclasses.replace(BLOCKS, momentum=0.8)},
        {"preprocessing": Preprocessing((0.0, 0.0, 0.0))},
    ]
    keys += [key(**change) for change in changes]
    assert_untouched(model, state)
    attach_transfer(model, FeatureTransferBlock(32, 8, kernel_size=3), site="layer1")
    keys.append(key())
    detach_transfer(model)
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    keys.append(key())
    os.utime(files[0])
    keys.append(key())
    files.pop()
    keys.append(key())
    assert len(set(keys)) == len(keys) == 25
    detector, views = by_hand("faster r-cnn"), [SCALED, ScaledDegradation(2)]
    given: list[dict[str, Any]] = [
        {"site": "boxes"},
        {"site": "boxes", "degradation": views},
        {"site": "fpn0"},
        {"site": ["fpn0", "boxes"]},
        {"site": None},
    ]
    found = [fit_key(detector, discs, **arguments(**change)) for change in given]
    assert found == [fit_key(detector, discs, **arguments(**change)) for change in given]
    assert len(set(found)) == len(found)


def named_target(model: Any, images: Tensor) -> Tensor:
    features: Tensor = model.forward_features(images)
    return features.mean((2, 3))
