"""PseudoLabelTrainer: pairs of inputs and targets in, a trained module and its log out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from featxfer.checks import ArrayLike, check_choice, check_integer
from featxfer.features.backbone import frozen, modes_kept
from featxfer.features.forward import PRECISIONS, bf16_is_fast
from featxfer.training.checkpoint import keep, resume, settings_of
from featxfer.training.dropout import dropout_from, warn_of_dropout
from featxfer.training.objectives import LabelCrossEntropy, Objective
from featxfer.training.pairs import PairSource, checked_pairs
from featxfer.training.processes import Processes
from featxfer.training.recipe import Recipe
from featxfer.training.state import EpochLog, TrainingState


class DivergenceError(ArithmeticError):
    """The loss became infinite or NaN; the head holds the weights of the last good epoch."""


class PseudoLabelTrainer:
    """Trains a head, or any module from inputs to what an objective takes.

    `fit` runs the whole recipe on features in memory and `fit_rows` on any pairs, without a
    DataLoader; `step` does one mini-batch, for a loop of one's own. Parameters that ask for no
    gradient, such as frozen layers behind a block, are left alone.

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

        Returns the loss before the update, detached, and the number of rows that match their
        target: two scalars. The learning rate is the optimizer's own: set it as you like.
        """
        loss, matches = self.objective(self._outputs(self.head, features), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), matches

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
        self.recipe.check_held_out(held_out)
        with self.processes.together():
            device, judged = self._device, None
            pairs = checked_pairs("features", features, targets, self._check, device)
            if held_out is not None:
                width = pairs.inputs.shape[1]
                judged = checked_pairs("held_out", *held_out, self._check, device, width)
        return self.fit_rows(pairs, held_out=judged, callback=callback)

    def fit_rows(
        self,
        rows: PairSource,
        *,
        held_out: PairSource | None = None,
        held_out_batch: int = 256,
        checkpoint: Path | None = None,
        callback: Callable[[EpochLog], object] | None = None,
    ) -> list[EpochLog]:
        """As `fit`, on pairs that are made when they are taken; they are not checked.

        Args:
            rows: see `PairSource`.
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
        self.recipe.check_held_out(held_out)
        check_integer("held_out_batch", held_out_batch, at_least=1)
        path = None if checkpoint is None else Path(checkpoint)
        judges, several = held_out is not None, self.processes.size
        settings = settings_of(
            self.recipe, self.seed, self._arithmetic, self.objective, judges, several
        )
        self.processes.check_same_training(settings, path)
        generators = self.processes.generators(self.seed)
        state = TrainingState(self.module, self.parameters, self.optimizer, self.recipe, generators)
        with modes_kept(self.head), dropout_from(self.module, generators["dropout"]):
            self.head.train()
            warn_of_dropout(self.module)
            if path is not None and path.exists():
                resume(path, settings, state, self.processes)
            elif held_out is not None:
                state.note(self._judge(held_out, held_out_batch))
            while not state.is_done:
                state.log.append(self._epoch(state, rows, held_out, held_out_batch))
                if path is not None:
                    keep(path, settings, state, self.processes)
                if callback is not None:
                    with self.processes.together():
                        callback(state.log[-1])
        state.restore(state.best)
        return state.log

    def _epoch(
        self, state: TrainingState, rows: PairSource, held_out: PairSource | None, size: int
    ) -> EpochLog:
        """Trains on all rows once and judges the held-out ones; a bad epoch leaves no trace."""
        start, epoch, judged = time.perf_counter(), len(state.log), None
        rate = self.recipe.learning_rate_at(epoch)
        with self.processes.together():
            order = rows.order(state.generators["order"])
        count = self.processes.count_rows(order)
        good = state.copied()
        self.head.train()
        losses, hits, batches = [], [], order.split(self.recipe.batch_size)
        for step, batch in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate_at(epoch, step / len(batches))
            loss, found = self.step(*self._taken(rows, batch))
            losses.append(loss * len(batch))
            hits.append(found)
        sums = self.processes.numbers(*state.sums(losses, hits)).T
        total, matches, bad = float(sums[0].sum()), float(sums[1].sum()), float(sums[2].min())
        self.processes.broadcast(state.buffers().values())
        what = f"loss or weights are not finite at epoch {epoch}, step {bad:g}"
        if held_out is not None and bad == math.inf:
            judged = self._judge(held_out, size)
            what = f"the held-out loss is not finite after epoch {epoch}"
        if bad < math.inf or not math.isfinite(judged or 0.0):
            state.restore(good)
            raise DivergenceError(
                f"{what} (learning rate {rate:g}); the weights are those from before that epoch"
            )
        if judged is not None:
            state.note(judged)
        seconds = time.perf_counter() - start
        return EpochLog(epoch, total / count, matches / count, rate, seconds, judged)

    def _judge(self, held_out: PairSource, size: int) -> float:
        """The mean loss on the held-out rows of all processes."""
        total, count = 0.0, 0
        with self.processes.together(), frozen(self.module):
            order = held_out.order(torch.Generator("cpu").manual_seed(0))
            for batch in order.split(size) if len(order) else ():
                inputs, targets = self._taken(held_out, batch)
                loss, _ = self.objective(self._outputs(self.module, inputs), targets)
                total += float(loss) * len(batch)
            count = len(order)
        sums = self.processes.numbers(total, count).sum(0)
        if not sums[1]:
            raise ValueError("held_out: got no rows, wanted at least one")
        return float(sums[0] / sums[1])

    def _check(self, rows: Tensor, targets: Tensor, count: int) -> None:
        """Raises `ValueError` for targets of so many rows that do not go with the outputs."""
        with frozen(self.module):
            outputs = self._outputs(self.module, rows)
        self.objective.check(outputs, targets, count)

    def _taken(self, rows: PairSource, batch: Tensor) -> tuple[Any, Any]:
        inputs, targets = rows.take(batch)
        return inputs.to(self._device), targets.to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    @property
    def _arithmetic(self) -> str:
        fast = self.precision == "auto" and bf16_is_fast(self._device)
        return "bf16" if fast or self.precision == "bf16" else "fp32"

    def _outputs(self, module: nn.Module, features: Any) -> Any:
        if self._arithmetic == "fp32":
            return module(features)
        with torch.autocast(self._device.type, torch.bfloat16):
            return module(features).float()
