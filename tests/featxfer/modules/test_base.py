from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featxfer import FeatureTransferBlock, FeatureTransferHead
from featxfer.modules.base import LARGEST_Z, SMALLEST_SHARE, TransferModule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 16
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda rows: rows * 0,
    "ordinary": lambda rows: rows,
    "one channel hardly varies": lambda rows: rows * torch.tensor([2e-9] + [1.0] * (WIDTH - 1)),
    "all channels hardly vary": lambda rows: rows * 1e-9,
    "tiny": lambda rows: rows * 1e-30,
    "large means": lambda rows: rows + 1e5,
    "huge": lambda rows: rows * 1e16,
    "one is sparse": lambda rows: rows * (torch.arange(len(rows)) == 0)[:, None],
}


def nasty(dtype: torch.dtype) -> Tensor:
    """Rows of finite values, each of which has undone somebody's arithmetic: `(n, WIDTH)`."""
    limits = torch.finfo(dtype)
    values = [0.0, 1e-9, 1.0, 1e4, 65504.0, limits.tiny, limits.smallest_normal / 2, limits.max]
    values += [limits.max / 2, 1e38]
    column = torch.tensor([value for value in values if value <= limits.max], dtype=torch.float64)
    column = torch.cat([column, -column])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(column), (60, WIDTH), generator=generator)
    chosen[: len(column)] = torch.arange(len(column))[:, None]
    rows = column[chosen].to(dtype)
    assert torch.isfinite(rows).all()
    return rows


def shaped(kind: str, rows: Tensor) -> Tensor:
    """Rows `(60, WIDTH)` as rows, maps with channels first, or with channels last."""
    if kind in ("rows", "gelu"):
        return rows
    maps = rows.view(3, 4, 5, WIDTH)
    if kind.endswith("tokens"):
        return maps.flatten(1, 2)
    return maps if kind.endswith("nhwc") else maps.movedim(-1, 1)


MODULES: dict[str, Callable[[], TransferModule]] = {
    "rows": lambda: FeatureTransferHead(WIDTH, 4, 24),
    "gelu": lambda: FeatureTransferHead(WIDTH, 4, 24, activation="gelu"),
    "maps": lambda: FeatureTransferHead(WIDTH, 4, 24),
    "block": lambda: FeatureTransferBlock(WIDTH, 8, kernel_size=3),
    "block of one unit": lambda: FeatureTransferBlock(WIDTH, 8, units=1, kernel_size=3),
    "full block": lambda: FeatureTransferBlock(WIDTH, 8, kernel_size=3, depthwise=False),
    "block, tokens": lambda: FeatureTransferBlock(
        WIDTH, 8, kernel_size=3, layout="tokens", grid=(4, 5)
    ),
    "block, nhwc": lambda: FeatureTransferBlock(WIDTH, 8, kernel_size=3, layout="nhwc"),
}


def take_statistics(module: Any, kind: str, name: str) -> None:
    rows = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1))
    rows = STATISTICS[name](rows)
    module.set_input_statistics(shaped(kind, rows) if "block" in kind else rows)


def same_bits(left: Tensor, right: Tensor) -> bool:
    as_bits = torch.int32 if left.dtype == torch.float32 else torch.int16
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(as_bits), right.contiguous().view(as_bits)
    )


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODULES)
@torch.no_grad()
def test_an_untrained_module_is_the_identity_for_every_finite_input(
    kind: str, dtype: torch.dtype, weights: torch.dtype
) -> None:
    inputs = shaped(kind, nasty(dtype))
    for name in STATISTICS:
        module = MODULES[kind]()
        take_statistics(module, kind, name)
        assert same_bits(module.to(weights)(inputs), inputs), name


@torch.no_grad()
def test_far_inputs_along_the_weights_of_a_wide_module_do_not_overflow_half_precision() -> None:
    head = FeatureTransferHead(8192, 4, 16).half()
    far = head.fc1.weight.sign() * 65504
    assert torch.isfinite(head.hidden(far)).all()
    assert float(head.hidden(far).max()) > 1000
    assert same_bits(head(far), far)
    block = FeatureTransferBlock(2048, 4, units=1).half()
    unit: Any = block.units[0]
    signs = unit.spatial.weight.sign() * unit.expand.weight[0].sign().view(-1, 1, 1, 1)
    maps = signs.movedim(0, 1) * 65504
    assert same_bits(block(maps), maps)


@pytest.mark.parametrize("kind", ["rows", "block"])
def test_a_channel_that_hardly_varies_counts_as_a_share_of_the_others(kind: str) -> None:
    module = MODULES[kind]()
    take_statistics(module, kind, "ordinary")
    std = module.input_std.flatten()
    take_statistics(module, kind, "one channel hardly varies")
    floored = module.input_std.flatten()
    assert torch.equal(floored[1:], std[1:])
    assert float(floored[0]) == pytest.approx(SMALLEST_SHARE * float(std.median()), rel=0.2)


@pytest.mark.parametrize("kind", ["rows", "block of one unit"])
def test_inputs_count_as_no_further_than_the_bound(kind: str) -> None:
    module = MODULES[kind]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    take_statistics(module, kind, "ordinary")
    module.eval()
    mean, std = (part.view(-1) for part in (module.input_mean, module.input_std))

    def change(z: float) -> Tensor:
        rows = shaped(kind, (mean + z * std).expand(60, WIDTH))
        changed: Tensor = module(rows) - rows
        return changed.detach()

    torch.testing.assert_close(change(16_000), change(LARGEST_Z), rtol=1e-3, atol=1e-2)
    assert not torch.allclose(change(LARGEST_Z - 10), change(LARGEST_Z), rtol=1e-2)


def test_statistics_stay_wide_whatever_a_module_is_converted_to() -> None:
    host = nn.Sequential(FeatureTransferHead(4, 3, 5), FeatureTransferBlock(4, 3, kernel_size=1))
    head: Any = host[0]
    head.set_input_statistics(torch.tensor([[1e5, 1e-9, 3.0, 0], [1e5 + 1, 2e-9, 3.0, 0]]))
    mean, std = head.input_mean.clone(), head.input_std.clone()
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float16):
        host.to(dtype)
        assert {value.dtype for value in host.parameters()} == {dtype}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {value.dtype for value in host.buffers()} == {wide}
        assert torch.equal(head.input_mean.float(), mean)
        assert torch.equal(head.input_std.float(), std)
    assert {value.device.type for value in host.to("meta").state_dict().values()} == {"meta"}


def test_statistics_are_wide_under_another_default_dtype() -> None:
    torch.set_default_dtype(torch.float16)
    try:
        head = FeatureTransferHead(4, 3, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert head.fc1.weight.dtype == torch.float16
    assert {value.dtype for value in head.buffers()} == {torch.float32}


def test_modules_are_found_by_their_kind_and_those_without_are_not() -> None:
    class Nothing(TransferModule):
        """It is nowhere saved."""

    class Own(FeatureTransferHead):
        """A user's own, of the same kind."""

    kinds = {"head": FeatureTransferHead, "block": FeatureTransferBlock}
    assert kinds == TransferModule.KINDS
