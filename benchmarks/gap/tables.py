"""The gap benchmark's tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import markdown_table
from benchmarks.voc2007.run import summarise


def summarised(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of each number that all runs have: values, mean and 95% interval over seeds."""
    names = [name for name, value in runs[0].items() if isinstance(value, int | float)]
    return {name: summarise([run[name] for run in runs]) for name in names}


def with_gaps(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Summaries by row, with the share of the gap recovered in %, where HR is above LR.

    The ends are plain HR and LR features under SVMs on HR features (deploy, few labels), and under
    SVMs on their own features (retrain).
    """
    high, low = rows["HR"][0], rows["LR"][0]
    table = {}
    for label, runs in rows.items():
        found = []
        for run in runs:
            gaps = {
                f"{name} gap": 100 * (run[name] - low[name]) / (high[name] - low[name])
                for name in run
                if name in low
                and name in high
                and name.startswith(("deploy", "accuracy", "retrain", "few"))
                and high[name] > low[name]
            }
            cost = {"hr loss": high["hr"] - run["hr"]} if "hr" in run and "hr" in high else {}
            found.append({**run, **gaps, **cost})
        table[label] = summarised(found)
    return table


def to_markdown(table: Mapping[str, Any]) -> str:
    """The table of all rows: figures and gaps with half of their 95% interval."""
    columns = [
        ("deploy mAP %", "deploy", 1),
        ("gap %", "deploy gap", 1),
        ("accuracy gap %", "accuracy gap", 1),
        ("retrain mAP %", "retrain", 1),
        ("gap %", "retrain gap", 1),
        ("HR loses", "hr loss", 1),
        ("parameters", "parameters", 0),
        ("blocks, M MACs", "block_macs", 0),
        ("training, s", "seconds", 0),
    ]
    return grid(table, columns)


def few_labels(table: Mapping[str, Any]) -> str:
    """SVMs on few labelled HR images a class, tested on LR ones: mAP and gap."""
    columns = [
        (text, name, 1)
        for m in (1, 5, 10)
        for text, name in ((f"{m} a class, mAP %", f"few-{m}"), ("gap %", f"few-{m} gap"))
    ]
    return grid({k: v for k, v in table.items() if "few-1" in v}, columns)


def grid(table: Mapping[str, Any], columns: Sequence[tuple[str, str, int]]) -> str:
    """Rows of a Markdown table; empty where a row has no such figure."""
    return markdown_table(
        [heading for heading, _, _ in columns],
        (
            [label, *(_cell(figures.get(name), digits) for _, name, digits in columns)]
            for label, figures in table.items()
        ),
    )


def _cell(figure: Mapping[str, Any] | None, digits: int) -> str:
    if figure is None:
        return ""
    text = f"{figure['mean']:,.{digits}f}"
    if figure["low"] is None or digits == 0:
        return text
    return f"{text} ± {(figure['high'] - figure['low']) / 2:.{digits}f}"
