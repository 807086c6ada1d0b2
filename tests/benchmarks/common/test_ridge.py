from __future__ import annotations

import pytest
import torch

from benchmarks.common.ridge import ridge, warm_start_head
from featxfer import FeatureTransferHead

HR = torch.randn(200, 10, generator=torch.Generator().manual_seed(5))
MIX = torch.randn(10, 10, generator=torch.Generator().manual_seed(6))
LR = HR @ MIX / 3 + torch.randn(200, 10, generator=torch.Generator().manual_seed(7)) / 10 + 1


@torch.no_grad()
def test_a_warm_start_is_ridge_regression() -> None:
    """Against the closed form with the penalty that it says it took, and a generous rank."""
    head = FeatureTransferHead(10, 3, 21).eval()
    head.set_input_statistics(LR)
    penalty = warm_start_head(head, LR, HR)
    z = ((LR - head.input_mean) / head.input_std).double()
    centred, change = z - z.mean(0), (LR - HR).double()
    weights = torch.linalg.solve(
        centred.T @ centred + penalty * torch.eye(10).double(),
        centred.T @ (change - change.mean(0)),
    )
    wanted = LR - (centred @ weights + change.mean(0)).float()
    torch.testing.assert_close(head(LR), wanted, rtol=1e-4, atol=1e-4)
    assert float((head(LR) - HR).square().mean()) < 0.1 * float((LR - HR).square().mean())


@torch.no_grad()
def test_a_narrow_warm_start_keeps_the_directions_that_matter() -> None:
    errors = []
    for hidden in (1, 4, 8, 20):
        head = FeatureTransferHead(10, 3, hidden).eval()
        head.set_input_statistics(LR)
        warm_start_head(head, LR, HR)
        errors.append(float((head(LR) - HR).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1]


@torch.no_grad()
def test_a_warm_start_from_fewer_rows_than_features() -> None:
    head = FeatureTransferHead(10, 3, 64).eval()
    head.set_input_statistics(LR[:6])
    warm_start_head(head, LR[:6], HR[:6])
    after, before = ((rows - HR[:6]).square().mean() for rows in (head(LR[:6]), LR[:6]))
    assert float(after) < float(before)


def test_a_warm_start_wants_a_residual_head_with_relu() -> None:
    with pytest.raises(ValueError, match="head's output: got 'clusters'"):
        warm_start_head(FeatureTransferHead(10, 3, output="clusters"), LR, HR)
    with pytest.raises(ValueError, match="head's activation: got 'gelu'"):
        warm_start_head(FeatureTransferHead(10, activation="gelu"), LR, HR)


def test_ridge_takes_a_linear_map_back() -> None:
    train, test = ridge((LR[:150], LR[150:]), HR[:150])
    assert train.dtype == test.dtype == torch.float32
    before, after = ((rows - HR[150:]).square().mean() for rows in (LR[150:], test))
    assert float(after) < 0.1 * float(before)
