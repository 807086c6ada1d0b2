"""report.html: one self-contained page with everything that a run found."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from benchmarks.common.intervals import plus_minus
from benchmarks.voc2007 import tables

_STYLE = """
:root { color-scheme: light dark; --text: #1f2933; --page: #fff; --line: #d9dee4; --soft: #f4f6f8;
  --note: #fff3cd; --muted: #52606d; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --page: #14191f; --line: #323f4b;
  --soft: #1d252d; --note: #4a3c0a; --muted: #9aa5b1; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--page);
  margin: 0 auto; max-width: 60rem; padding: 1.2rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.lead { font-size: 1.15rem; } .lead p { margin: .5rem 0; }
.warn { background: var(--note); padding: .6rem .9rem; border-radius: .4rem; }
.muted { color: var(--muted); font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; overflow-wrap: normal; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } td { white-space: nowrap; }
td:first-child { white-space: normal; min-width: 11rem; }
pre { overflow-x: auto; font-size: .8rem; background: var(--soft); padding: .8rem;
  border-radius: .4rem; overflow-wrap: normal; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
svg { width: 100%; max-width: 44rem; height: auto; } summary { cursor: pointer; }
"""

_OWN_PHOTOGRAPHS = """from featxfer_integrations import fit_transfer, load_model, save_transfers

model = load_model("resnet50")         # torchvision's or timm's, or any model of your own
fit = fit_transfer(model, "photos/")   # a folder of HR images, no labels
save_transfers(model, "transfer/")     # what was trained, alone
"""

_OWN_DEVKIT = "python -m benchmarks.voc2007 --root DEVKIT --backbone resnet50   # VOC's layout"


def render(results: Mapping[str, Any], pictures: Mapping[str, bytes], chart: str) -> str:
    """The page; `pictures`, PNG files by name, and `chart`, SVG, are embedded."""
    words = tables.found_in_words(results)
    parts = [
        "<h1>What low resolution takes, and what comes back</h1>",
        _synthetic_note(results),
        f'<div class="lead">{"".join(f"<p>{escape(line)}</p>" for line in words)}</div>',
        f"<h2>Gap recovered by method</h2>{chart}",
    ]
    for protocol, table in results["tables"].items():
        parts += [f"<h2>Table 1, protocol {escape(protocol)}</h2>", _table(table)]
    parts += [
        f'<p class="muted">{escape(tables.READING)}</p>',
        *_section("HR and LR images", ["pairs.png"], pictures),
        *_section(
            "Average precision by class",
            [name for name in pictures if name.startswith("ap_")],
            pictures,
        ),
        *_section("Features by t-SNE", ["tsne.png"], pictures),
    ]
    if "curve.png" in pictures:
        parts += _section("mAP over the SVMs' C", ["curve.png"], pictures)
    parts += [
        "<h2>On your own photographs</h2>",
        f"<pre>{escape(_OWN_PHOTOGRAPHS)}</pre>",
        f"<p>This table, for images with labels:</p><pre>{escape(_OWN_DEVKIT)}</pre>",
        *_details(results),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>featxfer: VOC2007 benchmark</title><style>{_STYLE}</style>\n"
        + "\n".join(part for part in parts if part)
        + "</html>\n"
    )


def _synthetic_note(results: Mapping[str, Any]) -> str:
    if not results["data"]["synthetic"]:
        return ""
    return (
        '<p class="warn">These images are synthetic, rendered by this project to show the command '
        "at work. The figures say nothing about photographs.</p>"
    )


def _table(table: tables.Table) -> str:
    heads = "".join(f"<th>{escape(heading)}</th>" for heading, _ in tables.COLUMNS)
    lines = [f'<div class="wide"><table><tr><th></th>{heads}</tr>']
    for label, row in table.items():
        cells = "".join(f"<td>{plus_minus(row.get(name))}</td>" for _, name in tables.COLUMNS)
        lines.append(f"<tr><td>{escape(label)}</td>{cells}</tr>")
    return "\n".join([*lines, "</table></div>"])


def _section(title: str, names: Iterable[str], pictures: Mapping[str, bytes]) -> list[str]:
    """A heading and its pictures; nothing where there are none."""
    shown = [
        f'<img alt="{escape(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(pictures[name]).decode()}">'
        for name in names
        if name in pictures
    ]
    return [f"<h2>{escape(title)}</h2>", *shown] if shown else []


def _details(results: Mapping[str, Any]) -> list[str]:
    """Everything else, folded away."""
    classes, ap = results["data"]["classes"], results["config"]["ap"]
    texts = {
        f"AP of every class, protocol {protocol}": tables.per_class(table, classes, ap)
        for protocol, table in results["tables"].items()
    }
    if "grid" in results:
        texts["Table 2"] = "\n\n".join(tables.grids(results))
    texts["Clusters and pseudo-labels, by seed"] = "\n".join(
        tables.diagnostics(found) for found in results["diagnostics"]
    )
    made = {name: results[name] for name in ("config", "versions", "backbone", "data")}
    texts["Made with"] = tables.heading(results) + "\n\n" + json.dumps(made, indent=1)
    return [
        "<h2>Everything else</h2>",
        *(
            f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
            for title, text in texts.items()
        ),
    ]
