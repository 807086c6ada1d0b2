"""Features of whole sets of images through a model and the blocks that are attached to it."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gap.study import Study
from featxfer import Degradation, fill_stores
from featxfer_integrations import transfers_of
from featxfer_integrations._attach import Place, is_attached
from featxfer_integrations.attach import find_place, host_of
from featxfer_integrations.deep import MapAt, extract_maps, features_of, maps_backbone, open_rest
from featxfer_integrations.fit import host_backbone

SHIFTS = ((8, 0), (-8, 0), (0, 8), (0, -8))
"""Right and down, pixels of the model's input: about one pixel of a 32-pixel image at 224."""


@dataclass(frozen=True)
class Through:
    """Features `(n, d)` of both views, as they are and of the mirrored images.

    `lr_shifted`: of LR views that are moved by each of `SHIFTS`, where these were asked for.
    """

    hr: Tensor
    hr_flipped: Tensor
    lr: Tensor
    lr_flipped: Tensor
    lr_shifted: tuple[Tensor, ...] = ()

    @property
    def averaged(self) -> Tensor:
        """LR features, averaged over the image and its mirror image."""
        return (self.lr + self.lr_flipped) / 2


class _Moved(MapAt):
    """The maps of images that are moved by whole pixels; their edges are repeated."""

    def __init__(self, model: nn.Module, place: Place, right: int, down: int) -> None:
        super().__init__(model, place)
        self.right, self.down = right, down

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        reach = max(abs(self.right), abs(self.down))
        wide = F.pad(images, [reach] * 4, mode="replicate")
        top, left = reach - self.down, reach - self.right
        return super().forward(wide[..., top : top + height, left : left + width])


def through_blocks(
    study: Study, model: nn.Module, split: str, view: Degradation, *, shifts: bool = False
) -> Through:
    """Through the attached blocks; a head that is attached is left out."""
    pooled = find_place(study.model)
    transfers = transfers_of(model) if is_attached(model) else None
    places = [] if transfers is None else [p for n, p in transfers.places.items() if n != "pooled"]
    host = host_of(study.model)
    assert host is not None
    stage = places[0] if places else find_place(study.model, at=host.deep_modules(study.model)[0])
    rest, shape = open_rest(study.model, stage, pooled, study.resize.hr_size)
    backbone = maps_backbone(host_backbone(study.model, pooled), study.model, stage)
    images, cache, precision = study.images(split), study.cache / "maps", rest.precision
    maps = extract_maps(backbone, images, [view], cache, shape, precision=precision)
    moved = []
    for right, down in SHIFTS if shifts else ():
        named = dataclasses.replace(
            backbone,
            module=_Moved(study.model, stage, right, down),
            name=f"{backbone.name}, images moved by {right}, {down}",
        )
        stores = fill_stores(named, images, view, cache, precision=precision, views=["lr"])
        moved.append(stores["lr"].open_rows())
    for place in places:
        assert transfers is not None
        rest.attach(place, copy.deepcopy(transfers[place.name]))
    rest.eval()
    with torch.no_grad():
        (lr,), hr = (
            [[features_of(rest, maps, rows) for rows in pair] for pair in maps.lr],
            [features_of(rest, maps, rows) for rows in maps.hr],
        )
        shifted = tuple(features_of(rest, maps, rows) for rows in moved)
    return Through(hr[0], hr[1], lr[0], lr[1], shifted)
