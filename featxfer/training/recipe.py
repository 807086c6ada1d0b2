"""Recipe: how a network is trained, and the recipes that are the defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featxfer.checks import check_choice, check_integer

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("steps", "one-cycle")

_WARM_UP = 0.3


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
        patience: training ends once the loss on held-out rows has not fallen for so many epochs;
            0: never.

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
            ("learning_rate", 0 < self.learning_rate < math.inf, "> 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, ">= 0"),
            ("gamma", 0 < self.gamma < math.inf, "> 0"),
            ("steps", all(0 < step < 1 for step in self.steps), "shares in (0, 1)"),
        ):
            if not valid:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted {wanted}")
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)

    def check_held_out(self, held_out: object) -> None:
        """Raises `ValueError` where `patience` has no held-out rows to count on."""
        if self.patience and held_out is None:
            raise ValueError(
                f"recipe: got patience={self.patience} without held_out rows, which it counts"
            )

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

    def optimizer_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Zeros like what the optimizer keeps of a parameter that has moved, by name."""
        zeros = torch.zeros_like(parameter)
        if self.optimizer == "sgd":
            return {"momentum_buffer": zeros} if self.momentum else {}
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros}

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
