"""FeatureTransferHead: the two fully connected layers that LR features go through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featxfer.checks import ArrayLike, as_features, check_choice, check_floating, check_integer
from featxfer.features.backbone import frozen
from featxfer.modules.base import he_initialise
from featxfer.modules.hub import HubModule
from featxfer.modules.scaling import SCALINGS, scale_features, scale_rows

OUTPUTS = ("features", "clusters")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "identity": lambda x: x,
}
HIDDEN_FEATURES = {"features": 512, "clusters": 4096}
"""The default of `hidden_features` by output: ours, and the paper's best."""

DROPOUT = {"features": 0.5, "clusters": 0.0}
"""The default of `dropout` by output."""


class FeatureTransferHead(HubModule):
    """The feature transfer network of Wu et al. 2019, sections 3.2 and 4.2, and its residual form.

    The paper gives two fully connected layers, their sizes and MSRA (He) initialisation; it states
    neither the activation between them nor any normalisation: ReLU and the statistics of the
    input, kept as buffers, are ours. With `hidden = activation(fc1(z))` and `z = (x - input_mean) /
    input_std`, within +-`LARGEST_Z`, the output is

    - "features" (ours): `x - fc2(hidden)`, in the feature space of the backbone. `fc2` starts at
      zero and learns what low resolution added to the feature, so an untrained head returns every
      finite input bit for bit (a zero that is subtracted, not added, keeps even the sign of zeros).
    - "clusters" (the paper): `fc2(hidden)`, k cluster logits; `fc2` starts as He initialisation.

    Shapes: vectors `(..., in_features) -> (..., out_features)`; feature maps `(n, in_features, h,
    w) -> (n, out_features, h, w)`, position by position. A 4-D input whose second dimension is
    `in_features` is a map. The output has the dtype of the input; the layers run in the dtype of
    their weights; the scaling and `z` are computed in float32 or wider.

    Args:
        in_features: width d of the backbone's feature.
        clusters: number of HR centroids k (the paper's N2; 100 was best).
        hidden_features: the paper's N1; by default 512 for "features", 4096 (the paper's best)
            for "clusters".
        output: "features" or "clusters".
        activation: between the layers: "relu", "gelu" or "identity".
        dropout: share of the hidden activations that training drops, in [0, 1); by default 0.5
            for "features", 0 for "clusters".
        scaling: of each feature before all else, "none" or "l2" (see `scale_features`; a feature of
            zeros stays zeros). "l2" is for "clusters": "features" are in the space of the input.
        seed: of the initialisation, and of dropout in a training loop of one's own, which draws
            from `generator`. The global random state is neither read nor changed.

    Attributes:
        generator: of dropout, on the CPU wherever the head is; in no state dict. Seed it anew where
            several processes train copies of one head. In training `torch.compile` breaks its graph
            at dropout, and activation checkpointing around the head is refused.

    Raises:
        ValueError: a size below 1, an unknown output, activation or scaling, a dropout outside
            [0, 1), scaling "l2" with output "features".
    """

    kind = "head"
    centroids: Tensor

    def __init__(
        self,
        in_features: int,
        clusters: int = 100,
        hidden_features: int | None = None,
        *,
        output: str = "features",
        activation: str = "relu",
        dropout: float | None = None,
        scaling: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("output", output, OUTPUTS)
        if hidden_features is None:
            hidden_features = HIDDEN_FEATURES[output]
        if dropout is None:
            dropout = DROPOUT[output]
        check_integer("in_features", in_features, at_least=1)
        check_integer("clusters", clusters, at_least=1)
        check_integer("hidden_features", hidden_features, at_least=1)
        check_choice("activation", activation, ACTIVATIONS)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout!r}, wanted a share in [0, 1)")
        check_choice("scaling", scaling, SCALINGS)
        if output == "features" and scaling != "none":
            raise ValueError(f"scaling: got {scaling!r}, wanted 'none' with output 'features'")
        self.output = output
        self.activation = activation
        self.dropout = float(dropout)
        self.scaling = scaling
        self.generator = torch.Generator("cpu").manual_seed(seed)
        out_features = in_features if output == "features" else clusters
        make: Any = partial(nn.utils.skip_init, nn.Linear, device=torch.get_default_device())
        self.fc1 = make(in_features, hidden_features)
        self.fc2 = make(hidden_features, out_features)
        wide = torch.float32
        self.register_buffer("input_mean", torch.zeros(in_features, dtype=wide))
        self.register_buffer("input_std", torch.ones(in_features, dtype=wide))
        self.register_buffer("centroids", torch.zeros(clusters, in_features, dtype=wide))
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int = 0) -> None:
        """The initial weights: He initialisation, from a generator of its own; zero biases."""
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.fc1, self.fc2):
            he_initialise(layer, generator)
        if self.output == "features":
            nn.init.zeros_(self.fc2.weight)

    @property
    def in_features(self) -> int:
        """Width of the features that it takes."""
        return int(self.fc1.in_features)

    @property
    def out_features(self) -> int:
        """Width of what it returns: `in_features`, or the number of clusters."""
        return int(self.fc2.out_features)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that make a head of the same shape, as JSON types."""
        return {
            "in_features": self.in_features,
            "clusters": len(self.centroids),
            "hidden_features": self.fc1.out_features,
            "output": self.output,
            "activation": self.activation,
            "dropout": self.dropout,
            "scaling": self.scaling,
        }

    def hidden(self, features: Tensor) -> Tensor:
        """Activations between the layers: `(..., in_features) -> (..., hidden_features)`."""
        z = self.normalise(scale_rows(features, self.scaling)).to(self.fc1.weight.dtype)
        hidden = ACTIVATIONS[self.activation](self.fc1(z))
        drops = self.training and self.dropout
        return _drop(hidden, self.dropout, self.generator) if drops else hidden

    def forward(self, features: Tensor) -> Tensor:
        """Transferred features, see the class; `ValueError` for another width or integers."""
        d = self.in_features
        check_floating("features", features)
        is_map = features.ndim == 4 and features.shape[1] == d
        if not is_map and (features.ndim == 0 or features.shape[-1] != d):
            raise ValueError(
                f"features: got shape {tuple(features.shape)}, wanted (..., {d}) or (n, {d}, h, w)"
            )
        rows = features.movedim(1, -1) if is_map else features
        second: Tensor = self.fc2(self.hidden(rows)).to(features.dtype)
        if is_map:
            second = second.movedim(-1, 1)
        return second if self.output == "clusters" else features - second

    def scale(self, features: ArrayLike) -> Tensor:
        """Rows `(n, in_features)` scaled as the head does it, which k-means wants: float32.

        Raises `ValueError` for another width, and as `scale_features`.
        """
        rows = as_features("features", features, width=self.in_features)
        return scale_features(rows, self.scaling)

    @torch.no_grad()
    def set_input_statistics(self, features: ArrayLike) -> None:
        """Takes mean and standard deviation a dimension from `features`, `(n, in_features)`.

        They are those of the scaled rows. A dimension that does not vary (and any, for n = 1) gets
        the standard deviation 1, one that hardly varies `SMALLEST_SHARE` of the
        median. Raises `ValueError` as `scale` does; the head is then unchanged.
        """
        rows = self.scale(features)
        std, mean = torch.std_mean(rows, dim=0, correction=0)
        self._keep_statistics(mean, std)

    @torch.no_grad()
    def set_centroids(self, centroids: ArrayLike) -> None:
        """Keeps the HR centroids `(clusters, in_features)` that it was trained towards.

        Raises `ValueError` for other shapes, NaN or infinity, and under scaling "l2" for what
        cannot be a mean of rows of length 1: the rows that were clustered were not scaled.
        """
        rows = as_features("centroids", centroids, width=self.in_features)
        if len(rows) != len(self.centroids):
            raise ValueError(
                f"centroids: got {len(rows)}, wanted {len(self.centroids)}, the head's clusters"
            )
        longest = float(rows.norm(dim=1).max())
        if self.scaling == "l2" and longest > 1.001:
            raise ValueError(
                f"centroids: got one of length {longest:g}, wanted those of rows that were scaled "
                "to length 1 (`head.scale`)"
            )
        self.centroids.copy_(rows)

    def transfer(
        self, features: ArrayLike, *, layer: str = "output", batch_size: int = 4096
    ) -> Tensor:
        """Rows through the head, without gradient, in batches: float32 `(n, k)` on the CPU.

        The head is in eval mode meanwhile.

        Args:
            features: `(n, in_features)`.
            layer: "output", or "hidden" for the `hidden_features` activations.
            batch_size: rows at a time, >= 1.

        Raises:
            ValueError: another width, NaN or infinity, an unknown layer.
        """
        check_choice("layer", layer, ("output", "hidden"))
        check_integer("batch_size", batch_size, at_least=1)
        rows = as_features("features", features, width=self.in_features)
        run = self.forward if layer == "output" else self.hidden
        with frozen(self):
            parts = [run(part.to(self.fc1.weight.device)) for part in rows.split(batch_size)]
        return torch.cat([part.to("cpu", torch.float32) for part in parts])


# as torch.compiler.disable, which imports the compiler at once
@torch._disable_dynamo  # type: ignore[attr-defined]
def _drop(hidden: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Dropout of which `generator`, on the CPU, draws the seed, whatever the device of `hidden`.

    Raises `RuntimeError` inside a backward pass, where activation checkpointing runs a head again:
    another mask than in the forward pass would give wrong gradients.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "dropout: got a head that activation checkpointing runs again, wanted one outside of "
            "it, or with `head.dropout = 0`: what it drops would not be the same again"
        )
    if hidden.is_meta:
        return F.dropout(hidden, share)
    seed = torch.randint(2**63 - 1, (), generator=generator, device="cpu")
    mask = torch.Generator(hidden.device).manual_seed(int(seed))
    kept = torch.empty_like(hidden).bernoulli_(1 - share, generator=mask)
    return hidden * kept.div_(1 - share)
