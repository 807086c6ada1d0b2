"""PseudoLabelTrainer: features and their targets in, a trained head and its log out."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from featxfer._checks import (
    ArrayLike,
    as_features,
    check_choice,
    check_integer,
    check_paired,
    variance_of,
)
from featxfer._files import write_atomic
from featxfer.forward import PRECISIONS, bf16_is_fast
from featxfer.head import FeatureTransferHead
from featxfer.labels import Clustering, pseudo_labels
from featxfer.objectives import LabelCrossEntropy, Objective, make_objective

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("steps", "one-cycle")


class DivergenceError(ArithmeticError):
    """The loss became infinite or NaN; the head holds the weights of the last good epoch."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or of another module; training has not begun."""


@dataclass(frozen=True)
class Recipe:
    """How the network is trained.

    The paper (section 4.3) names multinomial logistic loss, mini-batch SGD with momentum, weight
    decay and a learning rate that is stepped down. It states none of the values: all are ours.
    The defaults are for the paper's head; `FEATURES_RECIPE` is for output "features".

    Args:
        epochs: passes over the rows, >= 1.
        batch_size: rows a step, >= 1.
        learning_rate: the highest, > 0.
        momentum: in [0, 1); of "adamw" the first beta.
        weight_decay: of weights and biases, >= 0; "adamw" decouples it.
        steps: of schedule "steps": the learning rate is multiplied by `gamma` once each of these
            shares of the training is done, each in (0, 1).
        gamma: > 0.
        optimizer: "sgd" (the paper) or "adamw".
        schedule: "steps" (the paper), or "one-cycle": up in a straight line over the first 30% of
            the training, down to zero along a cosine.

    Raises:
        ValueError: a value outside of these.
    """

    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 5e-4
    steps: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    optimizer: str = "sgd"
    schedule: str = "steps"
    patience: int = 0

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, at_least=1)
        check_integer("batch_size", self.batch_size, at_least=1)
        check_integer("patience", self.patience, at_least=0)
        for name, valid, wanted in (
            ("learning_rate", self.learning_rate > 0, "> 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, ">= 0"),
            ("gamma", self.gamma > 0, "> 0"),
            ("steps", all(0 < step < 1 for step in self.steps), "shares in (0, 1)"),
        ):
            if not valid:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted {wanted}")
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)

    def learning_rate_at(self, epoch: int, share: float = 0.0) -> float:
        """The learning rate of epoch 0, 1, ... once a `share` in [0, 1) of that epoch is done.

        Schedule "steps" changes it between epochs only.
        """
        if self.schedule == "steps":
            passed = sum(epoch >= step * self.epochs for step in self.steps)
            return self.learning_rate * self.gamma**passed
        progress = (epoch + share) / self.epochs
        if progress < _WARM_UP:
            return self.learning_rate * (0.04 + 0.96 * progress / _WARM_UP)
        down = (progress - _WARM_UP) / (1 - _WARM_UP)
        return self.learning_rate * (1 + math.cos(math.pi * down)) / 2

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters,
                lr=self.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                fused=True,
            )
        return torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=(self.momentum, 0.999),
            weight_decay=self.weight_decay,
            fused=True,
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON types."""
        return {**dataclasses.asdict(self), "steps": list(self.steps)}


FEATURES_RECIPE = Recipe(
    epochs=80,
    batch_size=256,
    learning_rate=3e-4,
    weight_decay=0.05,
    optimizer="adamw",
    schedule="one-cycle",
)
"""For a head with output "features"."""

BLOCK_RECIPE = Recipe(
    epochs=24,
    batch_size=64,
    learning_rate=4e-3,
    weight_decay=0.05,
    optimizer="adamw",
    schedule="one-cycle",
)
"""For blocks, trained through the frozen rest of their backbone."""

_WARM_UP = 0.3


@dataclass(frozen=True)
class EpochLog:
    """One epoch: mean loss, label accuracy in [0, 1] while training, first rate and seconds.

    `held_out_loss` is the mean loss on held-out rows after the epoch, None where there are none.
    """

    epoch: int
    loss: float
    label_accuracy: float
    learning_rate: float
    seconds: float
    held_out_loss: float | None = None


class Rows(Protocol):
    """What a trainer draws mini-batches from, where it is more than two arrays in memory."""

    def order(self, generator: torch.Generator) -> Tensor:
        """Indices of the rows of one epoch, int64 `(m,)`, in the order that they are taken."""
        ...

    def take(self, indices: Tensor) -> tuple[Any, Any]:
        """Inputs and targets of these rows: tensors, or what can be moved by `to(device)`."""
        ...


@dataclass(frozen=True)
class _InMemory:
    inputs: Tensor
    targets: Tensor

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(self.inputs), generator=generator)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.inputs.device)
        return self.inputs[indices], self.targets[indices]


class PseudoLabelTrainer:
    """Trains a head, or any module from inputs to what an objective takes.

    Features are held in memory and drawn without a DataLoader. `fit` runs the whole recipe;
    `step` does one mini-batch, for a loop of one's own. Parameters that ask for no gradient, such
    as frozen layers behind a block, are left alone.

    Args:
        head: of rows `(n, d)`; trained in place, on the device of its parameters. In several
            processes a `DistributedDataParallel` of it: each process then draws from rows of its
            own, as many in each, and all have the same weights.
        recipe: see `Recipe`.
        objective: what is minimised; by default the paper's cross-entropy on pseudo-labels.
        seed: of the order of the rows and of dropout. In `fit` the global random state is neither
            read nor changed.
        precision: of the head's matrix products: "fp32"; "bf16", by autocast; "auto", that where
            the hardware multiplies in it. Weights, optimizer and loss are as they are.
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
        check_choice("precision", precision, PRECISIONS)
        self.head = head
        self.recipe = recipe or Recipe()
        self.objective = objective or LabelCrossEntropy()
        self.seed = seed
        self.parameters = {n: p for n, p in head.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("head: got no parameter that asks for a gradient, wanted one")
        self.optimizer = self.recipe.make_optimizer(self.parameters.values())
        self.precision = precision

    def step(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One update on a mini-batch of features `(b, d)` and their targets, on the head's device.

        Returns the loss before the update, detached, and the number of right labels: two scalars.
        The learning rate is the optimizer's own: set it as you like.
        """
        loss, right = self.objective(self._outputs(features), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), right

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def _outputs(self, features: Any) -> Any:
        device = self._device
        if self.precision == "fp32" or (self.precision == "auto" and not bf16_is_fast(device)):
            return self.head(features)
        with torch.autocast(device.type, torch.bfloat16):
            return self.head(features).float()

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
            ValueError: other shapes or dtypes, NaN or infinity (the row is named).
            DivergenceError: a loss that is not finite; the head keeps the last good epoch.
        """
        rows = as_features("features", features)
        sets = [(rows, targets)]
        if held_out is not None:
            sets.append((as_features("held_out", held_out[0], width=rows.shape[1]), held_out[1]))
        sets = [(part.to(self._device), wanted.to(self._device)) for part, wanted in sets]
        with torch.no_grad(), _evaluating(self.head):
            for part, wanted in sets:
                self.objective.check(self._outputs(part[:1]), wanted, len(part))
        others = [_InMemory(*part) for part in sets[1:]]
        return self.fit_rows(
            _InMemory(*sets[0]), held_out=others[0] if others else None, callback=callback
        )

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
                from it to the same weights, bit for bit. It is the caller's to see that it is of
                the same rows, recipe and seed.
            callback: as in `fit`.

        Raises:
            DivergenceError: as `fit`.
            CheckpointError: a checkpoint of another module, or damaged.
            DiskError: the checkpoint cannot be written.
        """
        progress = _Progress(torch.Generator().manual_seed(self.seed))
        training = self.head.training
        devices = [self._device] if self._device.type == "cuda" else []
        judge = None
        if held_out is not None:
            judge = partial(self._judge, held_out, held_out_batch)
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(self.seed)
                if checkpoint is not None and checkpoint.exists():
                    progress = self._resume(checkpoint, progress.generator)
                elif judge is not None:
                    self._note(progress, judge())
                while not self._is_done(progress):
                    self._epoch(progress, rows, judge)
                    if checkpoint is not None:
                        self._keep(checkpoint, progress)
                    if callback is not None:
                        callback(progress.log[-1])
        finally:
            self.head.train(training)
        self._restore(progress.best)
        return progress.log

    def _is_done(self, progress: _Progress) -> bool:
        """Whether all epochs are done, or the held-out loss has not fallen for `patience` ones."""
        log, patience = progress.log, self.recipe.patience
        if len(log) >= self.recipe.epochs:
            return True
        losses = [entry.held_out_loss for entry in log if entry.held_out_loss is not None]
        return bool(patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= patience

    def _epoch(self, progress: _Progress, rows: Rows, judge: Callable[[], float] | None) -> None:
        start, epoch, device = time.perf_counter(), len(progress.log), self._device
        good = {name: p.detach().clone() for name, p in self.parameters.items()}
        batches = rows.order(progress.generator).split(self.recipe.batch_size)
        first_rate = self.recipe.learning_rate_at(epoch)
        losses, right, count = [], [], 0
        self.head.train()
        for step, batch in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate_at(epoch, step / len(batches))
            inputs, targets = rows.take(batch)
            loss, hits = self.step(inputs.to(device), targets.to(device))
            losses.append(loss * len(batch))
            right.append(hits)
            count += len(batch)
        mean_loss = float(torch.stack(losses).sum()) / count
        if not (math.isfinite(mean_loss) and self._weights_are_finite()):
            self._restore(good)
            finite = [math.isfinite(float(loss)) for loss in losses]
            step = finite.index(False) if False in finite else len(finite)
            raise DivergenceError(
                f"loss or weights are not finite at epoch {epoch}, step {step} (learning rate "
                f"{first_rate:g}); the weights are those from before that epoch"
            )
        judged = None if judge is None else judge()
        if judged is not None:
            self._note(progress, judged)
        accuracy, seconds = int(torch.stack(right).sum()) / count, time.perf_counter() - start
        progress.log.append(EpochLog(epoch, mean_loss, accuracy, first_rate, seconds, judged))

    def _note(self, progress: _Progress, judged: float) -> None:
        """Keeps the weights if their held-out loss is the lowest so far."""
        if judged < progress.lowest:
            progress.lowest = judged
            progress.best = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def _judge(self, held_out: Rows, size: int) -> float:
        """The mean loss on held-out rows."""
        device = self._device
        order = held_out.order(torch.Generator().manual_seed(0))
        total = 0.0
        with _evaluating(self.head):
            for batch in order.split(size):
                inputs, targets = held_out.take(batch)
                loss, _ = self.objective(self._outputs(inputs.to(device)), targets.to(device))
                total += float(loss) * len(batch)
        return total / len(order)

    def _restore(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self.parameters[name].copy_(value)

    def _weights_are_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.parameters.values())

    def _keep(self, path: Path, progress: _Progress) -> None:
        tensors = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"best.{name}": value for name, value in progress.best.items()}
        for name, p in self.parameters.items():
            for part, value in self.optimizer.state[p].items():
                tensors[f"optimizer.{part}.{name}"] = value
        tensors["random.order"] = progress.generator.get_state()
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        log = json.dumps([dataclasses.asdict(entry) for entry in progress.log])
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        said = {"log": log, "lowest": repr(progress.lowest)}
        write_atomic(path, safetensors.torch.save(tensors, said))

    def _resume(self, path: Path, generator: torch.Generator) -> _Progress:
        """Weights, optimizer, randomness and log as after the checkpoint's last epoch."""
        data = path.read_bytes()
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            log = [EpochLog(**entry) for entry in json.loads(header["__metadata__"]["log"])]
            lowest = float(header["__metadata__"]["lowest"])
            self._restore({name: tensors[f"weights.{name}"] for name in self.parameters})
        except (
            safetensors.SafetensorError,
            KeyError,
            ValueError,
            TypeError,
            RuntimeError,
        ) as error:
            raise CheckpointError(
                f"{path}: no checkpoint of this training ({type(error).__name__}: {error}); "
                "delete it to start anew"
            ) from error
        best: dict[str, Tensor] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "best":
                best[name] = value
            elif kind == "optimizer":
                part, _, owner = name.partition(".")
                parameter = self.parameters[owner]
                self.optimizer.state[parameter][part] = value.to(parameter.device)
        generator.set_state(tensors["random.order"])
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return _Progress(generator, log, lowest, best)


@dataclass
class _Progress:
    """Randomness of the order, the log, the lowest held-out loss and the weights that had it."""

    generator: torch.Generator
    log: list[EpochLog] = field(default_factory=list)
    lowest: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside, the former mode after."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


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
        recipe: see `Recipe`.
        seed: of the order of the rows.
        precision: see `PseudoLabelTrainer`.
        callback: see `PseudoLabelTrainer.fit`.

    Raises:
        ValueError, DivergenceError: as `pseudo_labels` and `PseudoLabelTrainer.fit`.
    """
    check_choice("head's output", head.output, ("clusters",))
    hr, lr = (as_features(name, rows) for name, rows in (("hr", hr), ("lr", lr)))
    check_paired(hr, lr)
    targets = pseudo_labels(head.scale(hr), head.scale(lr), clustering.centroids, labels)
    head.set_centroids(clustering.centroids)
    trainer = PseudoLabelTrainer(head, recipe, seed=seed, precision=precision)
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
            (`featxfer.unpaired`); by default the paired HR features.
        objective: a name of `featxfer.objectives.OBJECTIVES`.
        warm_start: whether the head begins with what ridge regression finds (`warm_start_head`).
        recipe: see `Recipe`; by default `FEATURES_RECIPE`.
        seed: of the order of the rows and of dropout.
        precision: see `PseudoLabelTrainer`.
        callback: see `PseudoLabelTrainer.fit`.

    Raises:
        ValueError: other shapes, NaN or infinity, HR features without variance, an unknown
            objective.
        DivergenceError: as `PseudoLabelTrainer.fit`.
    """
    check_choice("head's output", head.output, ("features",))
    wanted = as_features("hr", hr, width=head.in_features)
    views = [as_features(f"lr[{i}]", rows, width=head.in_features) for i, rows in enumerate(lr)]
    if not views:
        raise ValueError("lr: got none, wanted the LR features of at least one degradation")
    goals = [wanted] * len(views)
    if targets is not None:
        goals = [as_features(f"targets[{i}]", rows) for i, rows in enumerate(targets)]
        if len(goals) != len(views):
            raise ValueError(f"targets: got {len(goals)} arrays for {len(views)} of lr")
    for rows, view in zip(goals, views, strict=True):
        check_paired(rows, view)
    variance = variance_of("hr", wanted)
    several = [clustering] if isinstance(clustering, Clustering) else list(clustering)
    goal = make_objective(objective, [part.centroids for part in several], variance)
    inputs, outputs = torch.cat([*views, wanted]), torch.cat([*goals, wanted])
    head.set_input_statistics(inputs)
    head.set_centroids(several[0].centroids)
    if warm_start:
        warm_start_head(head, inputs, outputs)
    trainer = PseudoLabelTrainer(
        head, recipe or FEATURES_RECIPE, objective=goal, seed=seed, precision=precision
    )
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
    rows = as_features("inputs", inputs, width=head.in_features)
    wanted = as_features("targets", targets, width=head.in_features)
    check_paired(rows, wanted)
    mean, std = head.input_mean.cpu().double(), head.input_std.cpu().double()
    z, change = (rows.double() - mean) / std, (rows - wanted).double()
    centre, offset = z.mean(0), change.mean(0)
    left, scale, right = torch.linalg.svd(z - centre, full_matrices=False)
    projected, total = left.T @ (change - offset), (change - offset).square().sum()
    best, penalty = math.inf, 1.0
    for candidate in torch.logspace(-2, 5, 29, dtype=torch.float64) * len(z) / 100:
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
