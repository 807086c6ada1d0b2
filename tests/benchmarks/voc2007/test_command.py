"""The benchmark end to end on a rendered devkit of 30 images, from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner, Result

from benchmarks.gap.methods import METHODS
from benchmarks.voc2007 import command
from benchmarks.voc2007 import run as run_module
from benchmarks.voc2007.__main__ import main
from benchmarks.voc2007.sample_devkit import render_sample
from featxfer import Recipe

ROOT = Path(__file__).parents[3]
ROWS = [
    "baseline-hr",
    "baseline-lr",
    "nearest",
    "paired",
    "hidden",
    "random",
    "centroids",
    "ridge",
    "pca",
]
SMALL = [
    "--hr-size",
    "64",
    "--lr-size",
    "8",
    "--clusters",
    "5",
    "--hidden",
    "16",
    "--epochs",
    "2",
    "--seeds",
    "2",
    "--protocol",
    "plain",
    "--jobs",
    "1",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's weights, by seed, as a local file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_sample(tmp_path_factory.mktemp("devkit"), trainval=18, test=12)


@pytest.fixture
def arguments(weights: Path, devkit: Path, tmp_path: Path) -> list[str]:
    backbone = ["--backbone", "timm/test_resnet", "--weights", str(weights)]
    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    return ["--root", str(devkit), *backbone, *SMALL, *folders]


def invoke(arguments: list[str]) -> Result:
    return CliRunner().invoke(main, arguments)


def refuse(arguments: list[str], *more: str) -> str:
    result = invoke([*arguments, *more])
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    return result.output.replace("\n", " ")


def test_from_the_shell_on_the_rendered_sample(weights: Path, tmp_path: Path) -> None:
    """A process of its own, with the default data source, figures and the grid."""
    command = [sys.executable, "-m", "benchmarks.voc2007", "--sample", "18", "12"]
    command += ["--backbone", "timm/test_resnet", "--weights", str(weights), *SMALL]
    command += ["--grid", "--grid-clusters", "3,5", "--grid-hidden", "8,16"]
    out = tmp_path / "out"
    command += ["--out", str(out), "--cache", str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'integrations'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (out / "tables.txt").read_text()
    assert "Data: SYNTHETIC images rendered by this project; 18 trainval and 12 test" in done.stdout
    assert f"figures to {out}" in done.stderr
    assert "it/s" not in done.stderr, "no progress bars where stderr is no terminal"
    results = json.loads((out / "results.json").read_text())
    assert list(results["table1"]["plain"]) == ROWS
    assert [(c["clusters"], c["hidden"]) for c in results["table2"]["cells"]] == [
        (3, 8), (3, 16), (5, 8), (5, 16),
    ]  # fmt: skip
    for entry in results["table1"]["plain"].values():
        assert len(entry["ap"]) == 20
        assert all(0 <= ap <= 1 for ap in entry["ap"])
    seeds = {name: len(e["map"]["values"]) for name, e in results["table1"]["plain"].items()}
    assert seeds == {
        name: 1 if name in ("baseline-hr", "baseline-lr", "ridge", "pca") else 2 for name in ROWS
    }
    widths = {name: e["runs"][0]["width"] for name, e in results["table1"]["plain"].items()}
    assert widths["nearest"] == widths["paired"] == widths["centroids"] == widths["pca"] == 5
    assert widths["hidden"] == widths["random"] == 16
    assert results["versions"]["torch"] == torch.__version__
    report = (out / "report.html").read_text()
    assert "These images are synthetic" in report
    assert report.count("data:image/png;base64,") == 3
    assert 'src="http' not in report
    assert sorted(p.name for p in (out / "figures").iterdir()) == [
        "ap_plain.png",
        "pairs.png",
        "tsne.png",
    ]


def test_every_method_on_the_same_views(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Recipe(epochs=1, batch_size=16, learning_rate=1e-3, optimizer="adamw")
    for module, name in (("heads", "FEATURES_RECIPE"), ("maps", "BLOCK_RECIPE")):
        monkeypatch.setattr(f"featxfer_integrations.stages.{module}.{name}", short)
    monkeypatch.setattr("featxfer_integrations.fit.warn_if_useless", lambda *_: None)
    monkeypatch.setattr(
        command, "METHODS", {name: METHODS[name] for name in ("plain", "prototypes", "deep")}
    )
    given = ["--methods", "all", "--ap", "area", "--kernel", "bilinear", "--seeds", "1"]
    done = invoke([*arguments, *given])
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    mine, papers = results["gap"]["table"], results["table1"]["plain"]
    assert {"head: prototypes (default)", "deep: blocks and head"} <= set(mine)
    for one, other in (("HR", "baseline-hr"), ("LR", "baseline-lr")):
        assert mine[one]["retrain"]["mean"] == pytest.approx(100 * papers[other]["map"]["mean"])
    assert "deep: blocks and head" in done.stdout
    assert "deep: blocks and head" in (tmp_path / "out" / "report.html").read_text()
    message = refuse(arguments, "--methods", "all", "--on-error", "skip")
    assert "on_error: got 'skip' with methods 'all', wanted 'raise'" in message


def test_the_gap_is_of_the_printed_maps(arguments: list[str], tmp_path: Path) -> None:
    assert invoke([*arguments, "--no-figures"]).exit_code == 0
    table = json.loads((tmp_path / "out" / "results.json").read_text())["table1"]["plain"]
    lr, hr = (table[name]["map"]["mean"] for name in ("baseline-lr", "baseline-hr"))
    for entry in table.values():
        if entry["gap_recovered"] is not None:
            wanted = (entry["map"]["mean"] - lr) / (hr - lr)
            assert entry["gap_recovered"]["mean"] == pytest.approx(wanted)
        assert entry["map"]["mean"] == pytest.approx(sum(entry["ap"]) / 20)


def test_fast_svms_find_what_the_reference_finds(arguments: list[str]) -> None:
    found = {}
    for svm in ("reference", "fast"):
        done = invoke([*arguments, "--no-figures", "--json", "--svm", svm])
        assert done.exit_code == 0, done.output
        found[svm] = json.loads(done.stdout)
        assert found[svm]["config"]["svm"] == svm
    rows = {svm: results["table1"]["plain"] for svm, results in found.items()}
    for label in ROWS:
        maps = [rows[svm][label]["map"]["mean"] for svm in rows]
        assert maps[0] == pytest.approx(maps[1], abs=2e-4), label
    kept = [run["fits"] for entry in rows["fast"].values() for run in entry["runs"]]
    assert all(fits > 0 for fits in kept)


def test_precision_and_compile_reach_the_features(arguments: list[str]) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        done = invoke([*arguments, "--no-figures", "--json", "--precision", precision])
        assert done.exit_code == 0, done.output
        found[precision] = json.loads(done.stdout)
        assert found[precision]["config"]["precision"] == precision
    keys = [results["data"]["feature_keys"]["test"]["hr"] for results in found.values()]
    assert keys[0] != keys[1]
    refused = refuse(arguments, "--precision", "fp16")
    assert "precision: got 'fp16', wanted" in refused
    assert "compile: got 'maybe', wanted" in refuse(arguments, "--compile", "maybe")


def test_heads_trained_at_once_are_those_trained_one_by_one(
    arguments: list[str], tmp_path: Path
) -> None:
    tables = []
    for jobs in ("1", "2"):
        folders = ["--cache", str(tmp_path / jobs), "--jobs", jobs]
        done = invoke([*arguments, "--no-figures", "--json", *folders])
        assert done.exit_code == 0, done.output
        heads = json.loads(done.stdout)["heads"]
        tables.append([run["loss"] for runs in heads.values() for run in runs])
    assert len(tables[0]) == 4
    assert tables[0] == pytest.approx(tables[1], rel=1e-4)


def test_a_second_run_computes_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = invoke([*arguments, "--no-figures", "--json"])
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    monkeypatch.setattr(run_module, "train_svms", None)
    monkeypatch.setattr("featxfer.training.trainer.PseudoLabelTrainer.fit_rows", None)
    again = invoke([*arguments, "--no-figures", "--json"])
    assert again.exit_code == 0, again.output
    one, two = (json.loads(result.stdout) for result in (first, again))
    assert one == two
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize("stage", ["features", "heads", "svms"])
def test_interrupted_and_resumed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Ctrl-C in each stage, then the same command: the figures of a run that nothing disturbed."""
    whole = json.loads(invoke([*arguments, "--no-figures", "--json"]).stdout)
    target = {
        "features": "featxfer.features.forward.Forward.__call__",
        "heads": "featxfer.training.trainer.PseudoLabelTrainer._epoch",
        "svms": "benchmarks.voc2007.run.average_precisions",
    }[stage]
    calls: list[int] = []
    with monkeypatch.context() as patch:
        real = _resolve(target)

        def third_time_interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        patch.setattr(target, third_time_interrupted)
        other = [*arguments, "--cache", str(tmp_path / "fresh"), "--no-figures", "--json"]
        result = invoke(other)
    assert result.exit_code == 130
    assert "Interrupted. What is finished is kept: the same command goes on." in result.output
    resumed = json.loads(invoke(other).stdout)
    for name in ROWS:
        one, two = (r["table1"]["plain"][name]["ap"] for r in (whole, resumed))
        assert one == two, name


def _resolve(dotted: str) -> Callable[..., Any]:
    import pkgutil

    found: Callable[..., Any] = pkgutil.resolve_name(dotted)
    return found


def test_no_such_root(arguments: list[str]) -> None:
    assert "Error: root: /nowhere is not a folder" in refuse(arguments, "--root", "/nowhere")


def test_no_image_sets(arguments: list[str], tmp_path: Path) -> None:
    message = refuse(arguments, "--root", str(tmp_path))
    assert "has no ImageSets/Main and JPEGImages, wanted a VOC devkit" in message


def test_a_truncated_image_is_named_or_skipped(
    arguments: list[str], devkit: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(devkit, copy)
    path = copy / "JPEGImages" / "000020.jpg"
    path.write_bytes(path.read_bytes()[:500])
    message = refuse(arguments, "--root", str(copy))
    assert "000020.jpg cannot be read" in message
    skipping = ["--root", str(copy), "--on-error", "skip", "--no-figures", "--json"]
    result = invoke([*arguments, *skipping])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)["data"]
    assert data["images"] == {"trainval": 18, "test": 11}
    assert list(data["skipped"]["test"]) == ["000020"]


def test_a_missing_image_is_named(arguments: list[str], devkit: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(devkit, tmp_path / "copy")
    (tmp_path / "copy" / "JPEGImages" / "000003.jpg").unlink()
    message = refuse(arguments, "--root", str(tmp_path / "copy"))
    assert "000003.jpg is not a file" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--clusters", "19"], "clusters: got 19 for 18 trainval images, wanted at most 18"),
        (["--clusters", "0"], "clusters: got 0, wanted an int >= 1"),
        (["--grid", "--grid-clusters", "5,100"], "clusters: got 100 for 18 trainval images"),
        (["--grid", "--grid-clusters", "5,x"], "got '5,x', wanted integers such as 20,100"),
        (["--lr-size", "65"], "lr_size: got 65, wanted at most hr_size=64"),
        (["--labels", "soft"], "labels: got 'soft', wanted one of 'nearest', 'paired'"),
        (["--protocol", "libsvm"], "protocol: got 'libsvm', wanted one of 'vissl'"),
        (["--ap", "mean"], "ap: got 'mean', wanted one of '11point', 'area', 'step'"),
        (["--on-error", "ignore"], "on_error: got 'ignore'"),
        (
            ["--backbone", "resnet1010"],
            "'resnet1010', which is no model of torchvision or timm; nearest:",
        ),
        (["--backbone", "resnet18"], "weights: they do not fit the backbone"),
        (["--weights", "/none.pth"], "weights: /none.pth is not a file"),
        (["--backbone", "timm/vit_tiny_patch16_224", "--weights", "random"], "wants 224"),
        (["--protocol", "virtex"], "rows, protocol 'virtex' wants at least 3"),
        (["--download"], "--root, --download: got both, wanted one source of images"),
        (["--epochs", "0"], "epochs: got 0"),
        (["--seeds", "0"], "seeds: got 0"),
        (
            ["--learning-rate", "1e30"],
            "loss or weights are not finite at epoch",
        ),
        (["--scaling", "max"], "scaling: got 'max', wanted one of 'none', 'l2'"),
        (["--svm", "slow"], "svm: got 'slow', wanted one of 'reference', 'fast'"),
    ],
)
def test_bad_input_gets_one_clear_error(
    arguments: list[str], more: list[str], message: str
) -> None:
    assert message in refuse([*arguments, "--no-figures"], *more)


def test_figures_without_matplotlib_are_refused_at_once(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'featxfer[plots]', or pass --no-figures" in refuse(arguments)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_told_and_the_rerun_succeeds(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("featxfer.files.os.fsync", full)
        message = refuse([*arguments, "--no-figures"])
    assert "No space left on device" in message
    assert "bytes needed" in message
    assert invoke([*arguments, "--no-figures"]).exit_code == 0
