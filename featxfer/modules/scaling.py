"""What a feature is divided by before k-means and the network: nothing, or its length.

The paper does not state any scaling; ours is an option of the head, which keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featxfer.checks import ArrayLike, as_features, check_choice

SCALINGS = ("none", "l2")


def scale_features(features: ArrayLike, scaling: str) -> Tensor:
    """Rows as they come ("none") or divided by their L2 norm ("l2"): float32 `(n, d)`.

    Raises `ValueError` for another `scaling`, NaN or infinity, and under "l2" for a row of zeros.
    """
    check_choice("scaling", scaling, SCALINGS)
    rows = as_features("features", features)
    if scaling == "l2":
        norms = torch.linalg.vector_norm(rows, dim=1)
        if not norms.all():
            row = int(norms.argmin())
            raise ValueError(f"features: row {row} is zero, wanted an L2 norm above 0")
    return scale_rows(rows, scaling)


def scale_rows(rows: Tensor, scaling: str) -> Tensor:
    """As `scale_features` in a network: `(..., d)`, with gradient; a row of zeros stays zeros.

    Scaled rows are float32 or wider: half precision has no room for their norms.
    """
    if scaling == "none":
        return rows
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1)
