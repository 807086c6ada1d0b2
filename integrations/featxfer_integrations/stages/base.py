"""Stage: one thing that a fit trains; stages differ in where their pairs come from."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from featxfer import (
    BaseDegradation,
    Card,
    EpochLog,
    Images,
    Preprocessing,
    PseudoLabelTrainer,
    Recipe,
)
from featxfer.evaluation.pairs import HeldOutPairs
from featxfer.features.backbone import sha256_of
from featxfer.features.extract import software_versions
from featxfer.features.forward import bf16_is_fast
from featxfer.modules.base import TransferModule
from featxfer.training.objectives import Objective
from featxfer.training.pairs import PairSource
from featxfer.training.pseudo_labels import LabelDiagnostics
from featxfer_integrations.hosts.base import Host
from featxfer_integrations.mechanism.attach import attached_at, host_device
from featxfer_integrations.mechanism.fingerprint import (
    backbone_sha256,
    libraries,
    model_sha256,
    weights_details,
)
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.options import OBJECTIVE, FitOptions


@dataclass(frozen=True)
class Task:
    """What a fit is asked for, after all checks that need no image.

    `targets` are the names of what LR images have to match, where the caller says it; `skipped`
    says of images that are left out why they could not be read.
    """

    model: nn.Module
    host: Host
    images: Images
    views: Sequence[BaseDegradation]
    preprocessing: Preprocessing
    options: FitOptions
    cache: Path
    seed: int
    targets: Sequence[str] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        """A name of `OBJECTIVES`."""
        return self.options.objective or OBJECTIVE

    @property
    def fast_precision(self) -> str:
        """Of maps and blocks: "bf16" where that is asked for, or where the hardware has it."""
        if self.options.precision != "auto":
            return self.options.precision
        return "bf16" if bf16_is_fast(host_device(self.model)) else "fp32"

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of `extract_features`: what of unreadable images, and how many at a time."""
        return {"on_error": self.options.on_error, "batch_size": self.options.batch_size or 64}

    def split(self, count: int) -> tuple[Tensor, Tensor]:
        """Indices of the images to train on, of so many, and of those held out, both in order.

        One at the least is held out where any are to be, and one is trained on.
        """
        chance = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(count, generator=chance, device="cpu")
        share = self.options.held_out
        kept = max(1, count - (max(1, round(count * share)) if share else 0))
        return order[:kept].sort().values, order[kept:].sort().values

    def new(self, site: Site, usual: Mapping[str, Any], **sizes: Any) -> TransferModule:
        """An untrained module for a site, in float32, on the model's device.

        In the sizes of what is attached there, else in the usual ones; in `sizes` in any case.
        """
        attached = attached_at(self.model, site)
        config = {} if attached is None else attached.config
        with host_device(self.model):
            return site.module_class(**{**usual, **config, **site.sizes, **sizes}, seed=self.seed)

    @cached_property
    def identity(self) -> list[Any]:
        """What every stage hangs on, as JSON types."""
        return [
            model_sha256(self.model, keep=()),
            self.images.fingerprint,
            [view.to_json() for view in self.views],
            dataclasses.asdict(self.preprocessing),
            [self.seed, self.options.held_out, self.objective, self.options.clusters],
            list(self.targets),
            [host_device(self.model).type, libraries(self.model), software_versions()],
        ]


@dataclass(frozen=True)
class Training:
    """What the trainer is given: a network, and its objective on pairs of inputs and targets.

    Other pairs, `held_out`, choose the epoch, if there are any; `held_out_batch` are taken at a
    time. `digest` is of data that no key knows of.
    """

    network: nn.Module
    pairs: PairSource
    objective: Objective
    held_out: PairSource | None = None
    held_out_batch: int = 256
    digest: str = ""


class Stage(ABC):
    """One thing to train: modules at `sites`.

    Attributes:
        what: the modules, in words.
        verb: "do" or "does".
        recipe: how they are trained.
        modules: by site, on the model's device.
        images: how many are trained on, once `training` has been asked.
        skipped: image name -> why it could not be read.
        details: of the cards, besides what all have.
        checkpoint: after `run`; needed until the modules are attached.
        log, held_out, diagnostics: after `run`, see `TransferFit`.
    """

    what: str
    verb = "does"
    recipe: Recipe
    checkpoint: Path
    log: list[EpochLog]
    held_out: list[HeldOutPairs]
    diagnostics: list[LabelDiagnostics]

    def __init__(self, task: Task, sites: Sequence[Site]) -> None:
        self.task, self.sites = task, list(sites)
        self.modules: dict[str, TransferModule] = {}
        self.images = 0
        self.skipped = dict(task.skipped)
        self.details: dict[str, Any] = {}

    @property
    @abstractmethod
    def described(self) -> list[Any]:
        """What training hangs on besides the task, as JSON types."""

    @abstractmethod
    def training(self) -> Training:
        """Takes the pairs, and makes the modules ready for them."""

    @abstractmethod
    def judge(self) -> tuple[list[HeldOutPairs], list[LabelDiagnostics]]:
        """What the trained modules do to held-out pairs, and the pseudo-labels, a view each."""

    def key(self, digest: str = "") -> str:
        """A hash of all that the trained modules hang on, 32 hex digits."""
        where = [[s.name, s.modules, s.side, s.lens.path, s.layout, s.prefix] for s in self.sites]
        return sha256_of(
            [*self.task.identity, where, self.recipe.to_dict(), self.described, digest]
        )[:32]

    def run(self) -> None:
        """Trains the modules, judges them and writes their cards.

        Interrupted, the same stage goes on from its checkpoint, to the same weights.
        """
        ready = self.training()
        name = f"{self.key(ready.digest)}.safetensors"
        self.checkpoint = self.task.cache / "training" / name
        trainer = PseudoLabelTrainer(
            ready.network, self.recipe, objective=ready.objective, seed=self.task.seed
        )
        with epochs(self.recipe, f"training {self.what}") as advance:
            self.log = trainer.fit_rows(
                ready.pairs,
                held_out=ready.held_out,
                held_out_batch=ready.held_out_batch,
                checkpoint=self.checkpoint,
                callback=advance,
            )
        ready.network.eval()
        self.held_out, self.diagnostics = self.judge()
        for site in self.sites:
            self.modules[site.name].card = self._card(site)

    def _card(self, site: Site) -> Card:
        task = self.task
        details = {
            "host": libraries(task.model),
            "preprocessing": dataclasses.asdict(task.preprocessing),
            "images": self.images,
            "images_fingerprint": task.images.fingerprint,
            "images_depth": task.images.depth,
            "objective": task.objective,
            **site.described,
            "seed": task.seed,
            "recipe": self.recipe.to_dict(),
            "diagnostics": [part.summary() for part in self.diagnostics],
            "held_out": [
                {**dataclasses.asdict(part), "cosine_gap_recovered": part.cosine_gap_recovered}
                for part in self.held_out
            ],
            "final_loss": self.log[-1].loss,
            "versions": software_versions(),
            **weights_details(task.host, task.model, site),
            **self.details,
        }
        name, sha256 = (
            task.host.model_name(task.model),
            backbone_sha256(task.host, task.model, site),
        )
        return Card(name, sha256, tuple(task.views), details)


@contextmanager
def epochs(recipe: Recipe, what: str) -> Iterator[Callable[[EpochLog], None]]:
    """What moves a progress bar on after an epoch."""
    with tqdm(total=recipe.epochs, desc=what, unit="epoch", disable=None) as bar:

        def advance(entry: EpochLog) -> None:
            bar.update(entry.epoch + 1 - bar.n)

        yield advance
