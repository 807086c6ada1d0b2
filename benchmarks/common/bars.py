"""A bar chart as SVG, which is sharp at any size and follows the reader's light or dark theme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, ROW, BAR = 560, 56, 13
"""Of the chart, of a row and of a bar, in units that are a pixel where nothing is scaled."""

STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1f2933; }
.small { font-size: 13px; fill: #52606d; }
.axis { stroke: #9aa5b1; } .grid { stroke: #e4e7eb; } .mark { stroke: #1f2933; stroke-width: 1.5; }
.s0 { fill: #2b6cb0; } .s1 { fill: #d9822b; }
@media (prefers-color-scheme: dark) {
text { fill: #e4e7eb; } .small { fill: #9aa5b1; } .axis { stroke: #7b8794; }
.grid { stroke: #323f4b; } .mark { stroke: #f5f7fa; } .s0 { fill: #63a4e8; } .s1 { fill: #f0a04b; }
}
"""


@dataclass(frozen=True)
class Bars:
    """A row of the chart.

    Args:
        label: of the row.
        values: a summary (mean, low, high) of each series; None where there is none.
    """

    label: str
    values: Sequence[dict[str, Any] | None]


def chart(title: str, series: Sequence[str], rows: Sequence[Bars]) -> str:
    """Horizontal bars from 0, with 95% intervals; figures stand beside them."""
    ends = [0.0, 100.0]
    for row in rows:
        for value in row.values:
            if value is not None:
                ends += [_low(value), _high(value)]
    low, high = max(-120.0, min(ends)), max(ends)
    scale = (WIDTH - 50) / (high - low)

    def at(value: float) -> float:
        return 8 + (min(max(value, low), high) - low) * scale

    parts = [f'<text x="0" y="16" font-weight="600">{escape(title)}</text>']
    for index, name in enumerate(series):
        y = 28 + 20 * index
        parts.append(f'<rect class="s{index}" x="0" y="{y}" width="11" height="11"/>')
        parts.append(f'<text class="small" x="18" y="{y + 10}">{escape(name)}</text>')
    top = 44 + 20 * len(series)
    bottom = top + ROW * len(rows)
    step = 25 if high - low < 180 else 50
    for tick in range(-step * int(-low // step), int(high) + 1, step):
        parts.append(_line("axis" if tick == 0 else "grid", at(tick), top - 8, at(tick), bottom))
        parts.append(
            f'<text class="small" x="{at(tick):.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{tick}%</text>"
        )
    height = bottom + 22
    for place, row in enumerate(rows):
        y = top + ROW * place
        parts.append(f'<text x="{at(0) + 4:.1f}" y="{y + 12}">{escape(row.label)}</text>')
        shown = [(index, value) for index, value in enumerate(row.values) if value is not None]
        for slot, (index, value) in enumerate(shown):
            parts += _bar(value, index, at, y + 18 + slot * (BAR + 2))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>\n' + "\n".join(parts) + "</svg>\n"
    )


def _bar(value: dict[str, Any], index: int, at: Any, y: float) -> list[str]:
    start, end = sorted((at(0), at(value["mean"])))
    middle = y + BAR / 2
    parts = [
        f'<rect class="s{index}" x="{start:.1f}" y="{y:.1f}" width="{end - start:.1f}" '
        f'height="{BAR}"/>'
    ]
    if value["low"] is not None:
        parts.append(_line("mark", at(value["low"]), middle, at(value["high"]), middle))
    right = max(at(_high(value)), at(0)) + 6
    parts.append(
        f'<text class="small" x="{right:.1f}" y="{middle + 4:.1f}">{value["mean"]:.0f}</text>'
    )
    return parts


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _low(value: dict[str, Any]) -> float:
    return float(value["mean"] if value["low"] is None else value["low"])


def _high(value: dict[str, Any]) -> float:
    return float(value["mean"] if value["high"] is None else value["high"])
