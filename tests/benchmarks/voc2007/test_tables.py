from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.intervals import gaps, summarise
from benchmarks.voc2007 import paper, tables


def entry(label: str, values: list[float], lr: float = 0.7, hr: float = 0.9) -> dict[str, Any]:
    return {
        "label": label,
        "ap": [values[0]] * 20,
        "map": summarise(values),
        "gap_recovered": gaps(values, lr, hr),
        "runs": [{"unconverged": 1, "fits": 10}],
    }


def test_summary_shows_means_and_intervals() -> None:
    table = {"a": entry("one seed", [0.9]), "b": entry("two seeds", [0.7, 0.8])}
    lines = tables.summary(table, ["cat"]).splitlines()
    assert lines[1].split() == ["one", "seed", "90.0", "100.0"]
    assert lines[2].split() == [
        "two",
        "seeds",
        "75.0",
        "[11.5,",
        "138.5]",
        "25.0",
        "[-292.7,",
        "342.7]",
    ]


def test_zero_has_no_sign() -> None:
    assert tables.percent(-0.0001) == "0.0"
    assert tables.percent(-0.001) == "-0.1"


def test_no_gap_is_said() -> None:
    table = {"a": entry("row", [0.9], lr=0.9, hr=0.9)}
    assert tables.summary(table, ["cat"]).endswith("no gap")


def test_the_papers_rows_stand_beside_ours_on_its_classes_only() -> None:
    table = {"baseline-hr": entry("Baseline-HR", [0.5])}
    assert "[1] nearest" not in tables.summary(table, ["cat"])
    text = tables.summary(table, paper.CLASSES) + tables.per_class(table, paper.CLASSES)
    assert "[1] nearest                           80.0" in text
    assert text.splitlines()[-1].split()[-20:] == [str(ap) for ap in paper.TABLE1["nearest"]]


def test_classes_come_in_blocks_of_twenty() -> None:
    table = {"a": {**entry("row", [0.5]), "ap": [0.5] * 45}}
    blocks = tables.per_class(table, [f"class{i}" for i in range(45)]).split("\n\n")
    assert [len(block.splitlines()[1].split()) - 1 for block in blocks] == [20, 20, 5]


def test_unconverged_fits_are_told() -> None:
    assert "row: 1 of 10" in tables.unconverged({"a": entry("row", [0.5])})


def test_grid_has_the_papers_layout() -> None:
    cells = [
        {"clusters": k, "hidden": h, "map": summarise([k / 1000])}
        for k in (20, 100)
        for h in (8, 16)
    ]
    lines = tables.grid({"protocol": "plain", "cells": cells}, ["cat"]).splitlines()
    assert lines[1].split() == ["8", "16"]
    assert lines[2].split() == ["20", "2.0", "2.0"]
    assert lines[3].split() == ["100", "10.0", "10.0"]


@pytest.mark.parametrize("row", ["baseline-hr", "baseline-lr", "nearest"])
def test_the_papers_rows_average_to_its_map(row: str) -> None:
    """Guards the transcription: the paper's mAP is the mean of its twenty APs."""
    aps = paper.TABLE1[row]
    assert len(aps) == len(paper.CLASSES) == 20
    assert sum(aps) / 20 == pytest.approx(paper.TABLE1_MAP[row], abs=0.06)


def test_the_papers_table_2_is_whole() -> None:
    assert [len(columns) for columns in paper.TABLE2.values()] == [5] * 6
    assert paper.TABLE2[100][4096] == paper.TABLE1_MAP["nearest"]


def test_markdown_has_a_row_a_row_and_two_columns_a_protocol() -> None:
    row = entry("row", [0.7, 0.8])
    results = {"table1": {"vissl": {"a": row}, "plain": {"a": {**row, "gap_recovered": None}}}}
    lines = tables.markdown(results).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 6
    assert lines[2] == "| row | 75.0 ± 63.5 | 25.0 ± 317.7 | 75.0 ± 63.5 | no gap |"


RESULTS = Path(tables.__file__).parent / "results"


@pytest.mark.parametrize("folder", sorted(p.name for p in RESULTS.glob("caltech101-*")))
def test_committed_tables_are_those_of_the_committed_results(folder: str) -> None:
    results = json.loads((RESULTS / folder / "results.json").read_text())
    assert (RESULTS / folder / "tables.txt").read_text() == tables.render(results)
    assert (RESULTS / folder / "summary.md").read_text() == tables.markdown(results)


def test_the_readmes_tables_are_those_of_the_committed_results() -> None:
    readme = (RESULTS.parents[2] / "README.md").read_text()
    assert (RESULTS / "caltech101-32" / "summary.md").read_text() in readme
    benchmark = (RESULTS.parent / "README.md").read_text()
    for folder in ("caltech101-32", "caltech101-64"):
        assert (RESULTS / folder / "summary.md").read_text() in benchmark
    grid = json.loads((RESULTS / "caltech101-32-grid" / "results.json").read_text())["table2"]
    assert tables.grid(grid, []) in benchmark
    assert (RESULTS / "tuning" / "tuning.txt").read_text() in benchmark
