from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner

from benchmarks.speed import attached, job, memory, stages
from benchmarks.speed.__main__ import main
from benchmarks.speed.pairs import Way, time_pairs
from benchmarks.voc2007.sample_devkit import render_sample
from featxfer import Backbone, Degradation, VOCDevkit, extract_features

FOLDER = Path(attached.__file__).parent


def test_pairs_take_turns_and_preparing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def step(name: str, seconds: float) -> None:
        clock[0] += seconds
        order.append(name)

    monkeypatch.setattr("benchmarks.speed.pairs.time.perf_counter", lambda: clock[0])
    ways = [
        Way(lambda: step("prepare", 100.0), lambda n=n, s=s: step(n, s))  # type: ignore[misc]
        for n, s in (("a", 2.0), ("b", 3.0))
    ]
    result = time_pairs("test", ways[0], ways[1], 3)
    assert [name for name in order if name != "prepare"] == list("ababbaab")
    assert result == {
        "first_ms": 2000.0,
        "second_ms": 3000.0,
        "ratio": 1.5,
        "ratio_quartiles": [1.5, 1.5],
        "pairs": 3,
    }


def test_attached_is_measured_and_the_model_left_plain(tmp_path: Path) -> None:
    arguments = ["attached", "--model", "test_resnet", "--batch", "1", "--seconds", "0.01"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["hidden"], row["dtype"]) for row in rows] == [
        (hidden, str(dtype).removeprefix("torch.")) for hidden, dtype in attached.HEADS
    ]
    assert all(row["pairs"] >= 7 and row["ratio"] > 0 for row in rows)
    assert (tmp_path / "summary.md").read_text() == attached.summary(rows)


def test_blocks_are_measured_against_the_plain_model(tmp_path: Path) -> None:
    arguments = ["attached", "--blocks", "--model", "test_resnet", "--batch", "1"]
    result = CliRunner().invoke(main, [*arguments, "--seconds", "0.01", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["after"] == ["layer3", "layer4"]
    assert 0 < row["macs"] <= 0.1 * row["model_macs"]
    assert row["ratio"] > 0
    assert (tmp_path / "summary.md").read_text() == attached.blocks_table([row])


def test_the_readmes_table_of_blocks_is_that_of_the_committed_results() -> None:
    rows = json.loads((FOLDER / "results" / "blocks" / "results.json").read_text())["rows"]
    assert attached.blocks_table(rows) in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("folder", ["attached-1", "attached-32"])
def test_the_readmes_tables_are_those_of_the_committed_results(folder: str) -> None:
    rows = json.loads((FOLDER / "results" / folder / "results.json").read_text())["rows"]
    assert attached.summary(rows) in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    ("folder", "table"),
    [
        ("extraction", lambda found: stages.summary(found["rows"])),
        ("extraction", lambda found: stages.map_table(found["map"])),
        ("svms", lambda found: stages.summary(found["rows"])),
        ("small", lambda found: stages.summary(found["rows"])),
        ("job", job.summary),
        ("memory", lambda found: memory.summary(found["rows"])),
        ("samples", lambda found: stages.samples_table(found["rows"])),
    ],
)
def test_the_readmes_other_tables_are_too(
    folder: str, table: Callable[[dict[str, Any]], str]
) -> None:
    results = FOLDER / "results" / folder
    text = table(json.loads((results / "results.json").read_text()))
    assert text in (results / "summary.md").read_text() + "\n"
    assert text in (FOLDER / "README.md").read_text()


def test_what_is_said_of_samples_at_scale_is_what_was_found() -> None:
    found = json.loads((FOLDER / "results" / "samples" / "results.json").read_text())
    scale = FOLDER.parents[1] / "docs" / "scale.md"
    assert stages.samples_table(found["rows"]) in scale.read_text()


def test_stages_are_measured_against_what_most_people_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "ARITHMETICS", (("fp32", "off"), ("bf16", "off")))
    devkit = render_sample(tmp_path / "kit", trainval=60, test=20)
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), weights)
    arguments = ["stages", "--root", devkit, "--backbone", "timm/test_resnet", "--weights", weights]
    arguments += [
        "--images",
        9,
        "--workers",
        0,
        "--rows",
        120,
        "--width",
        12,
        "--pairs",
        1,
        "--svm-pairs",
        1,
    ]
    result = CliRunner().invoke(main, [*map(str, arguments), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["what"].split(",")[0] for row in results["rows"]] == [
        "extraction", "extraction", "680 SVMs on 120 x 12", "k-means of 120 x 12",
        "a head of 4", "a head of 4",
    ]  # fmt: skip
    svms = results["rows"][2]
    assert abs(svms["mAP apart"]) < 2
    assert [row["what"] for row in results["map"]] == ["fp32", "bf16"]
    assert results["map"][0]["hr apart"] == 0
    refused = CliRunner().invoke(main, ["stages", "--out", str(tmp_path)])
    assert "root: got none, wanted a devkit for extraction" in refused.output


def test_the_job_is_timed_cold_and_warm_and_by_stage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), weights)
    arguments = ["--sample", "40", "20", "--backbone", "timm/test_resnet", "--weights", weights]
    arguments += ["--hr-size", 64, "--lr-size", 8, "--clusters", 5, "--hidden", 16, "--epochs", 2]
    arguments += ["--seeds", 1, "--protocol", "plain"]
    measured = job.measure_job([str(part) for part in arguments], tmp_path)
    assert measured["warm"] < measured["cold"]
    for name, stage in list(measured["stages"].items())[:-1]:
        assert 0 < stage["floor"] <= stage["seconds"] < measured["profiled"], name


def test_a_sample_clusters_nearly_as_well_as_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["samples", "--rows", "7000", "--width", "8", "--out", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["rows"] for row in rows] == [7000, 6400]
    assert rows[0]["inertia"] == 1
    assert 0.9 < rows[-1]["inertia"] < 1.1


def test_memory_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    arguments = ["memory", "--images", "5", "--images", "120", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["images"] for row in rows] == [5, 120]
    assert 0 < rows[0]["extraction_mib"] < rows[1]["extraction_mib"]


def test_the_plain_loop_gives_nearly_the_same_features(tmp_path: Path) -> None:
    devkit = VOCDevkit(render_sample(tmp_path / "kit", trainval=6, test=2))
    torch.manual_seed(0)
    backbone = Backbone(timm.create_model("test_resnet", num_classes=0).eval())
    paths = [devkit.root / "JPEGImages" / f"{name}.jpg" for name in devkit.ids("trainval")]
    plain = stages.plain_loop(backbone, paths, Degradation(), 0)
    ours = extract_features(backbone, devkit.images("trainval"), Degradation(), tmp_path / "cache")
    for view in ("hr", "lr"):
        alike = torch.cosine_similarity(plain[view], getattr(ours, view))
        assert float(alike.min()) > 0.99
