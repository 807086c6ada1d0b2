from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gap.unpaired import UNPAIRED, moment_targets, transport_targets, unpaired_targets
from featxfer import kmeans
from featxfer.training.pseudo_labels import Clustering, assign

GENERATOR = torch.Generator().manual_seed(0)
DIRECTIONS = torch.linalg.qr(torch.randn(8, 8, generator=GENERATOR))[0][:4] * 5


def draw(count: int, seed: int, shares: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """HR features of four groups, in these shares, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor(shares), count, replacement=True, generator=generator)
    noise = torch.randn(count, 8, generator=generator)
    return 3 + DIRECTIONS[labels] + noise / 2, labels


SHARES = (0.4, 0.3, 0.2, 0.1)
HR, _ = draw(400, 1, SHARES)
OTHERS, LABELS = draw(300, 2, SHARES)
LR = 0.4 * OTHERS + 2 + torch.randn(300, 8, generator=GENERATOR) / 4
CLUSTERING = kmeans(F.normalize(HR, dim=1), 8, seed=0)


@pytest.mark.parametrize("name", UNPAIRED)
def test_targets_are_nearer_to_the_unseen_hr_features(name: str) -> None:
    targets = unpaired_targets(name, HR, LR, CLUSTERING)
    assert targets.shape == LR.shape
    assert targets.dtype == torch.float32
    before, after = ((rows - OTHERS).square().sum(1).mean() for rows in (LR, targets))
    assert float(after) < 0.5 * float(before)
    found = torch.cdist(targets, 3 + DIRECTIONS).argmin(1)
    assert float((found == LABELS).float().mean()) > 0.9


def test_moments_become_those_of_hr() -> None:
    targets = moment_targets(HR, LR, shrinkage=1e-6)
    torch.testing.assert_close(targets.mean(0), HR.mean(0), rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.cov(targets.T), torch.cov(HR.T), rtol=1e-2, atol=1e-2)


def test_clusters_are_as_frequent_as_in_hr() -> None:
    targets = transport_targets(HR, LR, CLUSTERING)
    found = torch.cdist(targets, 3 + DIRECTIONS).argmin(1)
    counts = torch.bincount(found, minlength=4) / len(LR)
    torch.testing.assert_close(counts, torch.tensor(SHARES), atol=0.06, rtol=0)


def test_transport_is_the_fixed_point_of_balanced_assignments() -> None:
    """Softmax assignments, scaled a cluster at a time until their shares are those of HR."""
    labels = assign(F.normalize(HR, dim=1), F.normalize(CLUSTERING.centroids, dim=1))
    means = torch.stack([HR[labels == c].mean(0) for c in range(8)])
    rows, clusters = (
        F.normalize(part - whole.mean(0), dim=1) for part, whole in ((LR, LR), (means, HR))
    )
    logits, shift = rows @ clusters.T / 0.05, torch.zeros(8)
    shares = torch.bincount(labels, minlength=8) / len(HR)
    for _ in range(500):
        shift = shift + (shares / F.softmax(logits + shift, dim=1).mean(0)).log()
    wanted = F.softmax(logits + shift, dim=1) @ means
    torch.testing.assert_close(transport_targets(HR, LR, CLUSTERING), wanted, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", UNPAIRED)
def test_sets_that_cannot_be_compared(name: str) -> None:
    for hr, lr, message in (
        (HR, LR[:, :3], "lr: got width 3, wanted 8"),
        (HR, LR[:1], "lr: got 1 features, wanted at least 2"),
        (HR[:1], LR, "hr: got 1 features, wanted at least 2"),
        (HR, LR / 0, "lr: row 0 has NaN or infinity"),
        (HR[:0], LR, "hr: got"),
    ):
        with pytest.raises(ValueError, match=message):
            unpaired_targets(name, hr, lr, CLUSTERING)


def test_equal_sets_and_constant_features_give_finite_targets() -> None:
    flat = HR.clone()
    flat[:, 3] = 1.0
    for name in UNPAIRED:
        assert torch.isfinite(unpaired_targets(name, flat, flat, CLUSTERING)).all()


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="unpaired: got 'gan', wanted one of"):
        unpaired_targets("gan", HR, LR, CLUSTERING)
    with pytest.raises(ValueError, match="shrinkage: got 0, wanted in"):
        moment_targets(HR, LR, shrinkage=0)
    with pytest.raises(ValueError, match="regularisation: got -1, wanted > 0"):
        transport_targets(HR, LR, CLUSTERING, regularisation=-1)


def test_without_pot(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ot":
            raise ImportError
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="needs POT: pip install pot"):
        transport_targets(HR, LR, CLUSTERING)


def test_an_empty_cluster_is_left_out() -> None:
    far = torch.cat([CLUSTERING.centroids, -CLUSTERING.centroids.mean(0, keepdim=True)])
    targets = transport_targets(HR, LR, Clustering(far, 0.0, 0, "by hand"))
    assert np.isfinite(targets.numpy()).all()


def test_a_transport_that_is_not_balanced_is_told() -> None:
    with pytest.warns(
        UserWarning, match=r"regularisation: got 1e-06, .* left \d+% of the features"
    ):
        transport_targets(HR, LR, CLUSTERING, regularisation=1e-6)
