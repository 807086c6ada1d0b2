"""A fit that a benchmark asks for: what it hangs on, and what it found; each is done once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.common.memo import hash_key
from benchmarks.common.results import to_json
from benchmarks.common.versions import versions
from featxfer import EpochLog, FeatureTransferHead, Images
from featxfer.evaluation.pairs import HeldOutPairs
from featxfer.files import write_atomic
from featxfer_integrations import (
    detach_transfer,
    fit_key,
    fit_transfer,
    load_transfers,
    save_transfers,
    transfers_of,
)
from featxfer_integrations.mechanism.attach import is_attached


@dataclass(frozen=True)
class Found:
    """What a fit found, as it is kept.

    Args:
        seconds: of training the heads.
        blocks_seconds: of training the blocks.
        self_check: what is told of held-out pairs without labels, a degradation each.
    """

    seconds: float
    blocks_seconds: float
    self_check: list[dict[str, float]]


@dataclass(frozen=True)
class Fit:
    """A call of `fit_transfer`.

    Args:
        model: of the caller's own; it is trained in place.
        images: HR images.
        cache: folder.
        arguments: the others, by name.
    """

    model: nn.Module
    images: Images
    cache: Path
    arguments: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """Of all that it hangs on, before it is run."""
        return fit_key(self.model, self.images, **self.arguments)

    def run(self) -> Found:
        """Trains, or reads what was trained before, and leaves it attached."""
        folder = self.cache / "fits" / hash_key({"fit": self.key, "versions": versions()})
        kept = folder / "found.json"
        if kept.is_file():
            if is_attached(self.model):
                detach_transfer(self.model)
            load_transfers(self.model, folder)
            return Found(**json.loads(kept.read_text()))
        fit = fit_transfer(self.model, self.images, cache=self.cache, **self.arguments)
        found = Found(seconds(fit.log), seconds(fit.blocks_log), self_check(fit.held_out))
        save_transfers(self.model, folder)
        write_atomic(kept, to_json(dataclasses.asdict(found)).encode())
        return found


def seconds(log: Sequence[EpochLog]) -> float:
    """Of all epochs."""
    return sum(entry.seconds for entry in log)


def self_check(held_out: Sequence[HeldOutPairs]) -> list[dict[str, float]]:
    """What held-out pairs tell without labels, a degradation each."""
    return [
        {
            "cosine_gap": part.cosine_gap_recovered,
            "cosine": part.after.cosine,
            "retrieval": part.after.retrieval,
            "clusters": part.after.clusters,
            "retrieval_gap": _share(part.before.retrieval, part.after.retrieval),
            "clusters_gap": _share(part.before.clusters, part.after.clusters),
            "hr_cosine": part.hr_cosine,
        }
        for part in held_out
    ]


def _share(before: float, after: float) -> float:
    """Of what is missing to 1, how much is gained."""
    return (after - before) / (1 - before) if before < 1 else 0.0


def head_of(model: nn.Module) -> FeatureTransferHead:
    """The one head that is attached."""
    modules = transfers_of(model).values()
    (head,) = (module for module in modules if isinstance(module, FeatureTransferHead))
    return head
