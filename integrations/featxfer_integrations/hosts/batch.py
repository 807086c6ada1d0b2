"""Images as detectors take them, and what is drawn of an image for its heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images as a model, or its backbone, takes them.

    Args:
        images: `(n, c, h, w)`, on the model's device.
        sizes: height and width of each image before it was padded.
        boxes: `(b, 4)` of each image that are compared; none where the model proposes none.
    """

    images: Tensor
    sizes: Sequence[tuple[int, int]] = ()
    boxes: Sequence[Tensor] = ()

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return replace(
            self, images=self.images.to(device), boxes=[b.to(device) for b in self.boxes]
        )

    def part(self, rows: slice) -> Batch:
        """Some of the images."""
        return Batch(self.images[rows], self.sizes[rows], self.boxes[rows])


@dataclass(frozen=True)
class Sample:
    """Boxes or positions of one image at one site.

    Args:
        views: features `(b, d)`, a tensor a view.
        labels: what the detector predicts on the HR view, int64 `(b,)`; 0 is background.
    """

    views: list[Tensor]
    labels: Tensor


Sampler = Callable[[Sequence[Tensor], torch.Generator], dict[str, Sample]]
"""(views of an image, uint8, HR first; chance) -> samples by site."""


def balanced(labels: Tensor, scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, of each label in turn as long as it lasts."""
    order = scores.argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    for label in labels.unique():
        mine = order[labels[order] == label]
        ranks[mine] = torch.arange(len(mine), device=ranks.device)
    return order[ranks[order].argsort(stable=True)][:count]


def half_balanced(labels: Tensor, scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of `count`: up to half of them balanced over objects' labels, the rest by chance.

    With all of them balanced, heads take background for rarer than it is, and HR images lose more.
    """
    objects = (labels > 0).nonzero()[:, 0]
    first = objects[balanced(labels[objects], scores[objects], count // 2)]
    left = torch.ones(len(labels), dtype=torch.bool, device="cpu")
    left[first] = False
    others = left.nonzero()[:, 0]
    drawn = torch.randperm(len(others), generator=generator, device="cpu")[: count - len(first)]
    return torch.cat([first, others[drawn]])
