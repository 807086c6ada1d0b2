"""The plug-in's tables as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import markdown_table

COLUMNS = {
    "deploy": "deploy mAP %",
    "accuracy": "deploy accuracy %",
    "retrain": "retrain mAP %",
    "classifier": "ImageNet classifier, %",
}


def to_markdown(results: Mapping[str, Any]) -> str:
    """A table an LR size: figures with half of their 95% interval, and gap recovered."""
    parts = []
    for size, rows in results["tables"].items():
        headings = [text for name in COLUMNS for text in (COLUMNS[name], "gap %")]
        cells = (
            [label, *(cell for name in COLUMNS for cell in _cells(rows, figures.get(name), name))]
            for label, figures in rows.items()
        )
        parts.append(f"LR of {size} pixels:\n\n{markdown_table(headings, cells)}")
    return "\n".join(parts)


def _cells(rows: Mapping[str, Any], figure: Mapping[str, Any] | None, name: str) -> list[str]:
    if figure is None:
        return ["", ""]
    low, high = (rows[label][name]["mean"] for label in ("LR", "HR"))
    gap = 100 * (figure["mean"] - low) / (high - low) if high > low else None
    return [_with_interval(figure), "" if gap is None else f"{gap:.1f}"]


def _with_interval(figure: Mapping[str, Any]) -> str:
    text = f"{figure['mean']:.1f}"
    if figure["low"] is None:
        return text
    return f"{text} ± {(figure['high'] - figure['low']) / 2:.1f}"
