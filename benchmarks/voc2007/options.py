"""What the command was asked for, checked before anything runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featxfer import PROTOCOLS, Degradation, Recipe
from featxfer.checks import check_choice, check_integer
from featxfer.evaluation.metrics import AVERAGE_PRECISIONS
from featxfer.features.forward import COMPILE, PRECISIONS
from featxfer.modules.head import ACTIVATIONS
from featxfer.modules.scaling import SCALINGS
from featxfer.training.pseudo_labels import ASSIGNMENTS, BACKENDS

METHODS = ("paper", "all")

SVMS = {"reference": "liblinear", "fast": "batched"}
"""Solvers of `train_svms` by the name for `--svm`."""


@dataclass(frozen=True)
class Network:
    """The feature transfer network and what it is trained on, but for k, N1, labels and seed.

    What the paper does not state and we chose: `python -m benchmarks.voc2007.tune` compares the
    choices by cross-validation on trainval.
    """

    scaling: str = "l2"
    standardize: bool = True
    activation: str = "relu"
    kmeans: str = "faiss"
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        check_choice("scaling", self.scaling, SCALINGS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("kmeans", self.kmeans, BACKENDS)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON types."""
        return {**dataclasses.asdict(self), "recipe": self.recipe.to_dict()}


@dataclass(frozen=True)
class Options:
    """The command's options; see `python -m benchmarks.voc2007 --help`."""

    methods: str
    root: Path | None
    sample: tuple[int, int] | None
    backbone: str
    weights: str
    degradation: Degradation
    clusters: int
    hidden: int
    labels: str
    seeds: int
    protocols: tuple[str, ...]
    ap: str
    network: Network
    grid: tuple[tuple[int, ...], tuple[int, ...]] | None
    figures: bool
    out: Path
    cache: Path
    on_error: str
    precision: str
    compile: str
    svm: str
    jobs: int

    def __post_init__(self) -> None:
        check_integer("clusters", self.clusters, at_least=1)
        check_integer("hidden", self.hidden, at_least=1)
        check_integer("seeds", self.seeds, at_least=1)
        check_integer("jobs", self.jobs, at_least=1)
        check_choice("methods", self.methods, METHODS)
        if self.methods == "all" and self.on_error != "raise":
            raise ValueError(f"on_error: got {self.on_error!r} with methods 'all', wanted 'raise'")
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("compile", self.compile, COMPILE)
        check_choice("svm", self.svm, SVMS)
        check_choice("labels", self.labels, ASSIGNMENTS)
        check_choice("ap", self.ap, AVERAGE_PRECISIONS)
        for protocol in self.protocols:
            check_choice("protocol", protocol, PROTOCOLS)
        for size in [size for sizes in self.grid or () for size in sizes]:
            check_integer("grid", size, at_least=1)

    @property
    def data_name(self) -> str:
        """The devkit's folder, with the two above it where they are VOC's; no more of the path."""
        if self.root is None:
            return "sample"
        parts = self.root.resolve().parts
        return "/".join(parts[-3:] if "VOCdevkit" in parts[-2:-1] else parts[-1:])

    @property
    def cluster_counts(self) -> list[int]:
        """All numbers of clusters that will be asked for."""
        return sorted({self.clusters, *(self.grid[0] if self.grid else ())})

    def to_dict(self) -> dict[str, Any]:
        """What results depend on, as JSON types; no paths of this machine."""
        return {
            "methods": self.methods,
            "data": self.data_name,
            "backbone": self.backbone,
            "weights": self.weights if self.weights in ("pretrained", "demo", "random") else "file",
            "degradation": self.degradation.to_dict(),
            "clusters": self.clusters,
            "hidden": self.hidden,
            "labels": self.labels,
            "seeds": list(range(self.seeds)),
            "protocols": list(self.protocols),
            "ap": self.ap,
            "precision": self.precision,
            "compile": self.compile,
            "svm": self.svm,
            "network": self.network.to_dict(),
            "grid": self.grid,
        }
