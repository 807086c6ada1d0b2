"""What fits of models and of detectors share: checks, the report, held-out images, progress."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from featxfer import EpochLog, FeatureTransferHead, Recipe
from featxfer.evaluation.pairs import PairAgreement, compare_pairs
from featxfer.modules.hub import TransferModule
from featxfer.training.pseudo_labels import Clustering, LabelDiagnostics
from featxfer_integrations._attach import CHILD, Place, attached_at, install

OBJECTIVE = "prototypes"
"""The default."""

WITHOUT_CLUSTERS = ("regression", "contrast")
"""Objectives that look at no cluster."""

HELD_OUT = 0.1
"""Share of the images that is held out by default."""

MINUTES = 30.0
"""That blocks may train by default with depth "auto"."""


@dataclass(frozen=True)
class HeldOutPairs:
    """What a head does to pairs of views that it was not trained on.

    Args:
        before: plain LR features against the HR features of the same images.
        after: transferred LR features against the same.
        hr_cosine: mean cosine of HR features before and after the head: 1 is unharmed.
        pairs: how many.
    """

    before: PairAgreement
    after: PairAgreement
    hr_cosine: float
    pairs: int

    @property
    def cosine_gap_recovered(self) -> float:
        """Share of the cosine distance between LR and HR that the head takes away; 1 is all."""
        gap = 1 - self.before.cosine
        return (self.after.cosine - self.before.cosine) / gap if gap > 0 else 0.0


@dataclass(frozen=True)
class TransferFit:
    """What `fit_transfer` found.

    Args:
        log: of the head's training, an entry an epoch; empty if no head was trained.
        diagnostics: of the pseudo-labels, a degradation each.
        held_out: of what was trained, a degradation each; empty where no pairs were held out, and
            for output "clusters", which is not in the space of HR features. Of detectors first of
            the blocks and then of each head, and a pair is a box or a position.
        images: how many the head was trained on.
        skipped: image name -> why it could not be read.
        depth: "pooled", or "deep" where blocks were trained too.
        blocks_log: of the blocks' training, an entry an epoch.
    """

    log: list[EpochLog]
    diagnostics: list[LabelDiagnostics]
    held_out: list[HeldOutPairs]
    images: int
    skipped: dict[str, str]
    depth: str = "pooled"
    blocks_log: list[EpochLog] = field(default_factory=list)


def refuse_void(why: str, **given: object) -> None:
    """Raises `ValueError` for the first argument that is not None: it would have no effect."""
    for name, value in given.items():
        if value is not None:
            shown = "a Recipe" if isinstance(value, Recipe) else repr(value)
            raise ValueError(f"{name}: got {shown}, which would have no effect: {why}")


def libraries(model: nn.Module) -> str:
    """The packages whose modules a model is made of, torch's aside, with their versions."""
    found = {
        type(module).__module__.partition(".")[0]
        for name, module in model.named_modules()
        if name.partition(".")[0] != CHILD
    }
    described = []
    for library in sorted(found - {"torch"}) or ["torch"]:
        known = ""
        with suppress(PackageNotFoundError):
            known = f" {version(library)}"
        described.append(f"{library}{known}")
    return ", ".join(described)


def duration(seconds: float) -> str:
    """For people: seconds, or minutes from two on."""
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def split(count: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of those held out, both in order.

    One at the least is held out where any are to be, and one is trained on.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
    left_out = max(1, round(count * held_out)) if held_out else 0
    kept = max(1, count - left_out)
    return order[:kept].sort().values, order[kept:].sort().values


@contextmanager
def epochs(recipe: Recipe, what: str) -> Iterator[Callable[[EpochLog], None]]:
    """What moves a progress bar on after an epoch."""
    with tqdm(total=recipe.epochs, desc=what, unit="epoch", disable=None) as bar:

        def advance(entry: EpochLog) -> None:
            bar.update(entry.epoch + 1 - bar.n)

        yield advance


def reports(
    hr: Tensor, lr: Sequence[Tensor], through: Sequence[Tensor], clustering: Clustering
) -> list[HeldOutPairs]:
    """Of held-out images: their features, and what becomes of each LR view and of HR, the last."""
    if not len(hr) or not through:
        return []
    hr_cosine = float(F.cosine_similarity(through[-1], hr).mean())
    return [
        HeldOutPairs(
            compare_pairs(hr, before, clustering.centroids),
            compare_pairs(hr, after, clustering.centroids),
            hr_cosine,
            len(hr),
        )
        for before, after in zip(lr, through[:-1], strict=True)
    ]


def put(model: nn.Module, place: Place, module: TransferModule) -> None:
    """Attaches what was trained, or gives what it learned to what is attached."""
    attached = attached_at(model, place)
    if attached is None:
        install(model, place, module)
        return
    if isinstance(attached, FeatureTransferHead) and isinstance(module, FeatureTransferHead):
        attached.centroids = torch.empty_like(module.centroids).to(attached.centroids)
    attached.load_state_dict(module.state_dict())
    attached.card = module.card


def warn_if_useless(fitted: TransferFit) -> None:
    """Warns where there is no gap, or held-out LR features come no nearer to their HR features."""
    for part in fitted.held_out:
        if part.before.cosine > 1 - 1e-6:
            message = "LR features are the HR features: there is no gap to recover"
        elif part.after.cosine <= part.before.cosine:
            what = "the head does" if fitted.depth == "pooled" else "blocks do"
            message = (
                f"{what} not help: held-out cosine {part.before.cosine:.3f} before, "
                f"{part.after.cosine:.3f} after"
            )
        else:
            continue
        warnings.warn(message, stacklevel=3)
