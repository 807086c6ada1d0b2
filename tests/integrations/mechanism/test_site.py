"""Where a module acts: the lens to its tensor, and what passes there."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

from featxfer import Card, Degradation, FeatureTransferBlock, FeatureTransferHead
from featxfer_integrations import (
    AttachError,
    Site,
    attach_transfer,
    attached_runs,
    detach_transfer,
    host_of,
    load_transfers,
    save_transfers,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations.mechanism.fingerprint import backbone_sha256
from featxfer_integrations.mechanism.site import Lens
from tests.integrations.models import randomise_all

MAPS, VECTORS, CHANGED = torch.ones(2, 4, 3, 3), torch.zeros(2, 4), torch.full((2, 4, 3, 3), 5.0)


class Pair(NamedTuple):
    """As some models return it."""

    maps: Tensor
    state: Any


@dataclass(frozen=True)
class Output:
    """As others do."""

    pooled: Tensor
    maps: Tensor
    layers: tuple[Tensor, ...] | None = None


class Plain:
    """An object that says nothing of its attributes."""

    def __init__(self, maps: Tensor | None, name: str) -> None:
        self.name, self.maps = name, maps


VALUES: dict[str, tuple[Any, tuple[str | int, ...]]] = {
    "tensor": (MAPS, ()),
    "tuple": ((MAPS, VECTORS), (0,)),
    "list": ([MAPS, "name"], (0,)),
    "named tuple": (Pair(MAPS, None), (0,)),
    "dict": ({"mask": None, "maps": MAPS}, ("maps",)),
    "ordered dict": (OrderedDict(maps=MAPS, count=3), ("maps",)),
    "dict with a vector": ({"pooled": VECTORS, "maps": MAPS}, ("maps",)),
    "dict of a vector": ({"pooled": VECTORS}, ("pooled",)),
    "dataclass": (Output(VECTORS, MAPS), ("maps",)),
    "object": (Plain(MAPS, "stem"), ("maps",)),
    "tuple in a tuple": (((MAPS, None), VECTORS), (0, 0)),
    "dict in a tuple": (({"maps": MAPS}, VECTORS), (0, "maps")),
    "object in a list": ([Plain(MAPS, "stem"), VECTORS], (0, "maps")),
}


def parts_of(value: Any) -> list[Any]:
    """What a value holds, keys aside."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else list(vars(value).values())


@pytest.mark.parametrize("name", VALUES)
def test_a_lens_takes_the_tensor_out_and_puts_another_in(name: str) -> None:
    value, path = VALUES[name]
    lens = Lens.found(value)
    assert lens == Lens(path)
    before = lens.get(value)
    assert before is (VECTORS if name == "dict of a vector" else MAPS)
    put = lens.put(value, CHANGED)
    assert type(put) is type(value)
    assert lens.get(put) is CHANGED
    assert lens.get(value) is before  # the model's own value stays as it is
    if len(path) == 1:
        held = zip(parts_of(put), parts_of(value), strict=True)
        assert sum(mine is not theirs for mine, theirs in held) == 1
        if isinstance(value, dict):
            assert list(put) == list(value)


@pytest.mark.parametrize(
    "value", [None, 3, "maps", (), (3, MAPS), {"maps": None}, Plain(None, "x")]
)
def test_there_is_no_lens_where_no_tensor_is(value: Any) -> None:
    assert Lens.found(value) is None


@pytest.mark.parametrize(
    "value",
    [
        {"low": MAPS, "high": MAPS, "pooled": VECTORS},
        OrderedDict(low=MAPS, high=MAPS),
        ({"low": MAPS, "high": MAPS},),
    ],
    ids=["dict", "ordered dict", "in a tuple"],
)
def test_several_maps_in_a_mapping_are_an_error(value: Any) -> None:
    with pytest.raises(AttachError, match="site: several tensors pass there, low, high; name a mo"):
        Lens.found(value)


class Stem(nn.Module):
    """Maps, in whatever it is told to put them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(3, 8, 3, stride=2)

    def forward(self, images: Tensor) -> Any:
        maps = self.conv(images)
        if self.kind == "tuple":
            return maps, None
        if self.kind == "named tuple":
            return Pair(maps, 3)
        if self.kind == "dict":
            return {"maps": maps, "pooled": maps.mean((2, 3))}
        if self.kind == "dataclass":
            return Output(maps.mean((2, 3)), maps)
        return {"low": maps, "high": maps} if self.kind == "levels" else Plain(maps, "stem")


class Wrapped(nn.Module):
    """A model whose stem returns more than a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.fc = Stem(kind), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        found = self.stem(images)
        if isinstance(found, tuple):
            maps = found[0]
        else:
            maps = next(iter(found.values())) if isinstance(found, dict) else found.maps
        logits: Tensor = self.fc(maps.mean((2, 3)))
        return logits


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["tuple", "named tuple", "dict", "dataclass", "object"])
def test_a_block_acts_on_maps_in_what_a_module_returns(kind: str) -> None:
    torch.manual_seed(0)
    model = Wrapped(kind).eval()
    plain = model(IMAGES)
    attach_transfer(model, site="stem", hidden_features=8)
    assert isinstance(transfers_of(model)["stem"], FeatureTransferBlock)
    assert torch.equal(model(IMAGES), plain)
    assert attached_runs(model, IMAGES) == {"stem": True}
    randomise_all(model)
    block = transfers_of(model)["stem"]
    assert torch.equal(model(IMAGES), model.fc(block(model.stem.conv(IMAGES)).mean((2, 3))))
    assert torch.equal(copy.deepcopy(model)(IMAGES), model(IMAGES))
    with transfer_disabled(model):
        assert torch.equal(model(IMAGES), plain)
    assert torch.equal(detach_transfer(model)(IMAGES), plain)


def test_a_module_that_returns_several_maps_is_no_site() -> None:
    model = Wrapped("levels")
    with pytest.raises(AttachError, match="site: several tensors pass there, low, high"):
        attach_transfer(model, site="stem")
    assert not hasattr(model, "feature_transfer")


def test_a_lstms_output_is_the_first_that_it_returns() -> None:
    model: Any = nn.Sequential(nn.Flatten(2), nn.Flatten(0, 1), nn.LSTM(1024, 4)).eval()
    model.image_size = 32
    images = torch.randn(1, 3, 32, 32)
    plain, (hidden, _) = model(images)
    attach_transfer(model, site="2")
    randomise_all(model)
    found, (kept, _) = model(images)
    assert torch.equal(found, transfers_of(model)["2"](plain))
    assert torch.equal(kept, hidden)


# Tokens

VITS: dict[str, tuple[str, dict[str, Any], int, tuple[int, int]]] = {
    "class token": ("test_vit", {}, 1, (10, 10)),
    "two tokens": ("deit_tiny_distilled_patch16_224", {"img_size": 64}, 2, (4, 4)),
    "registers": ("vit_base_patch16_reg4_gap_256", {"img_size": 64, "depth": 6}, 4, (4, 4)),
    "no token": ("vit_base_patch16_siglip_gap_224", {"img_size": 64, "depth": 6}, 0, (4, 4)),
    "not square": ("vit_tiny_patch16_224", {"img_size": (64, 96)}, 1, (4, 6)),
}


def make_vit(kind: str) -> tuple[Any, Tensor]:
    """In eval mode, and images of its size."""
    torch.manual_seed(0)
    name, options, _, (rows, columns) = VITS[kind]
    model = timm.create_model(name, num_classes=5, **options).eval()
    side = model.patch_embed.patch_size[0]
    return model, torch.randn(2, 3, rows * side, columns * side)


@pytest.mark.parametrize("kind", VITS)
@torch.no_grad()
def test_blocks_of_a_vision_transformer_act_on_the_grid_of_its_tokens(kind: str) -> None:
    """After a third and two thirds of its blocks; the tokens before the grid pass as they are."""
    model, images = make_vit(kind)
    _, _, prefix, extent = VITS[kind]
    depth = len(model.blocks)
    names = [f"blocks.{depth // 3 - 1}", f"blocks.{2 * depth // 3 - 1}"]
    assert host_of(model).blocks(model) == names
    plain, tokens = model(images), model.forward_features(images)
    attach_transfer(model, site="blocks", hidden_features=8)
    transfers = transfers_of(model)
    assert list(transfers) == [name.replace(".", "_") for name in names]
    for site in transfers.sites.values():
        block = transfers[site.name]
        assert isinstance(block, FeatureTransferBlock)
        assert (site.layout, site.prefix, site.extent) == ("tokens", prefix, extent)
        assert (block.layout, block.prefix_tokens) == ("tokens", prefix)
    assert torch.equal(model(images), plain)
    assert torch.equal(model.forward_features(images), tokens)
    assert attached_runs(model, images) == dict.fromkeys(transfers, True)
    randomise_all(model)
    seen: list[tuple[Tensor, Tensor]] = []
    transfers[site.name].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    assert not torch.equal(model(images), plain)
    ((before, after),) = seen
    assert torch.equal(before[:, :prefix], after[:, :prefix])
    assert not torch.equal(before[:, prefix:], after[:, prefix:])
    assert torch.equal(detach_transfer(model)(images), plain)


@pytest.mark.parametrize("kind", ["class token", "not square"])
def test_blocks_on_tokens_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, images = make_vit(kind)
    attach_transfer(model, site="stage1", hidden_features=8)
    (site,) = transfers_of(model).sites.values()
    randomise_all(model)
    transfers_of(model)[site.name].card = Card(
        "vit", backbone_sha256(host_of(model), model, site), (Degradation(),), site.described
    )
    loaded = load_transfers(make_vit(kind)[0], save_transfers(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_a_head_may_follow_tokens() -> None:
    model, images = make_vit("class token")
    attach_transfer(model, site="stage1", output="features", hidden_features=8)
    randomise_all(model)
    head = transfers_of(model)["blocks_1"]
    assert isinstance(head, FeatureTransferHead)
    with torch.no_grad():
        found = model.forward_intermediates(images, indices=[1], output_fmt="NLC")[1][0]
        with transfer_disabled(model):
            plain = model.forward_intermediates(images, indices=[1], output_fmt="NLC")[1][0]
        assert torch.equal(found, head(plain[:, :]))


@pytest.mark.parametrize(
    ("shape", "prefix", "sides", "wanted"),
    [
        ((1, 50, 8), 0, (1, 1), (1, (7, 7))),
        ((1, 49, 8), 0, (224, 224), (0, (7, 7))),
        ((1, 201, 8), 0, (224, 224), (5, (14, 14))),
        ((1, 201, 8), 5, (224, 224), (5, (14, 14))),
        ((1, 25, 8), 0, (64, 96), (1, (4, 6))),
        ((1, 255, 8), 3, (224, 288), (3, (14, 18))),
    ],
)
def test_the_grid_of_tokens_is_in_the_images_proportion(
    shape: tuple[int, ...], prefix: int, sides: tuple[int, int], wanted: Any
) -> None:
    site = Site("x", ("x",), prefix=prefix).shaped(shape, sides=sides)
    assert site is not None
    assert (site.layout, site.width, site.is_block) == ("tokens", 8, True)
    assert (site.prefix, site.extent) == wanted
    block: Any = site.module_class(**site.sizes)
    assert block(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("shape", [(1,), (1, 2, 3, 4, 5)])
def test_other_shapes_are_no_feature(shape: tuple[int, ...]) -> None:
    with pytest.raises(AttachError, match=r"site: x gives \(1,.*wanted vectors \(n, d\), maps"):
        Site("x", ("x",)).shaped(shape)


def test_tokens_that_are_no_grid_take_a_head_and_no_block() -> None:
    """Queries of a pool behind a class token, and tokens of which images are the second axis."""
    for shape, prefix in (((1, 10, 8), 2), ((9, 1, 8), 0)):
        site = Site("x", ("x",), prefix=prefix).shaped(shape, sides=(64, 64))
        assert site is not None
        assert (site.layout, site.width, site.is_block) == ("tokens", 8, True)
        with pytest.raises(AttachError, match=f"no grid of the image's behind {prefix} others"):
            _ = site.sizes
        assert dataclasses.replace(site, kind="head").sizes == {"in_features": 8}


@torch.no_grad()
def test_images_of_another_proportion_than_a_blocks_are_refused() -> None:
    """Of 128 x 32 pixels there are as many patches as of 64 x 64, in another order."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 64, "dynamic_img_size": True, "num_classes": 5}
    model = timm.create_model("test_vit", **options).eval()
    sizes = [(64, 64), (96, 96), (96, 64), (128, 32)]
    images = [torch.randn(2, 3, *sides) for sides in sizes]
    plain = [model(part) for part in images]
    attach_transfer(model, site="blocks", hidden_features=8)
    for part, wanted in zip(images[:2], plain[:2], strict=True):
        assert torch.equal(model(part), wanted)
    for part, found in zip(images[2:], ("6 x 4", "8 x 2"), strict=True):
        for run in (model, model.forward_features):
            message = f"images: they make {found} patches, wanted them in the proportion 1 : 1 of"
            with pytest.raises(AttachError, match=message):
                run(part)
    with transfer_disabled(model):
        assert torch.equal(model(images[3]), plain[3])
    assert torch.equal(detach_transfer(model)(images[3]), plain[3])
