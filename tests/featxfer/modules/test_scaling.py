from __future__ import annotations

import pytest
import torch

from featxfer.modules.scaling import scale_features, scale_rows

ROWS = torch.tensor([[3.0, 4.0], [0.0, 2.0]])


def test_rows_stay_or_get_the_length_one() -> None:
    assert scale_features(ROWS, "none").tolist() == ROWS.tolist()
    torch.testing.assert_close(scale_features(ROWS, "l2"), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_bad_rows_are_named() -> None:
    with pytest.raises(ValueError, match="row 1 is zero"):
        scale_features(torch.tensor([[1.0], [0.0]]), "l2")
    with pytest.raises(ValueError, match="scaling: got 'max', wanted one of 'none', 'l2'"):
        scale_features(ROWS, "max")


def test_networks_scale_by_the_last_dimension_as_rows_are_scaled() -> None:
    rows = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    wanted = scale_features(rows, "l2")
    assert torch.equal(scale_rows(rows, "l2"), wanted)
    assert torch.equal(scale_rows(rows.view(4, 10, 50), "l2"), wanted.view(4, 10, 50))
    assert scale_rows(rows, "none") is rows


def test_a_row_of_zeros_stays_zeros_and_has_a_finite_gradient() -> None:
    rows = torch.tensor([[0.0, -0.0], [3.0, 4.0]], requires_grad=True)
    scaled = scale_rows(rows, "l2")
    assert scaled[0].tolist() == [0.0, 0.0]
    scaled.sum().backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()
