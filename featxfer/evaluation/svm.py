"""One-vs-rest linear SVMs on features, by named protocols.

Wu et al. 2019, section 4.4, train one binary SVM a class with LIBSVM and state neither C nor any
scaling; the protocols here are other works' and ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featxfer.checks import ArrayLike, as_features, check_choice
from featxfer.evaluation.batched_svm import SingularBasis, solve
from featxfer.evaluation.liblinear import Matrix, Trained, train_liblinear
from featxfer.evaluation.metrics import average_precision
from featxfer.evaluation.protocols import Protocol, check_classes, targets_of

SOLVERS = ("liblinear", "batched")
_NORM_FLOOR = 1e-5


@dataclass(frozen=True)
class LinearSVMs:
    """Trained SVMs, one a class: `decision = x @ coef.T + intercept` on scaled rows.

    Args:
        protocol: how they were trained.
        coef: `(classes, d)`.
        intercept: `(classes,)`.
        costs: the chosen C of each class.
        unconverged: fits (folds included) that stopped at `max_iter`.
        fits: number of fits.
    """

    protocol: Protocol
    coef: Matrix
    intercept: Matrix
    costs: tuple[float, ...]
    unconverged: int
    fits: int

    def decisions(self, features: ArrayLike) -> Matrix:
        """Decision values `(n, classes)` of features `(n, d)`; `ValueError` for another width."""
        rows = as_features("features", features, width=self.coef.shape[1])
        return _scale(rows, self.protocol) @ self.coef.T + self.intercept

    def as_module(self, dtype: torch.dtype = torch.float32) -> SVMClassifier:
        """A module with a copy of these weights, on the CPU; features in, decisions out.

        After a backbone with its head, `nn.Sequential(backbone, svms.as_module())`, it makes one
        module of the whole system.

        Args:
            dtype: of its weights. With float64 its decisions are those of `decisions` but for
                rounding; a float32 module is some 1e-7 off, which `.double()` does not undo.
        """
        classes, features = self.coef.shape
        with torch.device("cpu"):
            module = SVMClassifier(
                features, classes, normalize=self.protocol.normalize, dtype=dtype
            )
        weights = {"linear.weight": self.coef, "linear.bias": self.intercept}
        module.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
        return module


class SVMClassifier(nn.Module):
    """Linear SVMs as a layer: `linear(x / (|x| + 1e-5))`, or `linear(x)`; zero until loaded.

    Shapes: `(..., in_features) -> (..., classes)`. The rows are taken in the dtype of the weights,
    and so are the decisions. NaN and infinity are not refused. Another width is a `RuntimeError`
    of `linear`.

    Args:
        in_features: width d of the features.
        classes: number of SVMs.
        normalize: whether rows are divided by their L2 norm, as `Protocol.normalize` says.
        dtype: of the weights; by default torch's default.
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        *,
        normalize: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        device = torch.get_default_device()
        self.linear = nn.utils.skip_init(
            nn.Linear, in_features, classes, device=device, dtype=dtype
        )
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """Decision values of features, see the class."""
        rows = features.to(self.linear.weight.dtype)
        if self.normalize:
            rows = rows / (torch.linalg.vector_norm(rows, dim=-1, keepdim=True) + _NORM_FLOOR)
        decisions: Tensor = self.linear(rows)
        return decisions

    def extra_repr(self) -> str:
        """What `repr` says beside the layer."""
        return f"normalize={self.normalize}"


def train_svms(
    features: ArrayLike,
    labels: npt.NDArray[np.integer],
    protocol: Protocol,
    *,
    solver: str = "liblinear",
    seed: int | None = None,
    jobs: int | None = None,
    callback: Callable[[int], object] | None = None,
) -> LinearSVMs:
    """Trains one linear SVM a class: squared hinge, the intercept regularised with the weights.

    Args:
        features: `(n, d)`.
        labels: `(n, classes)` in {1, 0, -1}; 0: only difficult instances.
        protocol: see `PROTOCOLS`.
        solver: "liblinear", scikit-learn's `LinearSVC` (the reference), or "batched", all classes
            at once in torch: the same minimum, much sooner. The protocol's `max_iter` is
            LIBLINEAR's alone, as are `seed` and `jobs`, which are refused with it.
        seed: of LIBLINEAR's coordinate order; by default 0.
        jobs: classes at a time, each in a process of its own, by default 1. LIBLINEAR's random
            state is one a process: threads wait for each other, so that none changes another's
            results.
        callback: called with the class index when a class is done, in order.

    Raises:
        ValueError: other shapes, NaN or infinity (the row is named), a class with fewer positive
            or negative rows than folds, an unknown solver, `seed` or `jobs` with "batched".
    """
    check_choice("solver", solver, SOLVERS)
    for name, value in (("seed", seed), ("jobs", jobs)):
        if value is not None and solver == "batched":
            raise ValueError(f"{name}: got {value!r}, which solver 'batched' has no use for")
    rows = as_features("features", features)
    if labels.ndim != 2 or len(labels) != len(rows):
        raise ValueError(
            f"labels: got shape {labels.shape}, wanted ({len(rows)}, classes), a row a feature"
        )
    check_classes(labels, protocol)
    train = _train_batched
    if solver == "liblinear":
        train = partial(train_liblinear, seed or 0, 1 if jobs is None else jobs)
    trained = []
    for result in train(_scale(rows, protocol), labels, protocol):
        trained.append(result)
        if callback is not None:
            callback(len(trained) - 1)
    coef, intercept, costs, unconverged, fits = zip(*trained, strict=True)
    return LinearSVMs(
        protocol, np.stack(coef), np.array(intercept), costs, sum(unconverged), sum(fits)
    )


def _train_batched(
    rows: Matrix, labels: npt.NDArray[np.integer], protocol: Protocol
) -> Iterator[Trained]:
    """C is chosen in single precision, each value from the weights of the one below."""
    signs = torch.where(torch.from_numpy(labels) == 1, 1.0, -1.0).double()
    weights = torch.where(signs > 0, protocol.positive_weight, 1.0).double()
    if protocol.difficult == "ignored":
        weights[torch.from_numpy(labels) == 0] = 0
    basis = SingularBasis(torch.from_numpy(rows))
    chosen, unconverged = _choose_costs(basis.single(), signs, weights, labels, protocol)
    columns, stopped = solve(basis, signs, weights * chosen, tolerance=1e-5)
    coef, intercept = basis.weights(columns)
    fits = 1 + protocol.folds * len(protocol.costs) * (len(protocol.costs) > 1)
    for c in range(len(chosen)):
        failed = int(unconverged[c] + stopped[c])
        yield coef[c].numpy(), float(intercept[c]), float(chosen[c]), failed, fits


def _choose_costs(
    basis: SingularBasis,
    signs: Tensor,
    weights: Tensor,
    labels: npt.NDArray[np.integer],
    protocol: Protocol,
) -> tuple[Tensor, Tensor]:
    """Of each class the C with the highest mean AP over the folds; fits that did not converge."""
    classes, costs = labels.shape[1], sorted(protocol.costs)
    unconverged = torch.zeros(classes, dtype=torch.int64, device=signs.device)
    if len(costs) == 1:
        return signs.new_tensor(costs).expand(classes), unconverged
    held_out = [rows for c in range(classes) for rows in _held_out(labels[:, c], protocol)]
    y, inside = (part.float().repeat_interleave(protocol.folds, 1) for part in (signs, weights))
    for column, rows in enumerate(held_out):
        inside[rows, column] = 0
    scores = np.zeros((len(costs), len(held_out)))
    columns = None
    for i, cost in enumerate(costs):
        columns, stopped = solve(basis, y, cost * inside, columns)
        unconverged += stopped.view(classes, -1).sum(1)
        decisions = (basis.rows @ columns).numpy()
        for column, rows in enumerate(held_out):
            truth = labels[rows, column // protocol.folds]
            scores[i, column] = average_precision(decisions[rows, column], truth, "step")
    means = scores.reshape(len(costs), classes, protocol.folds).mean(2)
    chosen = [costs[i] for i in means.argmax(0)]
    return signs.new_tensor(chosen), unconverged


def _held_out(
    labels: npt.NDArray[np.integer], protocol: Protocol
) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of the rows that each fold of a class holds out."""
    from sklearn.model_selection import StratifiedKFold

    used, targets = targets_of(labels, protocol)
    for _, rows in StratifiedKFold(protocol.folds).split(targets, targets):
        yield np.flatnonzero(used)[rows]


def average_precisions(
    decisions: npt.ArrayLike, labels: npt.NDArray[np.integer], kind: str = "11point"
) -> list[float]:
    """AP of each class from decision values and labels in {1, 0, -1}, both `(n, classes)`."""
    scores = np.asarray(decisions)
    if scores.shape != labels.shape:
        raise ValueError(
            f"decisions: got shape {scores.shape}, wanted that of labels {labels.shape}"
        )
    return [average_precision(scores[:, c], labels[:, c], kind) for c in range(labels.shape[1])]


def _scale(rows: torch.Tensor, protocol: Protocol) -> Matrix:
    values: Matrix = rows.numpy().astype(np.float64)
    if protocol.normalize:
        values /= np.linalg.norm(values, axis=1, keepdims=True) + _NORM_FLOOR
    return values
