from __future__ import annotations

import pytest
import torch

from featxfer import compare_pairs

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


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="wanted one HR row for each LR row"):
        compare_pairs(HR, HR[:3], CENTROIDS)
    with pytest.raises(ValueError, match="centroids: got width 2, wanted 4"):
        compare_pairs(HR, HR, CENTROIDS[:, :2])
