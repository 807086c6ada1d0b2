"""Stage: one thing that a fit trains; all are run by `run_stage`, and differ in their pairs."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from featxfer.training.pseudo_labels import LabelDiagnostics
from featxfer.training.trainer import PairSource
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
from featxfer_integrations.report import epochs


@dataclass(frozen=True)
class Task:
    """What a fit is asked for, after all checks that need no image.

    Args:
        model: the host; it is not changed before all is trained.
        host: what is known of it.
        images: unlabelled HR images.
        views: degradations, one or several.
        preprocessing: of the model's weights.
        options: how.
        cache: folder.
        seed: of clusters, modules, the order of rows and the choice of held-out images.
        targets: names of what LR images have to match, where the caller says it.
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
    """What the trainer is given.

    Args:
        network: what is run on the pairs' inputs; a module, or the frozen model around it.
        pairs: inputs and targets.
        objective: of the network's outputs and the targets.
        held_out: other pairs, which choose the epoch, if there are any.
        held_out_batch: how many of these are taken at a time.
        digest: of data that no key knows of.
    """

    network: nn.Module
    pairs: PairSource
    objective: Objective
    held_out: PairSource | None = None
    held_out_batch: int = 256
    digest: str = ""


@dataclass(frozen=True)
class Judged:
    """What a stage's modules do, a degradation each; see `TransferFit`."""

    held_out: list[HeldOutPairs] = field(default_factory=list)
    diagnostics: list[LabelDiagnostics] = field(default_factory=list)


class Stage(ABC):
    """One thing to train.

    Args:
        task: of the fit.
        sites: where its modules act.

    Attributes:
        what: the modules, in words.
        verb: "do" or "does".
        recipe: how they are trained.
        modules: by site, untrained, on the model's device.
        images: how many are trained on, once `training` has been asked.
        skipped: image name -> why it could not be read.
        details: of the cards, besides what all have.
    """

    what: str
    verb = "does"
    recipe: Recipe

    def __init__(self, task: Task, sites: Sequence[Site]) -> None:
        self.task, self.sites = task, list(sites)
        self.modules: dict[str, TransferModule] = {}
        self.images = 0
        self.skipped: dict[str, str] = {}
        self.details: dict[str, Any] = {}

    @property
    @abstractmethod
    def described(self) -> list[Any]:
        """What training hangs on besides the task, as JSON types."""

    @abstractmethod
    def training(self) -> Training:
        """Takes the pairs, and makes the modules ready for them."""

    @abstractmethod
    def judge(self) -> Judged:
        """What the trained modules do to held-out pairs."""

    def key(self, digest: str = "") -> str:
        """A hash of all that the trained modules hang on, 32 hex digits."""
        where = [[s.name, s.modules, s.side, s.lens.path, s.layout, s.prefix] for s in self.sites]
        return sha256_of(
            [*self.task.identity, where, self.recipe.to_dict(), self.described, digest]
        )[:32]


@dataclass(frozen=True)
class Trained:
    """A stage that has been run; `checkpoint` is needed until its modules are attached."""

    stage: Stage
    log: list[EpochLog]
    judged: Judged
    checkpoint: Path


def run_stage(stage: Stage) -> Trained:
    """Trains a stage's modules, judges them and writes their cards.

    Interrupted, the same stage goes on from its checkpoint, to the same weights.
    """
    task, ready = stage.task, stage.training()
    checkpoint = task.cache / "training" / f"{stage.key(ready.digest)}.safetensors"
    trainer = PseudoLabelTrainer(
        ready.network, stage.recipe, objective=ready.objective, seed=task.seed
    )
    with epochs(stage.recipe, f"training {stage.what}") as advance:
        log = trainer.fit_rows(
            ready.pairs,
            held_out=ready.held_out,
            held_out_batch=ready.held_out_batch,
            checkpoint=checkpoint,
            callback=advance,
        )
    ready.network.eval()
    judged = stage.judge()
    for site in stage.sites:
        stage.modules[site.name].card = card(stage, site, log, judged)
    return Trained(stage, log, judged, checkpoint)


def card(stage: Stage, site: Site, log: Sequence[EpochLog], judged: Judged) -> Card:
    """The card of what was trained at a site."""
    task = stage.task
    return Card(
        task.host.model_name(task.model),
        backbone_sha256(task.host, task.model, site),
        tuple(task.views),
        {
            "host": libraries(task.model),
            "preprocessing": dataclasses.asdict(task.preprocessing),
            "images": stage.images,
            "images_fingerprint": task.images.fingerprint,
            "images_depth": task.images.depth,
            "objective": task.objective,
            **site.described,
            "seed": task.seed,
            "recipe": stage.recipe.to_dict(),
            "diagnostics": [part.summary() for part in judged.diagnostics],
            "held_out": [
                {**dataclasses.asdict(part), "cosine_gap_recovered": part.cosine_gap_recovered}
                for part in judged.held_out
            ],
            "final_loss": log[-1].loss,
            "versions": software_versions(),
            **weights_details(task.host, task.model, site),
            **stage.details,
        },
    )
