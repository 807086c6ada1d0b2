"""Images under the same names, flipped or cropped by chance."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from featxfer.views.images import Images


def flipped(images: Images) -> Images:
    """The same images under the same names, mirrored left to right."""
    digest = hashlib.sha256(f"flipped {images.fingerprint}".encode()).hexdigest()
    return dataclasses.replace(
        images, read=lambda index: images.read(index).flip(-1), fingerprint=digest
    )


def cropped(images: Images, draw: int, *, least: float = 0.4) -> Images:
    """The same images under the same names, each cropped and every other one mirrored, by chance.

    Args:
        images: any.
        draw: which crop: another one for each draw and image, the same one every time.
        least: share of the area that a crop keeps at the least, in (0, 1]; sides keep their ratio.

    Raises:
        ValueError: a share outside of (0, 1].
    """
    if not 0 < least <= 1:
        raise ValueError(f"least: got {least!r}, wanted a share in (0, 1]")
    text = f"cropped {draw} {least} {images.fingerprint}"

    def read(index: int) -> Tensor:
        image = images.read(index)
        generator = torch.Generator().manual_seed(draw * 1_000_003 + index)
        area, down, right, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        side = (least + (1 - least) * area) ** 0.5
        height, width = (max(1, round(length * side)) for length in image.shape[1:])
        top = int(down * (image.shape[1] - height + 1))
        left = int(right * (image.shape[2] - width + 1))
        part = image[:, top : top + height, left : left + width]
        return (part.flip(-1) if mirror < 0.5 else part).contiguous()

    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return dataclasses.replace(images, read=read, fingerprint=fingerprint)
