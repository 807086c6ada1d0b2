"""The same bits from the same run, and nearly the same ones however the work is laid out."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from benchmarks.torture.crash import VIEW, make_photographs, small_backbone
from benchmarks.torture.outcome import Outcome
from featxfer import (
    PROTOCOLS,
    FeatureTransferHead,
    Recipe,
    extract_features,
    fit_features_head,
    kmeans,
    open_images,
    train_svms,
)
from featxfer.evaluation.svm import average_precisions
from featxfer.modules.scaling import scale_features

MOST_DIFFERENCE = 1e-5
"""Of features, relative to the largest, between layouts of the work."""

MOST_MAP = 0.05
"""Of mAP, in points."""

RECIPE = Recipe(epochs=3, batch_size=16, learning_rate=1e-3, optimizer="adamw", steps=())


def pipeline(
    photographs: Path, cache: Path, *, batch_size: int = 64, part_rows: int = 256, threads: int = 1
) -> dict[str, torch.Tensor]:
    """Features, clusters, a head and SVMs of the transferred features: what they come to."""
    torch.set_num_threads(threads)
    found = extract_features(
        small_backbone(),
        open_images(photographs),
        VIEW,
        cache,
        batch_size=batch_size,
        part_rows=part_rows,
    )
    clustering = kmeans(scale_features(found.hr, "l2"), 4, seed=0)
    head = FeatureTransferHead(found.hr.shape[1], clustering.k, 16)
    fit_features_head(head, found.hr, [found.lr], clustering, recipe=RECIPE, seed=0)
    transferred = head.eval().transfer(found.lr)
    labels = np.where(found.hr.numpy()[:, :2] > np.median(found.hr, axis=0)[:2], 1, -1)
    labels = labels.astype(np.int8)
    svms = train_svms(found.hr, labels, PROTOCOLS["virtex"])
    precisions = average_precisions(svms.decisions(transferred), labels)
    return {
        "hr": found.hr,
        "lr": found.lr,
        "centroids": clustering.centroids,
        "transferred": transferred.detach().contiguous(),
        "map": torch.tensor([100 * float(np.mean(precisions))], dtype=torch.float64),
        "order": torch.tensor([int(name.partition(".")[0]) for name in found.ids]),
    }


def in_another_process(
    photographs: Path, out: Path, environment: Mapping[str, str], **options: Any
) -> dict[str, torch.Tensor]:
    """`pipeline` in a fresh process, with a cache of its own."""
    arguments = [sys.executable, "-m", __name__, str(photographs), str(out), json.dumps(options)]
    subprocess.run(arguments, check=True, env={**os.environ, **environment})
    return dict(safetensors.torch.load_file(out / "found.safetensors"))


LAYOUTS: Sequence[tuple[str, Mapping[str, str], Mapping[str, Any]]] = (
    ("batches of 1", {}, {"batch_size": 1}),
    ("batches of 7", {}, {"batch_size": 7}),
    ("parts of 5 images", {}, {"part_rows": 5}),
    ("two threads", {"OMP_NUM_THREADS": "2"}, {"threads": 2}),
)
"""Names, environments and options of `pipeline`."""


def run_repeats(
    folder: Path,
    repeats: int,
    photographs: int = 300,
    layouts: Sequence[tuple[str, Mapping[str, str], Mapping[str, Any]]] = LAYOUTS,
) -> Outcome:
    """`repeats` fresh processes give the same bits; other layouts of the work nearly the same."""
    source = make_photographs(folder / "photographs", photographs)
    faults: list[str] = []
    digests: list[str] = []
    first: dict[str, torch.Tensor] = {}
    for number in range(repeats):
        found = in_another_process(source, folder / f"again{number}", {"OMP_NUM_THREADS": "1"})
        digests.append(_digest(found))
        first = first or found
    faults += [
        f"run {n}: other bits than the first" for n, d in enumerate(digests) if d != digests[0]
    ]
    differences: dict[str, float] = {}
    for name, environment, options in layouts:
        found = in_another_process(
            source,
            folder / name.replace(" ", "-"),
            {"OMP_NUM_THREADS": "1", **environment},
            **options,
        )
        if not found["order"].equal(first["order"]):
            faults.append(f"{name}: another order")
        differences[name] = max(
            float((found[view] - first[view]).abs().max() / first[view].abs().max())
            for view in ("hr", "lr")
        )
        if differences[name] > MOST_DIFFERENCE:
            faults.append(f"{name}: features differ by {differences[name]:.1e}")
        apart = abs(float(found["map"] - first["map"]))
        if apart > MOST_MAP:
            faults.append(f"{name}: mAP differs by {apart:.2f} points")
    figures = {"same bits": digests.count(digests[0]), "differences": differences}
    return Outcome(repeats + len(layouts), faults, figures)


def _digest(found: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(safetensors.torch.save(dict(found))).hexdigest()


if __name__ == "__main__":
    target = Path(sys.argv[2])
    made = pipeline(Path(sys.argv[1]), target / "cache", **json.loads(sys.argv[3]))
    safetensors.torch.save_file(made, target / "found.safetensors")
