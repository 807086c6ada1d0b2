"""PseudoLabelTrainer: features and their targets in, a trained head and its log out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featxfer._checks import ArrayLike, as_features, check_choice, check_integer, check_paired
from featxfer.head import FeatureTransferHead
from featxfer.objectives import LabelCrossEntropy, Objective, PrototypeDistillation
from featxfer.pseudo_labels import Clustering, pseudo_labels

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("steps", "one-cycle")


class DivergenceError(ArithmeticError):
    """The loss became infinite or NaN; the head holds the weights of the last good epoch."""


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

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs, at_least=1)
        check_integer("batch_size", self.batch_size, at_least=1)
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
            )
        return torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=(self.momentum, 0.999),
            weight_decay=self.weight_decay,
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

_WARM_UP = 0.3


@dataclass(frozen=True)
class EpochLog:
    """One epoch: mean loss, label accuracy in [0, 1] while training, first rate and seconds."""

    epoch: int
    loss: float
    label_accuracy: float
    learning_rate: float
    seconds: float


class PseudoLabelTrainer:
    """Trains a head, or any module from features to what an objective takes.

    Features are held in memory and drawn without a DataLoader. `fit` runs the whole recipe;
    `step` does one mini-batch, for a loop of one's own.

    Args:
        head: of rows `(n, d)`; trained in place, on the device of its parameters.
        recipe: see `Recipe`.
        objective: what is minimised; by default the paper's cross-entropy on pseudo-labels.
        seed: of the order of the rows and of dropout. In `fit` the global random state is neither
            read nor changed.
    """

    def __init__(
        self,
        head: nn.Module,
        recipe: Recipe | None = None,
        *,
        objective: Objective | None = None,
        seed: int = 0,
    ) -> None:
        check_integer("seed", seed, at_least=0)
        self.head = head
        self.recipe = recipe or Recipe()
        self.objective = objective or LabelCrossEntropy()
        self.seed = seed
        self.optimizer = self.recipe.make_optimizer(head.parameters())

    def step(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One update on a mini-batch of features `(b, d)` and their targets, on the head's device.

        Returns the loss before the update, detached, and the number of right labels: two scalars.
        The learning rate is the optimizer's own: set it as you like.
        """
        loss, right = self.objective(self.head(features), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), right

    def fit(
        self,
        features: ArrayLike,
        targets: Tensor,
        *,
        callback: Callable[[EpochLog], object] | None = None,
    ) -> list[EpochLog]:
        """Runs the recipe and returns its log, an entry an epoch.

        The head is in training mode meanwhile and in its former mode after. The same seed, rows,
        machine and thread count give the same weights, bit for bit.

        Args:
            features: `(n, d)`.
            targets: a row each, as the objective takes them: pseudo-labels int64 `(n,)`, or HR
                features `(n, d)`.
            callback: called after each epoch with its log; an exception from it ends training.

        Raises:
            ValueError: other shapes or dtypes, NaN or infinity (the row is named).
            DivergenceError: a loss that is not finite; the head keeps the last good epoch.
        """
        rows = as_features("features", features)
        device = next(self.head.parameters()).device
        generator = torch.Generator().manual_seed(self.seed)
        training, log = self.head.training, []
        devices = [device] if device.type == "cuda" else []
        try:
            rows, targets = rows.to(device), targets.to(device)
            with torch.no_grad():
                self.objective.check(self.head.eval()(rows[:1]), targets, len(rows))
            self.head.train()
            with torch.random.fork_rng(devices):
                torch.manual_seed(self.seed)
                for epoch in range(self.recipe.epochs):
                    log.append(self._epoch(epoch, rows, targets, generator))
                    if callback is not None:
                        callback(log[-1])
        finally:
            self.head.train(training)
        return log

    def _epoch(
        self, epoch: int, rows: Tensor, targets: Tensor, generator: torch.Generator
    ) -> EpochLog:
        start = time.perf_counter()
        good = {name: value.clone() for name, value in self.head.state_dict().items()}
        batches = torch.randperm(len(rows), generator=generator).split(self.recipe.batch_size)
        first_rate = self.recipe.learning_rate_at(epoch)
        losses, right = [], []
        for step, batch in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate_at(epoch, step / len(batches))
            batch = batch.to(rows.device)
            loss, hits = self.step(rows[batch], targets[batch])
            losses.append(loss * len(batch))
            right.append(hits)
        mean_loss = float(torch.stack(losses).sum()) / len(rows)
        if not (math.isfinite(mean_loss) and self._weights_are_finite()):
            self.head.load_state_dict(good)
            finite = [math.isfinite(float(loss)) for loss in losses]
            step = finite.index(False) if False in finite else len(finite)
            raise DivergenceError(
                f"loss or weights are not finite at epoch {epoch}, step {step} (learning rate "
                f"{first_rate:g}); the head keeps the weights from before that epoch"
            )
        accuracy = int(torch.stack(right).sum()) / len(rows)
        return EpochLog(epoch, mean_loss, accuracy, first_rate, time.perf_counter() - start)

    def _weights_are_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.head.parameters())


def fit_head(
    head: FeatureTransferHead,
    hr: ArrayLike,
    lr: ArrayLike,
    clustering: Clustering,
    *,
    labels: str = "nearest",
    recipe: Recipe | None = None,
    seed: int = 0,
    callback: Callable[[EpochLog], object] | None = None,
) -> list[EpochLog]:
    """Trains the paper's head on the pseudo-labels of a clustering; leaves the centroids in it.

    Args:
        head: output "clusters", k of them; its input statistics are as the caller set them.
        hr: HR features `(n, d)`, scaled as those that were clustered.
        lr: LR features `(n, d)` of the same images, scaled alike.
        clustering: of the HR features, k clusters.
        labels: "nearest" (the paper) or "paired", see `pseudo_labels`.
        recipe: see `Recipe`.
        seed: of the order of the rows.
        callback: see `PseudoLabelTrainer.fit`.

    Raises:
        ValueError, DivergenceError: as `pseudo_labels` and `PseudoLabelTrainer.fit`.
    """
    check_choice("head's output", head.output, ("clusters",))
    targets = pseudo_labels(hr, lr, clustering.centroids, labels)
    head.set_centroids(clustering.centroids)
    return PseudoLabelTrainer(head, recipe, seed=seed).fit(lr, targets, callback=callback)


def fit_features_head(
    head: FeatureTransferHead,
    hr: ArrayLike,
    lr: Sequence[ArrayLike],
    clustering: Clustering,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    callback: Callable[[EpochLog], object] | None = None,
) -> list[EpochLog]:
    """Trains a head with output "features" towards the HR features of the same images (ours).

    HR features are among its inputs as well, with themselves as targets, so that HR images come
    out as they went in. Leaves the input's statistics and the centroids in the head.

    Args:
        head: output "features", as many clusters as the clustering.
        hr: HR features `(n, d)`, as they come.
        lr: LR features `(n, d)` of the same images, one array a degradation, at least one.
        clustering: of the HR features or of their directions.
        recipe: see `Recipe`; by default `FEATURES_RECIPE`.
        seed: of the order of the rows and of dropout.
        callback: see `PseudoLabelTrainer.fit`.

    Raises:
        ValueError: other shapes, NaN or infinity, HR features without variance.
        DivergenceError: as `PseudoLabelTrainer.fit`.
    """
    check_choice("head's output", head.output, ("features",))
    target = as_features("hr", hr, width=head.in_features)
    views = [as_features(f"lr[{index}]", rows) for index, rows in enumerate(lr)]
    if not views:
        raise ValueError("lr: got none, wanted the LR features of at least one degradation")
    for view in views:
        check_paired(target, view)
    variance = float((target - target.mean(0)).square().sum(1).mean())
    if variance == 0:
        raise ValueError(f"hr: got {len(target)} equal rows, wanted features that vary")
    objective = PrototypeDistillation(clustering.centroids, variance)
    inputs = torch.cat([*views, target])
    head.set_input_statistics(inputs)
    head.set_centroids(clustering.centroids)
    trainer = PseudoLabelTrainer(head, recipe or FEATURES_RECIPE, objective=objective, seed=seed)
    return trainer.fit(inputs, target.repeat(len(views) + 1, 1), callback=callback)
