"""A frozen feature extractor with the preprocessing of its weights, and how it is run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Preprocessing:
    """What belongs to the weights: `(pixels / 255 - mean) / std`, and the input size if fixed.

    Args:
        mean: per RGB channel, of pixels in [0, 1].
        std: per RGB channel, > 0.
        input_size: the only side, in pixels, that the backbone takes; None if it takes any.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    input_size: int | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 `(n, 3, h, w)` -> float32, channels last, normalised."""
        mean, std = (
            torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.mean, self.std)
        )
        images = pixels.to(torch.float32) / 255
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen feature extractor with the preprocessing of its weights.

    Args:
        module: images `(n, 3, hr_size, hr_size)` -> pooled features `(n, d)`. It is not changed.
        preprocessing: of its weights.
        name: for cache keys and cards.
        weights: where the weights are from, in words.
        host: the library, with its version, whose code the module is.
    """

    module: nn.Module
    preprocessing: Preprocessing = Preprocessing()
    name: str = "custom"
    weights: str = "custom"
    host: str = "custom"

    @property
    def weights_sha256(self) -> str:
        """Hash of the module's state dict as it is now."""
        return weights_sha256(self.module)

    @property
    def architecture_sha256(self) -> str:
        """Hash of the module's layers as they print."""
        return hashlib.sha256(repr(self.module).encode()).hexdigest()


def weights_sha256(
    module: nn.Module, *, leave_out: tuple[str, ...] = (), dtype: torch.dtype | None = None
) -> str:
    """SHA-256 over the names, shapes and values of a module's state dict, whatever their dtypes.

    Args:
        module: its floating-point values count as float32, or as float64 where they are.
        leave_out: names that begin with one of these do not count.
        dtype: what floating-point values are rounded to first; by default they are as they are.
    """
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if name.startswith(leave_out):
            continue
        value = value.detach().cpu().contiguous()
        if value.is_floating_point():
            value = value if dtype is None else value.to(dtype)
            value = value if value.dtype == torch.float64 else value.float()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each submodule's own mode restored after, always.

    Raises `ValueError` for a submodule whose own `eval` leaves it in training mode.
    """
    modes = {child: child.training for child in module.modules()}
    try:
        module.eval()
        _check_eval(modes)
        with torch.inference_mode():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def _check_eval(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if module.training:
            raise ValueError(f"module: {type(module).__name__} stays in training mode after eval()")
