"""Whether what is attached acts: asked by every fit before the first image, and by anybody."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featxfer.features.backbone import frozen
from featxfer.modules.base import TransferModule
from featxfer_integrations.hosts import host_of, unwrapped
from featxfer_integrations.hosts.base import does_not_run
from featxfer_integrations.mechanism import attach
from featxfer_integrations.mechanism.capture import take_feature, watched
from featxfer_integrations.mechanism.shown import Show
from featxfer_integrations.mechanism.site import CHILD, AttachError, Site


def attached_runs(
    model: nn.Module, batch: Any, *, run: Callable[[Any], Any] | None = None
) -> dict[str, bool]:
    """By site, whether what the model returns for `batch` hangs on what is attached there.

    What reaches a site is disturbed, one site after the other, and the results are compared. It is
    False where what is attached is not called, as in a model that the host has fused, rebuilt or
    copied since, or where its result is not used. Of a torchvision detector all that its heads say
    is compared, before boxes are left out for their scores.

    Args:
        model: with something attached to it, or to a module in it; as it is used: compiled, say.
        batch: what it takes.
        run: how it is used, if not as `model(batch)`: a predictor around the model, for one. It
            has to run in this thread.

    Raises:
        AttachError: nothing is attached.
        ValueError: a result without numbers, or another one each time.
    """
    model = unwrapped(model)
    hosts = {n: m for n, m in model.named_modules() if isinstance(m, attach.Transfers) and len(m)}
    if not hosts:
        attach.transfers_of(model)
    if run is None:
        run = partial(host_of(model).answers, model)
    with frozen(model):
        plain = numbers_of(run(batch))
        if not any(value.numel() for value in plain):
            raise ValueError("batch: the model's result for it has no numbers, wanted some")
        if not are_equal(plain, numbers_of(run(batch))):
            raise ValueError("batch: the model gives another result for it each time")
        acts = {}
        for name, transfers in hosts.items():
            for site in transfers:
                with attach.disturbed(transfers, site):
                    changed = not are_equal(plain, numbers_of(run(batch)))
                acts[site if len(hosts) == 1 else name.removesuffix(CHILD) + site] = changed
        return acts


def numbers_of(value: Any, depth: int = 6) -> list[Tensor]:
    """The numbers in whatever a model returns; objects may hold each other, so not for ever."""
    if isinstance(value, int | float | np.ndarray | np.generic):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        return [value.detach().double().nan_to_num().cpu()]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
        value = list(vars(value).values())
    if not isinstance(value, list | tuple) or not depth:
        return []
    return [tensor for part in value for tensor in numbers_of(part, depth - 1)]


def are_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two results of `numbers_of` are the same, bit for bit."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


class _Nothing(TransferModule):
    """What returns its input; of no kind, so that it cannot be saved."""

    def forward(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features


def prove(model: nn.Module, sites: Sequence[Site], image: Tensor, show: Show | None = None) -> None:
    """Attaches something at each site, sees by one image that it acts, and takes it away again.

    The model is as it was after, whatever happens. `image` is `(1, c, h, w)` in its dtype and on
    its device; what acts changes what the model returns or, where that is said, shows. Raises
    `AttachError` where what is attached changes nothing, or the model does not run.
    """
    watching = [  # a new classifier may be of zeros, and its result the same whatever reaches it
        name
        for name, module in model.named_modules()
        if any(p.ndim > 1 and not p.any() for p in module.parameters(recurse=False))
    ]

    def run(images: Tensor) -> list[Any]:
        if show is not None:
            return [show(model, images)]
        seen: list[Any] = []
        with watched(model, watching, before=lambda _, args: seen.append(args)):
            return [host_of(model).answers(model, images), *seen]

    if host_of(model).detects:  # of an image without boxes nothing can be told of their heads
        with frozen(model):
            sites = [s for s in sites if s.is_block or take_feature(model, s, image).numel()]
    added = [site for site in sites if attach.attached_at(model, site) is None]
    try:
        for site in added:
            attach.install(model, site, _Nothing())
        acts = attached_runs(model, image, run=run) if sites else {}
    except ValueError:
        raise
    except Exception as error:  # whatever a foreign model raises
        raise does_not_run(image, error, "nothing can be trained in it") from error
    finally:
        for site in added:
            if attach.attached_at(model, site) is not None:
                attach.uninstall(model, site)
    idle = [site.name for site in sites if not acts[site.name]]
    if idle:
        raise AttachError(
            f"model: what is attached at {', '.join(map(repr, idle))} changes nothing that "
            f"{type(model).__name__} {'returns' if show is None else 'shows by targets='}: it is "
            "not called, or its result is not used; name others by site="
        )
