"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from benchmarks.common.intervals import plus_minus

R = TypeVar("R")

Column = tuple[str, Callable[[R], str]]
"""A heading, and a row's cell under it."""


def to_markdown(rows: Iterable[R], columns: Sequence[Column[R]]) -> str:
    """A line of headings, one of rules and a line a row."""
    lines = [[heading for heading, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def entry(heading: str, name: str, form: str = "", scale: float | None = None) -> Column[Any]:
    """A column of `row[name]`, times `scale`, in the format `form`."""
    return heading, lambda row: format(row[name] if scale is None else scale * row[name], form)


def label(heading: str = "") -> Column[Any]:
    """The column of the rows' labels, of `(label, figures)`."""
    return heading, lambda row: str(row[0])


def figure(heading: str, cell: Callable[[Any], str], name: str) -> Column[Any]:
    """A column of the figure `name`, None where there is none, of `(label, figures)`."""
    return heading, lambda row: cell(row[1].get(name))


def grid(table: Mapping[str, Any], columns: Sequence[tuple[str, str, int]]) -> str:
    """Summaries of figures by row: mean and half of the 95% interval, empty where there is none.

    Args:
        table: summaries by the figure's name, by the row's label.
        columns: heading, the figure's name, digits.
    """
    named = [figure(head, partial(plus_minus, digits=d), name) for head, name, d in columns]
    return to_markdown(table.items(), [label(), *named])


def nested(value: Any, form: str) -> str:
    """A figure, or figures by name; those with a fraction in the format `form`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {nested(part, form)}" for name, part in value.items())
    return format(value, form) if isinstance(value, float) else str(value)
