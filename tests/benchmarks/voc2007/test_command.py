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

from benchmarks.common import fit, study
from benchmarks.voc2007.__main__ import main
from benchmarks.voc2007.sample_devkit import render_sample
from featxfer import Recipe

ROOT = Path(__file__).parents[3]
PAPER = [
    "Baseline-HR",
    "Baseline-LR",
    "the paper's head (nearest labels)",
    "head on paired labels",
    "its 16 hidden activations",
    "untrained random layer of 16",
    "5 closed-form centroid scores",
    "PCA whitening to 5",
]
PLUGIN = ["ridge regression", "head: prototypes (default)", "blocks (default)"]
CHEAP = ["--methods", "nearest,paired,hidden,random,centroids,pca,ridge", "--no-figures", "--json"]
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


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short recipes, and no warning that blocks for random features do not help."""
    short = Recipe(epochs=1, batch_size=16, learning_rate=1e-3, optimizer="adamw")
    for module, name in (("heads", "FEATURES_RECIPE"), ("maps", "BLOCK_RECIPE")):
        monkeypatch.setattr(f"featxfer_integrations.stages.{module}.{name}", short)
    monkeypatch.setattr("featxfer_integrations.fit.warn_if_useless", lambda *_: None)


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
    """A process of its own, with the default data source and rows, figures, grid and curve."""
    command = [sys.executable, "-m", "benchmarks.voc2007", "--sample", "18", "12"]
    command += ["--backbone", "timm/test_resnet", "--weights", str(weights), *SMALL]
    command += ["--grid", "--grid-clusters", "3,5", "--grid-hidden", "8,16", "--curve"]
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
    rows = results["tables"]["plain"]
    assert list(rows) == [*PAPER, *PLUGIN]
    assert [(c["clusters"], c["hidden"]) for c in results["grid"]] == [
        (3, 8), (3, 16), (5, 8), (5, 16),
    ]  # fmt: skip
    for row in rows.values():
        assert len(row["classes"]["11point"]) == 20
        assert all(0 <= ap <= 100 for ap in row["classes"]["11point"])
    seeds = {label: len(row["retrain"]["values"]) for label, row in rows.items()}
    closed = {*PAPER[:2], PAPER[-1], PLUGIN[0]}
    assert seeds == {label: 1 if label in closed else 2 for label in rows}
    widths = [row["svms"][0]["width"] for row in rows.values()]
    assert widths == [96, 96, 5, 5, 16, 16, 5, 5, 96, 96, 96]
    assert {label for label in rows if "deploy" in rows[label]} == {*PAPER[:2], *PLUGIN}
    assert {label for label in rows if "hr loss" in rows[label]} == {*PAPER[:2], *PLUGIN}
    assert results["versions"]["torch"] == torch.__version__
    report = (out / "report.html").read_text()
    assert "These images are synthetic" in report
    assert report.count("data:image/png;base64,") == 4
    assert "<svg" in report
    assert 'src="http' not in report
    assert sorted(p.name for p in (out / "figures").iterdir()) == [
        "ap_plain.png",
        "curve.png",
        "pairs.png",
        "tsne.png",
    ]
    for panel in results["curve"].values():
        assert list(panel) == [PAPER[0], PAPER[1], PAPER[2], PAPER[6], PAPER[7]]
        costs = [point["cost"] for point in panel["Baseline-HR"]]
        at_one = panel["Baseline-HR"][costs.index(1.0)]["map"]["mean"]
        assert at_one > 0
    as_they_come = results["curve"]["rows as they come"]["Baseline-HR"][costs.index(1.0)]
    assert as_they_come["map"]["mean"] == pytest.approx(rows["Baseline-HR"]["retrain"]["mean"])


def test_train_and_val_of_a_devkit_without_a_test_split(
    arguments: list[str], devkit: Path, tmp_path: Path
) -> None:
    """VOC2007's official train and val may be judged where its test photographs cannot be had."""
    import shutil

    shutil.copytree(devkit, tmp_path / "copy")
    sets = tmp_path / "copy" / "ImageSets" / "Main"
    for path in list(sets.iterdir()):
        path.rename(path.with_name(path.name.replace("trainval", "train").replace("test", "val")))
    given = [*arguments, "--root", str(tmp_path / "copy"), *CHEAP]
    message = refuse(given)
    assert "split: no" in message
    assert "trainval.txt; there is train, val" in message
    splits = ["--train-split", "train", "--test-split", "val"]
    done = invoke([*given, *splits])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results["data"]["images"] == {"train": 18, "val": 12}
    tables = (tmp_path / "out" / "tables.txt").read_text()
    assert "trained on 'train', judged on 'val', which is not the test set" in tables
    shared = (sets / "train.txt").read_text().split()[0]
    (sets / "val.txt").write_text((sets / "val.txt").read_text() + f"{shared}\n")
    for path in sets.glob("*_val.txt"):
        path.write_text(f"{path.read_text()}{shared} 1\n")
    message = refuse([*given, *splits])
    assert f"1 images of 'val' are in 'train' too, {shared} for one; wanted none" in message


def test_the_gap_is_of_the_printed_maps(arguments: list[str], tmp_path: Path) -> None:
    assert invoke([*arguments, *CHEAP]).exit_code == 0
    table = json.loads((tmp_path / "out" / "results.json").read_text())["tables"]["plain"]
    hr, lr = (table[label]["retrain"]["mean"] for label in PAPER[:2])
    for row in table.values():
        mean = row["retrain"]["mean"]
        if hr > lr:
            wanted = 100 * (mean - lr) / (hr - lr)
            assert row["retrain gap"]["mean"] == pytest.approx(wanted)
        assert mean == pytest.approx(sum(row["classes"]["11point"]) / 20)


def test_batched_svms_find_what_the_reference_finds(arguments: list[str]) -> None:
    found = {}
    for svm in ("reference", "batched"):
        done = invoke([*arguments, *CHEAP, "--svm", svm])
        assert done.exit_code == 0, done.output
        found[svm] = json.loads(done.stdout)
        assert found[svm]["config"]["svm"] == svm
    rows = {svm: results["tables"]["plain"] for svm, results in found.items()}
    for label in [*PAPER, PLUGIN[0]]:
        maps = [rows[svm][label]["retrain"]["mean"] for svm in rows]
        assert maps[0] == pytest.approx(maps[1], abs=2e-2), label
    kept = [run["fits"] for row in rows["batched"].values() for run in row["svms"]]
    assert all(fits > 0 for fits in kept)


def test_heads_trained_at_once_are_those_trained_one_by_one(
    arguments: list[str], tmp_path: Path
) -> None:
    tables = []
    for jobs in ("1", "2"):
        folders = ["--cache", str(tmp_path / jobs), "--jobs", jobs]
        done = invoke([*arguments, *CHEAP, *folders])
        assert done.exit_code == 0, done.output
        heads = json.loads(done.stdout)["heads"]
        tables.append([run["loss"] for runs in heads.values() for run in runs])
    assert len(tables[0]) == 4
    assert tables[0] == pytest.approx(tables[1], rel=1e-4)


def test_a_second_run_computes_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*arguments, "--no-figures", "--json"]
    first = invoke(given)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    for module, name in ((study, "train_svms"), (fit, "fit_transfer")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr("featxfer.training.trainer.PseudoLabelTrainer.fit_rows", None)
    again = invoke(given)
    assert again.exit_code == 0, again.output
    one, two = (json.loads(result.stdout) for result in (first, again))
    assert one == two
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.parametrize("stage", ["features", "heads", "svms"])
def test_interrupted_and_resumed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Ctrl-C in each stage, then the same command: the figures of a run that nothing disturbed."""
    given = [*arguments, "--methods", "nearest,head", "--no-figures", "--json"]
    whole = json.loads(invoke(given).stdout)
    target = {
        "features": "featxfer.features.forward.Forward.__call__",
        "heads": "featxfer.training.trainer.PseudoLabelTrainer._epoch",
        "svms": "benchmarks.common.study.average_precisions",
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
        other = [*given, "--cache", str(tmp_path / "fresh")]
        result = invoke(other)
    assert result.exit_code == 130
    assert "Interrupted. What is finished is kept: the same command goes on." in result.output
    resumed = json.loads(invoke(other).stdout)
    one, two = (r["tables"]["plain"] for r in (whole, resumed))
    assert list(one) == [*PAPER[:3], PLUGIN[1]]
    for label in one:
        assert one[label]["classes"] == two[label]["classes"], label


def _resolve(dotted: str) -> Callable[..., Any]:
    import pkgutil

    found: Callable[..., Any] = pkgutil.resolve_name(dotted)
    return found


def test_no_such_root(arguments: list[str]) -> None:
    assert "Error: root: /nowhere is not a folder" in refuse(arguments, "--root", "/nowhere")


def test_no_image_sets(arguments: list[str], tmp_path: Path) -> None:
    message = refuse(arguments, "--root", str(tmp_path))
    assert "has no ImageSets/Main and JPEGImages, wanted a VOC devkit" in message


def test_a_truncated_image_is_named(arguments: list[str], devkit: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(devkit, copy)
    path = copy / "JPEGImages" / "000020.jpg"
    path.write_bytes(path.read_bytes()[:500])
    assert "000020.jpg cannot be read" in refuse(arguments, "--root", str(copy))


def test_a_devkit_of_boxes_without_lists_is_told(arguments: list[str], tmp_path: Path) -> None:
    for name in ("Annotations", "JPEGImages"):
        (tmp_path / "boxes" / name).mkdir(parents=True)
    message = refuse(arguments, "--root", str(tmp_path / "boxes"))
    assert "has no ImageSets/Main" in message
    assert "wanted a VOC devkit" in message


def test_a_split_without_a_positive_of_a_class_is_told(
    arguments: list[str], devkit: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(devkit, tmp_path / "copy")
    (path,) = (tmp_path / "copy").rglob("dotted_star_test.txt")
    path.write_text(path.read_text().replace("  1\n", " -1\n"))
    message = refuse(arguments, "--root", str(tmp_path / "copy"))
    assert "class 'dotted_star' has no positive image in 'test'" in message


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
        (["--methods", "nearest,magic"], "got magic, wanted some of nearest, paired"),
        (["--train-split", "none"], "none.txt; there is test, trainval"),
        (["--test-split", "trainval"], "18 images of 'trainval' are in 'trainval' too"),
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
        (["--svm", "slow"], "svm: got 'slow', wanted one of 'batched', 'reference'"),
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
