"""report.html: one self-contained page with everything that a run found."""

from __future__ import annotations

import base64
import json
from html import escape
from typing import Any

from benchmarks.voc2007 import tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .7rem; }
td, th { border-bottom: 1px solid #ddd; text-align: right; } td:first-child { text-align: left; }
pre { overflow-x: auto; font-size: 12px; background: #f6f7f9; padding: .8rem; }
img { max-width: 100%; } .warn { background: #fff3cd; padding: .6rem 1rem; }
"""


def render(results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The page; `pictures` are embedded."""
    body = [
        "<h1>VOC2007 benchmark: unsupervised deep feature transfer</h1>",
        _synthetic_note(results),
        f"<pre>{escape(tables.heading(results))}</pre>",
    ]
    for protocol, table in results["table1"].items():
        body += [
            f"<h2>Table 1, protocol {escape(protocol)}</h2>",
            _summary_table(table),
            _picture(f"ap_{protocol}.png", pictures),
            f"<pre>{escape(tables.per_class(table, results['data']['classes']))}</pre>",
            f"<p>{escape(tables.unconverged(table))}</p>",
        ]
    if "table2" in results:
        grid = tables.grid(results["table2"], results["data"]["classes"])
        body += ["<h2>Table 2</h2>", f"<pre>{escape(grid)}</pre>"]
    if "gap" in results:
        body += [
            "<h2>Every method</h2>",
            f"<pre>{escape(tables.every_method(results['gap']))}</pre>",
        ]
    body += ["<h2>Features by t-SNE</h2>", _picture("tsne.png", pictures)]
    body += ["<h2>HR and LR images</h2>", _picture("pairs.png", pictures)]
    body += ["<h2>Clusters and pseudo-labels, by seed</h2>", _diagnostics(results["diagnostics"])]
    made = {name: results[name] for name in ("config", "versions", "backbone", "data")}
    body += ["<h2>Made with</h2>", f"<pre>{escape(json.dumps(made, indent=1))}</pre>"]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>VOC2007 benchmark</title>'
        f"<style>{_STYLE}</style>\n" + "\n".join(part for part in body if part) + "</html>\n"
    )


def _synthetic_note(results: dict[str, Any]) -> str:
    if not results["data"]["synthetic"]:
        return ""
    return (
        '<p class="warn">These images are synthetic, rendered by this project to show the command '
        "at work. The figures say nothing about photographs.</p>"
    )


def _summary_table(table: dict[str, Any]) -> str:
    lines = ["<table><tr><td></td><th>mAP %</th><th>95% interval</th><th>gap recovered %</th>"]
    lines.append("<th>95% interval</th></tr>")
    for entry in table.values():
        gap = entry["gap_recovered"]
        cells = [tables.percent(entry["map"]["mean"]), tables.interval(entry["map"])]
        cells += [tables.percent(gap["mean"]), tables.interval(gap)] if gap else ["no gap", ""]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr><td>{escape(entry['label'])}</td>{row}</tr>")
    return "\n".join([*lines, "</table>"])


def _diagnostics(diagnostics: list[dict[str, Any]]) -> str:
    names = [name for name in diagnostics[0] if not name.endswith("_sizes")]
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    rows = [
        f"<tr><td>{seed}</td>" + "".join(f"<td>{found[name]:.4g}</td>" for name in names) + "</tr>"
        for seed, found in enumerate(diagnostics)
    ]
    return f"<table><tr><td>seed</td>{head}</tr>{''.join(rows)}</table>"


def _picture(name: str, pictures: dict[str, bytes]) -> str:
    if name not in pictures:
        return "<p>Not drawn: --no-figures, or too few test images of a single class.</p>"
    data = base64.b64encode(pictures[name]).decode()
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
