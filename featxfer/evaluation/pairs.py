"""How near LR features are to the HR features of the same images: needs no labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from featxfer.checks import ArrayLike, as_features, check_paired

_MOST_SIMILARITIES = 1 << 24
"""At a time: 64 MiB in float32."""


@dataclass(frozen=True)
class PairAgreement:
    """How far LR features say what the HR features of the same images say.

    A feature of zeros has no direction: its cosine is 0, and it finds no image and no cluster.

    Args:
        cosine: mean cosine of an image's LR and HR feature, in [-1, 1].
        retrieval: share in [0, 1] of LR features whose most similar HR feature is their image's.
        clusters: share in [0, 1] of images whose LR and HR features have the same most similar
            centroid.
    """

    cosine: float
    retrieval: float
    clusters: float


def compare_pairs(hr: ArrayLike, lr: ArrayLike, centroids: ArrayLike) -> PairAgreement:
    """Compares LR features `(n, d)` with the HR features `(n, d)` of the same images, by cosine.

    Similarities are computed for some rows at a time, so that there are never n x n of them. Raises
    `ValueError` for other shapes, NaN or infinity.
    """
    wanted, got = as_features("hr", hr), as_features("lr", lr)
    check_paired(wanted, got)
    prototypes = F.normalize(as_features("centroids", centroids, width=wanted.shape[1]), dim=1)
    wanted, got = F.normalize(wanted, dim=1), F.normalize(got, dim=1)
    own, directed = (wanted * got).sum(1), got.any(1) & wanted.any(1)
    size = max(1, _MOST_SIMILARITIES // len(wanted))
    best = torch.cat([(part @ wanted.T).max(1).values for part in got.split(size)])
    found = directed & (own >= best - 1e-6)
    same = directed & ((got @ prototypes.T).argmax(1) == (wanted @ prototypes.T).argmax(1))
    return PairAgreement(float(own.mean()), float(found.float().mean()), float(same.float().mean()))
