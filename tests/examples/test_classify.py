from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from examples.classify import agreement, main
from featxfer import Degradation, open_images

Figures = Callable[..., dict[str, list[float]]]


def test_the_classifier_agrees_with_itself_more_often(
    figures: Figures, options: Any, train_photos: Path, test_photos: Path, weights: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    printed = figures(main, train_photos, test_photos, *options, "--cache", tmp_path)
    [before], [after], [hr] = printed["LR, before"], printed["LR, after"], printed["HR, after"]
    assert before == pytest.approx(100 * plain_agreement(weights, test_photos), abs=0.051)
    assert before < after <= 100
    assert before < hr <= 100


def plain_agreement(weights: Path, photos: Path) -> float:
    """The same figure by timm alone."""
    model = timm.create_model("test_efficientnet", checkpoint_path=str(weights)).eval()
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    images, degradation, same = open_images(photos), Degradation(lr_size=12), 0
    for index in range(len(images)):
        pixels = images.read(index)
        views = torch.stack([degradation.hr(pixels), degradation.lr(pixels)])
        with torch.no_grad():
            hr, lr = model((views / 255 - mean) / std).argmax(1).tolist()
        same += hr == lr
    return same / len(images)


def test_agreement_counts_first_choices() -> None:
    wanted = torch.tensor([[0.0, 1], [1, 0], [5, 2], [0, 3]])
    assert agreement(wanted, wanted) == 1
    assert agreement(torch.tensor([[0.0, 9], [2, 1], [0, 1], [1, 0]]), wanted) == 0.5
