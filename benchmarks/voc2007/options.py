"""What the command was asked for, checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featxfer import PROTOCOLS, Degradation, Recipe
from featxfer.checks import check_choice, check_integer
from featxfer.evaluation.metrics import AVERAGE_PRECISIONS
from featxfer.modules.head import ACTIVATIONS
from featxfer.modules.scaling import SCALINGS
from featxfer.training.pseudo_labels import ASSIGNMENTS, BACKENDS

SVMS = {"batched": "batched", "reference": "liblinear"}
"""Solvers of `train_svms` by the name for `--svm`."""

CHOICES: Mapping[str, Collection[str]] = {
    "svm": SVMS,
    "labels": ASSIGNMENTS,
    "ap": AVERAGE_PRECISIONS,
}
"""Values of an option by its name."""

METHODS = (
    *("nearest", "paired", "hidden", "random", "centroids", "pca"),  # the paper's, and controls
    *("ridge", "head", "blocks"),  # of the gap benchmark
)
"""Rows of Table 1 besides the two baselines, by the name that `--methods` takes."""


@dataclass(frozen=True)
class Network:
    """The feature transfer network and what it is trained on, but for k, N1, labels and seed.

    What the paper does not state and we chose: `python -m benchmarks.voc2007.tune` compares the
    choices by cross-validation on the training split.
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

    methods: tuple[str, ...]
    root: Path | None
    sample: tuple[int, int]
    splits: tuple[str, str]
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
    curve: bool
    figures: bool
    out: Path
    cache: Path
    svm: str
    jobs: int

    def __post_init__(self) -> None:
        for name in ("clusters", "hidden", "seeds", "jobs"):
            check_integer(name, getattr(self, name), at_least=1)
        for name, known in CHOICES.items():
            check_choice(name, getattr(self, name), known)
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
        names = ("methods", "backbone", "splits", "clusters", "hidden", "protocols", "grid")
        return {
            **{name: getattr(self, name) for name in (*names, "curve", *CHOICES)},
            "data": self.data_name if self.root else "sample of {} and {}".format(*self.sample),
            "weights": self.weights if self.weights in ("pretrained", "demo", "random") else "file",
            "degradation": self.degradation.to_dict(),
            "seeds": list(range(self.seeds)),
            "network": self.network.to_dict(),
        }
