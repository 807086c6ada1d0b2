"""Features of whole sets of images through a model and the blocks that are attached to it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gap.study import Study
from featxfer import Degradation
from featxfer_integrations import transfers_of
from featxfer_integrations._attach import is_attached
from featxfer_integrations.attach import find_place, host_of
from featxfer_integrations.deep import extract_maps, features_of, maps_backbone, open_rest
from featxfer_integrations.fit import host_backbone


@dataclass(frozen=True)
class Through:
    """Features `(n, d)` of both views, as they are and of the mirrored images."""

    hr: Tensor
    hr_flipped: Tensor
    lr: Tensor
    lr_flipped: Tensor

    @property
    def averaged(self) -> Tensor:
        """LR features, averaged over the image and its mirror image."""
        return (self.lr + self.lr_flipped) / 2


def through_blocks(study: Study, model: nn.Module, split: str, view: Degradation) -> Through:
    """Through the attached blocks; a head that is attached is left out."""
    pooled = find_place(study.model)
    transfers = transfers_of(model) if is_attached(model) else None
    places = [] if transfers is None else [p for n, p in transfers.places.items() if n != "pooled"]
    host = host_of(study.model)
    assert host is not None
    stage = places[0] if places else find_place(study.model, at=host.deep_modules(study.model)[0])
    rest, shape = open_rest(study.model, stage, pooled, study.resize.hr_size)
    maps = extract_maps(
        maps_backbone(host_backbone(study.model, pooled), study.model, stage),
        study.images(split),
        [view],
        study.cache / "maps",
        shape,
        precision=rest.precision,
    )
    for place in places:
        assert transfers is not None
        rest.attach(place, copy.deepcopy(transfers[place.name]))
    rest.eval()
    with torch.inference_mode():
        (lr,), hr = (
            [[features_of(rest, maps, rows) for rows in pair] for pair in maps.lr],
            [features_of(rest, maps, rows) for rows in maps.hr],
        )
    return Through(hr[0], hr[1], lr[0], lr[1])
