"""What several tests need: small images, a small backbone, a small devkit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from featxfer import Backbone, Preprocessing

if "PYTEST_XDIST_WORKER" in os.environ:  # of several at once, each has a core to itself
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}  # of ultralytics

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def backbone() -> Backbone:
    """A convolution, batch norm and pooling: images of any size -> 8 features."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Backbone(module, Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "tiny", "seed 0")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Ten JPEG files of noise, of several sizes, in a flat folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(10):
        pixels = rng.integers(0, 256, (40 + index, 60 - index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.jpg")
    return folder


@pytest.fixture
def photographs() -> Path:
    """The devkit of real photographs that some machines have beside the checkout."""
    root = SHARED / "caltech101" / "VOCdevkit" / "VOC2007"
    if not root.is_dir():
        pytest.skip(f"no photographs at {root}")
    return root
