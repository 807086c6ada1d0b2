"""The plug-in's tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.common.intervals import plus_minus
from benchmarks.common.markdown import figure, label, to_markdown

COLUMNS = {
    "deploy": "deploy mAP %",
    "accuracy": "deploy accuracy %",
    "retrain": "retrain mAP %",
    "classifier": "ImageNet classifier, %",
}


def summary(results: Mapping[str, Any]) -> str:
    """A table an LR size: figures with half of their 95% interval, and gap recovered."""
    parts = []
    for size, rows in results["tables"].items():
        columns = [label()]
        for name, heading in COLUMNS.items():
            gap = figure("gap %", partial(_gap, rows, name), name)
            columns += [figure(heading, plus_minus, name), gap]
        parts.append(f"LR of {size} pixels:\n\n{to_markdown(rows.items(), columns)}")
    return "\n".join(parts)


def _gap(rows: Mapping[str, Any], name: str, summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return ""
    low, high = (rows[label][name]["mean"] for label in ("LR", "HR"))
    return f"{100 * (summary['mean'] - low) / (high - low):.1f}" if high > low else ""
