from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.hugging_face import main
from featxfer import open_images

transformers: Any = pytest.importorskip("transformers")


@pytest.fixture
def model(test_photos: Path, tmp_path: Path) -> Path:
    """A small ViT whose ten first choices do vary, saved with its image processor."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64,
        image_size=64, patch_size=8, num_labels=10,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 64, "width": 64})
    images = open_images(test_photos)
    pixels = [images.read(i) for i in range(len(images))]
    with torch.no_grad():
        model.classifier.weight.normal_()
        model.classifier.bias -= model(**processor(pixels, return_tensors="pt")).logits.mean(0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_classifier_agrees_with_itself_more_often(
    figures: Callable[..., dict[str, list[float]]],
    model: Path,
    train_photos: Path,
    test_photos: Path,
    tmp_path: Path,
) -> None:
    options = ("--model", model, "--hr-size", 64, "--lr-size", 12, "--cache", tmp_path / "cache")
    printed = figures(main, train_photos, test_photos, tmp_path / "out", *options)
    [before], [after], [hr] = printed["LR, before"], printed["LR, after"], printed["HR, after"]
    assert before < after <= 100
    assert before < hr <= 100
    assert (tmp_path / "out").is_dir()
