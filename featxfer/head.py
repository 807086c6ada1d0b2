"""FeatureTransferHead: the two fully connected layers that LR features go through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featxfer._checks import ArrayLike, as_features, check_choice, check_integer

OUTPUTS = ("clusters",)
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "identity": lambda x: x,
}


class FeatureTransferHead(nn.Module):
    """The feature transfer network of Wu et al. 2019, sections 3.2 and 4.2.

    `fc2(activation(fc1((x - input_mean) / input_std)))`, both layers with He (MSRA) initialisation
    and zero biases. The paper gives two fully connected layers, their sizes and MSRA
    initialisation; it states neither the activation between them nor any normalisation: ReLU and
    the statistics of the input, kept as buffers, are ours.

    Shapes: `(..., in_features) -> (..., out_features)`, in the dtype of the module.

    Args:
        in_features: width d of the backbone's feature.
        out_features: number of clusters k (the paper's N2; 100 was best).
        hidden_features: the paper's N1; 4096 was best.
        output: "clusters" (the paper): the output is the k cluster logits.
        activation: between the layers: "relu", "gelu" or "identity".
        seed: of the initialisation. The global random state is neither read nor changed.

    Raises:
        ValueError: a size below 1, an unknown output or activation.
    """

    input_mean: Tensor
    input_std: Tensor
    centroids: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int = 100,
        hidden_features: int = 4096,
        *,
        output: str = "clusters",
        activation: str = "relu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("in_features", in_features, at_least=1)
        check_integer("out_features", out_features, at_least=1)
        check_integer("hidden_features", hidden_features, at_least=1)
        check_choice("output", output, OUTPUTS)
        check_choice("activation", activation, ACTIVATIONS)
        self.output = output
        self.activation = activation
        self.fc1 = nn.utils.skip_init(nn.Linear, in_features, hidden_features)
        self.fc2 = nn.utils.skip_init(nn.Linear, hidden_features, out_features)
        self.register_buffer("input_mean", torch.zeros(in_features))
        self.register_buffer("input_std", torch.ones(in_features))
        self.register_buffer("centroids", torch.zeros(out_features, in_features))
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int = 0) -> None:
        """He initialisation of both layers, from a generator of its own."""
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make a head of the same shape, as JSON types."""
        return {
            "in_features": self.fc1.in_features,
            "out_features": self.fc2.out_features,
            "hidden_features": self.fc1.out_features,
            "output": self.output,
            "activation": self.activation,
        }

    def hidden(self, features: Tensor) -> Tensor:
        """Activations between the layers: `(..., in_features) -> (..., hidden_features)`."""
        activate = ACTIVATIONS[self.activation]
        return activate(self.fc1((features - self.input_mean) / self.input_std))

    def forward(self, features: Tensor) -> Tensor:
        """Cluster logits: `(..., in_features) -> (..., out_features)`."""
        transferred: Tensor = self.fc2(self.hidden(features))
        return transferred

    @torch.no_grad()
    def set_input_statistics(self, features: ArrayLike) -> None:
        """Takes mean and standard deviation a dimension from `features`, `(n, in_features)`.

        A dimension that does not vary (and any, for n = 1) gets the standard deviation 1. Raises
        `ValueError` for another width, NaN or infinity; the head is then unchanged.
        """
        rows = as_features("features", features, width=self.fc1.in_features)
        std, mean = torch.std_mean(rows, dim=0, correction=0)
        constant = std <= 1e-6 * mean.abs().clamp(min=1e-6)
        self.input_mean.copy_(mean)
        self.input_std.copy_(std.masked_fill(constant, 1.0))

    @torch.no_grad()
    def set_centroids(self, centroids: ArrayLike) -> None:
        """Keeps the HR centroids `(out_features, in_features)` that the logits stand for."""
        rows = as_features("centroids", centroids, width=self.fc1.in_features)
        if len(rows) != self.fc2.out_features:
            raise ValueError(
                f"centroids: got {len(rows)}, wanted {self.fc2.out_features}, one an output"
            )
        self.centroids.copy_(rows)

    @torch.no_grad()
    def transfer(
        self, features: ArrayLike, *, layer: str = "output", batch_size: int = 4096
    ) -> Tensor:
        """Rows through the head, without gradient, in batches: float32 `(n, k)` on the CPU.

        Args:
            features: `(n, in_features)`.
            layer: "output", or "hidden" for the `hidden_features` activations.
            batch_size: rows at a time.

        Raises:
            ValueError: another width, NaN or infinity, an unknown layer.
        """
        check_choice("layer", layer, ("output", "hidden"))
        rows = as_features("features", features, width=self.fc1.in_features)
        run = self.forward if layer == "output" else self.hidden
        weight = self.fc1.weight
        parts = [run(part.to(weight.device, weight.dtype)) for part in rows.split(batch_size)]
        return torch.cat([part.to("cpu", torch.float32) for part in parts])
