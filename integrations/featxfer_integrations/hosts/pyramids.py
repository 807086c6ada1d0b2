"""Detectors with a backbone that runs alone: blocks go where its resolutions end."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from featxfer import ScaledDegradation
from featxfer.features.backbone import frozen
from featxfer_integrations.hosts.base import Host
from featxfer_integrations.hosts.images import black_image
from featxfer_integrations.mechanism.capture import watched
from featxfer_integrations.mechanism.site import AttachError, Site, module_site, no_site

REDUCTIONS = (8, 16, 32)
"""Blocks go where the backbone's last maps of so many times less than the image's size end."""


def run_backbone(model: Any, images: Tensor) -> Any:
    """The maps of a detector's backbone, of images as that takes them."""
    return model.backbone(images)


class PyramidHost(Host):
    """Detectors with a backbone; a subclass may say where that is and how it is run."""

    site = "backbone"
    degradation = ScaledDegradation
    detects = True

    run_backbone = staticmethod(run_backbone)
    """(model, images) -> the maps that the backbone returns: one, several, or by name."""

    left_out: type[nn.Module] | tuple[()] = ()
    """Modules in the backbone in which no blocks go: a pyramid."""

    def backbone(self, model: Any) -> str:
        """Name of the module that makes maps of images."""
        return "backbone"

    def image(self, model: Any) -> Tensor:
        """A black image, as the backbone takes it too."""
        size = self.input_size(model)
        return black_image(model, size, size)

    def head(self, model: Any) -> Site:
        """None: a detector has no pooled feature."""
        raise AttachError(f"model: {type(model).__name__} is a detector and has no pooled feature")

    def after(self, model: Any, name: str, kind: str | None = None) -> Site:
        """After a module; what is in the backbone is found by running that alone."""
        inside = name.startswith(f"{self.backbone(model)}.")
        run = self.run_backbone if inside else None
        return module_site(model, name, kind=kind, run=run, repeats=not inside)

    def stages(self, model: Any) -> list[str]:
        """The last module of the backbone of each resolution, from the highest one."""
        return list(self._ends(model).values())

    def blocks(self, model: Any) -> list[str]:
        """The last modules of the backbone that give maps of 1/8, 1/16 and 1/32 of the image."""
        last = self._ends(model)
        found = [last[reduction] for reduction in REDUCTIONS if reduction in last]
        if not found:
            raise no_site(
                model, "site: the backbone has no maps of 1/8 to 1/32 of the image's size"
            )
        return found

    def _ends(self, model: Any) -> dict[int, str]:
        """Names of the backbone's last modules of each resolution, by how much it is reduced.

        From one run. Modules inside of those `left_out` are left out, and those inside of modules
        that give maps themselves and are no lists of layers. Where a module's maps are what the
        backbone returns of a resolution, as SSD's are, it is that resolution's last: later ones
        are not seen there.
        """
        path, image = self.backbone(model), self.image(model)
        backbone, side = model.get_submodule(path), image.shape[2]
        reductions: dict[str, int] = {}
        maps: dict[str, Tensor] = {}

        def note(name: str, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and 1 < output.shape[2] < side:
                reductions[name] = 2 ** round(math.log2(side / output.shape[2]))
                maps[name] = output

        names = [name for name, _ in backbone.named_modules(prefix=path)]
        with watched(model, names, after=note), frozen(model):
            returned = self.run_backbone(model, image)
        levels = returned.values() if isinstance(returned, Mapping) else returned
        levels = [levels] if isinstance(levels, Tensor) else list(levels)
        stages = list(_stages(backbone, path, reductions, self.left_out))
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
