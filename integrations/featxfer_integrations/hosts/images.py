"""Images that a model takes, as it says: their size and channels, and small ones of these."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featxfer import Degradation
from featxfer_integrations.mechanism.attach import host_device, patch_layer
from featxfer_integrations.mechanism.capture import in_dtype
from featxfer_integrations.mechanism.site import AttachError

INPUT_SIZE = 224
"""Side of an image where a model does not say its own, in pixels."""

LR_SIZE = 32
"""Side of the small image by default, pixels; less where the model's own images are no larger."""


def usual_degradation(size: int) -> Degradation:
    """To `LR_SIZE` and up again; of images that are no larger, to a quarter."""
    return Degradation(hr_size=size, lr_size=LR_SIZE if size > LR_SIZE else max(1, size // 4))


def input_channels(model: nn.Module) -> int:
    """Channels of the images that the model takes: what it says, what its first convolution takes.

    Some fold pixels into channels first, so that a multiple of 3 stands for 3; so does no layer.
    """
    said = getattr(model, "in_chans", None)
    if type(said) is int:
        return said
    first = patch_layer(model)
    return first.in_channels if first is not None and first.in_channels % 3 else 3


def black_image(model: nn.Module, height: int, width: int) -> Tensor:
    """An image `(1, c, height, width)` of zeros, on the model's device and in its dtype."""
    shape = (1, input_channels(model), height, width)
    return in_dtype(model, torch.zeros(shape, device=host_device(model)))


def said_sides(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images that the model, or a part of it, says that it takes."""
    for module in model.modules():
        for name in ("image_size", "img_size"):
            said = getattr(module, name, None)
            sides = tuple(said) if isinstance(said, list | tuple) else (said, said)
            if len(sides) == 2 and all(type(side) is int for side in sides):
                return sides
    return None


def said_side(model: nn.Module) -> int | None:
    """The one side of `said_sides`; `AttachError` where there are two."""
    sides = said_sides(model)
    return None if sides is None else square_side(sides)


def square_side(said: Any) -> int:
    """The side of what is said, a number or two; `AttachError` where these differ."""
    sides = (said, said) if isinstance(said, int) else tuple(said)
    if sides[0] != sides[1]:
        raise AttachError(f"model: it takes images of {sides}, wanted square ones")
    return int(sides[0])
