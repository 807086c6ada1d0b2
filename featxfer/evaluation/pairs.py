"""How near LR features are to the HR features of the same images: needs no labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from featxfer.checks import ArrayLike, as_features, check_paired

MOST_SIMILARITIES = 1 << 24
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


@dataclass(frozen=True)
class HeldOutPairs:
    """What a module does to pairs of views that it was not trained on.

    Args:
        before: plain LR features against the HR features of the same images.
        after: transferred LR features against the same.
        hr_cosine: mean cosine of HR features before and after the module: 1 is unharmed.
        pairs: how many.
    """

    before: PairAgreement
    after: PairAgreement
    hr_cosine: float
    pairs: int

    @property
    def cosine_gap_recovered(self) -> float:
        """Share of the cosine distance between LR and HR that it takes away; 1 is all."""
        gap = 1 - self.before.cosine
        return (self.after.cosine - self.before.cosine) / gap if gap > 0 else 0.0


def report_pairs(
    hr: ArrayLike, lr: ArrayLike, lr_after: ArrayLike, hr_after: ArrayLike, centroids: ArrayLike
) -> HeldOutPairs:
    """Compares features `(n, d)` of the same images before and after a module; as `compare_pairs`.

    `lr_after` and `hr_after` are what the module makes of LR and HR features.
    """
    wanted, through = as_features("hr", hr), as_features("hr_after", hr_after)
    check_paired(wanted, through)
    return HeldOutPairs(
        compare_pairs(wanted, lr, centroids),
        compare_pairs(wanted, lr_after, centroids),
        float(F.cosine_similarity(through, wanted).mean()),
        len(wanted),
    )


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
    size = max(1, MOST_SIMILARITIES // len(wanted))
    best = torch.cat([(part @ wanted.T).max(1).values for part in got.split(size)])
    found = directed & (own >= best - 1e-6)
    same = directed & ((got @ prototypes.T).argmax(1) == (wanted @ prototypes.T).argmax(1))
    return PairAgreement(float(own.mean()), float(found.float().mean()), float(same.float().mean()))
