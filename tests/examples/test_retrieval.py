from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.retrieval import main, recall
from featxfer import Degradation, extract_features, open_images
from featxfer_integrations import load_backbone

Figures = Callable[..., dict[str, list[float]]]


def test_more_queries_find_their_own_image(
    figures: Figures, options: Any, train_photos: Path, test_photos: Path, weights: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    printed = figures(main, train_photos, test_photos, *options, "--cache", tmp_path)
    # "recall@1 73.3%, recall@5 100.0%"
    before, after, hr = (printed[name] for name in ("LR, before", "LR, after", "HR, after"))
    assert before[0] == pytest.approx(plain_recall(weights, test_photos, tmp_path), abs=0.051)
    assert before[0] < after[0]
    assert before[0] < hr[0]
    assert all(first <= five <= 100 for first, five in (before, after, hr))


def plain_recall(weights: Path, photos: Path, cache: Path) -> float:
    """recall@1 of the plain model in per cent, a query at a time."""
    backbone = load_backbone("timm/test_efficientnet", weights)
    features = extract_features(backbone, open_images(photos), Degradation(lr_size=12), cache)
    hr = [row / np.linalg.norm(row) for row in features.hr.numpy()]
    found = [int(np.argmax([row @ other for other in hr])) for row in features.lr.numpy()]
    return 100 * float(np.mean([where == index for index, where in enumerate(found)]))


def test_recall_looks_for_the_own_row_among_the_first_k() -> None:
    gallery = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    queries = torch.tensor([[3.0, 0], [2, 1], [1, 0.1]])  # own row is 1st, 3rd and 2nd by cosine
    found = [recall(queries, gallery, k) for k in (1, 2, 3, 9)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1])
