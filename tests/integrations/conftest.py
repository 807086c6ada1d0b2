"""Drawings and a small model that has seen them, for tests that train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from featxfer import Degradation, Preprocessing, open_images


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images of coloured blobs: what small sizes blur away is not all there is."""
    folder = tmp_path_factory.mktemp("drawings")
    rng = np.random.default_rng(0)
    for index in range(60):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)
        noise = rng.integers(-40, 40, (48, 48, 3))
        pixels = np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def model(drawings: Path) -> nn.Module:
    """Random weights; batch norm has seen the drawings, or all features would be much alike."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("test_resnet", num_classes=7)
    images = open_images(drawings)
    pixels = torch.stack(
        [Degradation(hr_size=32, lr_size=8).hr(images.read(index)) for index in range(len(images))]
    )
    with torch.no_grad():
        for _ in range(30):
            model.train()(Preprocessing()(pixels))
    return model.eval()
