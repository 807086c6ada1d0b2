from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner

from benchmarks.common import fit
from benchmarks.common.study import Study, small, subset
from benchmarks.common.table import with_gaps
from benchmarks.gap import __main__ as gap
from benchmarks.gap import features, methods, run, tune, views
from benchmarks.gap.tables import all_rows, few_labels, summary
from benchmarks.voc2007.sample_devkit import render_sample
from featxfer import PROTOCOLS, Degradation, Recipe, VOCDevkit

FOLDER = Path(gap.__file__).parent


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A small model with random weights on a rendered devkit."""
    folder = tmp_path_factory.mktemp("gap")
    torch.manual_seed(0)
    weights = folder / "w.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), weights)
    devkit = render_sample(folder / "devkit", trainval=30, test=16)
    return Study(
        "timm/test_resnet",
        str(weights),
        VOCDevkit(devkit),
        folder / "cache",
        Degradation(hr_size=64),
        PROTOCOLS["plain"],
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short recipes, and no warning that a head for random features does not help."""
    short = Recipe(epochs=2, batch_size=16, learning_rate=1e-3, optimizer="adamw")
    for module, name in (("heads", "FEATURES_RECIPE"), ("maps", "BLOCK_RECIPE")):
        monkeypatch.setattr(f"featxfer_integrations.stages.{module}.{name}", short)
    monkeypatch.setattr("featxfer_integrations.fit.warn_if_useless", lambda *_: None)


def arguments(study: Study, out: Path, *more: object) -> list[str]:
    given = [
        *("--root", study.devkit.root, "--backbone", study.name, "--weights", study.weights),
        *("--hr-size", 64, "--cache", study.cache, "--out", out, *more),
    ]
    return [str(part) for part in given]


def test_all_methods_give_their_rows_and_are_kept(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(study, tmp_path, "--lr-size", 16, "--seeds", 1, "--protocol", "plain")
    first = CliRunner().invoke(gap.main, given)
    assert first.exit_code == 0, first.output
    for module, name in ((fit, "fit_transfer"), (methods, "ridge"), (methods, "through_blocks")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("computed again"))
    second = CliRunner().invoke(gap.main, given)
    assert second.stdout == first.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    table = results["table"]
    assert list(table) == [label for m in methods.METHODS.values() for label in m.labels]
    assert table["LR"]["hr loss"]["mean"] == 0
    for label in ("deep: blocks", "deep: blocks and head"):
        assert table[label]["parameters"]["mean"] > 0
        assert {"deploy", "accuracy", "retrain", "hr", "few-1", "few-10"} <= set(table[label])
    assert table["deep: blocks"]["block_macs"]["mean"] > 0
    paper = table["the paper's head (nearest labels)"]
    assert "deploy" not in paper
    assert paper["retrain"]["mean"] > 0
    assert results["self_check"]["runs"] >= 5
    assert (tmp_path / "summary.md").read_text() == summary(results)


def test_unknown_methods_are_told(study: Study, tmp_path: Path) -> None:
    told = CliRunner().invoke(gap.main, arguments(study, tmp_path, "--methods", "magic"))
    assert told.exit_code == 2
    assert "got magic, wanted some of plain, ridge" in told.output


@pytest.mark.parametrize("kind", ["sizes", "corruptions"])
def test_views(study: Study, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "SIZES", (16, 32))
    monkeypatch.setattr(views, "SMALL", 24)
    monkeypatch.setattr(views, "BLOCK_RECIPE", Recipe(2, 16, 1e-3, optimizer="adamw"))
    given = arguments(study, tmp_path, "--views", kind, "--seeds", 2, "--deep")
    told = CliRunner().invoke(views.main, given)
    assert told.exit_code == 0, told.output
    results = json.loads((tmp_path / "results.json").read_text())
    names = list(views.named_views(kind, 64))
    assert list(results["tables"]) == names
    for table in results["tables"].values():
        heads = [f"head of {name}" for name in names]
        blocks = f"blocks of {', '.join(names[::2])}"
        assert list(table) == ["HR", "LR", "ridge regression", *heads, "one head for all", blocks]
        assert "hr loss" in table[blocks]
        assert len(table["one head for all"]["deploy"]["values"]) == 2
    assert views.summary(results) in told.output
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_gaps_are_between_lr_and_hr() -> None:
    rows = {
        "HR": [{"deploy": 90.0, "hr": 90.0}],
        "LR": [{"deploy": 70.0, "hr": 90.0}],
        "x": [{"deploy": 75.0, "hr": 89.0}, {"deploy": 85.0, "hr": 89.0}],
    }
    table = with_gaps(rows)
    assert table["x"]["deploy gap"]["values"] == [25.0, 75.0]
    assert table["x"]["hr loss"]["mean"] == 1.0
    assert "| x | 80.0 ±" in all_rows(table)
    same = with_gaps({"HR": [{"deploy": 1.0}], "LR": [{"deploy": 1.0}]})
    assert "deploy gap" not in same["LR"]


def test_halves_and_small_photographs(study: Study) -> None:
    images = study.images("train")
    part = subset(images, [4, 2])
    assert part.ids == (images.ids[4], images.ids[2])
    assert torch.equal(part.read(1), images.read(2))
    tiny = small(part, 16)
    assert tiny.read(0).shape == (3, 16, 16)
    assert len({images.fingerprint, part.fingerprint, tiny.fingerprint}) == 3
    view = study.view(16)
    assert torch.equal(view.hr(tiny.read(0)), view.lr(images.read(4)))


def test_the_self_check_ranks_heads_by_what_they_gain() -> None:
    def figures(cosine: float, deploy: float) -> dict[str, Any]:
        check = dict.fromkeys(run.SELF_CHECKS, 0.5)
        return {"deploy": deploy, "self_check": [{**check, "cosine_gap": cosine}]}

    several = [figures(0.1, 70.0), figures(0.2, 72.0)]
    rows = {"a": several, "b": [figures(0.4, 80.0)], "LR": [{"deploy": 60.0}]}
    assert run.self_check(rows) == {"runs": 3, "cosine_gap": 1.0}
    assert run.self_check({}) == {}


@pytest.mark.parametrize("part", ["head", "blocks"])
def test_tuning_sees_no_test_image(
    study: Study, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = Study.labels
    monkeypatch.setattr(tune, "RECIPES", (("epochs", 3),))
    monkeypatch.setattr(tune, "CLUSTERS", (2,))
    monkeypatch.setattr(tune, "HIDDEN", (8,))
    shape = {"units": 1, "kernel_size": 3, "hidden_channels": 8}
    monkeypatch.setattr(tune, "SHAPES", {"one": (("layer2",), shape)})

    def train_alone(self: Study, part: str) -> Any:
        assert part == "train"
        return labels(self, part)

    given = arguments(study, tmp_path, "--part", part, "--lr-size", 16, "--seconds", 0.01)
    given += ["--protocol", "plain"]
    with monkeypatch.context() as patch:
        patch.setattr(Study, "identity", {"part": "train"})
        patch.setattr(Study, "labels", train_alone)
        told = CliRunner().invoke(tune.main, given)
    assert told.exit_code == 0, told.output
    table = json.loads((tmp_path / "results.json").read_text())["table"]
    heads = ["default", "epochs 3", "2 clusters", "8 hidden"]
    assert list(table) == (heads if part == "head" else ["one"])
    for figures in table.values():
        assert 0 <= figures["deploy"]["mean"] <= 100
        assert "held-out cosine_gap" in figures
    assert tune.summary({"table": table}) in told.output


RESULTS = sorted((FOLDER / "results").iterdir())


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_the_readme_shows_what_the_results_hold(folder: Path) -> None:
    results, readme = json.loads((folder / "results.json").read_text()), FOLDER / "README.md"
    text = readme.read_text()
    if "part" in results["config"]:
        assert tune.summary(results) in text
    elif "table" in results:
        assert all_rows(results["table"]) in text
        assert few_labels(results["table"]) in text
    else:
        assert views.summary(results) in text


def test_moved_images_keep_their_size_and_repeat_their_edges(study: Study) -> None:
    image = study.images("train").read(0)
    view = study.view(16)
    plain, moved = view.lr(image), partial(features.MovedDegradation, 64, 16)
    wanted = torch.cat([plain[..., :1].expand(-1, -1, 8), plain[..., :-8]], dim=-1)
    assert torch.equal(moved(right=8).lr(image), wanted)
    up = torch.cat([plain[..., 8:, :], plain[..., -1:, :].expand(-1, 8, -1)], dim=-2)
    assert torch.equal(moved(down=-8).lr(image), up)
    assert torch.equal(moved(right=8).hr(image), view.hr(image))


def test_shifts_are_kept_apart_from_what_is_not_moved(study: Study) -> None:
    through = features.through_blocks(study, study.model, "test", study.view(16), shifts=True)
    rows = [through.lr, *through.lr_shifted]
    assert len(rows) == 5
    for i, first in enumerate(rows):
        for second in rows[:i]:
            assert not torch.allclose(first, second)
