"""The part of a frozen model behind a site, as a module of its own: maps in, what it shows out.

No layer is taken out of its model. A copy of the model runs as it always does, but the modules that
are done before the site's maps are there return empty tensors of the right shape at no cost, and
the site's module returns the maps that were kept. That is right where what is shown hangs on these
maps alone, which is tested on an image before anything is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featxfer.modules.base import TransferModule
from featxfer_integrations.mechanism.attach import (
    attached_sites,
    install,
    is_attached,
    transfers_of,
    uninstall,
)
from featxfer_integrations.mechanism.capture import no_tensor, take_enabled_feature, watched
from featxfer_integrations.mechanism.shown import Show, Shown
from featxfer_integrations.mechanism.site import AttachError, Site

T = TypeVar("T")


class FrozenCopy(nn.Module):
    """A copy of a model, frozen but for what is attached to the copy; in float32, in eval mode.

    Small steps are lost in half precision. What `attach` adds are its only parameters that ask for
    gradients, and the only modules that `train` sets to training mode. `show` is what the copy
    shows of a batch, and `precision` "fp32", or "bf16" for autocast. What is attached at the sites
    to `keep` is copied too, and stays frozen; the rest is left out.
    """

    def __init__(
        self, model: nn.Module, show: Show, precision: str, keep: Sequence[Site] = ()
    ) -> None:
        super().__init__()
        self.host = copy.deepcopy(model)
        kept = {site.name for site in keep}
        for site in attached_sites(self.host):
            if site.name not in kept:
                uninstall(self.host, site)
        self.host.eval().requires_grad_(False).float()
        self.show, self.precision = show, precision

    def attach(self, site: Site, module: TransferModule) -> None:
        """Makes `module` act at `site`."""
        module.requires_grad_(True)
        install(self.host, site, module)

    def train(self, mode: bool = True) -> FrozenCopy:
        """Sets what is attached to training or eval mode, and nothing else."""
        self.training = mode
        if is_attached(self.host):
            transfers_of(self.host).train(mode)
        return self

    def forward(self, batch: Any) -> Shown:
        """What it shows of a batch, through what is attached."""
        images = batch if isinstance(batch, Tensor) else batch.images
        bf16 = self.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            return self.show(self.host, batch).map(Tensor.float)


class _Kept:
    """The maps that the site's module is to return."""

    maps = torch.empty(0)


@dataclass(frozen=True)
class _Run:
    """What modules that are done before the site return, the site's own, and what is shown."""

    done: dict[str, Any]
    returned: Any
    shown: Shown


class Suffix(FrozenCopy):
    """From the maps, tokens or vectors behind `site` to what the model shows, layers frozen.

    It is tried on one preprocessed square `image`, `(1, 3, s, s)`, and one made of it. Raises
    `AttachError` where what is shown hangs on more than these maps, or they are no module's result.
    """

    def __init__(
        self, model: nn.Module, site: Site, show: Show, image: Tensor, precision: str
    ) -> None:
        if site.side != "output" or not site.modules:
            raise AttachError(f"site: what passes {site.where} is no module's result")
        super().__init__(model, show, precision)
        self.host.to(memory_format=torch.channels_last)
        self.site, self._image, self._kept = site, image[:1].float(), _Kept()
        with torch.no_grad():
            runs = [self._run(view) for view in (self._image, 1 - 2 * self._image)]
            maps = [site.lens.get(run.returned) for run in runs]
            self._skip(*runs)
            _spare_strided_depthwise(self.host)
            try:
                got = [self._replayed(part, partial(show, self.host)) for part in maps]
            except Exception as error:  # whatever a foreign model raises
                raise AttachError(
                    f"site: this {type(model).__name__} does not run from the maps after "
                    f"{site.modules[0]!r} alone ({type(error).__name__}: {error})"
                ) from error
        self.shape = tuple(maps[0].shape[1:])
        if not all(_are_close(part, run.shown) for part, run in zip(got, runs, strict=True)):
            raise AttachError(
                f"site: what this {type(model).__name__} shows does not come from the maps "
                f"after {site.modules[0]!r} alone"
            )

    def maps_at(self, site: Site, maps: Tensor) -> Tensor:
        """The maps that arrive at a site behind the first, through what is attached before."""
        return self._replayed(maps, partial(take_enabled_feature, self.host, site))

    def attach(self, site: Site, module: TransferModule) -> None:
        """Makes `module` act at `site`, which is the first one or behind it."""
        super().attach(site, module)
        module.to(memory_format=torch.channels_last)

    def forward(self, maps: Tensor) -> Shown:
        """What the model shows of maps, through what is attached."""
        return self._replayed(maps, super().forward)

    def _replayed(self, maps: Tensor, run: Callable[[Tensor], T]) -> T:
        kept = maps.float()
        if kept.ndim == 4:
            kept = kept.contiguous(memory_format=torch.channels_last)
        self._kept.maps = kept
        images = self._image.to(maps.device).expand(len(maps), -1, -1, -1)
        try:
            return run(images)
        finally:
            self._kept.maps = torch.empty(0)

    def _run(self, image: Tensor) -> _Run:
        """A run of the whole copy."""
        done: dict[str, Any] = {}
        passed: list[Any] = []

        def note(name: str, output: Any) -> None:
            if name == self.site.modules[0]:
                passed.append(output)
            elif not passed:
                done[name] = output

        names = [name for name, _ in self.host.named_modules() if name]
        with watched(self.host, names, after=note):
            shown = self.show(self.host, image)
        if not passed:
            raise no_tensor(self.site)
        return _Run(done, passed[0], shown)

    def _skip(self, run: _Run, other: _Run) -> None:
        """Replaces the site's module by the kept maps, and all that is done before by nothing.

        But for what is the same in both runs, such as embeddings of positions.
        """
        seen = [name for name in run.done if not _are_same(run.done[name], other.done[name])]
        for name in seen:
            if not any(name.startswith(f"{around}.") for around in seen):
                self.host.get_submodule(name).forward = partial(_empty, self._kept, run.done[name])
        returned = partial(_kept_maps, self._kept, self.site, run.returned)
        self.host.get_submodule(self.site.modules[0]).forward = returned


def _are_close(got: Shown, wanted: Shown) -> bool:
    """Whether all that is shown is the same, but for rounding."""
    pairs = [(getattr(got, kind), getattr(wanted, kind)) for kind in ("maps", "vectors")]
    return all(
        torch.allclose(some[name], part, rtol=1e-3, atol=1e-3 * float(part.abs().max()))
        for some, parts in pairs
        for name, part in parts.items()
    )


def _are_same(output: Any, other: Any) -> bool:
    """Whether two things that a module returned hold the same tensors."""
    pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(*pair) for pair in pairs if isinstance(pair[0], Tensor))


def _kept_maps(kept: _Kept, site: Site, recorded: Any, *_: Any, **__: Any) -> Any:
    """What the site's module returned for one image, with the kept maps in it."""
    return site.lens.put(_empty(kept, recorded) if site.lens.path else recorded, kept.maps)


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
