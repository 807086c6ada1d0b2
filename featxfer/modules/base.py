"""TransferModule: what a head and a block share, and the card that says what they are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from featxfer.views.degradation import BaseDegradation

LARGEST_Z = 50.0
"""Standard deviations from the mean beyond which inputs count as so far away.

Of n features none is further than sqrt(n - 1) from their mean; those of photographs were within 27
at every stage of EfficientNet-Lite0, other data sets' too. What later layers make of it is within
float16.
"""

SMALLEST_SHARE = 1e-3
"""Of a channel's standard deviation: this share of the median of those channels that vary."""


@dataclass(frozen=True)
class Card:
    """What a module was made of and for.

    Args:
        backbone: the backbone's name.
        backbone_sha256: hash of its weights (`featxfer.features.backbone.weights_sha256`).
        degradations: how the LR images were made that it was trained on, one or several.
        details: the rest, as JSON types: recipe, seeds, diagnostics, data, measured figures.
    """

    backbone: str
    backbone_sha256: str
    degradations: tuple[BaseDegradation, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


class TransferModule(nn.Module):
    """A module that keeps the shape or the meaning of features, with a card that says for what.

    Its buffers are float32 or wider whatever dtype its weights are converted to: a mean of 1e5 is
    infinity in float16, and a standard deviation of 1e-9 is 0.

    Attributes:
        kind: of a subclass, by which saved ones are found in `KINDS`; one without cannot be saved.
        card: what it was trained on and for; None until it is trained or loaded.
    """

    KINDS: ClassVar[dict[str, type[TransferModule]]] = {}
    kind: ClassVar[str]
    input_mean: Tensor
    input_std: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in vars(cls):
            TransferModule.KINDS[cls.kind] = cls

    def __init__(self) -> None:
        super().__init__()
        self.card: Card | None = None

    @property
    def in_features(self) -> int:
        """Width or channels of what it takes."""
        raise NotImplementedError

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make a module of the same shape, as JSON types."""
        raise NotImplementedError

    def set_input_statistics(self, features: Tensor) -> None:
        """Takes mean and standard deviation of what it will get, a channel or dimension each."""
        raise NotImplementedError

    def normalise(self, features: Tensor) -> Tensor:
        """`(features - input_mean) / input_std` within +-`LARGEST_Z`, in float32 or wider."""
        centred = features - self.input_mean  # the wider of the dtypes, and new memory
        return centred.div_(self.input_std).clamp_(-LARGEST_Z, LARGEST_Z)

    def _keep_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Takes them as the input's; what does not vary gets the standard deviation 1.

        What hardly varies gets `SMALLEST_SHARE` of the median standard deviation.
        """
        constant = std <= 1e-6 * mean.abs().clamp(min=1e-6)
        if not constant.all():
            std = std.clamp(min=SMALLEST_SHARE * float(std[~constant].median()))
        self.input_mean.copy_(mean)
        self.input_std.copy_(std.masked_fill(constant, 1.0))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransferModule:
        """What moves and converts modules; buffers are moved, and not made narrower."""
        buffers = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in buffers.items():
            after = self.get_buffer(name)
            if after.dtype.itemsize < before.dtype.itemsize:
                setattr(self, name, before.to(after.device, torch.float32))
        return self


def he_initialise(layer: nn.Linear | nn.Conv2d, generator: torch.Generator) -> None:
    """He initialisation from a generator on the CPU, on whatever device the layer is; zero bias.

    A layer without memory (`meta`) is left as it is.
    """
    if layer.weight.is_meta:
        return
    drawn = torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device="cpu")
    nn.init.kaiming_normal_(drawn, nonlinearity="relu", generator=generator)
    with torch.no_grad():
        layer.weight.copy_(drawn)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
