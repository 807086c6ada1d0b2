from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.discovery import judge, main
from featxfer import Degradation, assign, extract_features, kmeans, open_images
from featxfer.modules.scaling import scale_features
from featxfer_integrations import load_backbone

Figures = Callable[..., dict[str, list[float]]]


def test_figures_of_hr_lr_and_transferred_clusters(
    figures: Figures, options: Any, train_photos: Path, test_photos: Path, weights: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    printed = figures(main, train_photos, test_photos, *options, "--cache", tmp_path)
    assert list(printed) == ["HR", "LR, before", "LR, after", "HR, after"]
    for accuracy, _, nmi, _, ari, _ in printed.values():  # a mean and a deviation each
        assert 1 / 3 <= accuracy <= 1
        assert 0 <= nmi <= 1
        assert -0.5 <= ari <= 1
    plain = plain_accuracies(weights, test_photos, tmp_path)
    for name, wanted in zip(("HR", "LR, before"), plain, strict=True):
        assert printed[name][:2] == pytest.approx([np.mean(wanted), np.std(wanted)], abs=6e-4)


def plain_accuracies(weights: Path, photos: Path, cache: Path) -> list[list[float]]:
    """Of the plain HR and LR features, a seed each; the best of all ways to name the clusters."""
    images = open_images(photos)
    backbone = load_backbone("timm/test_efficientnet", weights)
    features = extract_features(backbone, images, Degradation(lr_size=12), cache)
    accuracies = []
    for rows in (scale_features(features.hr, "l2"), scale_features(features.lr, "l2")):
        found = [assign(rows, kmeans(rows, 3, seed=seed).centroids).numpy() for seed in range(5)]
        accuracies.append([best_accuracy(clusters, images.targets) for clusters in found])
    return accuracies


def best_accuracy(clusters: Any, classes: Any) -> float:
    names = permutations(range(3))
    return max(float(np.mean(np.array(name)[clusters] == np.array(classes))) for name in names)


def test_accuracy_lets_each_cluster_stand_for_its_best_class() -> None:
    corners = torch.eye(3)[[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    assert judge(corners, np.array([2, 2, 2, 0, 0, 0, 1, 1, 1]), 0) == pytest.approx((1, 1, 1))
    one_off = judge(corners, np.array([2, 2, 2, 0, 0, 0, 1, 1, 0]), 0)
    assert one_off[0] == pytest.approx(8 / 9)
    assert max(one_off[1:]) < 1
    assert judge(corners, np.array([0, 1, 2] * 3), 0)[0] == pytest.approx(1 / 3)
