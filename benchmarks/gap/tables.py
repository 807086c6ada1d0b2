"""The gap benchmark's tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.common.markdown import grid

ALL_ROWS = (
    ("deploy mAP %", "deploy", 1),
    ("gap %", "deploy gap", 1),
    ("accuracy gap %", "accuracy gap", 1),
    ("retrain mAP %", "retrain", 1),
    ("gap %", "retrain gap", 1),
    ("HR loses", "hr loss", 1),
    ("parameters", "parameters", 0),
    ("blocks, M MACs", "block_macs", 0),
    ("training, s", "seconds", 0),
)
FEW_LABELS = tuple(
    (text, name, 1)
    for m in (1, 5, 10)
    for text, name in ((f"{m} a class, mAP %", f"few-{m}"), ("gap %", f"few-{m} gap"))
)


def all_rows(table: Mapping[str, Any]) -> str:
    """All rows: figures and gaps with half of their 95% interval."""
    return grid(table, ALL_ROWS)


def few_labels(table: Mapping[str, Any]) -> str:
    """SVMs on few labelled HR images a class, tested on LR ones: mAP and gap."""
    return grid({k: v for k, v in table.items() if "few-1" in v}, FEW_LABELS)


def summary(results: Mapping[str, Any]) -> str:
    """All rows, and those of few labels."""
    return f"{all_rows(results['table'])}\n{few_labels(results['table'])}"
