from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.common.bars import Bars, chart
from benchmarks.common.intervals import summarise
from benchmarks.voc2007 import figures, paper, report, tables

CATS = [f"cat{i}" for i in range(20)]


def row(values: list[float], **more: Any) -> dict[str, Any]:
    return {
        "retrain": summarise(values),
        "classes": {"11point": [values[0]] * 20},
        "svms": [{"unconverged": 1, "fits": 10}],
        **{name: summarise(several) for name, several in more.items()},
    }


def results(table: dict[str, Any], classes: list[str] | None = None) -> dict[str, Any]:
    found = {"agreement": 0.5, "k": 5}
    found |= {f"{v}_{n}": 1 for v in ("hr", "lr") for n in ("empty", "tiny", "giant", "entropy")}
    return {
        "tables": {"plain": table},
        "config": {
            "data": "VOC2007",
            "ap": "11point",
            "splits": ["trainval", "test"],
            "seeds": [0],
            "weights": "demo",
            "clusters": 5,
            "hidden": 8,
            "svm": "batched",
            "degradation": {
                "hr_size": 224,
                "lr_size": 32,
                "kernel": "bicubic",
                "antialias": True,
                "order": "original",
            },
        },
        "data": {
            "synthetic": False,
            "classes": classes or CATS,
            "images": {"trainval": 3, "test": 2},
            "width": 4,
        },
        "backbone": {"name": "net", "sha256": "0" * 64},
        "versions": {},
        "diagnostics": [found],
    }


ENDS = {
    "Baseline-HR": row([80.0], deploy=[80.0], **{"hr loss": [0.0]}),
    "Baseline-LR": row([60.0], deploy=[50.0], **{"hr loss": [0.0]}),
}
FOUND = {
    **ENDS,
    "the paper's head (nearest labels)": row([58.0], **{"retrain gap": [-10.0]}),
    "head: prototypes (default)": row(
        [61.0], deploy=[56.0], **{"deploy gap": [20.0], "retrain gap": [5.0], "hr loss": [0.0]}
    ),
    "blocks (default)": row(
        [70.0, 72.0],
        deploy=[65.0, 66.0],
        **{"deploy gap": [50.0, 54.0], "retrain gap": [50.0, 60.0], "hr loss": [0.4, 0.6]},
    ),
}


def test_the_table_shows_means_intervals_and_gaps() -> None:
    lines = tables.main_table(FOUND, CATS).splitlines()
    assert lines[1].split() == ["Baseline-HR", "80.0", "80.0", "0.0"]
    assert lines[3].split()[-2:] == ["58.0", "-10.0"]
    assert lines[5].split("  ")[0] == "blocks (default)"
    assert "71.0 ± 12.7" in lines[5]
    assert "52.0 ± 25.4" in lines[5]


def test_what_was_found_is_said_in_three_lines_with_figures() -> None:
    said = tables.found_in_words(results(FOUND))
    assert len(said) == 3
    assert "at 32 pixels and not at 224" in said[0]
    assert "from 80.0 to 50.0 mAP" in said[0]
    assert "give back 52.0% of that, and HR images lose nothing; a head 20.0%" in said[1]
    assert "reach 60.0 mAP" in said[2]
    assert "of the paper's head 58.0 (-10.0% of the gap)" in said[2]
    assert "through blocks 71.0 (55.0% of the gap)" in said[2]
    assert tables.render(results(FOUND)).endswith("\n".join(said) + "\n")


def test_what_hr_images_lose_is_said_where_it_is_more_than_chance() -> None:
    table = {**FOUND, "ridge regression": row([60.0], **{"deploy gap": [9.0], "hr loss": [5.0]})}
    said = tables.found_in_words(results(table))[1]
    assert said.endswith("; ridge regression 9.0%, and HR images lose 5.0 mAP.")


def test_no_gap_is_said() -> None:
    same = dict.fromkeys(ENDS, ENDS["Baseline-HR"])
    assert "no gap to recover" in tables.found_in_words(results(same))[0]


def test_another_test_split_than_the_official_one_is_said() -> None:
    found = results(FOUND)
    assert "which is not the test set" not in tables.heading(found)
    found["config"]["splits"] = ["train", "val"]
    assert "trained on 'train', judged on 'val', which is not the test set" in tables.heading(found)


def test_the_papers_rows_stand_beside_ours_on_its_classes_only() -> None:
    assert "[1] nearest" not in tables.main_table(FOUND, CATS)
    text = tables.main_table(FOUND, paper.CLASSES)
    text += tables.per_class(FOUND, paper.CLASSES, "11point")
    assert "[1] nearest" in text
    assert text.splitlines()[-1].split()[-20:] == [str(ap) for ap in paper.TABLE1["nearest"]]


def test_classes_come_in_blocks_of_twenty() -> None:
    table = {"a": {**row([50.0]), "classes": {"11point": [50.0] * 45}}}
    blocks = tables.per_class(table, [f"class{i}" for i in range(45)], "11point").split("\n\n")
    assert [len(block.splitlines()[1].split()) - 1 for block in blocks] == [20, 20, 5]


def test_unconverged_fits_are_told() -> None:
    assert "row: 1 of 10" in tables.unconverged({"row": row([50.0])})


def test_grid_has_the_papers_layout() -> None:
    cells = [
        {"clusters": k, "hidden": h, "map": summarise([k / 10])} for k in (20, 100) for h in (8, 16)
    ]
    lines = tables.grid(cells, "plain", ["cat"]).splitlines()
    assert lines[1].split() == ["8", "16"]
    assert lines[2].split() == ["20", "2.0", "2.0"]
    assert lines[3].split() == ["100", "10.0", "10.0"]
    assert len(tables.grid(cells, "plain", paper.CLASSES).splitlines()) == 4 + 7


@pytest.mark.parametrize("name", ["baseline-hr", "baseline-lr", "nearest"])
def test_the_papers_rows_average_to_its_map(name: str) -> None:
    """Guards the transcription: the paper's mAP is the mean of its twenty APs."""
    aps = paper.TABLE1[name]
    assert len(aps) == len(paper.CLASSES) == 20
    assert sum(aps) / 20 == pytest.approx(paper.TABLE1_MAP[name], abs=0.06)


def test_the_papers_table_2_is_whole() -> None:
    assert [len(columns) for columns in paper.TABLE2.values()] == [5] * 6
    assert paper.TABLE2[100][4096] == paper.TABLE1_MAP["nearest"]


def test_markdown_has_a_row_a_row_and_five_columns_a_protocol() -> None:
    found = results(FOUND)
    found["tables"]["vissl"] = ENDS | {name: row([1.0]) for name in FOUND if name not in ENDS}
    lines = tables.markdown(found).splitlines()
    assert {line.count("|") for line in lines} == {12}
    assert lines[0].startswith("|  | plain: retrain mAP % | plain: gap % |")
    assert lines[6].startswith("| blocks (default) | 71.0 ± 12.7 | 55.0 ± 63.5 |")


def test_the_page_says_it_first_and_shows_the_chart(tmp_path: Path) -> None:
    found = results(FOUND)
    page = report.render(found, {}, figures.gap_bars(found))
    said = page.index("Seen at 32 pixels")
    assert said < page.index("<svg") < page.index("<table")
    assert '<meta name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert "src=" not in page, "no picture was given"
    for line in ("fit_transfer(model", "--root DEVKIT"):
        assert line in page


def test_bars_are_as_long_as_their_values() -> None:
    rows = [Bars("a & b", [summarise([50.0]), None]), Bars("c", [summarise([-25.0, -15.0]), None])]
    root = ElementTree.fromstring(chart("t", ("one", "two"), rows))
    bars = [
        {name: float(bar.attrib[name]) for name in ("x", "width")}
        for bar in root.iter("{http://www.w3.org/2000/svg}rect")
        if bar.attrib["height"] != "11"
    ]
    assert len(bars) == 2
    assert bars[0]["width"] / bars[1]["width"] == pytest.approx(50 / 20, rel=0.01)
    assert bars[1]["x"] + bars[1]["width"] == pytest.approx(bars[0]["x"], abs=0.2)
    marks = [e for e in root.iter() if e.attrib.get("class") == "mark"]
    assert len(marks) == 1, "one seed has no interval"


RESULTS = Path(tables.__file__).parent / "results"
RUNS = sorted(path.parent.name for path in RESULTS.glob("*/results.json"))


@pytest.mark.parametrize("folder", RUNS)
def test_committed_tables_are_those_of_the_committed_results(folder: str) -> None:
    found = json.loads((RESULTS / folder / "results.json").read_text())
    assert (RESULTS / folder / "tables.txt").read_text() == tables.render(found)
    assert (RESULTS / folder / "summary.md").read_text() == tables.markdown(found)
    assert (RESULTS / folder / "gap.svg").read_text() == figures.gap_bars(found)


def test_the_readmes_tables_are_those_of_the_committed_results() -> None:
    readme = (RESULTS.parents[2] / "README.md").read_text()
    assert (RESULTS / "voc2007-32" / "summary.md").read_text() in readme
    assert "benchmarks/voc2007/results/voc2007-32/gap.svg" in readme
    benchmark = (RESULTS.parent / "README.md").read_text()
    for folder in RUNS:
        found = json.loads((RESULTS / folder / "results.json").read_text())
        assert (RESULTS / folder / "summary.md").read_text() in benchmark
        for grid in tables.grids(found) if "grid" in found else []:
            assert grid in benchmark
    assert (RESULTS / "tuning" / "tuning.txt").read_text() in benchmark
