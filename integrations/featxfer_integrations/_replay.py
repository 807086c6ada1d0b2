"""The part of a frozen model behind a stage, as a module of its own: maps in, pooled feature out.

No layer is taken out of its model. A copy of the model runs as it always does, but the modules that
are done before the stage's maps are there return empty tensors of the right shape at no cost, and
the stage returns the maps that were kept. That is right where the feature hangs on these maps
alone, which is tested on an image before anything is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featxfer.modules.hub import TransferModule
from featxfer_integrations._attach import (
    CHILD,
    AttachError,
    Place,
    install,
    is_attached,
    pooled_feature,
    remove_all,
    take_enabled_feature,
    take_feature,
    with_layout,
)


@dataclass
class _Kept:
    """The maps that the stage is to return."""

    maps: Tensor = field(default_factory=lambda: torch.empty(0))


class Rest(nn.Module):
    """From the maps behind `stage` to the feature at `pooled`, `(n, d)` float32, layers frozen.

    What is attached to the model is left out. The copy is in float32, whatever the model is in:
    small steps are lost in half precision. `attach` adds modules, which are its only parameters
    that ask for gradients, and the only ones that `train` sets to training mode.

    Args:
        model: the host; it is copied, not changed.
        stage: the place of the maps.
        pooled: the place of the feature.
        image: one preprocessed square image `(1, 3, s, s)` to try it on.
        precision: "fp32", or "bf16" for autocast.

    Raises:
        AttachError: the feature hangs on more than these maps, or is none (`pooled_feature`).
    """

    def __init__(
        self, model: nn.Module, stage: Place, pooled: Place, image: Tensor, precision: str
    ) -> None:
        super().__init__()
        self.host = copy.deepcopy(model)
        if is_attached(self.host):
            remove_all(self.host)
        self.host.eval().requires_grad_(False).float()
        self.host.to(memory_format=torch.channels_last)
        self.stage, self.precision = stage, precision
        self._image, self._kept = image[:1].float(), _Kept()
        self.pooled = with_layout(self.host, pooled, self._image)
        with torch.no_grad():
            maps = take_feature(self.host, stage, self._image)
            wanted = pooled_feature(take_feature(self.host, pooled, self._image), self.pooled)
            self._skip(stage.outputs[0])
            _spare_strided_depthwise(self.host)
            got = pooled_feature(self._run(maps, pooled, take_feature), self.pooled)
        if not torch.allclose(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
            raise AttachError(
                f"at: the feature of this {type(model).__name__} does not come from the maps after "
                f"{stage.outputs[0]!r} alone, so a block there cannot be trained by itself"
            )

    def maps_at(self, place: Place, maps: Tensor) -> Tensor:
        """The maps that arrive at a place behind the stage, through what is attached before."""
        return self._run(maps, place, take_enabled_feature)

    def attach(self, place: Place, module: TransferModule) -> None:
        """Makes `module` act at `place`, which is the stage or behind it."""
        module.requires_grad_(True)
        install(self.host, place, module)
        module.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Rest:
        """Sets what is attached to training or eval mode, and nothing else."""
        self.training = mode
        if is_attached(self.host):
            self.host.get_submodule(CHILD).train(mode)
        return self

    def forward(self, maps: Tensor) -> Tensor:
        """Features of maps, through what is attached."""
        device = maps.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            feature = self._run(maps, self.pooled, take_enabled_feature)
            return pooled_feature(feature, self.pooled).float()

    def _run(self, maps: Tensor, place: Place, take: Callable[..., Tensor]) -> Tensor:
        self._kept.maps = maps.float().contiguous(memory_format=torch.channels_last)
        images = self._image.to(maps.device).expand(len(maps), -1, -1, -1)
        try:
            return take(self.host, place, images)
        finally:
            self._kept.maps = torch.empty(0)

    def _skip(self, stage: str) -> None:
        """Replaces the stage by the kept maps, and all that is done before it by nothing."""
        done: dict[str, Any] = {}
        finished = False

        def note(_: nn.Module, __: Any, output: Any, *, name: str) -> None:
            nonlocal finished
            if not finished and name != stage:
                done[name] = output
            finished = finished or name == stage

        handles = [
            module.register_forward_hook(partial(note, name=name))
            for name, module in self.host.named_modules()
            if name and name.partition(".")[0] != CHILD
        ]
        try:
            take_feature(self.host, self.pooled, self._image)
        finally:
            for handle in handles:
                handle.remove()
        for name in _outermost(done):
            empty = partial(_empty, self._kept, done[name])
            self.host.get_submodule(name).forward = empty
        self.host.get_submodule(stage).forward = partial(_kept_maps, self._kept)


def _outermost(names: Iterable[str]) -> list[str]:
    """The names that are not inside another of them."""
    chosen = set(names)
    return [
        name
        for name in chosen
        if not any(name.startswith(f"{other}.") for other in chosen if other != name)
    ]


def _kept_maps(kept: _Kept, *_: Any, **__: Any) -> Tensor:
    return kept.maps


def _empty(kept: _Kept, recorded: Any, *_: Any, **__: Any) -> Any:
    """What a module returned for one image, as zeros without memory for as many as there are."""

    def shrink(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        zero = torch.zeros((), dtype=value.dtype, device=kept.maps.device)
        return zero.expand(len(kept.maps), *value.shape[1:])

    return pytree.tree_map(shrink, recorded)


def _spare_strided_depthwise(model: nn.Module) -> None:
    """On the CPU, strided depthwise convolutions run in float32 under autocast.

    Their gradient in bfloat16 takes a path that was measured to be thirty times as slow.
    """
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.groups == module.in_channels > 1
            and max(module.stride) > 1
            and module.weight.device.type == "cpu"
        ):
            module.forward = partial(_in_float32, module)  # type: ignore[method-assign]


def _in_float32(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        result: Tensor = type(convolution).forward(convolution, x.to(convolution.weight.dtype))
        return result.to(x.dtype)
