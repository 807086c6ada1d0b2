"""Ridge regression from LR features to HR ones in closed form: on its own, and inside of a head.

Two formulas, since published figures hang on both: `ridge` chooses its penalty by leave-one-out
error, `warm_start_head` by generalised cross-validation.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from featxfer import FeatureTransferHead
from featxfer.checks import ArrayLike, as_features, check_choice, check_paired


def ridge(lr: tuple[Tensor, Tensor], hr: Tensor) -> tuple[Tensor, Tensor]:
    """LR features mapped to the HR features of the same training images.

    The penalty is chosen from 10^-2 ... 10^4 by leave-one-out error on the training rows.

    Args:
        lr: `(n, d)` of the training rows and `(m, d)` of others.
        hr: `(n, d)` of the training rows.
    """
    from sklearn.linear_model import RidgeCV

    model = RidgeCV(alphas=np.logspace(-2, 4, 13)).fit(lr[0].double().numpy(), hr.double().numpy())
    train, test = (torch.from_numpy(model.predict(rows.double().numpy())).float() for rows in lr)
    return train, test


@torch.no_grad()
def warm_start_head(head: FeatureTransferHead, inputs: ArrayLike, targets: ArrayLike) -> float:
    """Sets a head to reduced-rank ridge regression from inputs to targets; returns the penalty.

    `inputs - targets` is regressed on the inputs in closed form, the penalty chosen by generalised
    cross-validation (Golub, Heath and Wahba 1979), and the fit cut to half as many directions as
    the head has hidden units (Izenman 1975): `relu(u) - relu(-u) = u`, so two units carry one. Of
    an odd number one unit stays idle. Exact without dropout; training goes on from there.

    Args:
        head: output "features", activation "relu", its input statistics set.
        inputs: `(n, d)`.
        targets: `(n, d)`.

    Raises:
        ValueError: another output or activation, other shapes, NaN or infinity.
    """
    check_choice("head's output", head.output, ("features",))
    check_choice("head's activation", head.activation, ("relu",))
    rows = as_features("inputs", inputs, width=head.in_features).cpu()
    wanted = as_features("targets", targets, width=head.in_features).cpu()
    check_paired(rows, wanted)
    device = head.input_mean.device
    z = head.normalise(rows.to(device).double()).cpu()
    change = (rows - wanted).double()
    centre, offset = z.mean(0), change.mean(0)
    left, scale, right = torch.linalg.svd(z - centre, full_matrices=False)
    projected, total = left.T @ (change - offset), (change - offset).square().sum()
    best, penalty = math.inf, 1.0
    candidates = torch.logspace(-2, 5, 29, dtype=torch.float64, device="cpu") * len(z) / 100
    for candidate in candidates:
        shrink = scale.square() / (scale.square() + candidate)
        residual = total - ((2 * shrink - shrink.square())[:, None] * projected.square()).sum()
        score = float(residual / (len(z) - shrink.sum()).square())
        if score < best:
            best, penalty = score, float(candidate)
    coefficients = right.T @ ((scale / (scale.square() + penalty))[:, None] * projected)
    fitted = (scale[:, None] * right) @ coefficients
    directions = torch.linalg.svd(fitted, full_matrices=False)[2][: head.fc1.out_features // 2]
    rank = len(directions)
    inner = directions @ coefficients.T
    for layer in (head.fc1, head.fc2):
        layer.weight.zero_()
        layer.bias.zero_()
    for sign, part in ((1, slice(0, rank)), (-1, slice(rank, 2 * rank))):
        head.fc1.weight[part] = (sign * inner).to(head.fc1.weight)
        head.fc1.bias[part] = (-sign * inner @ centre).to(head.fc1.bias)
        head.fc2.weight[:, part] = (sign * directions.T).to(head.fc2.weight)
    head.fc2.bias.copy_(offset)
    return penalty
