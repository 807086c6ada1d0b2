"""Named protocols: how linear SVMs on features are trained and judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from featxfer.checks import check_choice, check_integer


@dataclass(frozen=True)
class Protocol:
    """How SVMs are trained.

    Args:
        name: the protocol's name.
        costs: values of C. With more than one, each class takes the value with the highest mean
            AP ("step") over stratified folds, the first of equals.
        folds: number of folds, where there is a choice of C.
        normalize: whether rows are divided by their L2 norm (plus 1e-5, as VISSL does).
        positive_weight: weight of positive rows, where negative ones weigh 1.
        difficult: what a training image with only difficult instances of the class is: "negative",
            or "ignored". At test it is always ignored.
        max_iter: of LIBLINEAR's dual coordinate descent.

    Raises:
        ValueError: a value outside of these.
    """

    name: str
    costs: tuple[float, ...]
    folds: int = 3
    normalize: bool = True
    positive_weight: float = 2.0
    difficult: str = "negative"
    max_iter: int = 2000

    def __post_init__(self) -> None:
        check_choice("difficult", self.difficult, ("negative", "ignored"))
        check_integer("folds", self.folds, at_least=2)
        check_integer("max_iter", self.max_iter, at_least=1)
        if not self.costs or not all(0 < cost < math.inf for cost in self.costs):
            raise ValueError(f"costs: got {self.costs}, wanted at least one value of C > 0")
        if not 0 < self.positive_weight < math.inf:
            raise ValueError(f"positive_weight: got {self.positive_weight!r}, wanted > 0")


PROTOCOLS = MappingProxyType(
    {
        # Goyal et al. 2019 as VISSL's configuration for VOC07 has it.
        "vissl": Protocol("vissl", (0.01, 0.1, 1.0, 2, 5, 10, 15, 20, 50, 100, 1000)),
        # Desai and Johnson 2021, VirTex's script for VOC07.
        "virtex": Protocol("virtex", (0.01, 0.1, 1.0, 10.0)),
        # Ours: a plain call without any choice, nearest to what the paper may have done.
        "plain": Protocol(
            "plain",
            (1.0,),
            normalize=False,
            positive_weight=1.0,
            difficult="ignored",
            max_iter=10000,
        ),
    }
)
"""The protocols by name."""


def check_classes(
    labels: npt.NDArray[np.integer], protocol: Protocol, names: Sequence[str] | None = None
) -> None:
    """Raises `ValueError` for a class with too few positive or negative rows for the folds.

    Args:
        labels: `(n, classes)` in {1, 0, -1}.
        protocol: see `PROTOCOLS`.
        names: of the classes, for the message.
    """
    least = protocol.folds if len(protocol.costs) > 1 else 1
    for column, name in enumerate(names or [str(c) for c in range(labels.shape[1])]):
        targets = targets_of(labels[:, column], protocol)[1]
        for kind, sign in (("positive", 1), ("negative", -1)):
            count = int((targets == sign).sum())
            if count < least:
                raise ValueError(
                    f"labels: class {name} has {count} {kind} rows, "
                    f"protocol {protocol.name!r} wants at least {least}"
                )


def targets_of(
    labels: npt.NDArray[np.integer], protocol: Protocol
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Which rows are used, and their targets in {1, -1}."""
    used = labels != 0 if protocol.difficult == "ignored" else np.ones(len(labels), dtype=bool)
    return used, np.where(labels[used] == 1, 1, -1)
