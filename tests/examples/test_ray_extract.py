from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from featxfer import Degradation, fill_stores, open_images
from featxfer.features.store import FeatureStore
from featxfer_integrations import load_backbone

pytest.importorskip("ray", reason="pip install 'featxfer[scale]'")
ROOT = Path(__file__).parents[2]


def test_parts_by_actors_are_those_of_one_process(image_folder: Path, tmp_path: Path) -> None:
    """On a Ray of this machine, with a part there already."""
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), weights)
    backbone = load_backbone("timm/test_resnet", str(weights))
    images = open_images(image_folder)
    arguments = (backbone, images, Degradation())
    wanted = fill_stores(*arguments, tmp_path / "wanted", part_rows=3)
    fill_stores(*arguments, tmp_path / "cache", part_rows=3, rank=1, world_size=4)
    command = [sys.executable, "-m", "examples.ray_extract", image_folder, tmp_path / "cache"]
    command += ["--backbone", "timm/test_resnet", "--weights", weights, "--part-rows", "3"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    done = subprocess.run(
        [*map(str, command), "--actors", "2"], capture_output=True, text=True, cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"4 parts of each view are in {tmp_path / 'cache'}\n")
    for view, store in wanted.items():
        found = FeatureStore.open(tmp_path / "cache" / store.directory.name)
        assert found.missing_parts() == []
        assert found.read().ids == store.read().ids == images.ids
        torch.testing.assert_close(found.read().features, store.read().features), view
