"""Tables 1 and 2 as text, in the paper's layout, from what `results.json` holds."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.common.markdown import Column, to_markdown
from benchmarks.gap import tables as gap
from benchmarks.voc2007 import paper

CLASSES_A_BLOCK = 20


def render(results: dict[str, Any]) -> str:
    """All tables of a run, with what they are of above them."""
    blocks = [heading(results)]
    for protocol, table in results["table1"].items():
        blocks += [
            f"Protocol {protocol}",
            summary(table, results["data"]["classes"]),
            per_class(table, results["data"]["classes"]),
            unconverged(table),
        ]
    if "table2" in results:
        blocks.append(grid(results["table2"], results["data"]["classes"]))
    if "gap" in results:
        blocks.append(every_method(results["gap"]))
    return "\n\n".join(block for block in blocks if block) + "\n"


def heading(results: dict[str, Any]) -> str:
    """Data, backbone, degradation, seeds and the labels' diagnostics in a few lines."""
    config, data = results["config"], results["data"]
    images, degradation = data["images"], config["degradation"]
    kind = "SYNTHETIC images rendered by this project" if data["synthetic"] else config["data"]
    agreement = [d["agreement"] for d in results["diagnostics"]]
    skipped = sum(len(s) for s in data["skipped"].values())
    return "\n".join(
        [
            f"Data: {kind}; {images['trainval']} trainval and {images['test']} test images, "
            f"{len(data['classes'])} classes" + (f"; {skipped} images skipped" if skipped else ""),
            f"Backbone: {results['backbone']['name']} ({config['weights']} weights, "
            f"{results['backbone']['sha256'][:12]}), {data['width']}-D",
            f"LR: {degradation['lr_size']} pixels, {degradation['kernel']}, antialias "
            f"{degradation['antialias']}, order {degradation['order']!r}",
            f"Seeds: {len(config['seeds'])}; AP: {config['ap']}; k = {config['clusters']}, "
            f"N1 = {config['hidden']}",
            "Nearest and paired pseudo-labels agree for "
            f"{percent(sum(agreement) / len(agreement))}% of the LR training images",
        ]
    )


def diagnostics(found: dict[str, Any]) -> str:
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


def summary(table: dict[str, Any], classes: list[str]) -> str:
    """The mAP and the gap recovered of each row, with 95% intervals over seeds."""
    spread = "95% interval"
    lines = [f"{'':34}{'mAP %':>8}  {spread:<16}{'gap recovered %':>15}  {spread}"]
    for entry in table.values():
        gap = entry["gap_recovered"]
        lines.append(
            f"{entry['label']:34}{percent(entry['map']['mean']):>8}  {interval(entry['map']):<16}"
            + (f"{percent(gap['mean']):>15}  {interval(gap)}" if gap else f"{'no gap':>15}")
        )
    lines = [line.rstrip() for line in lines]
    if classes == paper.CLASSES:
        lines += [f"{'[1] ' + row:34}{v:>8.1f}" for row, v in paper.TABLE1_MAP.items()]
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """The mAP and the gap recovered of each row under every protocol, in Markdown."""
    tables = results["table1"]
    columns: list[Column[str]] = [("", lambda name: next(iter(tables.values()))[name]["label"])]
    for protocol, table in tables.items():
        columns.append((f"{protocol}: mAP %", partial(_cell, table, "map")))
        columns.append((f"{protocol}: gap recovered %", partial(_cell, table, "gap_recovered")))
    text = to_markdown(next(iter(tables.values())), columns)
    return text + "\n" + every_method(results["gap"]) if "gap" in results else text


def _cell(table: dict[str, Any], name: str, row: str) -> str:
    summary = table[row][name]
    return in_percent(summary) if summary else "no gap"


def every_method(found: dict[str, Any]) -> str:
    """The gap benchmark's two tables, in Markdown."""
    return (
        f"Every method, protocol {found['config']['protocol']}, batched solver:\n\n"
        f"{gap.all_rows(found['table'])}\nFew labels:\n\n{gap.few_labels(found['table'])}"
    )


def per_class(table: dict[str, Any], classes: list[str]) -> str:
    """AP of each class, mean over seeds, as the paper's Table 1; 20 classes a block."""
    rows = [(entry["label"], [100 * ap for ap in entry["ap"]]) for entry in table.values()]
    if classes == paper.CLASSES:
        rows += [(f"[1] {row}", aps) for row, aps in paper.TABLE1.items()]
    blocks = []
    for start in range(0, len(classes), CLASSES_A_BLOCK):
        part = slice(start, start + CLASSES_A_BLOCK)
        lines = [" " * 34 + "".join(f"{_short(name):>8}" for name in classes[part])]
        lines += [f"{label:34}" + "".join(f"{ap:8.1f}" for ap in aps[part]) for label, aps in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def unconverged(table: dict[str, Any]) -> str:
    """Says how many SVM fits stopped at the limit of iterations, where any did."""
    counts = {
        entry["label"]: (sum(r["unconverged"] for r in runs), sum(r["fits"] for r in runs))
        for entry in table.values()
        for runs in [entry["runs"]]
    }
    told = [f"{label}: {n} of {fits}" for label, (n, fits) in counts.items() if n]
    return "SVM fits stopped at the limit of iterations: " + "; ".join(told) if told else ""


def grid(table2: dict[str, Any], classes: list[str]) -> str:
    """The mAP over N2 = k (rows) and N1 (columns), as the paper's Table 2."""
    cells = {(cell["clusters"], cell["hidden"]): cell["map"] for cell in table2["cells"]}
    ks, hiddens = sorted({k for k, _ in cells}), sorted({h for _, h in cells})
    lines = [f"Grid, protocol {table2['protocol']}: mAP % (rows N2 = k, columns N1)"]
    lines.append(f"{'':6}" + "".join(f"{hidden:>16}" for hidden in hiddens))
    for k in ks:
        values = (cells[k, hidden] for hidden in hiddens)
        lines.append(f"{k:<6}" + "".join(f"{in_percent(value):>16}" for value in values))
    if classes == paper.CLASSES:
        lines.append(f"{'[1]':6}" + "".join(f"{hidden:>16}" for hidden in paper.TABLE2[100]))
        for k, row in paper.TABLE2.items():
            lines.append(f"{k:<6}" + "".join(f"{value:>16.1f}" for value in row.values()))
    return "\n".join(lines)


def _short(name: str) -> str:
    """At most 7 letters of a class name, from its first two words."""
    words = name.split("_")
    return name[:7] if len(words) == 1 else "_".join(word[:3] for word in words[:2])


def percent(value: float) -> str:
    """A share as percent with one decimal, zero without a sign."""
    return f"{round(100 * value, 1) + 0.0:.1f}"


def interval(summary: dict[str, Any]) -> str:
    """`[low, high]` in percent, or nothing for a single value."""
    if summary["low"] is None:
        return ""
    return f"[{percent(summary['low'])}, {percent(summary['high'])}]"


def in_percent(summary: dict[str, Any]) -> str:
    """`mean ± half width` in percent, or the mean alone."""
    if summary["low"] is None:
        return percent(summary["mean"])
    return f"{percent(summary['mean'])} ± {percent((summary['high'] - summary['low']) / 2)}"
