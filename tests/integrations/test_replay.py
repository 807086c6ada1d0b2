from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from featxfer import FeatureTransferBlock
from featxfer_integrations import AttachError, attach_transfer, transfers_of
from featxfer_integrations._attach import module_place, take_feature
from featxfer_integrations._replay import Rest
from featxfer_integrations.attach import find_place
from featxfer_integrations.fit import FeatureAt


def maps_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def make(name: str) -> nn.Module:
    """A small model whose batch norms do something."""
    torch.manual_seed(0)
    library, _, model = name.partition("/")
    if library == "timm":
        made: nn.Module = timm.create_model(model, num_classes=5)
    else:
        made = torchvision.models.get_model(model, num_classes=5)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
    return made.eval()


HOSTS = [
    ("timm/test_resnet", "layer3"),
    ("timm/test_resnet", "stage1"),
    ("timm/test_efficientnet", "blocks.3"),
    ("timm/test_convnext", "stages.1"),
    ("timm/tf_efficientnet_lite0", "blocks.4"),
    ("torchvision/resnet18", "layer2"),
    ("torchvision/densenet121", "features.transition2"),
    ("torchvision/mobilenet_v3_small", "features.8"),
    ("torchvision/swin_t", "features.5"),
]


@pytest.mark.parametrize(("name", "at"), HOSTS)
def test_the_rest_gives_the_model_s_own_feature(name: str, at: str) -> None:
    """For other images and another number of them than it was tried on."""
    model = make(name)
    stage, pooled = find_place(model, at=at), find_place(model)
    size = 224 if "swin" in name else 64
    rest = Rest(model, stage, pooled, maps_of((1, 3, size, size)), "fp32")
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps, wanted = take_feature(model, stage, images), take_feature(model, pooled, images)
        got = rest(maps)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(rest(-9 * maps), wanted)


def test_what_is_before_the_stage_is_not_run() -> None:
    model = make("timm/test_resnet")
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    rest = Rest(
        model, find_place(model, at="layer2"), find_place(model), maps_of((1, 3, 64, 64)), "fp32"
    )
    ran.clear()
    rest(maps_of((2, 48, 8, 8)))
    assert ran
    assert all(name.startswith(("layer3", "layer4")) for name in ran)


def test_a_block_gets_gradients_through_frozen_layers() -> None:
    model = make("timm/test_resnet")
    before = copy.deepcopy(model.state_dict())
    stage = find_place(model, at="layer2")
    rest = Rest(model, stage, find_place(model), maps_of((1, 3, 64, 64)), "fp32")
    block: Any = FeatureTransferBlock(48, 16)
    rest.attach(stage, block)
    maps = maps_of((2, 48, 8, 8))
    plain = rest(maps)
    rest.train()
    assert block.training
    assert not any(
        module.training for module in rest.host.modules() if isinstance(module, nn.BatchNorm2d)
    )
    asked = [p for p in rest.parameters() if p.requires_grad]
    assert {id(p) for p in asked} == {id(p) for p in block.parameters()}
    (plain.square().mean()).backward()
    assert float(block.units[-1].project.weight.grad.abs().sum()) > 0
    nn.init.normal_(block.units[0].project.weight, std=0.1)
    changed = rest(maps)
    assert not torch.allclose(changed, plain)
    attach_transfer(model, block, at="layer2")
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        real = take_feature(model, stage, images)
        attached: Any = model
        through = attached.forward_head(attached.forward_features(images), pre_logits=True)
    torch.testing.assert_close(rest(real), through, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if n in before)


def test_what_is_attached_to_the_model_is_left_out() -> None:
    model = make("timm/test_resnet")
    stage, pooled = find_place(model, at="layer2"), find_place(model)
    image = maps_of((1, 3, 64, 64))
    plain = Rest(model, stage, pooled, image, "fp32")
    attach_transfer(model)
    head: Any = transfers_of(model)["pooled"]
    nn.init.normal_(head.fc2.weight)
    assert torch.equal(
        Rest(model, stage, pooled, image, "fp32")(maps_of((2, 48, 8, 8))),
        plain(maps_of((2, 48, 8, 8))),
    )


def test_bf16_is_near_and_strided_depthwise_layers_have_gradients() -> None:
    model = make("timm/tf_efficientnet_lite0")
    stage, pooled = find_place(model, at="blocks.2"), find_place(model)
    image = maps_of((1, 3, 64, 64))
    maps = take_feature(model, stage, image).detach()
    full, half = (Rest(model, stage, pooled, image, p) for p in ("fp32", "bf16"))
    assert float(torch.cosine_similarity(full(maps), half(maps)).min()) > 0.99
    maps.requires_grad_()
    half(maps).sum().backward()
    assert maps.grad is not None
    assert torch.isfinite(maps.grad).all()


class Skips(nn.Module):
    """A feature that hangs on two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(3, 4, 3, stride=2)
        self.late = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        early = self.early(images)
        pooled: Tensor = self.pool(self.late(early) + early)
        return pooled.flatten(1)


def test_a_feature_of_more_than_these_maps_is_refused() -> None:
    torch.manual_seed(0)
    model = Skips().eval()
    image = maps_of((1, 3, 16, 16))
    with pytest.raises(AttachError, match="does not come from the maps after 'late' alone"):
        Rest(model, module_place(model, "late"), module_place(model, "pool"), image, "fp32")
    Rest(model, module_place(model, "early"), module_place(model, "pool"), image, "fp32")


def small_swin() -> nn.Module:
    """Channels last, and its `norm` gives maps (n, 2, 2, 128)."""
    torch.manual_seed(0)
    sizes = {"img_size": 64, "window_size": 2, "embed_dim": 16}
    stages = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    made: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", **sizes, **stages)
    return made.eval()


def test_maps_with_channels_last_are_averaged_over_their_plane() -> None:
    """The rest's feature is the one that a head behind `norm` gets."""
    model = small_swin()
    stage, pooled = module_place(model, "layers.2"), module_place(model, "norm")
    rest = Rest(model, stage, pooled, maps_of((1, 3, 64, 64)), "fp32")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, wanted = rest(take_feature(model, stage, images)), FeatureAt(model, pooled)(images)
    assert got.shape == (2, 128)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_tokens_are_no_pooled_feature() -> None:
    model = timm.create_model("test_vit").eval()
    places = module_place(model, "blocks.0"), module_place(model, "blocks.1")
    with pytest.raises(AttachError, match=r"where: blocks.1 gives \(1, 101, 64\), wanted vectors"):
        Rest(model, *places, maps_of((1, 3, 160, 160)), "fp32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rest_of_a_half_precision_model_is_in_full(dtype: torch.dtype) -> None:
    model = make("timm/test_resnet")
    stage, pooled = find_place(model, at="layer2"), find_place(model)
    half = copy.deepcopy(model).to(dtype)
    whole = copy.deepcopy(half).float()
    image, maps = maps_of((1, 3, 64, 64)), maps_of((2, 48, 8, 8))
    results = []
    for host in (half, whole):
        rest = Rest(host, stage, pooled, image.to(host.conv1[0].weight.dtype), "fp32")  # type: ignore[index, union-attr]
        block: Any = FeatureTransferBlock(48, 16)
        rest.attach(stage, block)
        assert {p.dtype for p in rest.parameters()} == {torch.float32}
        feature = rest(maps)
        feature.square().mean().backward()
        results.append((feature.detach(), block.units[-1].project.weight.grad))
    assert {p.dtype for p in half.parameters()} == {dtype}
    for mine, wanted in zip(*results, strict=True):
        assert torch.equal(mine, wanted)
