from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from featxfer import diagnose, kmeans, pseudo_labels
from featxfer.training.pseudo_labels import assign, centroid_scores

GENERATOR = torch.Generator().manual_seed(0)
CENTRES = torch.randn(6, 5, generator=GENERATOR) * 20
BLOBS = CENTRES.repeat_interleave(30, 0) + torch.randn(180, 5, generator=GENERATOR)


@pytest.mark.parametrize("backend", ["faiss", "sklearn"])
def test_kmeans_finds_blobs(backend: str) -> None:
    found = kmeans(BLOBS, 6, seed=0, redo=20, backend=backend)
    assert found.k == 6
    assert found.centroids.dtype == torch.float32
    means = BLOBS.view(6, 30, 5).mean(1)
    torch.testing.assert_close(found.centroids[assign(means, found.centroids)], means)
    assert found.inertia == pytest.approx(
        float((BLOBS - means.repeat_interleave(30, 0)).square().sum(1).mean()), rel=1e-4
    )


def test_backends_reach_the_same_inertia() -> None:
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    faiss, sklearn = (kmeans(rows, 10, seed=0, backend=b).inertia for b in ("faiss", "sklearn"))
    assert faiss == pytest.approx(sklearn, rel=0.03)


@pytest.mark.parametrize("backend", ["faiss", "sklearn"])
def test_kmeans_is_deterministic_by_seed(backend: str) -> None:
    first, same, other = (kmeans(BLOBS, 20, seed=s, backend=backend, redo=1) for s in (0, 0, 1))
    assert torch.equal(first.centroids, same.centroids)
    assert not torch.equal(first.centroids, other.centroids)


def test_kmeans_takes_every_row_and_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """faiss alone would take 256 rows a centroid at most, and warn below 39."""
    rows = torch.zeros(1000, 1)
    rows[-1] = 1000
    assert float(
        kmeans(rows + torch.arange(1000)[:, None] * 1e-3, 1, seed=0).centroids
    ) == pytest.approx(1.4995, rel=1e-3)
    kmeans(BLOBS, 100, seed=0)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("backend", ["faiss", "sklearn"])
def test_as_many_clusters_as_rows(backend: str) -> None:
    assert kmeans(BLOBS[:7], 7, seed=0, backend=backend).inertia == pytest.approx(0, abs=1e-3)


def test_nearest_labels_are_the_closed_form() -> None:
    """W = c, b = -|c|^2 / 2 ranks centroids as the distance does."""
    rows = torch.randn(500, 5, generator=GENERATOR) * 10
    scores = centroid_scores(rows, CENTRES)
    distances = torch.cdist(rows.double(), CENTRES.double())
    assert torch.equal(assign(rows, CENTRES), distances.argmin(1))
    rebuilt = rows.double().square().sum(1, keepdim=True) - 2 * scores
    torch.testing.assert_close(rebuilt, distances.square(), rtol=1e-4, atol=1e-2)


def test_nearest_and_paired() -> None:
    hr, lr = torch.tensor([[0.0], [10.0]]), torch.tensor([[9.0], [11.0]])
    centroids = torch.tensor([[0.0], [10.0]])
    assert pseudo_labels(hr, lr, centroids, "nearest").tolist() == [1, 1]
    assert pseudo_labels(hr, lr, centroids, "paired").tolist() == [0, 1]
    assert pseudo_labels(hr, lr, centroids, "paired").dtype == torch.int64


def test_diagnostics() -> None:
    centroids = torch.arange(4.0)[:, None] * 10
    hr = torch.tensor([0.0] * 90 + [10.0] * 2 + [20.0] * 8)[:, None]
    lr = torch.tensor([0.0] * 85 + [10.0] * 15)[:, None]
    found = diagnose(hr, lr, centroids)
    assert found.hr_sizes == (90, 2, 8, 0)
    assert found.lr_sizes == (85, 15, 0, 0)
    summary = found.summary()
    assert summary["agreement"] == pytest.approx(0.87)
    assert (summary["hr_empty"], summary["hr_tiny"], summary["hr_giant"]) == (1, 1, 0)
    entropy = -(0.9 * math.log(0.9) + 0.02 * math.log(0.02) + 0.08 * math.log(0.08))
    assert summary["hr_entropy"] == pytest.approx(entropy / math.log(4))


def test_diagnostics_of_giants_and_of_one_cluster() -> None:
    centroids = torch.arange(12.0)[:, None]
    rows = torch.zeros(240, 1)
    assert diagnose(rows, rows, centroids).summary()["hr_giant"] == 1
    assert diagnose(rows, rows, centroids[:1]).summary()["hr_entropy"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: got 0, wanted an int >= 1"),
        ({"k": 181}, "k: got 181 clusters for 180 features, wanted at most 180"),
        ({"backend": "cuml"}, "backend: got 'cuml', wanted one of 'faiss', 'sklearn'"),
        ({"iterations": 0}, "iterations: got 0"),
        ({"seed": 2**31}, r"seed: got 2147483648, wanted an int < 2\*\*31"),
        ({"features": BLOBS[0]}, r"features: got shape \(5,\), wanted \(n, d\)"),
        ({"features": torch.ones(180, 5)}, "features: collapsed, only 1 distinct rows of 180"),
        (
            {"features": BLOBS.clone().index_fill_(0, torch.tensor([7, 9]), math.nan)},
            r"features: row 7 has NaN or infinity \(2 such rows of 180\)",
        ),
        ({"features": BLOBS.clone().fill_(math.inf)}, "features: row 0 has NaN or infinity"),
        (
            {"features": BLOBS.clone().index_fill_(0, torch.tensor([7, 9]), 1e30)},
            r"features: row 7 has too large a norm \(2 such rows of 180\).* at most 1e\+18",
        ),
    ],
)
def test_bad_kmeans_input_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"features": BLOBS, "k": 6, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        kmeans(arguments.pop("features"), arguments.pop("k"), **arguments)


def test_no_array_at_all() -> None:
    with pytest.raises(TypeError, match=r"features: got list, wanted a torch\.Tensor"):
        kmeans([[1.0]], 1, seed=0)  # type: ignore[arg-type]


def test_numpy_arrays_of_any_layout_are_taken() -> None:
    rows = np.asfortranarray(BLOBS.double().numpy())
    assert torch.equal(kmeans(rows, 6, seed=0).centroids, kmeans(BLOBS, 6, seed=0).centroids)


@pytest.mark.parametrize(
    ("hr", "lr"), [(BLOBS, BLOBS[:-1]), (BLOBS, BLOBS[:, :-1])], ids=["length", "width"]
)
def test_unpaired_sets_are_refused(hr: torch.Tensor, lr: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"hr, lr: got shapes .* one HR row for each LR row"):
        pseudo_labels(hr, lr, CENTRES, "paired")


def test_unknown_assignment() -> None:
    with pytest.raises(
        ValueError, match="assignment: got 'soft', wanted one of 'nearest', 'paired'"
    ):
        pseudo_labels(BLOBS, BLOBS, CENTRES, "soft")


def test_centroids_of_another_width() -> None:
    with pytest.raises(ValueError, match="features: got width 5, wanted 4"):
        assign(BLOBS, CENTRES[:, :4])


@pytest.mark.parametrize("flip", [np.flip, lambda rows: rows])
def test_arrays_that_torch_does_not_take_as_they_are(flip: Callable[[Any], Any]) -> None:
    rows = flip(np.array([[3.0]], dtype=np.float32))
    rows.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kmeans(rows, 1, seed=0).centroids.tolist() == [[3.0]]


def test_zeros_of_either_sign_are_one_row() -> None:
    rows = torch.tensor([[0.0, 1], [-0.0, 1], [2, 1]])
    with pytest.raises(ValueError, match="only 2 distinct rows of 3, wanted at least k=3"):
        kmeans(rows, 3, seed=0)
