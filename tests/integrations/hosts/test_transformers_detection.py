from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from featxfer import ScaledDegradation
from tests.integrations.fitting import WHOLE
from tests.integrations.hosts import transformers_detectors as tiny
from tests.integrations.hosts.fitted_contract import Case, check_attached, check_fitted


QUICK = dataclasses.replace(WHOLE, epochs=8)


def run(model: Any, pixels: Any) -> Any:
    """All that a detector says; DAB-DETR alone does not run in half precision by itself."""
    is_dab = model.config.model_type == "dab-detr"
    with torch.autocast("cpu", torch.bfloat16, enabled=is_dab and model.dtype is torch.bfloat16):
        return model(pixels)


def case_of(name: str, folder: Path) -> Case:
    def make() -> Any:
        model = tiny.make(name)
        model.config._name_or_path = str(folder)
        return model

    chance = torch.Generator().manual_seed(0)
    sizes = [(2, 3, 64, 64), (1, 3, 64, 96)]
    if name not in (*tiny.FIXED, "Yolos"):
        sizes.append((1, 3, 75, 97))
    batches = [torch.rand(size, generator=chance) for size in sizes]
    return Case(make, run, batches, ScaledDegradation(3), site="backbone")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_blocks_change_nothing_until_trained_then_act_and_leave_no_trace(
    name: str, tmp_path: Path
) -> None:
    check_attached(case_of(name, tmp_path))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_fit_brings_maps_of_lr_images_nearer(name: str, discs: Path, tmp_path: Path) -> None:
    case = case_of(name, tiny.save_processor(name, tmp_path / "processor"))
    check_fitted(case, discs, tmp_path, block_recipe=QUICK)
