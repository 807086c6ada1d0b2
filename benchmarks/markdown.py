"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], corner: str = "") -> str:
    """A line of headings, one of rules and a line a row; the first column is of the rows' names.

    Args:
        headings: of the columns after the first.
        rows: cells, with the row's name.
        corner: heading of the first column.
    """
    lines = [[corner, *headings], ["---"] * (len(headings) + 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
