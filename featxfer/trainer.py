"""PseudoLabelTrainer: features and pseudo-labels in, a trained head and its log out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featxfer._checks import ArrayLike, as_features, check_integer
from featxfer.head import FeatureTransferHead
from featxfer.pseudo_labels import Clustering, pseudo_labels


class DivergenceError(ArithmeticError):
    """The loss became infinite or NaN; the head holds the weights of the last good epoch."""


@dataclass(frozen=True)
class Recipe:
    """How the network is trained.

    The paper (section 4.3) names multinomial logistic loss, mini-batch SGD with momentum, weight
    decay and a learning rate that is stepped down. It states none of the values: all are ours.

    Args:
        epochs: passes over the rows, >= 1.
        batch_size: rows a step, >= 1.
        learning_rate: of the first epochs, > 0.
        momentum: in [0, 1).
        weight_decay: of weights and biases, >= 0.
        steps: the learning rate is multiplied by `gamma` once each of these shares of the epochs
            is done, each in (0, 1).
        gamma: > 0.

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

    def learning_rate_at(self, epoch: int) -> float:
        """The learning rate of epoch 0, 1, ..."""
        passed = sum(epoch >= step * self.epochs for step in self.steps)
        return self.learning_rate * self.gamma**passed

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON types."""
        return {**dataclasses.asdict(self), "steps": list(self.steps)}


@dataclass(frozen=True)
class EpochLog:
    """One epoch: mean loss (nats), label accuracy in [0, 1] while training, rate and seconds."""

    epoch: int
    loss: float
    label_accuracy: float
    learning_rate: float
    seconds: float


class PseudoLabelTrainer:
    """Trains a head, or any module from features to logits, on pseudo-labels.

    Features are held in memory and drawn without a DataLoader. `fit` runs the whole recipe;
    `step` does one mini-batch, for a loop of one's own.

    Args:
        head: `(n, d) -> (n, k)`; trained in place, on the device of its parameters.
        recipe: see `Recipe`.
        seed: of the order of the rows. The global random state is neither read nor changed.
    """

    def __init__(self, head: nn.Module, recipe: Recipe | None = None, *, seed: int = 0) -> None:
        check_integer("seed", seed, at_least=0)
        self.head = head
        self.recipe = recipe or Recipe()
        self.seed = seed
        self.optimizer = torch.optim.SGD(
            head.parameters(),
            lr=self.recipe.learning_rate,
            momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
        )

    def step(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One update on a mini-batch: features `(b, d)`, labels int64 `(b,)`, on the head's device.

        Returns the loss before the update, detached, and the number of right labels: two scalars.
        The learning rate is the optimizer's own: set it as you like.
        """
        logits = self.head(features)
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), (logits.detach().argmax(1) == labels).sum()

    def fit(
        self,
        features: ArrayLike,
        labels: Tensor,
        *,
        callback: Callable[[EpochLog], object] | None = None,
    ) -> list[EpochLog]:
        """Runs the recipe and returns its log, an entry an epoch.

        The head is in training mode meanwhile and in its former mode after. The same seed, rows,
        machine and thread count give the same weights, bit for bit.

        Args:
            features: `(n, d)`.
            labels: int64 `(n,)`, each in [0, k).
            callback: called after each epoch with its log; an exception from it ends training.

        Raises:
            ValueError: other shapes or dtypes, NaN or infinity (the row is named).
            DivergenceError: a loss that is not finite; the head keeps the last good epoch.
        """
        rows = as_features("features", features)
        if labels.shape != (len(rows),) or labels.dtype != torch.int64 or int(labels.min()) < 0:
            raise ValueError(
                f"labels: got {labels.dtype} {tuple(labels.shape)}, "
                f"wanted int64 ({len(rows)},), none negative"
            )
        device = next(self.head.parameters()).device
        rows, labels = rows.to(device), labels.to(device)
        generator = torch.Generator().manual_seed(self.seed)
        training, log = self.head.training, []
        try:
            self._check_labels(rows, labels)
            self.head.train()
            for epoch in range(self.recipe.epochs):
                log.append(self._epoch(epoch, rows, labels, generator))
                if callback is not None:
                    callback(log[-1])
        finally:
            self.head.train(training)
        return log

    def _epoch(
        self, epoch: int, rows: Tensor, labels: Tensor, generator: torch.Generator
    ) -> EpochLog:
        start = time.perf_counter()
        rate = self.recipe.learning_rate_at(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        good = {name: value.clone() for name, value in self.head.state_dict().items()}
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        losses, right = [], []
        for batch in order.split(self.recipe.batch_size):
            loss, hits = self.step(rows[batch], labels[batch])
            losses.append(loss * len(batch))
            right.append(hits)
        mean_loss = float(torch.stack(losses).sum()) / len(rows)
        if not (math.isfinite(mean_loss) and self._weights_are_finite()):
            self.head.load_state_dict(good)
            finite = [math.isfinite(float(loss)) for loss in losses]
            step = finite.index(False) if False in finite else len(finite)
            raise DivergenceError(
                f"loss or weights are not finite at epoch {epoch}, step {step} (learning rate "
                f"{rate:g}); the head keeps the weights from before that epoch"
            )
        accuracy = int(torch.stack(right).sum()) / len(rows)
        return EpochLog(epoch, mean_loss, accuracy, rate, time.perf_counter() - start)

    def _weights_are_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.head.parameters())

    @torch.no_grad()
    def _check_labels(self, rows: Tensor, labels: Tensor) -> None:
        """Raises `ValueError` for a label that the head, left in eval mode, has no output for."""
        outputs = self.head.eval()(rows[:1]).shape[-1]
        if int(labels.max()) >= outputs:
            raise ValueError(f"labels: got {int(labels.max())}, wanted labels below {outputs}")


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
    """Trains a head on the pseudo-labels of a clustering and leaves the centroids in it.

    Args:
        head: with k outputs; its input statistics are as the caller set them.
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
    targets = pseudo_labels(hr, lr, clustering.centroids, labels)
    head.set_centroids(clustering.centroids)
    return PseudoLabelTrainer(head, recipe, seed=seed).fit(lr, targets, callback=callback)
