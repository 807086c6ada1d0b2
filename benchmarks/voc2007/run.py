"""The benchmark's stages in order: devkit, features, heads, SVMs, figures of merit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.intervals import gaps, summarise
from benchmarks.common.memo import Memo, hash_key
from benchmarks.common.versions import versions
from benchmarks.voc2007.data import Data, check_devkit, load_data, open_devkit
from benchmarks.voc2007.methods import Row, Sizes, Transfer, table_rows
from benchmarks.voc2007.options import SVMS, Options
from featxfer import PROTOCOLS, Backbone, train_svms
from featxfer.evaluation.metrics import AVERAGE_PRECISIONS
from featxfer.evaluation.svm import average_precisions
from featxfer_integrations import load_backbone

Results = dict[str, Any]
"""What `results.json` holds; tables, figures and the report are drawn from it."""


@dataclasses.dataclass(frozen=True)
class PaperStudy:
    """All that a run works on."""

    options: Options
    data: Data
    transfer: Transfer
    backbone: Backbone
    memo: Memo

    @property
    def sizes(self) -> Sizes:
        """The sizes of Table 1's head."""
        return Sizes(self.options.clusters, self.options.hidden, self.options.labels)


def open_study(options: Options) -> PaperStudy:
    """Checks what can be checked early, then takes the features."""
    devkit = open_devkit(options)
    check_devkit(options, devkit)
    backbone = load_backbone(options.backbone, options.weights)
    data = load_data(options, devkit, backbone)
    features = data.trainval.features
    transfer = Transfer(
        features.hr,
        features.lr,
        options.network,
        options.cache / "heads",
        features.keys,
        (backbone.name, backbone.weights_sha256, options.degradation),
        options.precision,
    )
    return PaperStudy(options, data, transfer, backbone, Memo(options.cache / "rows"))


def run(study: PaperStudy) -> Results:
    """Every figure of the tables, computed or read from earlier, interrupted runs."""
    options, transfer = study.options, study.transfer
    seeds = range(options.seeds)
    transfer.train_heads(_heads(study), options.jobs)
    results: Results = {
        "config": options.to_dict(),
        "data": study.data.describe(),
        "backbone": {"name": study.backbone.name, "sha256": study.backbone.weights_sha256},
        "versions": versions(),
        "diagnostics": [transfer.diagnostics(options.clusters, seed) for seed in seeds],
    }
    rows = table_rows(study.data, transfer, study.sizes)
    results["table1"] = {name: _table1(study, rows, name) for name in options.protocols}
    results["heads"] = {
        labels: [
            transfer.log(dataclasses.replace(study.sizes, labels=labels), seed) for seed in seeds
        ]
        for labels in ("nearest", "paired")
    }
    if options.grid:
        results["table2"] = _table2(study, options.grid)
    return results


def _heads(study: PaperStudy) -> list[tuple[Sizes, int]]:
    """Sizes and seeds of all heads in the tables."""
    options = study.options
    sizes = [dataclasses.replace(study.sizes, labels=labels) for labels in ("nearest", "paired")]
    if options.grid:
        sizes += [Sizes(k, hidden, options.labels) for k, hidden in product(*options.grid)]
    return [(size, seed) for size in dict.fromkeys(sizes) for seed in range(options.seeds)]


def score(study: PaperStudy, row: Row, sizes: Sizes, seed: int, protocol: str) -> dict[str, Any]:
    """SVMs of one row, seed and protocol: AP a class by every definition, C, fits, seconds."""
    splits = (study.data.trainval, study.data.test)
    key = {
        "row": row.label,
        "transfer": [seed, dataclasses.asdict(sizes), study.transfer.network.to_dict()]
        if row.seeded
        else None,
        "protocol": dataclasses.asdict(PROTOCOLS[protocol]),
        "svm": study.options.svm,
        "features": [split.features.keys for split in splits],
        "labels": [hash_key({"labels": split.labels.tolist()}) for split in splits],
    }
    return study.memo.get(key, lambda: _score(study, row, seed, protocol))


def _score(study: PaperStudy, row: Row, seed: int, protocol: str) -> dict[str, Any]:
    train, test = row.run(seed)
    labels, start = study.data.trainval.labels, time.perf_counter()
    name = f"{protocol}: {row.label}, seed {seed}"
    with tqdm(total=labels.shape[1], desc=name, unit="svm", disable=None, leave=False) as bar:
        svms = train_svms(
            train,
            labels,
            PROTOCOLS[protocol],
            solver=SVMS[study.options.svm],
            jobs=study.options.jobs if study.options.svm == "reference" else None,
            callback=lambda _: bar.update(),
        )
    decisions, truth = svms.decisions(test), study.data.test.labels
    return {
        "ap": {kind: average_precisions(decisions, truth, kind) for kind in AVERAGE_PRECISIONS},
        "costs": svms.costs,
        "fits": svms.fits,
        "unconverged": svms.unconverged,
        "width": train.shape[1],
        "seconds": time.perf_counter() - start,
    }


def _table1(study: PaperStudy, rows: dict[str, Row], protocol: str) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, row in rows.items():
        seeds = row.seeds(study.options.seeds)
        scores = [score(study, row, study.sizes, seed, protocol) for seed in seeds]
        per_class = np.array([s["ap"][study.options.ap] for s in scores])
        table[name] = {
            "label": row.label,
            "ap": per_class.mean(0).tolist(),
            "map": summarise(per_class.mean(1).tolist()),
            "runs": scores,
        }
    lr, hr = (table[name]["map"]["mean"] for name in ("baseline-lr", "baseline-hr"))
    for entry in table.values():
        entry["gap_recovered"] = gaps(entry["map"]["values"], lr, hr)
    return table


def _table2(study: PaperStudy, grid: tuple[Sequence[int], Sequence[int]]) -> dict[str, Any]:
    """MAP of the head over N2 = k and N1, by the first protocol."""
    options, cells = study.options, []
    for k in grid[0]:
        for hidden in grid[1]:
            sizes = Sizes(k, hidden, options.labels)
            row = table_rows(study.data, study.transfer, sizes)[sizes.labels]
            scores = [
                score(study, row, sizes, seed, options.protocols[0])
                for seed in range(options.seeds)
            ]
            values = [float(np.mean(s["ap"][options.ap])) for s in scores]
            cells.append({"clusters": k, "hidden": hidden, "map": summarise(values)})
    return {"protocol": options.protocols[0], "cells": cells}
