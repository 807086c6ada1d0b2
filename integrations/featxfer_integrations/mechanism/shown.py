"""What a model shows to what comes after: what LR images have to match, and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featxfer.features.backbone import frozen
from featxfer.training.objectives import Objective
from featxfer_integrations.mechanism.capture import (
    captured,
    plain,
    run_host,
    take_enabled_feature,
)
from featxfer_integrations.mechanism.site import AttachError, Site

VECTORS_WEIGHT = 0.1
"""Of the objective of vectors, where maps are compared besides."""


@dataclass(frozen=True)
class Shown:
    """What a model shows of a batch, by name.

    Args:
        maps: `(n, c, h, w)`, `(n, h, w, c)` or tokens `(n, t, c)`; compared number by number.
        vectors: `(m, d)`, an image each or several (boxes); compared by an objective of features.
    """

    maps: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor]

    def to(self, device: torch.device) -> Shown:
        """The same on a device."""
        return self.map(lambda part: part.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Shown:
        """The same with each tensor changed."""
        return Shown(
            {name: change(part) for name, part in self.maps.items()},
            {name: change(part) for name, part in self.vectors.items()},
        )

    def rows(self) -> Tensor:
        """Vectors for a report: those shown; where there are none, means over parts of the maps.

        Sixteen parts of each level that is as wide as the first one.
        """
        if self.vectors:
            return next(iter(self.vectors.values()))
        levels = [part if part.ndim == 4 else part.mT.unsqueeze(2) for part in self.maps.values()]
        width = levels[0].shape[1]
        pool = nn.functional.adaptive_avg_pool2d
        parts = [pool(level, 4).flatten(2).mT.flatten(0, 1) for level in levels]
        return torch.cat([part for part in parts if part.shape[1] == width])


Show = Callable[[Any, Any], Shown]
"""(model, batch) -> what the model shows of it, with what is attached in use."""


class ShownAt:
    """What passes sites of known layouts: maps of blocks as maps, all else as vectors."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = list(sites)

    def __call__(self, model: nn.Module, images: Tensor) -> Shown:
        """See `Show`; `AttachError` where no tensor passes a site."""
        if len(self.sites) == 1:
            (site,) = self.sites
            found = {site.name: take_enabled_feature(model, site, images)}
        else:
            with captured(model, self.sites) as taken:
                run_host(model, self.sites[0], images)
            missing = [site.where for site in self.sites if not taken[site.name]]
            if missing:
                raise AttachError(f"targets: no tensor passes {missing[0]} when the model runs")
            found = {name: parts[0] for name, parts in taken.items()}
        maps = {s.name: found[s.name].float() for s in self.sites if s.is_block}
        rows = {s.name: s.pool(found[s.name]).float() for s in self.sites if not s.is_block}
        return Shown(maps, rows)


def shown_by(function: Callable[[Any, Any], Any]) -> Show:
    """A caller's function to tensors, one or several, as `Show`.

    Raises `TypeError` for what gives no tensors of 2 to 4 dimensions.
    """

    def show(model: nn.Module, images: Tensor) -> Shown:
        found = function(model, images)
        if isinstance(found, Tensor):
            found = [found]
        named = dict(found) if isinstance(found, Mapping) else dict(enumerate(found))
        tensors = {str(name): part for name, part in named.items()}
        if not tensors or not all(
            isinstance(part, Tensor) and 2 <= part.ndim <= 4 for part in tensors.values()
        ):
            raise TypeError(
                "targets: the function gives other than tensors of 2 to 4 dimensions, wanted one "
                "or several, (n, d), (n, t, d) or (n, c, h, w)"
            )
        vectors = {name: part.float() for name, part in tensors.items() if part.ndim == 2}
        maps = {name: part.float() for name, part in tensors.items() if part.ndim > 2}
        return Shown(maps, vectors)

    return show


@torch.no_grad()
def check_shown(show: Show, model: nn.Module, pair: Tensor) -> None:
    """Tries what LR images are to match on an HR image and its LR view, `(2, c, h, w)`.

    Raises `ValueError` where it is the same of both, or hangs on the other images of a batch.
    """
    with frozen(model), plain(model):
        several = [show(model, part) for part in (pair, pair[:1], pair[1:])]
    both, hr, lr = ({**shown.maps, **shown.vectors} for shown in several)
    for name, part in both.items():
        alone, most = torch.cat([hr[name], lr[name]]), float(part.abs().max())
        if part.shape != alone.shape or not torch.allclose(part, alone, rtol=0, atol=0.05 * most):
            raise ValueError(
                f"targets: {name!r} of an image hangs on the other images of its batch, wanted an "
                "entry for each image that does not"
            )
    if all(torch.equal(part, lr[name]) for name, part in hr.items()):
        raise ValueError(
            f"targets: got {', '.join(map(repr, hr))}, the same of an image and of its LR view, "
            "wanted what low resolution changes"
        )


class ShownDistance:
    """How far what a model shows is from what it shows of the HR image (ours).

    The mean over maps of their squared distance, divided by the variance of HR maps, and the
    objectives of vectors `(m, d)` that have one, `VECTORS_WEIGHT` times where there are maps.
    """

    def __init__(self, variances: Mapping[str, float], objectives: Mapping[str, Objective]) -> None:
        self.variances, self.objectives = dict(variances), dict(objectives)
        self.weight = VECTORS_WEIGHT if variances else 1.0

    def __call__(self, outputs: Shown, targets: Shown) -> tuple[Tensor, Tensor]:
        """The loss, a scalar with gradient, and for how many images vectors are right."""
        terms: list[Tensor] = []
        right: Tensor | None = None
        if self.variances:
            parts = [
                (outputs.maps[name] - targets.maps[name]).square().mean() / variance
                for name, variance in self.variances.items()
            ]
            terms.append(torch.stack(parts).mean())
        for name, objective in self.objectives.items():
            if name in outputs.vectors and name in targets.vectors:
                loss, hits = objective(outputs.vectors[name], targets.vectors[name])
                terms.append(self.weight * loss)
                shown = next(iter(targets.maps.values()), targets.vectors[name])
                right = hits / len(targets.vectors[name]) * len(shown)
        loss = torch.stack(terms).sum()
        return loss, torch.zeros_like(loss) if right is None else right.round()

    def check(self, outputs: Any, targets: Any, rows: int) -> None:
        """Nothing: both are made by the same module."""
