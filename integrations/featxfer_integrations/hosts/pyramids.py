"""Where the resolutions of a detector's backbone end: what its blocks follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from torch import Tensor, nn

from featxfer_integrations.mechanism.capture import watched
from featxfer_integrations.mechanism.site import no_site

REDUCTIONS = (8, 16, 32)
"""Blocks go where the backbone's last maps of so many times less than the image's size end."""


def blocks_of(model: nn.Module, last: Mapping[int, str]) -> list[str]:
    """Of `modules_by_reduction`, those that blocks follow; raises `AttachError` without any."""
    found = [last[reduction] for reduction in REDUCTIONS if reduction in last]
    if not found:
        raise no_site(model, "site: the backbone has no maps of 1/8 to 1/32 of the image's size")
    return found


def modules_by_reduction(
    model: nn.Module,
    path: str,
    run: Callable[[], Sequence[Tensor]],
    side: int,
    leave_out: type[nn.Module] | tuple[()] = (),
) -> dict[int, str]:
    """Names of the backbone's last modules of each resolution, by how much it is reduced.

    `run` runs the backbone, the module at `path`, once, on an image of `side` x `side` pixels, and
    gives the maps that it returns. Modules inside of those to `leave_out` (a pyramid) are left out,
    and those inside of modules that give maps themselves and are no lists of layers. Where a
    module's maps are what the backbone returns of a resolution, as SSD's are, it is that
    resolution's last: later ones are not seen there.
    """
    backbone = model.get_submodule(path)
    reductions: dict[str, int] = {}
    maps: dict[str, Tensor] = {}

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and 1 < output.shape[2] < side:
            reductions[name] = 2 ** round(math.log2(side / output.shape[2]))
            maps[name] = output

    names = [name for name, _ in backbone.named_modules(prefix=path)]
    with watched(model, names, after=note):
        levels = run()
    stages = list(_stages(backbone, path, reductions, leave_out))
    last = {reduction: name for name, reduction in reductions.items() if name in stages}
    for name in stages:  # of modules that return the same tensor, the outermost comes last
        if any(maps[name] is level for level in levels):
            last[reductions[name]] = name
    return dict(sorted(last.items()))


def _stages(
    module: nn.Module, path: str, giving: Container[str], leave_out: type[nn.Module] | tuple[()]
) -> Iterator[str]:
    """Names of modules that give maps, and of those in lists of layers among them."""
    for name, child in module.named_children():
        inner = f"{path}.{name}"
        if isinstance(child, leave_out):
            continue
        if inner not in giving or isinstance(child, nn.Sequential):
            yield from _stages(child, inner, giving, leave_out)
        if inner in giving:
            yield inner
