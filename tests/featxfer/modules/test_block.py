from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featxfer import FeatureTransferBlock

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
        ({"layout": "chw"}, "layout: got 'chw', wanted one of 'nchw', 'nhwc'"),
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
