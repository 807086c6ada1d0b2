"""FeatureTransferBlock: a residual convolution on feature maps, after any stage of a backbone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featxfer._checks import check_choice, check_integer
from featxfer.hub import TransferModule

LAYOUTS = ("nchw", "nhwc")


class FeatureTransferBlock(TransferModule):
    """The idea of the feature transfer network where features are still maps (ours).

    `x - project(relu(conv2(a)) + a)` with `a = relu(conv1((x - input_mean) / input_std))`: a 3 x 3
    convolution to `hidden_channels`, a grouped 3 x 3 one beside a skip, and a 1 x 1 one back, which
    starts at zero. Untrained it returns its input, bit for bit.

    Shapes: `(n, channels, h, w)`, or with layout "nhwc" `(n, h, w, channels)`, to the same, in the
    dtype of the input; the layers run in the dtype of their weights.

    Args:
        channels: of the stage that it follows.
        hidden_channels: of the convolutions between; a multiple of `groups`.
        groups: of the second convolution.
        layout: "nchw", or "nhwc" for hosts that keep channels last (Swin).
        seed: of the He initialisation. The global random state is neither read nor changed.

    Raises:
        ValueError: a size below 1, `hidden_channels` that `groups` does not divide, an unknown
            layout.
    """

    kind = "block"

    def __init__(
        self,
        channels: int,
        hidden_channels: int = 256,
        *,
        groups: int = 16,
        layout: str = "nchw",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("channels", channels, at_least=1)
        check_integer("hidden_channels", hidden_channels, at_least=1)
        check_integer("groups", groups, at_least=1)
        if hidden_channels % groups:
            raise ValueError(
                f"hidden_channels: got {hidden_channels}, wanted a multiple of groups={groups}"
            )
        check_choice("layout", layout, LAYOUTS)
        self.layout = layout
        make: Any = partial(nn.utils.skip_init, nn.Conv2d, device=torch.get_default_device())
        width = hidden_channels
        self.conv1 = make(channels, width, 3, padding=1)
        self.conv2 = make(width, width, 3, padding=1, groups=groups)
        self.project = make(width, channels, 1)
        self.register_buffer("input_mean", torch.zeros(channels, 1, 1))
        self.register_buffer("input_std", torch.ones(channels, 1, 1))
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int = 0) -> None:
        """The initial weights, from a generator of its own; zero biases and last layer."""
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.conv1, self.conv2):
            if not layer.weight.is_meta:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    @property
    def in_features(self) -> int:
        """Channels of the maps that it takes and returns."""
        return int(self.conv1.in_channels)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make a block of the same shape, as JSON types."""
        return {
            "channels": self.in_features,
            "hidden_channels": self.conv1.out_channels,
            "groups": self.conv2.groups,
            "layout": self.layout,
        }

    def forward(self, maps: Tensor) -> Tensor:
        """Transferred maps, see the class; `ValueError` for another shape."""
        planes = self._planes(maps).to(self.conv1.weight.dtype)
        hidden = F.relu(self.conv1((planes - self.input_mean) / self.input_std))
        added: Tensor = self.project(F.relu(self.conv2(hidden)) + hidden).to(maps.dtype)
        return maps - (added if self.layout == "nchw" else added.movedim(1, -1))

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

        A channel that does not vary gets the standard deviation 1. Raises `ValueError` for another
        shape, NaN or infinity; the block is then unchanged.
        """
        planes = self._planes(maps).float()
        if not (planes.numel() and torch.isfinite(planes).all()):
            raise ValueError(f"maps: got {tuple(maps.shape)}, wanted n >= 1 finite ones")
        std, mean = torch.std_mean(planes, dim=(0, 2, 3), correction=0, keepdim=True)
        self._keep_statistics(mean[0], std[0])
