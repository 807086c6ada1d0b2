from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from examples._photos import Pairs
from examples.dropin import main, their_loop
from featxfer import Degradation, FeatureTransferHead, Preprocessing, extract_features, open_images
from featxfer_integrations import attach_transfer, load_backbone, load_model

Figures = Callable[..., dict[str, list[float]]]


def test_the_loop_trains_a_head_that_is_saved_and_loaded(
    figures: Figures, options: Any, train_photos: Path, test_photos: Path, weights: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "head"
    printed = figures(main, train_photos, test_photos, folder, *options)
    [before], [after], [hr] = printed["LR, before"], printed["LR, after"], printed["HR, after"]
    assert before < after <= 1
    assert before < hr <= 1
    assert printed["epoch 2"] < printed["epoch 1"]

    head = FeatureTransferHead.from_pretrained(folder)
    assert head.card is not None
    assert head.card.degradations == (Degradation(lr_size=12),)
    assert (before, after, hr) == pytest.approx(
        cosines(head, weights, test_photos, tmp_path), abs=6e-5
    )
    attach_transfer(load_model("timm/test_efficientnet", weights), head=folder)  # it fits


def cosines(
    head: FeatureTransferHead, weights: Path, photos: Path, cache: Path
) -> tuple[float, ...]:
    """Of LR before, LR after, HR after to HR, from stored features."""
    backbone = load_backbone("timm/test_efficientnet", weights)
    features = extract_features(backbone, open_images(photos), Degradation(lr_size=12), cache)
    rows = (features.lr, head.transfer(features.lr), head.transfer(features.hr))
    return tuple(float(cosine_similarity(r, features.hr).mean()) for r in rows)


def test_the_loop_changes_nothing_but_the_head(train_photos: Path, weights: Path) -> None:
    model, teacher = (load_backbone("timm/test_efficientnet", weights).module for _ in range(2))
    attach_transfer(model)
    pairs = Pairs(open_images(sorted((train_photos / "plain").iterdir())), Degradation())
    their_loop(model, teacher, pairs, Preprocessing())
    changed = model.state_dict()
    for name, value in teacher.state_dict().items():
        assert torch.equal(changed[name], value), name
    assert changed["feature_transfer.head.fc2.weight"].any()
