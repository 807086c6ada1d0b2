from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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
    figures: Callable[..., dict[str, list[float]]],
    train_photos: Path,
    test_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    yolo: Any = YOLO("yolov8n.yaml")
    yolo.model.args["imgsz"] = yolo.overrides["imgsz"] = 64
    monkeypatch.setattr("examples.yolo.YOLO", lambda name: yolo)
    quick = replace(DETECTOR_RECIPE, epochs=1, batch_size=16)
    monkeypatch.setattr("featxfer_integrations.stages.pyramid.DETECTOR_RECIPE", quick)
    given = ("--cache", tmp_path, "--score", 1e-4)
    printed = figures(main, train_photos, test_photos, *given)
    assert list(printed) == ["LR, before", "LR, after", "HR, after"]
    for shares in printed.values():
        assert len(shares) == 2
        assert all(0 < part <= 100 for part in shares)
    assert list(transfers_of(yolo)) == ["model_4", "model_6", "model_9"]
