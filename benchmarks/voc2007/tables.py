"""Tables 1 and 2 as text, in the paper's layout, and what was found in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.common.intervals import plus_minus
from benchmarks.common.markdown import Column, to_markdown
from benchmarks.gap.methods import BLOCKS, METHODS
from benchmarks.voc2007 import paper

CLASSES_A_BLOCK = 20

Table = Mapping[str, Mapping[str, Any]]
"""Summaries of figures by name, by row."""

COLUMNS = (
    ("retrain mAP %", "retrain"),
    ("gap %", "retrain gap"),
    ("deploy mAP %", "deploy"),
    ("gap %", "deploy gap"),
    ("HR loses", "hr loss"),
)
"""Headings and figures of Table 1 here. The first two are the paper's."""

READING = (
    "retrain: SVMs trained and tested on the row's own features, as in the paper.\n"
    "deploy: SVMs on HR features, never changed.\n"
    "gap: 0 is Baseline-LR, 100 Baseline-HR; ± is half of the 95% interval over seeds.\n"
    "HR loses: what HR images lose in deploy mAP when they go the same way."
)


def render(results: Mapping[str, Any]) -> str:
    """All tables of a run, with what they are of above them and what was found below."""
    classes = results["data"]["classes"]
    blocks = [heading(results), READING]
    for protocol, table in results["tables"].items():
        blocks += [
            f"Protocol {protocol}",
            main_table(table, classes),
            per_class(table, classes, results["config"]["ap"]),
            unconverged(table),
        ]
    if "grid" in results:
        blocks += grids(results)
    blocks += ["\n".join(found_in_words(results))]
    return "\n\n".join(block for block in blocks if block) + "\n"


def heading(results: Mapping[str, Any]) -> str:
    """Data, backbone, degradation, seeds and the labels' diagnostics in a few lines."""
    config, data = results["config"], results["data"]
    degradation = config["degradation"]
    kind = "SYNTHETIC images rendered by this project" if data["synthetic"] else config["data"]
    counts = " and ".join(f"{count} {split}" for split, count in data["images"].items())
    agreement = [d["agreement"] for d in results["diagnostics"]]
    return "\n".join(
        [
            f"Data: {kind}; {counts} images, {len(data['classes'])} classes{_apart(config)}",
            f"Backbone: {results['backbone']['name']} ({config['weights']} weights, "
            f"{results['backbone']['sha256'][:12]}), {data['width']}-D",
            f"HR: {degradation['hr_size']} pixels; LR: {degradation['lr_size']} pixels, "
            f"{degradation['kernel']}, antialias {degradation['antialias']}, order "
            f"{degradation['order']!r}",
            f"Seeds: {len(config['seeds'])}; AP: {config['ap']}; k = {config['clusters']}, "
            f"N1 = {config['hidden']}; SVMs: {config['svm']}",
            "Nearest and paired pseudo-labels agree for "
            f"{percent(sum(agreement) / len(agreement))}% of the LR training images",
        ]
    )


def _apart(config: Mapping[str, Any]) -> str:
    """Says which splits were used, where they are not the usual ones."""
    train, test = config["splits"]
    if test == "test":
        return ""
    return f"; trained on {train!r}, judged on {test!r}, which is not the test set"


def diagnostics(found: Mapping[str, Any]) -> str:
    """The pseudo-labels of one seed in a line, before anything is trained on them."""
    views = "; ".join(
        f"{view.upper()}: {found[f'{view}_empty']} empty, {found[f'{view}_tiny']} tiny, "
        f"{found[f'{view}_giant']} giant, entropy {found[f'{view}_entropy']:.2f}"
        for view in ("hr", "lr")
    )
    return (
        f"{found['k']} clusters, seed 0: nearest and paired pseudo-labels agree for "
        f"{percent(found['agreement'])}% of the LR training images; {views}"
    )


def main_table(table: Table, classes: Sequence[str]) -> str:
    """MAP, the gap recovered and what HR images lose, of each row."""
    rows = [["", *(heading for heading, _ in COLUMNS)]]
    rows += [
        [label, *(plus_minus(row.get(name)) for _, name in COLUMNS)] for label, row in table.items()
    ]
    if list(classes) == paper.CLASSES:
        rows += [[f"[1] {row}", f"{value:.1f}"] for row, value in paper.TABLE1_MAP.items()]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = (
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=False))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown(results: Mapping[str, Any]) -> str:
    """Table 1 under every protocol, in Markdown."""
    tables = results["tables"]
    columns: list[Column[str]] = [("", lambda label: label)]
    for protocol, table in tables.items():
        of = f"{protocol}: " if len(tables) > 1 else ""
        columns += [(f"{of}{head}", partial(_cell, table, name)) for head, name in COLUMNS]
    return to_markdown(next(iter(tables.values())), columns)


def _cell(table: Table, name: str, label: str) -> str:
    return plus_minus(table[label].get(name))


def per_class(table: Table, classes: Sequence[str], ap: str) -> str:
    """AP of each class, mean over seeds, as the paper's Table 1; 20 classes a block."""
    rows = [(label, row["classes"][ap]) for label, row in table.items()]
    if list(classes) == paper.CLASSES:
        rows += [(f"[1] {row}", aps) for row, aps in paper.TABLE1.items()]
    blocks = []
    for start in range(0, len(classes), CLASSES_A_BLOCK):
        part = slice(start, start + CLASSES_A_BLOCK)
        lines = [" " * 34 + "".join(f"{_short(name):>8}" for name in classes[part])]
        lines += [f"{label:34}" + "".join(f"{ap:8.1f}" for ap in aps[part]) for label, aps in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def unconverged(table: Table) -> str:
    """Says how many SVM fits stopped at the limit of iterations, where any did."""
    counts = {
        label: (sum(r["unconverged"] for r in row["svms"]), sum(r["fits"] for r in row["svms"]))
        for label, row in table.items()
    }
    told = [f"{label}: {n} of {fits}" for label, (n, fits) in counts.items() if n]
    return "SVM fits stopped at the limit of iterations: " + "; ".join(told) if told else ""


def grids(results: Mapping[str, Any]) -> list[str]:
    """The grid of each protocol."""
    cells, classes = results["grid"], results["data"]["classes"]
    return [
        grid([cell for cell in cells if cell["protocol"] == protocol], protocol, classes)
        for protocol in results["tables"]
    ]


def grid(cells: Sequence[Mapping[str, Any]], protocol: str, classes: Sequence[str]) -> str:
    """The mAP over N2 = k (rows) and N1 (columns), as the paper's Table 2."""
    found = {(cell["clusters"], cell["hidden"]): cell["map"] for cell in cells}
    ks, hiddens = sorted({k for k, _ in found}), sorted({h for _, h in found})
    lines = [f"Grid, protocol {protocol}: mAP % (rows N2 = k, columns N1)"]
    lines.append(f"{'':6}" + "".join(f"{hidden:>14}" for hidden in hiddens))
    for k in ks:
        values = (found[k, hidden] for hidden in hiddens)
        lines.append(f"{k:<6}" + "".join(f"{plus_minus(value):>14}" for value in values))
    if list(classes) == paper.CLASSES:
        lines.append(f"{'[1]':6}" + "".join(f"{hidden:>14}" for hidden in paper.TABLE2[100]))
        for k, row in paper.TABLE2.items():
            lines.append(f"{k:<6}" + "".join(f"{value:>14.1f}" for value in row.values()))
    return "\n".join(lines)


def found_in_words(results: Mapping[str, Any]) -> list[str]:
    """What was found, in up to three sentences: the loss, what gives it back, and what does not."""
    table: Table = next(iter(results["tables"].values()))
    degradation = results["config"]["degradation"]
    size, full = degradation["lr_size"], degradation["hr_size"]
    hr, lr = (table[row]["deploy"]["mean"] for row in ("Baseline-HR", "Baseline-LR"))
    if hr <= lr:
        return [f"Images of {size} pixels cost nothing here: there is no gap to recover."]
    said = [
        f"Seen at {size} pixels and not at {full}, images take a classifier that was trained on HR "
        f"ones from {hr:.1f} to {lr:.1f} mAP."
    ]
    paper, head = (
        next((label for label in table if label.startswith(name)), "")
        for name in ("the paper's head", METHODS["prototypes"].label)
    )
    if BLOCKS.label in table:
        row = table[BLOCKS.label]
        others = [
            f"{name} {_gap(table[label], 'deploy')}, and {_hr(table[label]['hr loss'])}"
            for name, label in (("a head", head), ("ridge regression", METHODS["ridge"].label))
            if label in table
        ]
        said.append(
            "Blocks, trained without labels and without touching a filter, give back "
            f"{_gap(row, 'deploy')} of that, and {_hr(row['hr loss'])}"
            + "".join(f"; {other}" for other in others)
            + "."
        )
    if paper and "retrain gap" in table[paper]:
        rows = {
            "the outputs of the paper's head": paper,
            "LR features through blocks": BLOCKS.label,
        }
        found = [
            f"on {name} {table[label]['retrain']['mean']:.1f} ({_gap(table[label], 'retrain')} of "
            "the gap)"
            for name, label in rows.items()
            if label in table
        ]
        said.append(
            "SVMs that are trained anew on plain LR features reach "
            f"{table['Baseline-LR']['retrain']['mean']:.1f} mAP; {', '.join(found)}."
        )
    return said


def _gap(row: Mapping[str, Any], of: str) -> str:
    return f"{row[f'{of} gap']['mean']:.1f}%"


def _hr(loss: Mapping[str, Any]) -> str:
    """What HR images lose; nothing where the interval holds 0."""
    low, high, mean = loss["low"], loss["high"], loss["mean"]
    if abs(mean) < 0.05 or (low is not None and low <= 0 <= high):
        return "HR images lose nothing"
    return f"HR images {'lose' if mean > 0 else 'gain'} {abs(mean):.1f} mAP"


def _short(name: str) -> str:
    """At most 7 letters of a class name, from its first two words."""
    words = name.split("_")
    return name[:7] if len(words) == 1 else "_".join(word[:3] for word in words[:2])


def percent(value: float) -> str:
    """A share as percent with one decimal, zero without a sign."""
    return f"{round(100 * value, 1) + 0.0:.1f}"
