"""PseudoLabelTrainer: features and their targets in, a trained head and its log out."""

from __future__ import annotations

import json
import math
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from featxfer.checks import (
    ArrayLike,
    as_features,
    check_choice,
    check_integer,
    check_paired,
    variance_of,
)
from featxfer.features.backbone import modes_kept
from featxfer.features.forward import PRECISIONS, bf16_is_fast
from featxfer.modules.head import FeatureTransferHead
from featxfer.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    EpochLog,
    read_checkpoint,
    write_checkpoint,
)
from featxfer.training.objectives import LabelCrossEntropy, Objective, make_objective
from featxfer.training.processes import Processes
from featxfer.training.pseudo_labels import Clustering, pseudo_labels
from featxfer.training.recipe import FEATURES_RECIPE, Recipe

_GLOBAL_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
"""Layers of torch that draw from its global generator."""


class DivergenceError(ArithmeticError):
    """The loss became infinite or NaN; the head holds the weights of the last good epoch."""


class Rows(Protocol):
    """What a trainer draws mini-batches from, where it is more than two arrays in memory."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Indices of the rows of one epoch, int64 `(m,)`, in the order that they are taken.

        Called as each epoch begins. Where a module draws from torch's global generator, seed that
        here by a draw from `generator`: then a checkpoint goes on to the same weights.
        """
        ...

    def take(self, indices: Tensor) -> tuple[Any, Any]:
        """Inputs and targets of these rows: tensors, or what can be moved by `to(device)`."""
        ...


@dataclass(frozen=True)
class _InMemory:
    inputs: Tensor
    targets: Tensor

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(self.inputs), generator=generator, device="cpu")

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.inputs.device)
        return self.inputs[indices], self.targets[indices]


class PseudoLabelTrainer:
    """Trains a head, or any module from inputs to what an objective takes.

    Features are held in memory and drawn without a DataLoader. `fit` runs the whole recipe;
    `step` does one mini-batch, for a loop of one's own. Parameters that ask for no gradient, such
    as frozen layers behind a block, are left alone.

    In several processes `head` is a `DistributedDataParallel`, outermost. Each process draws from
    rows of its own, as many in each, `recipe.batch_size` at a time, with one recipe and seed. They
    take part in one training: losses, log and weights are those of all rows, and all keep the same
    weights, end together, and fail together where rows or losses are bad. With the same batches
    and without dropout it is the training of one process, but for rounding.

    Args:
        head: of rows `(n, d)`; trained in place, on the device of its parameters.
        recipe: see `Recipe`.
        objective: what is minimised; by default the paper's cross-entropy on pseudo-labels.
        seed: in [0, 2**63), of the order of the rows and, in `fit`, of the dropout of
            `FeatureTransferHead`, which differs by process. The global random state is neither
            read nor changed; layers of torch that drop (`nn.Dropout`) read it, and are warned of.
        precision: of the head's matrix products: "fp32"; "bf16", by autocast; "auto", that where
            the hardware multiplies in it. Weights, optimizer and loss are as they are.

    Raises:
        ValueError: a value outside of these, no parameter that asks for a gradient, or a
            `DistributedDataParallel` inside another module.
    """

    def __init__(
        self,
        head: nn.Module,
        recipe: Recipe | None = None,
        *,
        objective: Objective | None = None,
        seed: int = 0,
        precision: str = "fp32",
    ) -> None:
        check_integer("seed", seed, at_least=0)
        if seed >= 2**63:
            raise ValueError(f"seed: got {seed}, wanted an int below 2**63")
        check_choice("precision", precision, PRECISIONS)
        self.head = head
        self.module: nn.Module = head.module if isinstance(head, DistributedDataParallel) else head
        if any(isinstance(part, DistributedDataParallel) for part in self.module.modules()):
            raise ValueError("head: got a DistributedDataParallel inside it, wanted it outermost")
        self.processes = Processes(head)
        self.recipe = recipe or Recipe()
        self.objective = LabelCrossEntropy() if objective is None else objective
        self.seed = seed
        self.parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("head: got no parameter that asks for a gradient, wanted one")
        self.optimizer = self.recipe.make_optimizer(self.parameters.values())
        self.precision = precision

    def step(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One update on a mini-batch of features `(b, d)` and their targets, on the head's device.

        Returns the loss before the update, detached, and the number of right labels: two scalars.
        The learning rate is the optimizer's own: set it as you like.
        """
        loss, right = self.objective(self._outputs(self.head, features), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), right

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    @property
    def _in_bf16(self) -> bool:
        return self.precision == "bf16" or (self.precision == "auto" and bf16_is_fast(self._device))

    def _outputs(self, module: nn.Module, features: Any) -> Any:
        if not self._in_bf16:
            return module(features)
        with torch.autocast(self._device.type, torch.bfloat16):
            return module(features).float()

    def fit(
        self,
        features: ArrayLike,
        targets: Tensor,
        *,
        held_out: tuple[ArrayLike, Tensor] | None = None,
        callback: Callable[[EpochLog], object] | None = None,
    ) -> list[EpochLog]:
        """Runs the recipe and returns its log, an entry an epoch.

        The head is in training mode meanwhile and in its former mode after. The same seed, rows,
        machine and thread count give the same weights, bit for bit.

        Args:
            features: `(n, d)`.
            targets: a row each, as the objective takes them: pseudo-labels int64 `(n,)`, or HR
                features `(n, d)`.
            held_out: other rows and their targets. The head gets the weights of the epoch with the
                lowest loss on them, or keeps those that it came with where no epoch's is lower, and
                the recipe's `patience` counts.
            callback: called after each epoch with its log; an exception from it ends training.

        Raises:
            ValueError: other shapes or dtypes, NaN or infinity (the row is named), a recipe with
                `patience` without `held_out`; processes with unequal numbers of rows.
            DivergenceError: a loss that is not finite; the head keeps the last good epoch.
            RuntimeError: another process had an error.
        """
        _check_patience(self.recipe, held_out)
        with self.processes.together():
            rows = self._in_memory("features", features, targets)
            judged = None
            if held_out is not None:
                judged = self._in_memory("held_out", *held_out, width=rows.inputs.shape[1])
        return self.fit_rows(rows, held_out=judged, callback=callback)

    @torch.no_grad()
    def _in_memory(
        self, name: str, features: ArrayLike, targets: Tensor, width: int | None = None
    ) -> _InMemory:
        """Rows and their targets on the head's device, once the objective has checked them."""
        rows = as_features(name, features, width=width).to(self._device)
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets: got {type(targets).__name__}, wanted a torch.Tensor")
        targets = targets.to(self._device)
        with _evaluating(self.module):
            outputs = self._outputs(self.module, rows[:1])
        try:
            self.objective.check(outputs, targets, len(rows))
        except ValueError as error:
            raise ValueError(f"held_out: {error}" if name == "held_out" else str(error)) from error
        return _InMemory(rows, targets)

    def fit_rows(
        self,
        rows: Rows,
        *,
        held_out: Rows | None = None,
        held_out_batch: int = 256,
        checkpoint: Path | None = None,
        callback: Callable[[EpochLog], object] | None = None,
    ) -> list[EpochLog]:
        """As `fit`, on rows that are made when they are taken; they are not checked.

        Args:
            rows: see `Rows`.
            held_out: the same, as `fit` has it.
            held_out_batch: how many of these are taken at a time.
            checkpoint: a file that is written after each epoch; where it exists, training goes on
                from it to the same weights, bit for bit. Recipe, seed, precision, the objective's
                class and numbers, and the names and shapes of what is trained have to be those
                that it was written with; that the rows are is the caller's to see. Several
                processes share one file: the first writes it, and each goes on from it.
            callback: as in `fit`.

        Raises:
            ValueError: as `fit`; no rows; a held-out loss that is not finite before training.
            DivergenceError: as `fit`.
            CheckpointError: a checkpoint that is damaged, or of another training; nothing has been
                changed.
            DiskError: the checkpoint cannot be written.
            RuntimeError: another process had an error.
        """
        _check_patience(self.recipe, held_out)
        check_integer("held_out_batch", held_out_batch, at_least=1)
        path = None if checkpoint is None else Path(checkpoint)
        settings = self._settings(held_out is not None)
        self._check_alike(settings, path)
        rank, size = self.processes.rank, self.processes.size
        progress = _Progress(_seeded(self.seed), _seeded((self.seed * size + rank) % 2**63))
        judge = None
        if held_out is not None:
            judge = partial(self._judge, held_out, held_out_batch)
        with modes_kept(self.head), _dropout_from(self.module, progress.dropout):
            self.head.train()
            _warn_of_dropout(self.module)
            if path is not None and path.exists():
                with self.processes.together():
                    self._resume(path, settings, progress)
            elif judge is not None:
                first = judge()
                if not math.isfinite(first):
                    raise ValueError(
                        f"held_out: got a loss of {first} before training, wanted a finite one"
                    )
                self._note(progress, first)
            while not self._is_done(progress):
                self._epoch(progress, rows, judge)
                if path is not None:
                    self._keep(path, settings, progress)
                if callback is not None:
                    with self.processes.together():
                        callback(progress.log[-1])
        self._restore(progress.best)
        return progress.log

    def _settings(self, judged: bool) -> dict[str, Any]:
        """What training hangs on besides the rows, as JSON types, as far as it can be told."""
        numbers = {
            name: value
            for name, value in getattr(self.objective, "__dict__", {}).items()
            if isinstance(value, str | int | float)
        }
        settings = {
            "recipe": self.recipe.to_dict(),
            "seed": self.seed,
            "precision": "bf16" if self._in_bf16 else "fp32",
            "objective": {"class": type(self.objective).__qualname__, **numbers},
            "held_out": judged,
            "processes": self.processes.size,
        }
        told: dict[str, Any] = json.loads(json.dumps(settings, default=float))
        return told

    def _check_alike(self, settings: Mapping[str, Any], path: Path | None) -> None:
        """Raises `ValueError` in all processes unless all were asked for the same training."""
        asked = {
            "recipe, seed, precision, objective, held_out": zlib.crc32(repr(settings).encode()),
            "checkpoint": path is not None,
            "checkpoint's file": path is not None and path.exists(),
        }
        for name, given in zip(asked, self.processes.numbers(*asked.values()).T, strict=True):
            if not bool((given == given[0]).all()):
                raise ValueError(
                    f"{name}: got others in some of {self.processes.size} processes, wanted the "
                    "same in all"
                )

    def _is_done(self, progress: _Progress) -> bool:
        """Whether all epochs are done, or the held-out loss has not fallen for `patience` ones."""
        log, patience = progress.log, self.recipe.patience
        if len(log) >= self.recipe.epochs:
            return True
        losses = [entry.held_out_loss for entry in log if entry.held_out_loss is not None]
        return bool(patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= patience

    def _epoch(self, progress: _Progress, rows: Rows, judge: Callable[[], float] | None) -> None:
        start, epoch = time.perf_counter(), len(progress.log)
        rate = self.recipe.learning_rate_at(epoch)
        with self.processes.together():
            order = rows.order(progress.order)
        counts = [int(count) for count in self.processes.numbers(len(order))]
        if 0 in counts or len(set(counts)) > 1:
            raise ValueError(
                f"rows: got {counts} rows in {len(counts)} processes, wanted some, as many in each"
            )
        good = _copied(self._state())
        self.head.train()
        total, right, bad = self._pass(rows, order, epoch)
        self.processes.broadcast(self._buffers().values())
        what, judged = f"loss or weights are not finite at epoch {epoch}, step {bad:g}", None
        if judge is not None and bad == math.inf:
            judged = judge()
            what = f"the held-out loss is not finite after epoch {epoch}"
        if bad < math.inf or (judged is not None and not math.isfinite(judged)):
            self._restore(good)
            raise DivergenceError(
                f"{what} (learning rate {rate:g}); the weights are those from before that epoch"
            )
        if judged is not None:
            self._note(progress, judged)
        count, seconds = sum(counts), time.perf_counter() - start
        progress.log.append(EpochLog(epoch, total / count, right / count, rate, seconds, judged))

    def _pass(self, rows: Rows, order: Tensor, epoch: int) -> tuple[float, float, float]:
        """One pass over the rows: of all processes the sums of the loss and of right labels.

        And the first step whose loss is not finite, or the number of steps where only the weights
        after them are not; infinity where all is well.
        """
        batches, losses, right = order.split(self.recipe.batch_size), [], []
        for step, batch in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate_at(epoch, step / len(batches))
            inputs, targets = rows.take(batch)
            loss, hits = self.step(inputs.to(self._device), targets.to(self._device))
            losses.append(loss * len(batch))
            right.append(hits)
        total, bad = float(torch.stack(losses).sum()), math.inf
        if not (math.isfinite(total) and self._weights_are_finite()):
            finite = [math.isfinite(float(loss)) for loss in losses]
            bad = finite.index(False) if False in finite else len(finite)
        found = self.processes.numbers(total, int(torch.stack(right).sum()), bad)
        return float(found[:, 0].sum()), float(found[:, 1].sum()), float(found[:, 2].min())

    def _note(self, progress: _Progress, judged: float) -> None:
        """Keeps the weights if their held-out loss is the lowest so far."""
        if judged < progress.lowest:
            progress.lowest = judged
            progress.best = _copied(self._state())

    @torch.no_grad()
    def _judge(self, held_out: Rows, size: int) -> float:
        """The mean loss on the held-out rows of all processes."""
        total, count = 0.0, 0
        with self.processes.together(), _evaluating(self.module):
            order = held_out.order(_seeded(0))
            for batch in order.split(size) if len(order) else ():
                inputs, targets = held_out.take(batch)
                outputs = self._outputs(self.module, inputs.to(self._device))
                loss, _ = self.objective(outputs, targets.to(self._device))
                total += float(loss) * len(batch)
            count = len(order)
        sums = self.processes.numbers(total, count).sum(0)
        if not sums[1]:
            raise ValueError("held_out: got no rows, wanted at least one")
        return float(sums[0] / sums[1])

    def _buffers(self) -> dict[str, Tensor]:
        """What is saved with the module besides its parameters, such as running statistics."""
        saved = self.module.state_dict().keys()
        return {name: value for name, value in self.module.named_buffers() if name in saved}

    def _state(self) -> dict[str, Tensor]:
        """What training may change."""
        return {**self.parameters, **self._buffers()}

    @torch.no_grad()
    def _restore(self, state: Mapping[str, Tensor]) -> None:
        own = self._state()
        for name, value in state.items():
            own[name].copy_(value)

    def _weights_are_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.parameters.values())

    def _keep(self, path: Path, settings: Mapping[str, Any], progress: _Progress) -> None:
        tensors = {f"weights.{name}": value for name, value in self._state().items()}
        tensors |= {f"best.{name}": value for name, value in progress.best.items()}
        for name, p in self.parameters.items():
            for part, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{part}.{name}"] = value
        for kind, generator in progress.generators.items():
            for rank, state in enumerate(self.processes.gather(generator.get_state())):
                tensors[f"random.{kind}.{rank}"] = state
        with self.processes.together():
            if self.processes.rank == 0:
                write_checkpoint(path, Checkpoint(settings, progress.log, progress.lowest, tensors))

    def _resume(self, path: Path, settings: Mapping[str, Any], progress: _Progress) -> None:
        """Weights, optimizer, randomness and log as after the checkpoint's last epoch."""
        own = self._state()
        required = {f"weights.{name}": value for name, value in own.items()}
        if settings["held_out"]:
            required |= {f"best.{name}": value for name, value in own.items()}
        for kind, generator in progress.generators.items():
            for rank in range(self.processes.size):
                required[f"random.{kind}.{rank}"] = generator.get_state()
        moved = [
            {
                f"optimizer.{part}.{name}": value
                for part, value in self.recipe.optimizer_state(p).items()
            }
            for name, p in self.parameters.items()
        ]
        found = read_checkpoint(path, settings, required, moved)
        try:
            for kind, generator in progress.generators.items():
                generator.set_state(found.tensors[f"random.{kind}.{self.processes.rank}"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: no checkpoint of this training ({error}); delete it to start anew"
            ) from error
        self.optimizer.state.clear()
        for key, value in found.tensors.items():
            kind, _, name = key.partition(".")
            if kind == "best":
                progress.best[name] = value
            elif kind == "optimizer":
                part, _, name = name.partition(".")
                p = self.parameters[name]
                self.optimizer.state[p][part] = value.to(p.device)
        self._restore({name: found.tensors[f"weights.{name}"] for name in own})
        progress.log.extend(found.log)
        progress.lowest = found.lowest


@dataclass
class _Progress:
    """Generators of the order and of dropout, the log, the lowest held-out loss and its weights."""

    order: torch.Generator
    dropout: torch.Generator
    log: list[EpochLog] = field(default_factory=list)
    lowest: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def generators(self) -> dict[str, torch.Generator]:
        return {"order": self.order, "dropout": self.dropout}


def _seeded(seed: int) -> torch.Generator:
    """A generator on the CPU, whatever torch's default device."""
    return torch.Generator("cpu").manual_seed(seed)


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, the former modes after."""
    with modes_kept(module):
        module.eval()
        yield


@contextmanager
def _dropout_from(module: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Dropout of heads draws from `generator` inside."""
    heads = [part for part in module.modules() if isinstance(part, FeatureTransferHead)]
    former = [head.generator for head in heads]
    for head in heads:
        head.generator = generator
    try:
        yield
    finally:
        for head, own in zip(heads, former, strict=True):
            head.generator = own


def _warn_of_dropout(module: nn.Module) -> None:
    """Warns of layers in training mode that draw from torch's global generator."""
    for name, part in module.named_modules():
        if isinstance(part, _GLOBAL_DROPOUTS) and part.training and part.p > 0:
            warnings.warn(
                f"head: {name or type(part).__name__} draws from torch's global generator, so the "
                "same seed does not give the same weights, nor does a checkpoint; seed it in "
                "`order` of your `Rows`, or drop by a FeatureTransferHead",
                stacklevel=3,
            )
            return


def _check_patience(recipe: Recipe, held_out: object) -> None:
    """Raises `ValueError` for a recipe with patience where there is nothing that it counts."""
    if recipe.patience and held_out is None:
        raise ValueError(
            f"recipe: got patience={recipe.patience} without held_out rows, which it counts"
        )


def fit_head(
    head: FeatureTransferHead,
    hr: ArrayLike,
    lr: ArrayLike,
    clustering: Clustering,
    *,
    labels: str = "nearest",
    recipe: Recipe | None = None,
    seed: int = 0,
    precision: str = "fp32",
    callback: Callable[[EpochLog], object] | None = None,
) -> list[EpochLog]:
    """Trains the paper's head on the pseudo-labels of a clustering; leaves the centroids in it.

    Args:
        head: output "clusters", k of them; its input statistics are as the caller set them.
        hr: HR features `(n, d)`, as they come: the head scales them (`FeatureTransferHead.scale`).
        lr: LR features `(n, d)` of the same images, as they come.
        clustering: of the HR features as the head scales them, k clusters.
        labels: "nearest" (the paper) or "paired", see `pseudo_labels`.
        recipe: see `Recipe`; without `patience`, which counts on held-out rows.
        seed: of the order of the rows and of dropout.
        precision: see `PseudoLabelTrainer`.
        callback: see `PseudoLabelTrainer.fit`.

    Raises:
        ValueError, DivergenceError: as `pseudo_labels` and `PseudoLabelTrainer.fit`.
    """
    check_choice("head's output", head.output, ("clusters",))
    trainer = PseudoLabelTrainer(head, recipe, seed=seed, precision=precision)
    _check_patience(trainer.recipe, None)
    hr, lr = (as_features(name, rows) for name, rows in (("hr", hr), ("lr", lr)))
    check_paired(hr, lr)
    targets = pseudo_labels(head.scale(hr), head.scale(lr), clustering.centroids, labels)
    head.set_centroids(clustering.centroids)
    return trainer.fit(lr, targets, callback=callback)


def fit_features_head(
    head: FeatureTransferHead,
    hr: ArrayLike,
    lr: Sequence[ArrayLike],
    clustering: Clustering | Sequence[Clustering],
    *,
    targets: Sequence[ArrayLike] | None = None,
    objective: str = "prototypes",
    warm_start: bool = False,
    recipe: Recipe | None = None,
    seed: int = 0,
    precision: str = "fp32",
    callback: Callable[[EpochLog], object] | None = None,
) -> list[EpochLog]:
    """Trains a head with output "features" towards the HR features of the same images (ours).

    HR features are among its inputs as well, with themselves as targets, so that HR images come
    out as they went in. Leaves the input's statistics and the centroids in the head.

    Args:
        head: output "features", as many clusters as the (first) clustering.
        hr: HR features `(n, d)`, as they come.
        lr: LR features `(n, d)` of the same images, one array a degradation, at least one.
        clustering: of the HR features or of their directions; of several all are prototypes, and
            the head keeps the first one's centroids.
        targets: of LR features that have no HR image, an array for each of `lr` and of its length
            (`featxfer.training.unpaired`); by default the paired HR features.
        objective: a name of `featxfer.training.objectives.OBJECTIVES`.
        warm_start: whether the head begins with what ridge regression finds (`warm_start_head`).
        recipe: see `Recipe`, without `patience`; by default `FEATURES_RECIPE`.
        seed: of the order of the rows and of dropout.
        precision: see `PseudoLabelTrainer`.
        callback: see `PseudoLabelTrainer.fit`.

    Raises:
        ValueError: other shapes, NaN or infinity, HR features without variance, an unknown
            objective.
        DivergenceError: as `PseudoLabelTrainer.fit`.
    """
    check_choice("head's output", head.output, ("features",))
    if warm_start:
        check_choice("head's activation", head.activation, ("relu",))
    recipe, device = recipe or FEATURES_RECIPE, head.fc1.weight.device
    _check_patience(recipe, None)
    wanted = as_features("hr", hr, width=head.in_features).to(device)
    views = [
        as_features(f"lr[{i}]", rows, width=head.in_features).to(device)
        for i, rows in enumerate(lr)
    ]
    if not views:
        raise ValueError("lr: got none, wanted the LR features of at least one degradation")
    goals = [wanted] * len(views)
    if targets is not None:
        goals = [as_features(f"targets[{i}]", rows).to(device) for i, rows in enumerate(targets)]
        if len(goals) != len(views):
            raise ValueError(f"targets: got {len(goals)} arrays for {len(views)} of lr")
    for rows, view in zip(goals, views, strict=True):
        check_paired(rows, view)
    variance = variance_of("hr", wanted)
    several = [clustering] if isinstance(clustering, Clustering) else list(clustering)
    if not several:
        raise ValueError("clustering: got none, wanted at least one")
    goal = make_objective(objective, [part.centroids for part in several], variance)
    trainer = PseudoLabelTrainer(head, recipe, objective=goal, seed=seed, precision=precision)
    inputs, outputs = torch.cat([*views, wanted]), torch.cat([*goals, wanted])
    head.set_centroids(several[0].centroids)
    head.set_input_statistics(inputs)
    if warm_start:
        warm_start_head(head, inputs, outputs)
    return trainer.fit(inputs, outputs, callback=callback)


@torch.no_grad()
def warm_start_head(head: FeatureTransferHead, inputs: ArrayLike, targets: ArrayLike) -> float:
    """Sets a head to reduced-rank ridge regression from inputs to targets; returns the penalty.

    `inputs - targets` is regressed on the inputs in closed form, the penalty chosen by generalised
    cross-validation (Golub, Heath and Wahba 1979), and the fit cut to half as many directions as
    the head has hidden units (Izenman 1975): `relu(u) - relu(-u) = u`, so two units carry one. Of
    an odd number one unit stays idle. Exact without dropout; training goes on from there.

    Args:
        head: output "features", activation "relu", its input statistics set.
        inputs: `(n, d)`.
        targets: `(n, d)`.

    Raises:
        ValueError: another output or activation, other shapes, NaN or infinity.
    """
    check_choice("head's output", head.output, ("features",))
    check_choice("head's activation", head.activation, ("relu",))
    rows = as_features("inputs", inputs, width=head.in_features).cpu()
    wanted = as_features("targets", targets, width=head.in_features).cpu()
    check_paired(rows, wanted)
    device = head.input_mean.device
    z = head.normalise(rows.to(device).double()).cpu()
    change = (rows - wanted).double()
    centre, offset = z.mean(0), change.mean(0)
    left, scale, right = torch.linalg.svd(z - centre, full_matrices=False)
    projected, total = left.T @ (change - offset), (change - offset).square().sum()
    best, penalty = math.inf, 1.0
    candidates = torch.logspace(-2, 5, 29, dtype=torch.float64, device="cpu") * len(z) / 100
    for candidate in candidates:
        shrink = scale.square() / (scale.square() + candidate)
        residual = total - ((2 * shrink - shrink.square())[:, None] * projected.square()).sum()
        score = float(residual / (len(z) - shrink.sum()).square())
        if score < best:
            best, penalty = score, float(candidate)
    coefficients = right.T @ ((scale / (scale.square() + penalty))[:, None] * projected)
    fitted = (scale[:, None] * right) @ coefficients
    directions = torch.linalg.svd(fitted, full_matrices=False)[2][: head.fc1.out_features // 2]
    rank = len(directions)
    inner = directions @ coefficients.T
    for layer in (head.fc1, head.fc2):
        layer.weight.zero_()
        layer.bias.zero_()
    for sign, part in ((1, slice(0, rank)), (-1, slice(rank, 2 * rank))):
        head.fc1.weight[part] = (sign * inner).to(head.fc1.weight)
        head.fc1.bias[part] = (-sign * inner @ centre).to(head.fc1.bias)
        head.fc2.weight[:, part] = (sign * directions.T).to(head.fc2.weight)
    head.fc2.bias.copy_(offset)
    return penalty
