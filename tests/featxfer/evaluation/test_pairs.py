from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from featxfer import compare_pairs
from featxfer.evaluation.pairs import MOST_SIMILARITIES, report_pairs

HR = torch.eye(4)
CENTROIDS = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])


def test_the_same_features_agree_in_all() -> None:
    agreement = compare_pairs(HR, HR * 3, CENTROIDS)
    assert (agreement.cosine, agreement.retrieval, agreement.clusters) == (1.0, 1.0, 1.0)


def test_counted_by_hand() -> None:
    lr = HR.clone()
    lr[1] = torch.tensor([2.0, 1, 0, 0])  # nearer to another image, in the right cluster
    lr[2] = torch.tensor([0.0, 3, 2, 0])  # nearer to another image, in the wrong cluster
    agreement = compare_pairs(HR, lr, CENTROIDS)
    assert agreement.cosine == pytest.approx((1 + 1 / 5**0.5 + 2 / 13**0.5 + 1) / 4)
    assert agreement.retrieval == 0.5
    assert agreement.clusters == 0.75


def test_held_out_pairs_are_compared_before_and_after() -> None:
    lr, after, hr_after = HR.roll(1, 0), HR.clone(), HR.clone()
    after[0], hr_after[0] = torch.tensor([1.0, 1, 0, 0]), torch.tensor([-1.0, 0, 0, 0])
    report = report_pairs(HR, lr, after, hr_after, CENTROIDS)
    assert report.before == compare_pairs(HR, lr, CENTROIDS)
    assert report.after == compare_pairs(HR, after, CENTROIDS)
    assert (report.pairs, report.hr_cosine) == (4, 0.5)
    assert report.cosine_gap_recovered == pytest.approx((3 + 1 / 2**0.5) / 4)
    assert report_pairs(HR, HR, after, HR, CENTROIDS).cosine_gap_recovered == 0.0


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="wanted one HR row for each LR row"):
        report_pairs(HR, HR, HR, HR[:3], CENTROIDS)
    with pytest.raises(ValueError, match="wanted one HR row for each LR row"):
        compare_pairs(HR, HR[:3], CENTROIDS)
    with pytest.raises(ValueError, match="centroids: got width 2, wanted 4"):
        compare_pairs(HR, HR, CENTROIDS[:, :2])


class LargestTensor(TorchDispatchMode):
    """Notes the most values that one operation returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("most", [1, 700, 10**9])
def test_rows_are_compared_some_at_a_time(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hr, noise = torch.randn(2, 300, 3, generator=generator)
    hr[7], noise[9] = hr[8], -hr[9]
    lr, centroids = hr + noise / 8, hr[:5]
    cosines = torch.nn.functional.cosine_similarity(lr[:, None], hr, dim=2)
    wanted = float((cosines.diagonal() >= cosines.max(1).values - 1e-6).float().mean())
    monkeypatch.setattr("featxfer.evaluation.pairs.MOST_SIMILARITIES", most)
    with LargestTensor() as largest:
        agreement = compare_pairs(hr, lr, centroids)
    assert 0.1 < wanted < 0.9
    assert agreement.retrieval == pytest.approx(wanted, abs=1e-7)
    assert largest.most == (300 * 300 if most == 10**9 else 300 * 5)


def test_many_rows_do_not_need_their_square() -> None:
    hr = torch.randn(9_000, 2, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        assert compare_pairs(hr, hr, hr[:3]).retrieval == 1
    assert largest.most <= MOST_SIMILARITIES < 9_000**2


def test_features_of_zeros_agree_with_nothing() -> None:
    agreement = compare_pairs(HR, HR * torch.tensor([[1.0], [0], [0], [0]]), CENTROIDS)
    assert (agreement.cosine, agreement.retrieval, agreement.clusters) == (0.25, 0.25, 0.25)
