from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.torture.__main__ import PARTS, main, summary
from benchmarks.torture.artefacts import run_artefacts
from benchmarks.torture.crash import run_flipped, run_killed, run_refused, run_together
from benchmarks.torture.hostile import run_archives
from benchmarks.torture.numbers import run_numbers
from benchmarks.torture.outcome import Outcome
from benchmarks.torture.repeats import LAYOUTS, run_repeats
from benchmarks.torture.silent import run_edited, run_folders, run_ranks, run_threads
from featxfer.features.store import FeatureStore

FOLDER = Path(__file__).parents[2] / "benchmarks" / "torture"


def test_killed_extractions_go_on_to_the_same_store(tmp_path: Path) -> None:
    outcome = run_killed(tmp_path, 3, seed=1, parts=2)
    assert outcome.faults == []
    assert outcome.cases == 3 + outcome.figures["calls"]
    assert outcome.figures["calls"] == 2 * (1 + 2) * 4, "manifests and parts: 4 calls each"


@pytest.mark.parametrize(
    ("run", "cases"),
    [
        (lambda folder: run_refused(folder), 2 * 2 * (1 + 3) * 4),
        (lambda folder: run_together(folder, 2), 10),
        (lambda folder: run_archives(folder), 12),
        (lambda _: run_numbers(200, seed=5), 200),
        (lambda folder: run_repeats(folder, 2, layouts=LAYOUTS[:1]), 3),
        (lambda folder: run_threads(folder, 24, (1, 4)), 4),
        (lambda folder: run_edited(folder), 7),
        (lambda folder: run_ranks(folder, (1, 2)), 3),
        (lambda folder: run_folders(folder, 30, seed=3), 30),
    ],
    ids=[
        *("refused", "together", "archives", "numbers", "repeats"),
        *("threads", "edited", "ranks", "folders"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_short_version_of_each(
    tmp_path: Path, run: Callable[[Path], Outcome], cases: int
) -> None:
    outcome = run(tmp_path / "folder")
    assert outcome.faults == []
    assert outcome.cases == cases


def test_malformed_heads(tmp_path: Path) -> None:
    outcome = run_artefacts(tmp_path / "folder", seed=1, flips=20, every=17)
    assert outcome.faults == []
    assert outcome.cases > 500
    assert outcome.figures["refused"] > 0.9 * outcome.cases


def test_flipped_bytes(tmp_path: Path) -> None:
    outcome = run_flipped(tmp_path, every=41)
    assert outcome.faults == []
    assert outcome.cases > 40


class RefusedError(Exception):
    """Of no type that callers are told of."""


def test_every_part_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "missing_parts", lambda self: list(range(self.part_count)))
        assert run_refused(tmp_path / "a").faults, "parts are computed twice"
    with monkeypatch.context() as patch:
        patch.setattr("featxfer.cli._stores", lambda folder: [])
        assert run_flipped(tmp_path / "b", every=401).faults
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.torture.artefacts.ArtifactError", RefusedError)
        assert run_artefacts(tmp_path / "c", 0, flips=1, every=999).faults
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.torture.hostile.unpack", extract_all)
        assert run_archives(tmp_path / "e").faults
    with monkeypatch.context() as patch:
        patch.setattr("featxfer.checks.LARGEST_NORM", float("inf"))
        patch.setattr("benchmarks.torture.numbers.kmeans", None)
        assert run_numbers(30, 0).faults


def extract_all(archives: list[Path], folder: Path) -> None:
    folder.mkdir()
    for archive in archives:
        with tarfile.open(archive) as tar, contextlib.suppress(OSError):
            tar.extractall(folder, filter="fully_trusted")


def test_the_command_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke(main, ["--parts", "folders,archives", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["parts"]) == ["folders", "archives"]
    assert summary(results) == (tmp_path / "summary.md").read_text()
    monkeypatch.setitem(PARTS, "folders", ("folders", lambda folder, seed: Outcome(1, ["wrong"])))
    run = CliRunner().invoke(main, ["--parts", "folders", "--out", str(tmp_path)])
    assert run.exit_code == 1
    run = CliRunner().invoke(main, ["--parts", "all", "--out", str(tmp_path)])
    assert "got all, wanted some of killed" in run.output


def test_the_readme_shows_what_the_results_hold() -> None:
    results = json.loads((FOLDER / "results" / "results.json").read_text())
    assert list(results["parts"]) == list(PARTS)
    assert not any(part["faults"] for part in results["parts"].values())
    assert summary(results) in (FOLDER / "README.md").read_text()
