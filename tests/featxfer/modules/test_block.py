from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featxfer import Card, Degradation, FeatureTransferBlock

MAPS = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(0))


def make_block(**options: Any) -> FeatureTransferBlock:
    return FeatureTransferBlock(6, 8, **{"kernel_size": 3, **options})


def first_unit(block: FeatureTransferBlock) -> Any:
    return block.units[0]


def randomised(block: FeatureTransferBlock) -> FeatureTransferBlock:
    generator = torch.Generator().manual_seed(0)
    for unit in block.units:
        for name, parameter in unit.named_parameters():
            if name.startswith("project"):
                nn.init.normal_(parameter, std=0.1, generator=generator)
    return block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_an_untrained_block_is_the_identity_to_the_last_bit(
    dtype: torch.dtype, layout: str
) -> None:
    maps = (MAPS if layout == "nchw" else MAPS.movedim(1, -1).contiguous()).to(dtype)
    maps.view(-1)[:2] = torch.tensor([0.0, -0.0])
    output = make_block(layout=layout).to(dtype)(maps).detach()
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(output.view(as_bits), maps.view(as_bits))


def test_the_memory_format_is_kept() -> None:
    maps = MAPS.contiguous(memory_format=torch.channels_last)
    assert make_block()(maps).is_contiguous(memory_format=torch.channels_last)


def test_a_trained_block_subtracts_its_branch() -> None:
    for depthwise in (True, False):
        block = randomised(make_block(units=2, depthwise=depthwise))
        block.set_input_statistics(MAPS * 2 - 1)
        wanted = MAPS
        for unit in block.units:
            layers: Any = unit
            z = (wanted - block.input_mean) / block.input_std
            inner = layers.expand(layers.spatial(z) + z) if depthwise else layers.spatial(z)
            wanted = wanted - layers.project(F.relu(inner))
        assert torch.allclose(block(MAPS), wanted, atol=1e-6)
        assert not torch.equal(block(MAPS), MAPS)


def test_arithmetic_is_counted() -> None:
    """Depthwise 3 x 3 of 6 channels, 6 -> 8 and 8 -> 6; or a full 3 x 3 to 8, and 8 -> 6."""
    assert make_block(units=2).macs(5, 4) == 2 * (6 * 9 + 6 * 8 * 2) * 20
    assert make_block(units=1, depthwise=False).macs(5, 4) == (6 * 8 * 9 + 8 * 6) * 20


def test_both_layouts_are_one_function() -> None:
    nchw, nhwc = (randomised(make_block(layout=layout)) for layout in ("nchw", "nhwc"))
    assert torch.allclose(nhwc(MAPS.movedim(1, -1)).movedim(-1, 1), nchw(MAPS), atol=1e-6)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "tokens"])
def test_statistics_of_positions_are_those_of_their_maps(layout: str) -> None:
    plain, block = make_block(), make_block(layout=layout)
    plain.set_input_statistics(MAPS)
    positions = MAPS.movedim(1, -1).reshape(-1, 6)
    block.set_input_statistics(positions)
    torch.testing.assert_close(block.input_mean, plain.input_mean)
    torch.testing.assert_close(block.input_std, plain.input_std)
    with pytest.raises(ValueError, match="maps: got shape"):
        block.set_input_statistics(positions[:, :5])


def test_statistics_are_those_of_channels() -> None:
    block = make_block()
    maps = MAPS.clone()
    maps[:, 2] = 3.0
    block.set_input_statistics(maps)
    assert torch.allclose(block.input_mean.flatten(), maps.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(
        block.input_std.flatten()[[0, 1, 3]], maps.std((0, 2, 3), correction=0)[[0, 1, 3]]
    )
    assert float(block.input_std[2]) == 1.0


def as_tokens(maps: torch.Tensor, prefix: int) -> torch.Tensor:
    """The maps as tokens behind others, of zeros and negative zeros."""
    before = maps.new_zeros(len(maps), prefix, maps.shape[1])
    before.view(-1)[::2] = -0.0
    return torch.cat([before, maps.movedim(1, -1).flatten(1, 2)], 1)


@pytest.mark.parametrize(
    ("grid", "sizes"), [(None, (4, 4)), ((5, 4), (5, 4)), ([4, 5], (4, 5)), ((1, 7), (1, 7))]
)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_are_a_map_behind_what_passes(
    prefix: int, grid: Any, sizes: tuple[int, int]
) -> None:
    maps = torch.randn(3, 6, *sizes, generator=torch.Generator().manual_seed(1))
    tokens = as_tokens(maps, prefix)
    options: dict[str, Any] = {"layout": "tokens", "prefix_tokens": prefix, "grid": grid}
    untrained = make_block(**options)(tokens).detach()
    assert torch.equal(untrained.view(torch.int32), tokens.view(torch.int32))
    plain, block = make_block(), make_block(**options)
    plain.set_input_statistics(maps)
    block.set_input_statistics(tokens)
    assert torch.allclose(block.input_mean, plain.input_mean, atol=1e-6)
    assert torch.allclose(block.input_std, plain.input_std, atol=1e-6)
    found = randomised(block)(tokens)
    assert torch.allclose(found, as_tokens(randomised(plain)(maps), prefix), atol=1e-5)
    bits = found.detach()[:, :prefix].contiguous().view(torch.int32)
    assert torch.equal(bits, tokens[:, :prefix].contiguous().view(torch.int32))
    given = tokens.clone().requires_grad_()
    block(given).square().sum().backward()
    assert given.grad is not None
    assert torch.equal(given.grad[:, :prefix], 2 * tokens[:, :prefix])
    assert given.grad[:, prefix:].all()
    assert all(p.grad is not None and p.grad.any() for p in block.units.parameters())


@pytest.mark.parametrize(
    ("options", "shape", "wanted"),
    [
        ({"prefix_tokens": 1}, (2, 16, 6), r"\(n, 1 \+ side \* side, 6\)"),
        ({"prefix_tokens": 1}, (2, 1, 6), r"\(n, 1 \+ side \* side, 6\)"),
        ({"prefix_tokens": 3}, (2, 2, 6), r"\(n, 3 \+ side \* side, 6\)"),
        ({}, (2, 16, 5), r"\(n, 0 \+ side \* side, 6\)"),
        ({}, (2, 6, 4, 4), r"\(n, 0 \+ side \* side, 6\)"),
        ({"grid": (2, 8)}, (2, 15, 6), r"\(n, 0 \+ 2 \* 8, 6\)"),
    ],
)
def test_tokens_that_are_no_such_grid_are_refused(
    options: dict[str, Any], shape: tuple[int, ...], wanted: str
) -> None:
    block = make_block(layout="tokens", **options)
    for use in (block, block.set_input_statistics):
        with pytest.raises(ValueError, match=rf"maps: got shape \({shape[0]}, .*tokens {wanted}"):
            use(torch.zeros(shape))


@pytest.mark.parametrize("grid", [None, (2, 8)])
def test_a_block_of_tokens_is_saved_with_its_grid(grid: Any, tmp_path: Path) -> None:
    block = randomised(make_block(layout="tokens", prefix_tokens=1, grid=grid))
    assert json.loads(json.dumps(block.config)) == block.config
    block.card = Card("tiny", "ab" * 32, (Degradation(lr_size=16),))
    block.save_pretrained(tmp_path)
    again = FeatureTransferBlock.from_pretrained(tmp_path)
    tokens = torch.randn(2, 17, 6)
    assert again.config == block.config
    assert torch.equal(again(tokens), block(tokens))
    assert "grid" not in make_block().config


def test_seeds_copies_and_pickles() -> None:
    weights = [first_unit(make_block(seed=seed)).spatial.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    block = randomised(make_block())
    assert torch.equal(copy.deepcopy(block)(MAPS), block(MAPS))
    assert torch.equal(pickle.loads(pickle.dumps(block))(MAPS), block(MAPS))
    again = FeatureTransferBlock(**block.config)
    again.load_state_dict(block.state_dict())
    assert torch.equal(again(MAPS), block(MAPS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels: got 0"),
        ({"hidden_channels": 0}, "hidden_channels: got 0"),
        ({"units": 0}, "units: got 0"),
        ({"depthwise": "no"}, "depthwise: got 'no', wanted True or False"),
        ({"kernel_size": 4}, "kernel_size: got 4, wanted an odd one"),
        ({"prefix_tokens": 1}, "prefix_tokens: got 1 with layout 'nchw', wanted 'tokens'"),
        (
            {"layout": "nhwc", "grid": (2, 2)},
            r"grid: got \(2, 2\) with layout 'nhwc', wanted 'tokens'",
        ),
        ({"layout": "tokens", "prefix_tokens": -1}, "prefix_tokens: got -1, wanted an int >= 0"),
        ({"layout": "tokens", "grid": (2,)}, r"grid: got \(2,\), wanted \(rows, columns\)"),
        ({"layout": "tokens", "grid": (2, 0)}, "grid: got 0, wanted an int >= 1"),
        ({"layout": "tokens", "grid": 4}, r"grid: got 4, wanted \(rows, columns\)"),
        ({"layout": "chw"}, "layout: got 'chw', wanted one of 'nchw', 'nhwc', 'tokens'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureTransferBlock(**{"channels": 6, "hidden_channels": 8, **arguments})


def test_bad_maps_are_told_and_change_nothing() -> None:
    block = make_block()
    with pytest.raises(ValueError, match=r"maps: got shape \(3, 5, 4\), wanted \(n, 6, h, w\)"):
        block(MAPS[:, 0])
    with pytest.raises(ValueError, match=r"wanted \(n, h, w, 6\)"):
        make_block(layout="nhwc")(MAPS)
    for bad in (MAPS[:0], MAPS / 0):
        with pytest.raises(ValueError, match="wanted n >= 1 finite ones"):
            block.set_input_statistics(bad)
    with pytest.raises(ValueError, match=r"of values of at most 1e\+18"):
        block.set_input_statistics(MAPS * 1e30)
    with pytest.raises(ValueError, match=r"maps: got torch\.uint8, wanted a floating-point dtype"):
        block(MAPS.to(torch.uint8))
    assert torch.equal(block.input_mean, torch.zeros(6, 1, 1))
