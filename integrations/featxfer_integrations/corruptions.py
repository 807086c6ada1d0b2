"""Degradations beyond resizing: blur, sensor noise, and JPEG by Pillow."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from featxfer import Degradation
from featxfer.checks import check_integer


@dataclass(frozen=True)
class CorruptedDegradation(Degradation):
    """What cameras and networks do to a small image besides: original -> LR -> chain -> HR size.

    The chain is blur, noise, JPEG, each only where it is asked for; it acts on the LR image, so
    with `lr_size` equal to `hr_size` it acts alone. The same pixels get the same noise every time.

    Args:
        hr_size, lr_size, kernel, antialias, order: as of `Degradation`.
        blur_sigma: of a Gaussian, in pixels of the LR image, >= 0; 0 is none.
        noise_std: of Gaussian noise, of pixels in [0, 1], >= 0; 0 is none.
        jpeg_quality: 1 to 100; None is no JPEG.

    Raises:
        ValueError: for a value outside of these.
    """

    blur_sigma: float = 0.0
    noise_std: float = 0.0
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("blur_sigma", "noise_std"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < float("inf"):
                raise ValueError(f"{name}: got {value!r}, wanted a finite number >= 0")
            object.__setattr__(self, name, float(value))
        if self.jpeg_quality is not None:
            check_integer("jpeg_quality", self.jpeg_quality, at_least=1)
            if self.jpeg_quality > 100:
                raise ValueError(f"jpeg_quality: got {self.jpeg_quality}, wanted at most 100")

    def corrupt(self, small: Tensor) -> Tensor:
        """Blur, noise and JPEG on uint8 `(3, lr_size, lr_size)`."""
        if self.blur_sigma > 0:
            small = _blur(small, self.blur_sigma)
        if self.noise_std > 0:
            seed = zlib.crc32(small.contiguous().numpy().tobytes())
            noise = torch.randn(small.shape, generator=torch.Generator().manual_seed(seed))
            noisy = (small.float() / 255 + self.noise_std * noise).clamp(0, 1)
            small = (noisy * 255).round().to(torch.uint8)
        if self.jpeg_quality is not None:
            small = _through_jpeg(small, self.jpeg_quality)
        return small


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Adds in double and in one order, so that no number of threads shows; borders are mirrored."""
    reach = min(max(1, round(3 * sigma)), image.shape[-1] - 1)
    at = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (at / sigma) ** 2)
    weights = weights / weights.sum()
    whole = F.pad(image.double()[None], [reach] * 4, mode="reflect")[0]
    for dim in (1, 2):
        sums = torch.zeros_like(whole.narrow(dim, 0, image.shape[dim]))
        for start, weight in enumerate(weights.tolist()):
            sums += weight * whole.narrow(dim, start, image.shape[dim])
        whole = sums
    return whole.round().to(torch.uint8)


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    """By Pillow: torchvision's own encoder is deprecated since its version 0.29."""
    written = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(
        written, "JPEG", quality=quality
    )
    written.seek(0)
    return torch.from_numpy(np.array(JpegImageFile(written))).permute(2, 0, 1).contiguous()
