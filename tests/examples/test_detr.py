from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from examples.detr import main
from featxfer_integrations import load_transfers, transfers_of
from featxfer_integrations.stages.pyramid import DETECTOR_RECIPE
from tests.integrations.hosts import transformers_detectors as tiny


@pytest.mark.filterwarnings("ignore:.* not help")
def test_what_is_found_before_and_after(
    check_shares: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make("Detr")
    torch.nn.init.constant_(model.class_labels_classifier.bias[:1], 99.0)
    folder = tiny.save_processor("Detr", tmp_path / "detector")
    model.save_pretrained(folder)
    quick = dataclasses.replace(DETECTOR_RECIPE, epochs=1, batch_size=8)
    monkeypatch.setattr("featxfer_integrations.stages.pyramid.DETECTOR_RECIPE", quick)
    check_shares(main, "--detector", folder, "--save", tmp_path / "blocks")
    assert len(transfers_of(load_transfers(model, tmp_path / "blocks"))) == 3
