"""Checks of what callers pass in: an error names the argument, what it got and what it wanted."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ArrayLike: TypeAlias = Tensor | npt.NDArray[np.floating]


def as_features(name: str, value: ArrayLike, *, width: int | None = None) -> Tensor:
    """Returns `value` as a finite, contiguous float32 tensor `(n, d)` without gradient.

    Shares memory with `value` where it already is one. Raises `TypeError` for what is no array,
    and `ValueError` for a wrong number of dimensions, no rows, another width than `width`, or a
    row with NaN or infinity (the first such row is named).
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: got {type(value).__name__}, wanted a torch.Tensor or a numpy array"
        )
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, wanted (n, d) with n >= 1 and d >= 1"
        )
    if width is not None and value.shape[1] != width:
        raise ValueError(f"{name}: got width {value.shape[1]}, wanted {width}")
    features = value.detach().to(torch.float32).contiguous()
    bad = ~torch.isfinite(features).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}: row {row} has NaN or infinity ({int(bad.sum())} such rows of {len(bad)}), "
            "wanted finite values"
        )
    return features


def check_paired(hr: Tensor, lr: Tensor) -> None:
    """Raises `ValueError` unless HR and LR features have the same shape."""
    if hr.shape != lr.shape:
        raise ValueError(
            f"hr, lr: got shapes {tuple(hr.shape)} and {tuple(lr.shape)}, "
            "wanted one HR row for each LR row, of the same width"
        )


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, choices))}")


def check_integer(name: str, value: object, *, at_least: int) -> None:
    """Raises `ValueError` unless `value` is an int, not a bool, and at least `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}: got {value!r}, wanted an int >= {at_least}")
