"""FeatureTransferBlock: residual convolutions on feature maps, after any stage of a backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featxfer.checks import LARGEST_NORM, check_choice, check_floating, check_integer
from featxfer.modules.base import he_initialise
from featxfer.modules.hub import HubModule

LAYOUTS = ("nchw", "nhwc", "tokens")


class FeatureTransferBlock(HubModule):
    """The idea of the feature transfer network where features are still maps (ours).

    `units` residual units, one after the other: `x - project(relu(expand(spatial(z) + z)))` with
    `z = (x - input_mean) / input_std`, within +-`LARGEST_Z`. `spatial` is a depthwise
    convolution with a wide kernel, `expand` and `project` are 1 x 1 convolutions to
    `hidden_channels` and back; `project` starts at zero, so that an untrained block returns every
    finite input, bit for bit. Without `depthwise` a unit is `x - project(relu(spatial(z)))` with a
    full convolution to `hidden_channels`.

    Shapes: `(n, channels, h, w)`, with layout "nhwc" `(n, h, w, channels)`, or with layout "tokens"
    `(n, prefix_tokens + h * w, channels)`, to the same, in the dtype of the input; the layers run
    in the dtype of their weights, `z` is computed in float32 or wider. Of tokens the grid, row by
    row, is taken for a map; those before it pass as they are.

    Args:
        channels: of the stage that it follows.
        hidden_channels: between the 1 x 1 convolutions.
        units: how many, each with weights of its own.
        kernel_size: of the spatial convolution, odd.
        depthwise: whether the spatial convolution takes each channel by itself.
        layout: "nchw", "nhwc" for hosts that keep channels last (Swin), or "tokens" (ViT).
        prefix_tokens: with "tokens": how many come before the grid, such as a class token.
        grid: with "tokens": rows and columns of the grid; by default it is a square.
        seed: of the He initialisation. The global random state is neither read nor changed.

    Raises:
        ValueError: a size below 1, an even `kernel_size`, an unknown layout, a `depthwise` that is
            no bool, `prefix_tokens` or `grid` with another layout than "tokens".
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
        prefix_tokens: int = 0,
        grid: Sequence[int] | None = None,
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
        self.prefix_tokens, self.grid = _check_tokens(layout, prefix_tokens, grid)
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
        grid = None if self.grid is None else list(self.grid)
        tokens = {"prefix_tokens": self.prefix_tokens, "grid": grid}
        return {
            "channels": self.channels,
            "hidden_channels": self.hidden_channels,
            "units": len(self.units),
            "kernel_size": self.kernel_size,
            "depthwise": self.depthwise,
            "layout": self.layout,
            **(tokens if self.layout == "tokens" else {}),
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
        if self.layout == "tokens":
            tokens = planes.movedim(1, -1).flatten(1, 2)
            return torch.cat([maps[:, : self.prefix_tokens], tokens], 1)
        return planes if self.layout == "nchw" else planes.movedim(1, -1)

    def _planes(self, maps: Tensor) -> Tensor:
        """The maps as `(n, channels, h, w)`; `ValueError` for another shape."""
        c, shape = self.in_features, tuple(maps.shape)
        if self.layout == "tokens":
            count = shape[1] - self.prefix_tokens if len(shape) == 3 else 0
            rows, columns = self.grid or (math.isqrt(max(count, 0)),) * 2
            if not 0 < count == rows * columns or shape[2] != c:
                size = f"{rows} * {columns}" if self.grid else "side * side"
                wanted = f"(n, {self.prefix_tokens} + {size}, {c})"
                raise ValueError(f"maps: got shape {shape}, wanted tokens {wanted}")
            grid: Tensor = maps[:, self.prefix_tokens :].unflatten(1, (rows, columns))
            return grid.movedim(-1, 1)
        if len(shape) != 4 or shape[1 if self.layout == "nchw" else -1] != c:
            wanted = f"(n, {c}, h, w)" if self.layout == "nchw" else f"(n, h, w, {c})"
            raise ValueError(f"maps: got shape {shape}, wanted {wanted}")
        return maps if self.layout == "nchw" else maps.movedim(-1, 1)

    @torch.no_grad()
    def set_input_statistics(self, maps: Tensor) -> None:
        """Takes mean and standard deviation a channel from `maps`, in the block's layout.

        Or from positions `(n, channels)`; of tokens those of the grid count. A channel that does
        not vary gets the standard deviation 1, one that hardly varies `SMALLEST_SHARE` of the
        median. Raises `ValueError` for another shape, NaN, infinity or a value above
        `LARGEST_NORM`; the block is then unchanged.
        """
        rows = maps.ndim == 2 and maps.shape[1] == self.channels
        planes = (maps.T[None, ..., None] if rows else self._planes(maps)).float()
        if not (planes.numel() and (planes.abs() <= LARGEST_NORM).all()):
            raise ValueError(
                f"maps: got {tuple(maps.shape)}, wanted n >= 1 finite ones, of values of at most "
                f"{LARGEST_NORM:g}"
            )
        std, mean = torch.std_mean(planes, dim=(0, 2, 3), correction=0, keepdim=True)
        self._keep_statistics(mean[0], std[0])


def _check_tokens(
    layout: str, prefix_tokens: int, grid: Sequence[int] | None
) -> tuple[int, tuple[int, int] | None]:
    """Both, as they are kept; raises `ValueError` for what is none, or of another layout."""
    check_integer("prefix_tokens", prefix_tokens, at_least=0)
    for name, value in (("prefix_tokens", prefix_tokens), ("grid", grid)):
        if layout != "tokens" and value:
            raise ValueError(f"{name}: got {value!r} with layout {layout!r}, wanted 'tokens'")
    if grid is None:
        return prefix_tokens, None
    if not isinstance(grid, list | tuple) or len(grid) != 2:
        raise ValueError(f"grid: got {grid!r}, wanted (rows, columns)")
    for size in grid:
        check_integer("grid", size, at_least=1)
    return prefix_tokens, (grid[0], grid[1])


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
