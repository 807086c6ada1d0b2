"""`python -m benchmarks.voc2007.tune`: what the paper leaves open, cross-validated on trainval.

Varies one choice at a time around the defaults of `Network` and `Sizes`. Nothing here sees a test
image: heads and SVMs are trained on two thirds of trainval and scored on the last third, three
times, with one seed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks.common.memo import Memo, hash_key
from benchmarks.common.results import to_json, write_files
from benchmarks.common.shell import cache_option, root_option, told_errors
from benchmarks.common.versions import versions
from benchmarks.voc2007.command import DEMO_BACKBONE
from benchmarks.voc2007.methods import Sizes, Transfer
from benchmarks.voc2007.options import Network
from featxfer import (
    PROTOCOLS,
    Backbone,
    Degradation,
    Features,
    VOCDevkit,
    extract_features,
    train_svms,
)
from featxfer.evaluation.svm import average_precisions
from featxfer.evaluation.voc import Labels
from featxfer_integrations import load_backbone

FOLDS = 3
DEFAULT = (Network(), Sizes(100, 4096, "nearest"), "output", "virtex")
NETWORK: list[tuple[str, Any]] = [
    ("scaling", "none"),
    ("standardize", False),
    ("activation", "gelu"),
    ("activation", "identity"),
]
RECIPE: list[tuple[str, Any]] = [
    ("learning_rate", 0.003),
    ("learning_rate", 0.01),
    ("learning_rate", 0.1),
    ("epochs", 3),
    ("epochs", 10),
    ("epochs", 100),
    ("weight_decay", 0.0),
    ("weight_decay", 5e-3),
    ("batch_size", 32),
    ("batch_size", 512),
]
SIZES: list[tuple[str, Any]] = [
    ("clusters", 20),
    ("clusters", 50),
    ("clusters", 200),
    ("clusters", 500),
    ("hidden", 256),
    ("hidden", 1024),
    ("labels", "paired"),
]
Choice = tuple[Network, Sizes, str, str]
"""Network, sizes, the layer that the SVMs see, their protocol."""


def choices() -> Iterator[tuple[str, Choice]]:
    """The defaults, then each with one thing changed."""
    network, sizes, layer, protocol = DEFAULT
    yield "defaults", DEFAULT
    for name, value in NETWORK:
        changed = dataclasses.replace(network, **{name: value})
        yield f"{name} {value}", (changed, sizes, layer, protocol)
    for name, value in RECIPE:
        recipe = dataclasses.replace(network.recipe, **{name: value})
        changed = dataclasses.replace(network, recipe=recipe)
        yield f"{name} {value}", (changed, sizes, layer, protocol)
    for name, value in SIZES:
        yield (
            f"{name} {value}",
            (network, dataclasses.replace(sizes, **{name: value}), layer, protocol),
        )
    paired = dataclasses.replace(sizes, clusters=500, labels="paired")
    yield "clusters 500, labels paired", (network, paired, layer, protocol)
    yield "SVMs on the hidden activations", (network, sizes, "hidden", protocol)
    yield "protocol plain", (network, sizes, layer, "plain")


@click.command(context_settings={"show_default": True})
@root_option
@click.option("--split", default="trainval", help="Of the devkit.")
@click.option("--backbone", default=DEMO_BACKBONE)
@click.option("--weights", default="demo")
@click.option("--lr-size", default=32)
@cache_option
@click.option("--out", type=Path, default=Path("runs") / "voc2007" / "tuning")
def main(
    root: Path, split: str, backbone: str, weights: str, lr_size: int, cache: Path, out: Path
) -> None:
    """Compares the choices; writes tuning.json and tuning.txt. May be interrupted and resumed."""
    with told_errors():
        _tune(root, split, backbone, weights, lr_size, cache, out)


def _tune(
    root: Path, split: str, backbone: str, weights: str, lr_size: int, cache: Path, out: Path
) -> None:
    devkit, host = VOCDevkit(root), load_backbone(backbone, weights)
    degradation = Degradation(lr_size=lr_size)
    features = extract_features(host, devkit.images(split), degradation, cache / "features")
    bench = Bench(features, devkit.labels(split), host, degradation, cache)
    rows = []
    for name, choice in tqdm(list(choices()), desc="choices", disable=None):
        folds = bench.score(choice)
        rows.append({"choice": name, "folds": folds})
        click.echo(_line(name, folds), err=True)
    baselines = {
        p: {view: bench.baseline(view, p) for view in ("hr", "lr")} for p in ("virtex", "plain")
    }
    results = {
        "defaults": describe(DEFAULT),
        "backbone": host.name,
        "degradation": degradation.to_dict(),
        "images": len(features.ids),
        "folds": FOLDS,
        "seed": 0,
        "ap": "step",
        "versions": versions(),
        "baselines": baselines,
        "choices": rows,
    }
    write_files(out, {"tuning.json": to_json(results), "tuning.txt": table(results)})
    click.echo(table(results))
    click.echo(f"Wrote tuning.json and tuning.txt to {out}", err=True)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Trainval's features and labels, and where finished folds are kept."""

    features: Features
    labels: Labels
    backbone: Backbone
    degradation: Degradation
    cache: Path

    def score(self, choice: Choice) -> list[float]:
        """Held-out mAP (step AP) of each fold for one choice."""
        return self._folds(describe(choice), lambda fold: self._fold(choice, fold))

    def baseline(self, view: str, protocol: str) -> list[float]:
        """Held-out mAP of each fold for the plain "hr" or "lr" features."""
        rows = getattr(self.features, view)
        key = {"baseline": view, "protocol": dataclasses.asdict(PROTOCOLS[protocol])}
        return self._folds(key, lambda fold: self._svms(rows, protocol, fold))

    @property
    def _labels_key(self) -> str:
        return hash_key({"labels": self.labels.tolist()})

    def _folds(self, key: dict[str, Any], compute: Callable[[int], float]) -> list[float]:
        memo = Memo(self.cache / "tuning")
        full = {"tune": key, "features": self.features.keys, "labels": self._labels_key}
        values = [
            memo.get({**full, "fold": fold}, partial(_named_map, compute, fold))
            for fold in range(FOLDS)
        ]
        return [float(value["map"]) for value in values]

    def _fold(self, choice: Choice, fold: int) -> float:
        network, sizes, layer, protocol = choice
        train = np.flatnonzero(~self._held_out(fold))
        transfer = Transfer(
            self.features.hr[train],
            self.features.lr[train],
            network,
            self.cache / "heads",
            [hash_key(self.features.keys), self._labels_key, f"fold {fold} of {FOLDS}"],
            (self.backbone.name, self.backbone.weights_sha256, self.degradation),
        )
        head = transfer.head(sizes, 0)
        return self._svms(
            head.transfer(transfer.scale(self.features.lr), layer=layer), protocol, fold
        )

    def _svms(self, rows: Any, protocol: str, fold: int) -> float:
        held_out = self._held_out(fold)
        jobs = os.cpu_count() or 1
        svms = train_svms(rows[~held_out], self.labels[~held_out], PROTOCOLS[protocol], jobs=jobs)
        decisions = svms.decisions(rows[held_out])
        return float(np.mean(average_precisions(decisions, self.labels[held_out], "step")))

    def _held_out(self, fold: int) -> npt.NDArray[np.bool_]:
        """Which rows a fold holds out, balanced over the first class that each image shows."""
        first = (self.labels == 1).argmax(1)
        held_out = np.zeros(len(first), dtype=bool)
        for c in np.unique(first):
            rows = np.random.default_rng(int(c)).permutation(np.flatnonzero(first == c))
            held_out[rows[fold::FOLDS]] = True
        return held_out


def _named_map(compute: Callable[[int], float], fold: int) -> dict[str, Any]:
    return {"map": compute(fold)}


def describe(choice: Choice) -> dict[str, Any]:
    """A choice as JSON types."""
    network, sizes, layer, protocol = choice
    return {
        "network": network.to_dict(),
        "sizes": dataclasses.asdict(sizes),
        "layer": layer,
        "protocol": protocol,
    }


def table(results: dict[str, Any]) -> str:
    """Held-out mAP in %: mean over folds, and each fold."""
    lines = [
        f"{results['backbone']}, {results['degradation']['lr_size']} pixels, {results['images']} "
        f"trainval images, {FOLDS}-fold cross-validation, seed 0, step AP",
        f"{'':34}{'mAP %':>7}   folds",
    ]
    for protocol, views in results["baselines"].items():
        lines += [_line(f"Baseline-{v.upper()}, {protocol}", folds) for v, folds in views.items()]
    lines += [_line(row["choice"], row["folds"]) for row in results["choices"]]
    return "\n".join(lines) + "\n"


def _line(name: str, folds: list[float]) -> str:
    each = "  ".join(f"{100 * fold:.1f}" for fold in folds)
    return f"{name:34}{100 * np.mean(folds):7.1f}   {each}"


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.voc2007.tune")
