"""What a fit found, told to people."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm import tqdm

from featxfer import EpochLog, Recipe
from featxfer.evaluation.pairs import HeldOutPairs
from featxfer.training.pseudo_labels import LabelDiagnostics


@dataclass(frozen=True)
class TransferFit:
    """What `fit_transfer` found.

    Args:
        log: of the heads' training, an entry an epoch; empty if no head was trained.
        diagnostics: of the pseudo-labels, a degradation each.
        held_out: of what was trained, a degradation each; empty where no pairs were held out, and
            for output "clusters", which is not in the space of HR features. Of detectors first of
            the blocks and then of each head, and a pair is a box or a position.
        images: how many were trained on.
        skipped: image name -> why it could not be read.
        blocks_log: of the blocks' training, an entry an epoch.
    """

    log: list[EpochLog] = field(default_factory=list)
    diagnostics: list[LabelDiagnostics] = field(default_factory=list)
    held_out: list[HeldOutPairs] = field(default_factory=list)
    images: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    blocks_log: list[EpochLog] = field(default_factory=list)


def warn_if_useless(what: str, held_out: Sequence[HeldOutPairs]) -> None:
    """Warns where there is no gap, or held-out LR features come no nearer to their HR features."""
    for part in held_out:
        if part.before.cosine > 1 - 1e-6:
            message = "LR features are the HR features: there is no gap to recover"
        elif part.after.cosine <= part.before.cosine:
            message = (
                f"{what} not help: held-out cosine {part.before.cosine:.3f} before, "
                f"{part.after.cosine:.3f} after"
            )
        else:
            continue
        warnings.warn(message, stacklevel=3)


def duration(seconds: float) -> str:
    """For people: seconds, or minutes from two on."""
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


@contextmanager
def epochs(recipe: Recipe, what: str) -> Iterator[Callable[[EpochLog], None]]:
    """What moves a progress bar on after an epoch."""
    with tqdm(total=recipe.epochs, desc=what, unit="epoch", disable=None) as bar:

        def advance(entry: EpochLog) -> None:
            bar.update(entry.epoch + 1 - bar.n)

        yield advance
