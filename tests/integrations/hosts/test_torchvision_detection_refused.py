from __future__ import annotations

from typing import Any

import pytest
import timm
from torch import nn

from featxfer import FeatureTransferBlock, FeatureTransferHead
from featxfer_integrations import (
    AttachError,
    attach_transfer,
)
from featxfer_integrations.mechanism.attach import is_attached


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"branch": "mask"}, ValueError, "branch: got 'mask', wanted one of 'class', 'both'"),
        (
            {"site": "fpn", "branch": "both"},
            ValueError,
            "branch: got 'both', which is for site='boxes', not 'fpn'",
        ),
        (
            {"site": "neck"},
            AttachError,
            "site: got 'neck', wanted 'boxes'.*; candidates in FasterRCNN",
        ),
        ({"site": 3}, TypeError, "site: got 3, wanted a name"),
        ({"dtype": "bf16"}, TypeError, "dtype: got 'bf16', wanted a floating-point torch.dtype"),
        ({"site": "fpn9"}, AttachError, "site: got 'fpn9', wanted"),
        (
            {"site": "stage9"},
            AttachError,
            "site: FasterRCNN has no stage9; it has stage0 = backbone",
        ),
        ({"output": "clusters"}, ValueError, "output: got 'clusters', which a detector's"),
        (
            {"head": FeatureTransferHead(48, 7, output="clusters")},
            ValueError,
            "head: got 'clusters', which a detector's predictor does not fit",
        ),
        ({"site": "fpn", "output": "features"}, ValueError, "output: a block has none"),
        (
            {"site": "fpn", "head": FeatureTransferBlock(16, 4)},
            AttachError,
            "head: got one for 3 sites; name one by site=: fpn0, fpn1, fpn2",
        ),
        (
            {"site": "fpn1", "head": FeatureTransferHead(16)},
            AttachError,
            "head: got a head, wanted a block at 'fpn1'",
        ),
        ({"head": FeatureTransferHead(7)}, ValueError, "7"),
        ({"in_features": 7}, ValueError, "in_features: got 7, the model says 48"),
    ],
)
def test_bad_options_leave_the_detector_as_it_was(
    by_hand: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = by_hand("faster r-cnn")
    with pytest.raises(error, match=message):
        attach_transfer(model, **options)
    assert not is_attached(model)


def test_detectors_without_a_known_predictor_list_what_could_be_meant(by_hand: Any) -> None:
    model = by_hand("faster r-cnn")
    heads: Any = model.roi_heads
    heads.box_predictor = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    with pytest.raises(AttachError, match=r"roi_heads.box_predictor.cls_score; .*box_head.fc7"):
        attach_transfer(model)
    attach_transfer(model, site="roi_heads.box_head.fc7", in_features=48)
    with pytest.raises(AttachError, match="attached at 'roi_heads_box_head_fc7' already"):
        attach_transfer(model, site="roi_heads.box_head.fc7", in_features=48)
    dense = by_hand("retinanet")
    dense.head.classification_head = nn.Identity()
    with pytest.raises(AttachError, match=r"head.classification_head ends in no convolution"):
        attach_transfer(dense)
    model_without_branch = timm.create_model("test_resnet").eval()
    with pytest.raises(ValueError, match="branch: got 'both', which is for site='boxes'"):
        attach_transfer(model_without_branch, branch="both")
