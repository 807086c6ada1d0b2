"""Checks of what callers pass in: an error names the argument, what it got and what it wanted."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ArrayLike: TypeAlias = Tensor | npt.NDArray[np.floating]


LARGEST_NORM = 1e18
"""Of a feature: float32 has no room for the squares of larger distances."""


def as_features(name: str, value: ArrayLike, *, width: int | None = None) -> Tensor:
    """Returns `value` as a finite, contiguous float32 tensor `(n, d)` on the CPU without gradient.

    Rows come from any device and any mixture of them: what is computed of rows alone is computed on
    the CPU, and what runs in a module goes to the module's device. Shares memory with `value` where
    it already is one that may be written to. Raises `TypeError`
    for what is no array, and `ValueError` for a wrong number of dimensions, no rows, another width
    than `width`, or a row with NaN, infinity or a norm above `LARGEST_NORM` (the first such row is
    named).
    """
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value, dtype=np.float32)
        # torch takes no negative strides, which a side of 1 may keep, and warns of read-only memory
        fits = array.flags.writeable and min(array.strides, default=0) >= 0
        value = torch.from_numpy(array if fits else array.copy())
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
    features = value.detach().to("cpu", torch.float32).contiguous()
    norms = torch.linalg.vector_norm(features, dim=1)
    bad = ~(norms <= LARGEST_NORM)
    if bad.any():
        row = int(bad.nonzero()[0])
        finite = bool(torch.isfinite(features[row]).all())
        raise ValueError(
            f"{name}: row {row} has {'too large a norm' if finite else 'NaN or infinity'} "
            f"({int(bad.sum())} such rows of {len(bad)}), wanted finite values, and a norm of at "
            f"most {LARGEST_NORM:g}"
        )
    return features


def variance_of(name: str, rows: Tensor) -> float:
    """Mean squared distance of `(n, d)` rows to their mean; `ValueError` where all are equal."""
    variance = float((rows - rows.mean(0)).square().sum(1).mean())
    if variance == 0 or bool((rows == rows[0]).all()):  # the mean of equal rows is rounded
        raise ValueError(f"{name}: got {len(rows)} equal rows, wanted features that vary")
    return variance


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


def check_floating(name: str, value: Tensor) -> None:
    """Raises `ValueError` for integers, which a result in their dtype would be cut to."""
    if not value.is_floating_point():
        raise ValueError(f"{name}: got {value.dtype}, wanted a floating-point dtype")


def check_integer(name: str, value: object, *, at_least: int) -> None:
    """Raises `ValueError` unless `value` is an int, not a bool, and at least `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}: got {value!r}, wanted an int >= {at_least}")
