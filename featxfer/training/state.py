"""TrainingState: all that a training hands from one epoch to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from featxfer.training.recipe import Recipe


@dataclass(frozen=True)
class EpochLog:
    """One epoch: mean loss, match rate while training, first learning rate and seconds.

    `match_rate` is the share in [0, 1] of rows whose output matches its own target: its label, its
    most similar prototype, or its own HR feature in the batch. `held_out_loss` is the mean loss on
    held-out rows after the epoch, None where there are none.
    """

    epoch: int
    loss: float
    match_rate: float
    learning_rate: float
    seconds: float
    held_out_loss: float | None = None


@dataclass
class TrainingState:
    """A training between two epochs.

    Of a module some `parameters` are trained. `generators` are of the "order" of the rows and of
    "dropout"; `best` are the weights of the `lowest` held-out loss so far: none, and infinity,
    where there are no held-out rows.
    """

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    generators: Mapping[str, torch.Generator]
    log: list[EpochLog] = field(default_factory=list)
    lowest: float = math.inf
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done, or the held-out loss has not fallen for `patience` ones."""
        patience = self.recipe.patience
        if len(self.log) >= self.recipe.epochs:
            return True
        losses = [entry.held_out_loss for entry in self.log if entry.held_out_loss is not None]
        return bool(patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= patience

    def buffers(self) -> dict[str, Tensor]:
        """What is saved with the module besides its parameters, such as running statistics."""
        saved = self.module.state_dict().keys()
        return {name: value for name, value in self.module.named_buffers() if name in saved}

    def weights(self) -> dict[str, Tensor]:
        """What training may change of the module, itself."""
        return {**self.parameters, **self.buffers()}

    def copied(self) -> dict[str, Tensor]:
        """A copy of `weights`."""
        return {name: value.detach().clone() for name, value in self.weights().items()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Gives the module these of its weights."""
        own = self.weights()
        for name, value in weights.items():
            own[name].copy_(value)

    def note(self, held_out_loss: float) -> None:
        """Keeps the weights if their held-out loss is the lowest so far.

        Raises `ValueError` for one that is not finite; after an epoch that is asked before.
        """
        if not math.isfinite(held_out_loss):
            raise ValueError(
                f"held_out: got a loss of {held_out_loss} before training, wanted a finite one"
            )
        if held_out_loss < self.lowest:
            self.lowest = held_out_loss
            self.best = self.copied()

    def sums(self, losses: list[Tensor], matches: list[Tensor]) -> tuple[float, int, float]:
        """Of an epoch's steps the sums of the loss and of matches, and the first that went bad.

        That is the first whose loss is not finite, or the number of steps where only the weights
        after them are not; infinity where all is well.
        """
        total, bad = float(torch.stack(losses).sum()), math.inf
        weights = (bool(torch.isfinite(p).all()) for p in self.parameters.values())
        if not (math.isfinite(total) and all(weights)):
            finite = [math.isfinite(float(loss)) for loss in losses]
            bad = finite.index(False) if False in finite else len(finite)
        return total, int(torch.stack(matches).sum()), bad
