"""FeatureTransferBlock: residual convolutions on feature maps, after any stage of a backbone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featxfer.checks import LARGEST_NORM, check_choice, check_floating, check_integer
from featxfer.modules.hub import TransferModule, he_initialise

LAYOUTS = ("nchw", "nhwc")


class FeatureTransferBlock(TransferModule):
    """The idea of the feature transfer network where features are still maps (ours).

    `units` residual units, one after the other: `x - project(relu(expand(spatial(z) + z)))` with
    `z = (x - input_mean) / input_std`, within +-`LARGEST_Z`. `spatial` is a depthwise
    convolution with a wide kernel, `expand` and `project` are 1 x 1 convolutions to
    `hidden_channels` and back; `project` starts at zero, so that an untrained block returns every
    finite input, bit for bit. Without `depthwise` a unit is `x - project(relu(spatial(z)))` with a
    full convolution to `hidden_channels`.

    Shapes: `(n, channels, h, w)`, or with layout "nhwc" `(n, h, w, channels)`, to the same, in the
    dtype of the input; the layers run in the dtype of their weights, `z` is computed in float32 or
    wider.

    Args:
        channels: of the stage that it follows.
        hidden_channels: between the 1 x 1 convolutions.
        units: how many, each with weights of its own.
        kernel_size: of the spatial convolution, odd.
        depthwise: whether the spatial convolution takes each channel by itself.
        layout: "nchw", or "nhwc" for hosts that keep channels last (Swin).
        seed: of the He initialisation. The global random state is neither read nor changed.

    Raises:
        ValueError: a size below 1, an even `kernel_size`, an unknown layout, a `depthwise` that is
            no bool.
    """

    kind = "block"

    def __init__(
        self,
        channels: int,
        hidden_channels: int = 256,
        *,
        units: int = 2,
        kernel_size: int = 7,
        depthwise: bool = True,
        layout: str = "nchw",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("channels", channels, at_least=1)
        check_integer("hidden_channels", hidden_channels, at_least=1)
        check_integer("units", units, at_least=1)
        check_integer("kernel_size", kernel_size, at_least=1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, wanted an odd one")
        if not isinstance(depthwise, bool):
            raise ValueError(f"depthwise: got {depthwise!r}, wanted True or False")
        check_choice("layout", layout, LAYOUTS)
        self.channels, self.hidden_channels = channels, hidden_channels
        self.kernel_size, self.depthwise, self.layout = kernel_size, depthwise, layout
        self.units = nn.ModuleList(
            _Unit(channels, hidden_channels, kernel_size, self.depthwise) for _ in range(units)
        )
        wide = torch.float32
        self.register_buffer("input_mean", torch.zeros(channels, 1, 1, dtype=wide))
        self.register_buffer("input_std", torch.ones(channels, 1, 1, dtype=wide))
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int = 0) -> None:
        """The initial weights, from a generator of its own; zero biases and last layers."""
        generator = torch.Generator().manual_seed(seed)
        for unit in self.units:
            assert isinstance(unit, _Unit)
            for layer in unit.children():
                assert isinstance(layer, nn.Conv2d)
                he_initialise(layer, generator)
            nn.init.zeros_(unit.project.weight)

    @property
    def in_features(self) -> int:
        """Channels of the maps that it takes and returns."""
        return self.channels

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make a block of the same shape, as JSON types."""
        return {
            "channels": self.channels,
            "hidden_channels": self.hidden_channels,
            "units": len(self.units),
            "kernel_size": self.kernel_size,
            "depthwise": self.depthwise,
            "layout": self.layout,
        }

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one map of `height` x `width`."""
        weights = sum(p.numel() for p in self.units.parameters() if p.ndim == 4)
        return weights * height * width

    def forward(self, maps: Tensor) -> Tensor:
        """Transferred maps, see the class; `ValueError` for another shape or integers."""
        check_floating("maps", maps)
        planes = self._planes(maps)
        for unit in self.units:
            planes = planes - unit(self.normalise(planes)).to(maps.dtype)
        return planes if self.layout == "nchw" else planes.movedim(1, -1)

    def _planes(self, maps: Tensor) -> Tensor:
        """The maps as `(n, channels, h, w)`; `ValueError` for another shape."""
        c = self.in_features
        if maps.ndim != 4 or maps.shape[1 if self.layout == "nchw" else -1] != c:
            wanted = f"(n, {c}, h, w)" if self.layout == "nchw" else f"(n, h, w, {c})"
            raise ValueError(f"maps: got shape {tuple(maps.shape)}, wanted {wanted}")
        return maps if self.layout == "nchw" else maps.movedim(-1, 1)

    @torch.no_grad()
    def set_input_statistics(self, maps: Tensor) -> None:
        """Takes mean and standard deviation a channel from `maps`, in the block's layout.

        A channel that does not vary gets the standard deviation 1, one that hardly varies
        `SMALLEST_SHARE` of the median. Raises `ValueError` for another shape, NaN,
        infinity or a value above `LARGEST_NORM`; the block is then unchanged.
        """
        planes = self._planes(maps).float()
        if not (planes.numel() and (planes.abs() <= LARGEST_NORM).all()):
            raise ValueError(
                f"maps: got {tuple(maps.shape)}, wanted n >= 1 finite ones, of values of at most "
                f"{LARGEST_NORM:g}"
            )
        std, mean = torch.std_mean(planes, dim=(0, 2, 3), correction=0, keepdim=True)
        self._keep_statistics(mean[0], std[0])


class _Unit(nn.Module):
    """What one unit subtracts from the maps, of normalised maps."""

    def __init__(self, channels: int, hidden: int, kernel_size: int, depthwise: bool) -> None:
        super().__init__()
        make: Any = partial(nn.utils.skip_init, nn.Conv2d, device=torch.get_default_device())
        spatial = partial(make, channels, kernel_size=kernel_size, padding=kernel_size // 2)
        if depthwise:
            self.spatial = spatial(channels, groups=channels)
            self.expand = make(channels, hidden, 1)
        else:
            self.spatial = spatial(hidden)
        self.project = make(hidden, channels, 1)
        self.depthwise = depthwise

    def forward(self, z: Tensor) -> Tensor:
        z = z.to(self.project.weight.dtype)
        hidden = self.expand(self.spatial(z) + z) if self.depthwise else self.spatial(z)
        subtracted: Tensor = self.project(F.relu(hidden))
        return subtracted
