"""Where attach_transfer attaches, and that the model gives the same until that is trained."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from featxfer import FeatureTransferBlock, FeatureTransferHead
from featxfer_integrations import AttachError, attach_transfer, detach_transfer
from tests.integrations.models import IMAGES, make, randomise, run, untouched


@pytest.mark.parametrize("site", ["pool", "pool.1"])
def test_a_site_names_the_module_whose_output_is_transferred(site: str) -> None:
    model = make("tiny")
    logits, feature = run(model, "pool")
    attach_transfer(model, site=site)
    assert torch.equal(run(model)[0], logits)
    head = randomise(model, site.replace(".", "_"))
    changed, transferred = run(model, "pool")
    assert torch.equal(transferred, head(feature))
    assert torch.equal(changed, model.fc(head(feature)))


def test_a_head_may_follow_maps_and_logits() -> None:
    for site, width in (("layer3", 256), ("fc", 1000), ("layer1.0.conv1", 64)):
        model = make("torchvision/resnet18")
        plain = run(model, site)[1]
        attach_transfer(model, site=site, output="features")
        head = randomise(model, site.replace(".", "_"))
        assert isinstance(head, FeatureTransferHead)
        assert head.in_features == width
        assert torch.equal(run(model, site)[1], head(plain))


def test_a_sequential_host_runs_as_before() -> None:
    model = nn.Sequential(*make("tiny").stem, *make("tiny").pool, make("tiny").fc).eval()
    (plain, feature), stem = run(model, "4"), run(model, "2")[1]
    attach_transfer(attach_transfer(model, site="4"), site="2", hidden_features=16)
    assert torch.equal(run(model)[0], plain)
    head = randomise(model, "4")
    assert torch.equal(run(model, "4")[1], head(feature))
    block = randomise(model, "2")
    assert torch.equal(run(model, "2")[1], block(stem))
    assert not torch.equal(run(model)[0], plain)
    assert torch.equal(detach_transfer(model)(IMAGES), plain)


@pytest.mark.parametrize(
    ("name", "site", "module", "channels", "layout"),
    [
        ("timm/test_resnet", "stage0", "act1", 32, "nchw"),
        ("timm/test_resnet", "stage2", "layer2", 48, "nchw"),
        ("timm/test_efficientnet", "stage1", "blocks.1", 24, "nchw"),
        ("timm/swin_tiny_patch4_window7_224", "stage2", "layers.2", 384, "nhwc"),
        ("torchvision/resnet18", "stage0", "relu", 64, "nchw"),
        ("torchvision/resnet18", "stage3", "layer3", 256, "nchw"),
        ("torchvision/swin_t", "stage1", "features.3", 192, "nhwc"),
        ("torchvision/mobilenet_v3_small", "stage4", "features", 576, "nchw"),
        ("torchvision/resnet18", "layer2", "layer2", 128, "nchw"),
        ("torchvision/resnet18", "layer1.0.bn1", "layer1.0.bn1", 64, "nchw"),
        ("tiny", "stem", "stem", 8, "nchw"),
    ],
)
def test_a_block_goes_after_a_stage_or_module(
    name: str, site: str, module: str, channels: int, layout: str
) -> None:
    model = make(name)
    images = torch.randn(1, 3, 224, 224) if layout == "nhwc" else IMAGES
    logits, maps = run(model, module, images=images)
    attach_transfer(model, site=site, hidden_features=16)
    assert torch.equal(run(model, images=images)[0], logits)
    block = randomise(model, module.replace(".", "_"))
    assert isinstance(block, FeatureTransferBlock)
    assert (block.in_features, block.layout) == (channels, layout)
    assert block.config["hidden_channels"] == 16
    changed, transferred = run(model, module, images=images)
    assert torch.equal(transferred, block(maps))
    assert not torch.equal(changed, logits)


def test_a_head_may_follow_maps_with_channels_last() -> None:
    model = make("torchvision/swin_t")
    attach_transfer(model, site="features", output="features", hidden_features=16)
    assert model.feature_transfer["features"].in_features == 768


def test_a_stage_of_a_sequential_is_transferred_when_its_layers_are_run_alone() -> None:
    """As timm's models do it: `for layer in stage: x = layer(x)`."""
    model = make("torchvision/resnet18")
    plain = model.layer1(torch.ones(1, 64, 8, 8))
    block = randomise(attach_transfer(model, site="layer1", hidden_features=16), "layer1")
    maps = torch.ones(1, 64, 8, 8)
    for layer in model.layer1:
        maps = layer(maps)
    assert torch.equal(maps, block(plain))


def test_a_stage_whose_forward_is_its_own_is_transferred_as_a_whole() -> None:
    """timm's RDNet: a stage is a Sequential, but its result is more than its last layer's."""
    model = make("timm/rdnet_tiny")
    maps = run(model, "dense_stages.0")[1]
    attach_transfer(model, site="stage0", hidden_features=16)
    block = randomise(model, "dense_stages_0")
    assert block.in_features == maps.shape[1]
    assert torch.equal(run(model, "dense_stages.0")[1], block(maps))


@pytest.mark.parametrize("site", ["pool", "fc"])
def test_vectors_are_no_maps(site: str) -> None:
    model = make("tiny")
    with (
        untouched(model),
        pytest.raises(AttachError, match=f"head: got a block, wanted a head at '{site}'"),
    ):
        attach_transfer(model, FeatureTransferBlock(8), site=site)
    attach_transfer(model, site=site)
    assert isinstance(model.feature_transfer[site], FeatureTransferHead)


def test_a_models_own_stages_have_names_too() -> None:
    """timm's `features_only` models give the transferred maps."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", features_only=True).eval()
    with torch.no_grad():
        plain = model(IMAGES)
        block = randomise(attach_transfer(model, site="stage2", hidden_features=16), "layer2")
        changed = model(IMAGES)
        assert len(changed) == len(plain)
        assert torch.equal(changed[2], block(plain[2]))
        assert torch.equal(changed[1], plain[1])


def test_a_head_and_blocks_act_together_in_any_order() -> None:
    outputs = []
    for order in (("layer1", "head", "stage3"), ("stage3", "layer1", "head")):
        model = make("torchvision/resnet18")
        with untouched(model):
            for site in order:
                attach_transfer(model, site=site, hidden_features=16)
            assert set(model.feature_transfer) == {"layer1", "layer3", "head"}
            for name in model.feature_transfer:
                randomise(model, name)
            output, maps = run(model, "layer1")
            outputs.append(output)
            with torch.no_grad():
                rest = model.avgpool(model.layer4(model.layer3(model.layer2(maps)))).flatten(1)
                assert torch.equal(model.fc(rest), output)
            detach_transfer(model)
    assert torch.equal(*outputs)


def test_a_wrapper_and_what_it_wraps_may_both_have_something_attached() -> None:
    inner = make("timm/test_resnet")
    outer = nn.Sequential(inner, nn.ReLU()).eval()
    with untouched(inner):
        attach_transfer(inner, hidden_features=16)
        randomise(inner)
        attached = run(outer)[0]
        attach_transfer(outer, site="0", in_features=1000, hidden_features=16)
        randomise(outer, "0")
        assert not torch.equal(run(outer)[0], attached)
        detach_transfer(outer)
        assert torch.equal(run(outer)[0], attached)
        detach_transfer(inner)
