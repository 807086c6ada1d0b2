"""Pairs of an input and its target, which a trainer draws mini-batches from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from featxfer.checks import ArrayLike, as_features


class PairSource(Protocol):
    """What a trainer draws mini-batches from: pairs of an input and its target."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Indices of the pairs of one epoch, int64 `(m,)`, in the order that they are taken.

        Called as each epoch begins. Where a module draws from torch's global generator, seed that
        here by a draw from `generator`: then a checkpoint goes on to the same weights.
        """
        ...

    def take(self, indices: Tensor) -> tuple[Any, Any]:
        """Inputs and targets of these pairs: tensors, or what can be moved by `to(device)`."""
        ...


@dataclass(frozen=True)
class TensorPairs:
    """Pairs in memory: a row of inputs and one of targets each, on one device."""

    inputs: Tensor
    targets: Tensor

    def order(self, generator: torch.Generator) -> Tensor:
        """All of them, shuffled."""
        return torch.randperm(len(self.inputs), generator=generator, device="cpu")

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these pairs."""
        indices = indices.to(self.inputs.device)
        return self.inputs[indices], self.targets[indices]


def checked_pairs(
    name: str,
    features: ArrayLike,
    targets: Tensor,
    check: Callable[[Tensor, Tensor, int], object],
    device: torch.device,
    width: int | None = None,
) -> TensorPairs:
    """Features and their targets on a device, after `check` of one row, all targets, their number.

    Raises `TypeError` for targets that are no tensor, `ValueError` as `as_features` and `check`.
    """
    rows = as_features(name, features, width=width).to(device)
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: got {type(targets).__name__}, wanted a torch.Tensor")
    targets = targets.to(device)
    try:
        check(rows[:1], targets, len(rows))
    except ValueError as error:
        raise ValueError(f"held_out: {error}" if name == "held_out" else str(error)) from error
    return TensorPairs(rows, targets)
