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
