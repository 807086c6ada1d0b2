"""The benchmark's stages in order: devkit, features, heads, rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common import table
from benchmarks.common.intervals import summarise
from benchmarks.common.study import PARTS, Study
from benchmarks.common.versions import versions
from benchmarks.voc2007.curve import measure_curve
from benchmarks.voc2007.methods import Sizes, Transfer, paper_rows, table_methods
from benchmarks.voc2007.options import SVMS, Options
from benchmarks.voc2007.sample_devkit import render_sample
from featxfer import PROTOCOLS, VOCDevkit
from featxfer.evaluation.protocols import check_classes
from featxfer_integrations import backbone_of

Results = dict[str, Any]
"""What `results.json` holds; tables, figures and the report are drawn from it."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """All that a run works on."""

    options: Options
    study: Study
    transfer: Transfer

    @property
    def sizes(self) -> Sizes:
        """The sizes of Table 1's head."""
        return Sizes(self.options.clusters, self.options.hidden, self.options.labels)

    @cached_property
    def studies(self) -> dict[str, Study]:
        """The study under each protocol; each has its model and features once."""
        return {
            name: dataclasses.replace(self.study, protocol=PROTOCOLS[name])
            for name in self.options.protocols
        }


def open_bench(options: Options) -> Bench:
    """Checks what can be checked early, then takes the features."""
    study = Study(
        options.backbone,
        options.weights,
        _open_devkit(options),
        options.cache,
        options.degradation,
        ap=options.ap,
        solver=SVMS[options.svm],
        splits=options.splits,
    )
    _check(options, study)
    return Bench(options, study, Transfer.of(study, options.degradation, options.network))


def _open_devkit(options: Options) -> VOCDevkit:
    """The devkit at the root that was given, or the rendered sample."""
    if options.root is not None:
        return VOCDevkit(options.root)
    count, tested = options.sample
    folder = options.cache / f"sample-{count}-{tested}"
    with tqdm(total=count + tested, desc="rendering the sample", unit="img", disable=None) as bar:

        def advance(done: int, _: int) -> None:
            bar.update(done - bar.n)

        render_sample(folder, trainval=count, test=tested, progress=advance)
    return VOCDevkit(folder)


def _check(options: Options, study: Study) -> None:
    """Raises what labels, missing images and too many clusters would raise after the long work."""
    for part in PARTS:
        study.images(part)
        study.labels(part)
    for protocol in options.protocols:
        check_classes(study.labels("train"), PROTOCOLS[protocol], study.devkit.classes)
    split, count = study.split("train"), len(study.labels("train"))
    for k in options.cluster_counts:
        if k > count:
            raise ValueError(
                f"clusters: got {k} for {count} {split} images, wanted at most {count}"
            )


def run(bench: Bench) -> Results:
    """Every figure of the tables, computed or read from earlier, interrupted runs."""
    options, study, transfer = bench.options, bench.study, bench.transfer
    seeds, backbone = range(options.seeds), backbone_of(study.model)
    transfer.train_heads(_heads(bench), options.jobs)
    results: Results = {
        "config": options.to_dict(),
        "data": {
            "synthetic": options.root is None,
            "classes": list(study.devkit.classes),
            "images": study.counts,
            "width": study.hr[0].shape[1],
        },
        "backbone": {"name": backbone.name, "sha256": backbone.weights_sha256},
        "versions": versions(),
        "diagnostics": [transfer.diagnostics(options.clusters, seed) for seed in seeds],
        "tables": {name: _table(bench, name) for name in options.protocols},
        "heads": {
            labels: [transfer.log(sizes, seed) for seed in seeds]
            for labels, sizes in _taught(bench).items()
        },
    }
    if options.grid:
        results["grid"] = _grid(bench, options.grid)
    if options.curve:
        rows = paper_rows(transfer, bench.sizes)
        results["curve"] = measure_curve(study, rows, options.degradation, options.seeds)
    return results


def _taught(bench: Bench) -> dict[str, Sizes]:
    """The heads that are asked for, by their labels."""
    kinds = ("nearest", "paired")
    wanted = {bench.options.labels, *bench.options.methods}
    return {k: dataclasses.replace(bench.sizes, labels=k) for k in kinds if k in wanted}


def _heads(bench: Bench) -> list[tuple[Sizes, int]]:
    """Sizes and seeds of all heads in the tables."""
    options, sizes = bench.options, list(_taught(bench).values())
    if options.grid:
        sizes += [Sizes(k, hidden, options.labels) for k, hidden in product(*options.grid)]
    return [(size, seed) for size in dict.fromkeys(sizes) for seed in range(options.seeds)]


def _table(bench: Bench, protocol: str) -> dict[str, Any]:
    """Summaries by row; APs of each class are means over seeds."""
    options = bench.options
    methods = table_methods(bench.transfer, bench.sizes)
    asked = {name: methods[name] for name in methods if name in {"hr", "lr", *options.methods}}
    rows = table.run(bench.studies[protocol], asked, options.degradation, options.seeds)
    found = table.with_gaps(rows)
    for label, runs in rows.items():
        classes, svms = ([run[name] for run in runs] for name in ("classes", "svms"))
        found[label]["classes"] = {
            kind: np.mean([part[kind] for part in classes], axis=0).tolist() for kind in classes[0]
        }
        found[label]["svms"] = svms
    return found


def _grid(bench: Bench, grid: tuple[Sequence[int], Sequence[int]]) -> list[dict[str, Any]]:
    """MAP of the head over N2 = k and N1, by each protocol."""
    options, cells = bench.options, []
    for protocol, k, hidden in product(options.protocols, *grid):
        sizes = Sizes(k, hidden, options.labels)
        row = paper_rows(bench.transfer, sizes)[options.labels]
        study, method = bench.studies[protocol], {options.labels: row.method}
        (runs,) = table.run(study, method, options.degradation, options.seeds).values()
        summary = summarise([run["retrain"] for run in runs])
        cells.append({"protocol": protocol, "clusters": k, "hidden": hidden, "map": summary})
    return cells
