from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from examples.detect import main, share
from featxfer import Recipe


def small() -> nn.Module:
    """Random weights, a backbone of three layers, and boxes in every image."""
    backbone = nn.Sequential()
    for channels, width in ((3, 16), (16, 16), (16, 24)):
        backbone.extend([nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()])
    backbone.out_channels = 24  # type: ignore[assignment]
    anchors = AnchorGenerator(((16, 32),), ((1.0,),))
    model: nn.Module = FasterRCNN(
        backbone, min_size=64, max_size=96, rpn_anchor_generator=anchors, rpn_score_thresh=0.0,
        box_head=TwoMLPHead(24 * 49, 32), box_predictor=FastRCNNPredictor(32, 2),
        rpn_post_nms_top_n_test=50,
    )  # fmt: skip
    return model


@pytest.mark.filterwarnings("ignore:.* not help")
def test_what_is_found_before_and_after(
    check_shares: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    detector: Any = small()
    torch.nn.init.constant_(detector.roi_heads.box_predictor.cls_score.bias[1:], 0.3)
    monkeypatch.setattr("examples.detect.get_model", lambda name, weights: detector)
    quick = Recipe(epochs=2, batch_size=256, learning_rate=1e-4, optimizer="adamw", steps=())
    monkeypatch.setattr("featxfer_integrations.stages.boxes.BOX_RECIPE", quick)
    check_shares(main, "--site", "boxes")


def test_a_share_counts_boxes_of_the_same_class_and_place() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    wanted = [{"boxes": boxes, "labels": torch.tensor([1, 1, 2])}]
    found = [{"boxes": boxes[[0, 0, 2]], "labels": torch.tensor([1, 1, 1])}]
    assert share(wanted, found) == pytest.approx(1 / 3)
    assert share(found, wanted) == pytest.approx(2 / 3)
    nothing = [{"boxes": boxes[:0], "labels": torch.empty(0, dtype=torch.int64)}]
    assert share(wanted, nothing) == 0
    assert share(nothing, wanted) == 0
