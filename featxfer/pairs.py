"""How near LR features are to the HR features of the same images: needs no labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from featxfer._checks import ArrayLike, as_features, check_paired


@dataclass(frozen=True)
class PairAgreement:
    """How far LR features say what the HR features of the same images say.

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

    Raises `ValueError` for other shapes, NaN or infinity.
    """
    wanted, got = as_features("hr", hr), as_features("lr", lr)
    check_paired(wanted, got)
    prototypes = F.normalize(as_features("centroids", centroids, width=wanted.shape[1]), dim=1)
    wanted, got = F.normalize(wanted, dim=1), F.normalize(got, dim=1)
    own = (wanted * got).sum(1)
    best = (got @ wanted.T).max(1).values
    same = (got @ prototypes.T).argmax(1) == (wanted @ prototypes.T).argmax(1)
    return PairAgreement(
        float(own.mean()), float((own >= best - 1e-6).float().mean()), float(same.float().mean())
    )
