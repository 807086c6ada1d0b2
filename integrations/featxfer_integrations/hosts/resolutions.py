"""Where in a model each resolution of its maps or tokens ends, and after which blocks go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from featxfer.features.backbone import frozen
from featxfer_integrations.hosts.base import Host
from featxfer_integrations.mechanism.capture import watched
from featxfer_integrations.mechanism.site import PLANES, Lens

REDUCTIONS = (16, 32)
"""Blocks of classifiers go where a stage ends whose maps are so many times less than the image."""

ISOTROPIC = 6
"""From so many modules of one resolution on, blocks go after a third and two thirds of them."""


def passed_by(host: Host, model: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """The first tensor that each of these modules gives of a black image, in the order of a run."""
    found: dict[str, Tensor] = {}

    def note(name: str, output: Any) -> None:
        lens = Lens.found(output) if isinstance(output, Tensor | list | tuple) else None
        if lens is not None:
            found[name] = lens.get(output)

    with watched(model, names, after=note), frozen(model):
        host.answers(model, host.image(model))
    return found


def reductions(host: Host, model: Any, names: Iterable[str]) -> dict[str, int]:
    """Of these modules, as far as they give maps or tokens, how much less than the image they are.

    In sides, from one run on a black image.
    """
    size, found = host.image(model).shape[2], dict[str, int]()
    for name, tensor in passed_by(host, model, names).items():
        shape, side = tuple(tensor.shape), 0
        if len(shape) == 3:
            side = math.isqrt(shape[1])
        elif len(shape) == 4:
            nhwc = shape[1] == shape[2] != shape[3]
            side = shape[PLANES["nhwc" if nhwc else "nchw"][0]]
        if 1 < side < size:
            found[name] = round(size / side)
    return found


def ends(found: Mapping[str, int]) -> dict[int, str]:
    """The last module of each reduction, from the highest resolution; `found` in a run's order."""
    last = {reduction: name for name, reduction in found.items()}
    return dict(sorted(last.items()))


def block_places(found: Mapping[str, int]) -> list[str]:
    """The last module of each deep reduction; of many of one resolution (ViT) those after thirds.

    `found` are reductions by module, in the order of a run.
    """
    names, last = list(found), ends(found)
    if len(last) == 1 and len(names) >= ISOTROPIC:
        return [names[i * len(names) // 3 - 1] for i in (1, 2)]
    return [last[reduction] for reduction in REDUCTIONS if reduction in last]
