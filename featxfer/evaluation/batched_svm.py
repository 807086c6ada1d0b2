"""All the linear SVMs of one set of rows at once: squared hinge in the primal, columns of one X.

What it minimises is what LIBLINEAR's `LinearSVC` does (squared hinge, the intercept regularised as
one more weight). L-BFGS (Nocedal 1980) runs on all columns side by side, in the rows' singular
basis, where each column is scaled by the Hessian that it would have with every row active. Along a
direction the loss is piecewise quadratic in one number, so the line search is exact and needs no
product with X.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

HISTORY = 10
MAX_ITERATIONS = 300


class SingularBasis:
    """Rows `(n, d)` and a column of ones, as `(n, r)` in the basis of their singular vectors.

    Args:
        rows: `(n, d)`, float64.
    """

    def __init__(self, rows: Tensor) -> None:
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
        if len(rows) < rows.shape[1]:
            left, self.scale, self.basis = torch.linalg.svd(rows, full_matrices=False)
            self.rows = left * self.scale
        else:  # sooner; what is lost of small singular values only guides the steps
            squares, vectors = torch.linalg.eigh(rows.T @ rows)
            self.scale, self.basis = squares.clamp(min=0).sqrt(), vectors.T
            self.rows = rows @ vectors

    def single(self) -> SingularBasis:
        """The same in float32; what is solved in it runs in float32."""
        copied = copy.copy(self)
        copied.rows, copied.scale, copied.basis = (
            part.float() for part in (self.rows, self.scale, self.basis)
        )
        return copied

    def weights(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `(m, d)` and intercepts `(m,)` of columns `(r, m)` in this basis."""
        weights = columns.T @ self.basis
        return weights[:, :-1], weights[:, -1]


def solve(
    basis: SingularBasis,
    targets: Tensor,
    costs: Tensor,
    start: Tensor | None = None,
    *,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Minimises `|w|^2 / 2 + sum_i costs_i max(0, 1 - targets_i x_i w)^2` for each column.

    Args:
        basis: of the rows.
        targets: `(n, m)` in {1, -1}.
        costs: `(n, m)`, >= 0: C times the row's weight; 0 leaves the row out of the column.
        start: columns `(r, m)` to start from, such as those of a smaller C.
        tolerance: a column is done when its scaled gradient is this share of that at zero.

    Returns the columns `(r, m)`, and which stopped at the limit of iterations, bool `(m,)`.
    """
    x = basis.rows
    inverse = 1 / (1 + 2 * basis.scale.square()[:, None] * (costs.sum(0) / len(x)))
    columns = torch.zeros_like(inverse) if start is None else start.clone()
    at_zero = _norm(2 * (x.T @ (targets * costs)), inverse)
    left = torch.arange(targets.shape[1], device=x.device)
    stopped = torch.zeros_like(left, dtype=torch.bool)
    w, y, c, scores = columns, targets, costs, x @ columns
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    gradient = _gradient(x, w, y, c, scores)
    for _ in range(MAX_ITERATIONS):
        done = _norm(gradient, inverse) <= tolerance * at_zero
        if done.any():
            columns[:, left[done]] = w[:, done]
            keep = ~done
            if not keep.any():
                return columns, stopped
            left, at_zero = left[keep], at_zero[keep]
            w, y, c, scores, gradient, inverse = (
                part[:, keep] for part in (w, y, c, scores, gradient, inverse)
            )
            pairs = [(s[:, keep], g[:, keep], rho[keep]) for s, g, rho in pairs]
        direction = _direction(gradient, inverse, pairs)
        along = x @ direction
        step = _line_search(w, direction, y, c, scores, along)
        moved = step * direction
        w, scores = w + moved, scores + step * along
        following = _gradient(x, w, y, c, scores)
        change = following - gradient
        curvature = (moved * change).sum(0)
        rho = torch.where(curvature > 0, 1 / curvature.clamp(min=1e-30), 0)
        pairs = [*pairs[-HISTORY + 1 :], (moved, change, rho)]
        gradient = following
    columns[:, left] = w
    stopped[left] = True
    return columns, stopped


def _gradient(x: Tensor, w: Tensor, y: Tensor, c: Tensor, scores: Tensor) -> Tensor:
    return w - 2 * (x.T @ (c * y * (1 - y * scores).clamp_(min=0)))


def _norm(gradient: Tensor, inverse: Tensor) -> Tensor:
    return (gradient.square() * inverse).sum(0).sqrt()


def _direction(
    gradient: Tensor, inverse: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """The two-loop recursion of L-BFGS, on all columns; a pair with rho = 0 does nothing."""
    q = gradient.clone()
    shares = []
    for s, g, rho in reversed(pairs):
        share = rho * (s * q).sum(0)
        q -= share * g
        shares.append(share)
    q *= inverse
    for (s, g, rho), share in zip(pairs, reversed(shares), strict=True):
        q += (share - rho * (g * q).sum(0)) * s
    return -q


def _line_search(
    w: Tensor, direction: Tensor, y: Tensor, c: Tensor, scores: Tensor, along: Tensor
) -> Tensor:
    """The minimum along the direction, by Newton steps on the derivative kept in a bracket."""
    linear, square = (w * direction).sum(0), direction.square().sum(0)
    margin, slope = 1 - y * scores, y * along
    step = torch.ones_like(linear)
    low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
    for _ in range(12):
        hinge = (margin - step * slope).clamp_(min=0)
        first = linear + step * square - 2 * (c * slope * hinge).sum(0)
        second = square + 2 * (c * slope.square() * (hinge > 0)).sum(0)
        low, high = torch.where(first < 0, step, low), torch.where(first < 0, high, step)
        newton = step - first / second.clamp(min=1e-30)
        middle = torch.where(high.isinf(), 2 * step, (low + high) / 2)
        step = torch.where((newton > low) & (newton < high), newton, middle)
    return step
