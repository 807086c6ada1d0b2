"""Features of whole sets of images through a model and the blocks that are attached to it."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.study import Study
from featxfer import Degradation, fill_stores
from featxfer.features.forward import bf16_is_fast
from featxfer.features.store import MappedRows
from featxfer_integrations import host_of, transfers_of
from featxfer_integrations.hosts.base import find_sites
from featxfer_integrations.hosts.images import black_image
from featxfer_integrations.mechanism.attach import attached_sites, host_device
from featxfer_integrations.mechanism.fingerprint import backbone_at
from featxfer_integrations.mechanism.shown import ShownAt
from featxfer_integrations.mechanism.suffix import Suffix
from featxfer_integrations.stages.maps import extract_maps, shown_of

SHIFTS = ((8, 0), (-8, 0), (0, 8), (0, -8))
"""Right and down, pixels of the model's input: about one pixel of a 32-pixel image at 224."""


@dataclass(frozen=True)
class Through:
    """Features `(n, d)` of both views.

    Of mirrored images, and of LR views that are moved by each of `SHIFTS`, where these were asked
    for; else none.
    """

    hr: Tensor
    lr: Tensor
    hr_flipped: Tensor
    lr_flipped: Tensor
    lr_shifted: tuple[Tensor, ...]

    @property
    def averaged(self) -> Tensor:
        """LR features, averaged over the image and its mirror image."""
        return (self.lr + self.lr_flipped) / 2


@dataclass(frozen=True)
class MovedDegradation(Degradation):
    """LR views that are moved by whole pixels of the model's input; their edges are repeated.

    Args:
        right, down: by how many.
    """

    right: int = 0
    down: int = 0

    def lr(self, image: Tensor) -> Tensor:
        """The moved view, uint8 `(3, hr_size, hr_size)`."""
        return moved(super().lr(image), self.right, self.down)


def moved(image: Tensor, right: int, down: int) -> Tensor:
    """An image `(3, h, w)`, moved; its edges are repeated."""
    height, width = image.shape[-2:]
    reach = max(abs(right), abs(down))
    wide = F.pad(image[None].float(), [reach] * 4, mode="replicate")[0].to(image.dtype)
    top, left = reach - down, reach - right
    return wide[..., top : top + height, left : left + width]


def through_blocks(
    study: Study,
    model: nn.Module,
    part: str,
    view: Degradation,
    *,
    flips: bool = False,
    shifts: bool = False,
) -> Through:
    """Through the attached blocks; a head that is attached is left out."""
    plain, host = study.model, host_of(study.model)
    image = black_image(plain, study.resize.hr_size, study.resize.hr_size)
    (head,) = find_sites(host, plain, "head", image=image)
    blocks = [site for site in attached_sites(model) if site.is_block]
    first = (blocks or find_sites(host, plain, "blocks", image=image))[0]
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    precision = "bf16" if bf16_is_fast(host_device(plain)) else "fp32"
    suffix = Suffix(plain, first, ShownAt([head]), noise, precision)
    backbone = backbone_at(host, plain, first, host.preprocessing(plain), flat=True)
    images, cache = study.images(part), study.cache / "maps"
    maps = extract_maps(backbone, images, [view], cache, suffix.shape, precision=precision)
    shifted = []
    for right, down in SHIFTS if shifts else ():
        there = MovedDegradation(**dataclasses.asdict(view), right=right, down=down)
        stores = fill_stores(backbone, images, there, cache, precision=precision, views=["lr"])
        shifted.append(stores["lr"].open_rows())
    for site in blocks:
        suffix.attach(site, copy.deepcopy(transfers_of(model)[site.name]))
    suffix.eval()

    def seen(rows: MappedRows) -> Tensor:
        return shown_of(suffix, maps, rows)[head.name]

    (hr, hr_flipped), (lr, lr_flipped) = maps.hr[:2], maps.lr[0][:2]
    nothing = torch.empty(0)
    return Through(
        seen(hr),
        seen(lr),
        seen(hr_flipped) if flips else nothing,
        seen(lr_flipped) if flips else nothing,
        tuple(map(seen, shifted)),
    )
