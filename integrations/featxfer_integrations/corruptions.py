"""Degradations beyond resizing: blur and sensor noise by torchvision, JPEG by Pillow."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featxfer import Degradation
from featxfer._checks import check_integer


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
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: got {value!r}, wanted a finite number >= 0")
        if self.jpeg_quality is not None:
            check_integer("jpeg_quality", self.jpeg_quality, at_least=1)
            if self.jpeg_quality > 100:
                raise ValueError(f"jpeg_quality: got {self.jpeg_quality}, wanted at most 100")

    def corrupt(self, small: Tensor) -> Tensor:
        """Blur, noise and JPEG on uint8 `(3, lr_size, lr_size)`."""
        import torchvision.transforms.v2.functional as transforms

        if self.blur_sigma > 0:
            reach = max(1, round(3 * self.blur_sigma))
            reach = min(reach, small.shape[-1] - 1)
            small = transforms.gaussian_blur(
                small, [2 * reach + 1, 2 * reach + 1], [self.blur_sigma, self.blur_sigma]
            )
        if self.noise_std > 0:
            seed = zlib.crc32(small.contiguous().numpy().tobytes())
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                noisy = transforms.gaussian_noise(small.float() / 255, sigma=self.noise_std)
            small = (noisy * 255).round().to(torch.uint8)
        if self.jpeg_quality is not None:
            small = _through_jpeg(small, self.jpeg_quality)
        return small


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    """By Pillow: torchvision's own encoder is deprecated since its version 0.29."""
    written = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(
        written, "JPEG", quality=quality
    )
    return torch.from_numpy(np.array(Image.open(written))).permute(2, 0, 1).contiguous()
