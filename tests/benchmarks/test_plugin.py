from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner

from benchmarks.common import fit
from benchmarks.plugin import __main__ as plugin
from benchmarks.plugin.tables import summary
from benchmarks.voc2007.sample_devkit import render_sample

FOLDER = Path(plugin.__file__).parent
RESULTS = sorted(path.name for path in (FOLDER / "results").iterdir())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on a rendered devkit, with two sizes, and the same command again."""
    folder = tmp_path_factory.mktemp("plugin")
    torch.manual_seed(0)
    safetensors.torch.save_file(
        timm.create_model("test_resnet").state_dict(), folder / "w.safetensors"
    )
    devkit = render_sample(folder / "devkit", trainval=18, test=12)
    arguments = [
        *("--root", devkit, "--backbone", "timm/test_resnet"),
        *("--weights", folder / "w.safetensors", "--lr-size", 16, "--lr-size", 32),
        *(
            "--seeds",
            2,
            "--hidden",
            8,
            "--protocol",
            "plain",
            "--cache",
            folder / "cache",
            "--out",
            folder / "out",
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featxfer_integrations.fit.warn_if_useless", lambda *_: None)
        first = CliRunner().invoke(plugin.main, [str(part) for part in arguments])
        assert first.exit_code == 0, first.output
        patch.setattr(plugin, "train_svms", lambda *_, **__: pytest.fail("trained again"))
        patch.setattr(fit, "fit_transfer", lambda *_, **__: pytest.fail("fitted again"))
        second = CliRunner().invoke(plugin.main, [str(part) for part in arguments])
    assert second.output == first.output
    loaded: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    assert (folder / "out" / "summary.md").read_text() == summary(loaded)
    return loaded


def test_every_row_has_its_runs(results: dict[str, Any]) -> None:
    table = results["tables"]["16"]
    assert [len(figures["deploy"]["values"]) for figures in table.values()] == [1] * 4 + [2] * 5
    assert "retrain" not in table["HR through the head"]
    assert table["HR"]["classifier"]["mean"] == 100
    assert table["HR"]["deploy"]["mean"] != table["LR"]["deploy"]["mean"]


def test_the_attached_model_gives_what_the_stored_features_give(results: dict[str, Any]) -> None:
    assert results["end_to_end"] < 1e-4


def test_columns_and_gaps() -> None:
    figure = {"mean": 80.0, "low": None, "high": None}
    rows = {
        "HR": {"deploy": {**figure, "mean": 90.0}},
        "LR": {"deploy": {**figure, "mean": 70.0}},
        "x": {"deploy": {"mean": 75.0, "low": 74.0, "high": 76.0}},
    }
    text = summary({"tables": {"32": rows}})
    assert "| x | 75.0 ± 1.0 | 25.0 |" in text
    assert text.startswith("LR of 32 pixels:")


@pytest.mark.parametrize("folder", RESULTS)
def test_the_readmes_tables_are_those_of_the_committed_results(folder: str) -> None:
    path = FOLDER / "results" / folder
    text = (path / "summary.md").read_text()
    assert text == summary(json.loads((path / "results.json").read_text()))
    table = text.partition("\n\n")[2]
    assert table in (FOLDER / "README.md").read_text()
