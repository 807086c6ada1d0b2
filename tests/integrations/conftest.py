"""Drawings and a small model that has seen them, for tests that train."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from featxfer import Degradation, ImageError, Images, Preprocessing, open_images


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


def failing(images: Images, failures: dict[int, int]) -> Images:
    """The same images; of each key the reading that its value counts fails, and no other."""
    counts, lock = Counter[int](), threading.Lock()

    def read(index: int) -> Tensor:
        with lock:
            counts[index] += 1
            count = counts[index]
        if failures.get(index) == count:
            raise ImageError(f"image {images.ids[index]} could not be read this once")
        return images.read(index)

    return dataclasses.replace(images, read=read)


class Pyramid(nn.Module):
    """A backbone by hand: timm's stages and torchvision's pyramid."""

    def __init__(self, name: str, channels: int) -> None:
        super().__init__()
        self.stages: Any = timm.create_model(name, features_only=True)
        widths = self.stages.feature_info.channels()
        self.neck = FeaturePyramidNetwork(widths[-3:], channels)
        self.out_channels = channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = OrderedDict((str(i), part) for i, part in enumerate(self.stages(images)[-3:]))
        levels: OrderedDict[str, Tensor] = self.neck(maps)
        return levels


def make_detector(kind: str, backbone: str = "test_resnet") -> nn.Module:
    """By hand around timm, small, with random weights; every image has detections, and few."""
    torch.manual_seed(0)
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    pyramid = Pyramid(backbone, 16)
    sizes = {"min_size": 64, "max_size": 96}
    if kind == "retinanet":
        few = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 20}
        dense: nn.Module = RetinaNet(pyramid, 3, anchor_generator=anchors, **sizes, **few)
        for layer in dense.head.modules():  # type: ignore[union-attr]
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
        return dense.eval()
    few = {"box_detections_per_img": 5, "rpn_post_nms_top_n_test": 30}
    model: nn.Module = FasterRCNN(
        pyramid,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 5, 2),
        box_head=TwoMLPHead(16 * 25, 48),
        box_predictor=FastRCNNPredictor(48, 3),
        box_score_thresh=0.0,
        **sizes,
        **few,
    )
    return model.eval()


@pytest.fixture
def by_hand() -> Callable[[str, str], nn.Module]:
    """`make_detector`."""
    return make_detector


@pytest.fixture(scope="session")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images of two sizes, with bright discs on noise."""
    folder = tmp_path_factory.mktemp("discs")
    rng = np.random.default_rng(0)
    for index in range(16):
        height, width = ((64, 80), (72, 64))[index % 2]
        pixels = rng.integers(0, 90, (height, width, 3)).astype(np.float64)
        rows, columns = np.mgrid[:height, :width]
        for _ in range(3):
            y, x, radius = rng.integers(8, 56), rng.integers(8, 56), rng.integers(4, 12)
            pixels[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] += rng.integers(60, 160, 3)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(params=["faster r-cnn", "retinanet"])
def detector(request: pytest.FixtureRequest, discs: Path) -> nn.Module:
    """Batch norm has seen the discs, or random weights give features that are all alike."""
    model: Any = make_detector(request.param)
    images = open_images(discs)
    with torch.no_grad():
        for _ in range(20):
            for start in range(0, len(images), 4):
                pixels = [images.read(row).float() / 255 for row in range(start, start + 4)]
                model.backbone.train()(model.transform(pixels)[0].tensors)
    fitted: nn.Module = model.eval()
    return fitted
