from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from featxfer import FeatureTransferBlock
from featxfer_integrations import AttachError, Site, attach_transfer, host_of, transfers_of
from featxfer_integrations.hosts.base import find_sites
from featxfer_integrations.mechanism.capture import take_feature
from featxfer_integrations.mechanism.fingerprint import FeatureAt
from featxfer_integrations.mechanism.shown import Shown, ShownAt
from featxfer_integrations.mechanism.suffix import Suffix


def find_site(model: nn.Module, name: str = "head", kind: str | None = None) -> Site:
    """The one site of that name, with its layout."""
    host = host_of(model)
    (site,) = find_sites(host, model, name, kind=kind)
    return host.measured(model, site)


def suffix_of(
    model: nn.Module, stage: Site, pooled: Site, image: Tensor, precision: str = "fp32"
) -> Suffix:
    """From a stage to a pooled feature."""
    return Suffix(model, stage, ShownAt([pooled]), image, precision)


def feature_of(suffix: Suffix, maps: Tensor) -> Tensor:
    """The one vector that is shown."""
    shown: Shown = suffix(maps)
    assert (len(shown.maps), len(shown.vectors)) == (0, 1)
    feature: Tensor = next(iter(shown.vectors.values()))
    return feature


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


@pytest.mark.parametrize(("name", "site"), HOSTS)
def test_the_suffix_gives_the_model_s_own_feature(name: str, site: str) -> None:
    """For other images and another number of them than it was tried on."""
    model = make(name)
    stage, pooled = find_site(model, site), find_site(model)
    size = 224 if "swin" in name else 64
    suffix = suffix_of(model, stage, pooled, maps_of((1, 3, size, size)))
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps, wanted = take_feature(model, stage, images), take_feature(model, pooled, images)
        got = feature_of(suffix, maps)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(feature_of(suffix, -9 * maps), wanted)


def test_what_is_before_the_stage_is_not_run() -> None:
    model = make("timm/test_resnet")
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    image = maps_of((1, 3, 64, 64))
    suffix = suffix_of(model, find_site(model, "layer2"), find_site(model), image)
    ran.clear()
    feature_of(suffix, maps_of((2, 48, 8, 8)))
    assert ran
    assert all(name.startswith(("layer3", "layer4")) for name in ran)


def test_a_block_gets_gradients_through_frozen_layers() -> None:
    model = make("timm/test_resnet")
    before = copy.deepcopy(model.state_dict())
    stage = find_site(model, "layer2")
    suffix = suffix_of(model, stage, find_site(model), maps_of((1, 3, 64, 64)))
    block: Any = FeatureTransferBlock(48, 16)
    suffix.attach(stage, block)
    maps = maps_of((2, 48, 8, 8))
    plain = feature_of(suffix, maps)
    suffix.train()
    assert block.training
    assert not any(
        module.training for module in suffix.host.modules() if isinstance(module, nn.BatchNorm2d)
    )
    asked = [p for p in suffix.parameters() if p.requires_grad]
    assert {id(p) for p in asked} == {id(p) for p in block.parameters()}
    (plain.square().mean()).backward()
    assert float(block.units[-1].project.weight.grad.abs().sum()) > 0
    nn.init.normal_(block.units[0].project.weight, std=0.1)
    changed = feature_of(suffix, maps)
    assert not torch.allclose(changed, plain)
    attach_transfer(model, block, site="layer2")
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        real = take_feature(model, stage, images)
        attached: Any = model
        through = attached.forward_head(attached.forward_features(images), pre_logits=True)
    torch.testing.assert_close(feature_of(suffix, real), through, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if n in before)


def test_what_is_attached_to_the_model_is_left_out() -> None:
    model = make("timm/test_resnet")
    stage, pooled = find_site(model, "layer2"), find_site(model)
    image = maps_of((1, 3, 64, 64))
    plain = suffix_of(model, stage, pooled, image)
    attach_transfer(model)
    head: Any = transfers_of(model)["head"]
    nn.init.normal_(head.fc2.weight)
    maps = maps_of((2, 48, 8, 8))
    again = suffix_of(model, stage, pooled, image)
    assert torch.equal(feature_of(again, maps), feature_of(plain, maps))


def test_bf16_is_near_and_strided_depthwise_layers_have_gradients() -> None:
    model = make("timm/tf_efficientnet_lite0")
    stage, pooled = find_site(model, "blocks.2"), find_site(model)
    image = maps_of((1, 3, 64, 64))
    maps = take_feature(model, stage, image).detach()
    full, half = (suffix_of(model, stage, pooled, image, p) for p in ("fp32", "bf16"))
    similar = torch.cosine_similarity(feature_of(full, maps), feature_of(half, maps))
    assert float(similar.min()) > 0.99
    maps.requires_grad_()
    feature_of(half, maps).sum().backward()
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
        suffix_of(model, find_site(model, "late"), find_site(model, "pool"), image)
    suffix_of(model, find_site(model, "early"), find_site(model, "pool"), image)


def small_swin() -> nn.Module:
    """Channels last, and its `norm` gives maps (n, 2, 2, 128)."""
    torch.manual_seed(0)
    sizes = {"img_size": 64, "window_size": 2, "embed_dim": 16}
    stages = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    made: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", **sizes, **stages)
    return made.eval()


class Positioned(nn.Module):
    """Adds what is known before the site's maps are: of an image's shape, or of its content."""

    def __init__(self, known: str) -> None:
        super().__init__()
        self.body, self.layer, self.known = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(1, 4), known

    def forward(self, images: Tensor) -> Tensor:
        size = {
            "shape": torch.ones(1, 1) * images.shape[3],
            "mean": images.mean((1, 2, 3))[:, None],
        }
        added = self.layer(size[self.known]) if self.known in size else images[:, 0, 0, :4]
        pooled: Tensor = self.body(images).mean((2, 3))
        return pooled + added


def test_what_is_the_same_for_all_images_is_run() -> None:
    """As embeddings of positions are, where an image's content would not be known."""
    image, pooled = maps_of((1, 3, 8, 8)), Site("pooled", ("",), layout="rows", width=4)
    stage = Site("body", ("body",), layout="nchw", width=4)
    torch.manual_seed(0)
    model = Positioned("shape").eval()
    suffix = suffix_of(model, stage, pooled, image)
    images = maps_of((3, 3, 8, 8))
    torch.testing.assert_close(feature_of(suffix, model.body(images)), model(images))
    for known in ("mean", "pixels"):
        with pytest.raises(AttachError, match="Positioned shows does not come from the maps"):
            suffix_of(Positioned(known).eval(), stage, pooled, image)


def test_a_model_that_does_not_run_from_the_maps_is_refused() -> None:
    torch.manual_seed(0)
    model = timm.create_model("visformer_tiny", num_classes=5).eval()
    stage, pooled = find_site(model, "stage2"), find_site(model)
    with pytest.raises(AttachError, match=r"Visformer does not run from the maps after 'stage2"):
        suffix_of(model, stage, pooled, maps_of((1, 3, 224, 224)))


def test_maps_with_channels_last_are_averaged_over_their_plane() -> None:
    """The suffix's feature is the one that a head behind `norm` gets."""
    model = small_swin()
    stage, pooled = find_site(model, "layers.2"), find_site(model, "norm", "head")
    suffix = suffix_of(model, stage, pooled, maps_of((1, 3, 64, 64)))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = feature_of(suffix, take_feature(model, stage, images))
        wanted = FeatureAt(model, pooled)(images)
    assert got.shape == (2, 128)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_tokens_are_no_pooled_feature() -> None:
    model = timm.create_model("test_vit").eval()
    sites = find_site(model, "blocks.0"), find_site(model, "blocks.1", "head")
    with pytest.raises(AttachError, match=r"site: blocks.1 gives \(1, 101, 64\), wanted vectors"):
        suffix_of(model, *sites, maps_of((1, 3, 160, 160)))


def test_tokens_pass_as_they_are() -> None:
    """From one transformer's block to another, and to the feature of a head."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    first, last = find_site(model, "blocks.0"), find_site(model, "blocks.3")
    show = ShownAt([last, find_site(model)])
    images = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = Suffix(model, first, show, maps_of((1, 3, 160, 160)), "fp32")(
            take_feature(model, first, images)
        )
        tokens, feature = (
            take_feature(model, last, images),
            take_feature(model, find_site(model), images),
        )
    torch.testing.assert_close(got.maps, {"blocks_3": tokens}, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.vectors, {"head": feature}, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_suffix_of_a_half_precision_model_is_in_full(dtype: torch.dtype) -> None:
    model = make("timm/test_resnet")
    stage, pooled = find_site(model, "layer2"), find_site(model)
    half = copy.deepcopy(model).to(dtype)
    whole = copy.deepcopy(half).float()
    image, maps = maps_of((1, 3, 64, 64)), maps_of((2, 48, 8, 8))
    results = []
    for host in (half, whole):
        suffix = suffix_of(host, stage, pooled, image.to(next(host.parameters()).dtype))
        block: Any = FeatureTransferBlock(48, 16)
        suffix.attach(stage, block)
        assert {p.dtype for p in suffix.parameters()} == {torch.float32}
        feature = feature_of(suffix, maps)
        feature.square().mean().backward()
        results.append((feature.detach(), block.units[-1].project.weight.grad))
    assert {p.dtype for p in half.parameters()} == {dtype}
    for mine, wanted in zip(*results, strict=True):
        assert torch.equal(mine, wanted)
