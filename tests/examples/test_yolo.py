from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("ultralytics")
from ultralytics import YOLO

from examples.yolo import main
from featxfer_integrations import transfers_of
from featxfer_integrations.stages.pyramid import DETECTOR_RECIPE


@pytest.mark.filterwarnings("ignore:.* not help")
def test_what_is_found_before_and_after(
    check_shares: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    yolo: Any = YOLO("yolov8n.yaml")
    yolo.model.args["imgsz"] = yolo.overrides["imgsz"] = 64
    monkeypatch.setattr("examples.yolo.YOLO", lambda name: yolo)
    quick = replace(DETECTOR_RECIPE, epochs=1, batch_size=16)
    monkeypatch.setattr("featxfer_integrations.stages.pyramid.DETECTOR_RECIPE", quick)
    check_shares(main, "--score", 1e-4)
    assert list(transfers_of(yolo)) == ["model_4", "model_6", "model_9"]
