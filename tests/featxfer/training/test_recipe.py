from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from featxfer import FeatureTransferHead, PseudoLabelTrainer, Recipe

ROWS = torch.randn(300, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(300) % 6


def test_the_learning_rate_is_stepped_down() -> None:
    recipe = Recipe(epochs=8, learning_rate=1.0, steps=(0.5, 0.75), gamma=0.1)
    rates = [recipe.learning_rate_at(epoch) for epoch in range(8)]
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    small = Recipe(epochs=4, learning_rate=0.01)
    log = PseudoLabelTrainer(FeatureTransferHead(10, 6, 64, output="clusters"), small).fit(
        ROWS, LABELS
    )
    assert [e.learning_rate for e in log] == pytest.approx([0.01, 0.01, 0.001, 0.0001])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs: got 0, wanted an int >= 1"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"learning_rate": 0.0}, r"learning_rate: got 0\.0, wanted > 0"),
        ({"learning_rate": math.nan}, "learning_rate: got nan"),
        ({"learning_rate": math.inf}, "learning_rate: got inf"),
        ({"weight_decay": math.inf}, "weight_decay: got inf"),
        ({"gamma": math.inf}, "gamma: got inf"),
        ({"patience": -1}, "patience: got -1, wanted an int >= 0"),
        ({"momentum": 1.0}, r"momentum: got 1\.0, wanted in \[0, 1\)"),
        ({"weight_decay": -1.0}, r"weight_decay: got -1\.0, wanted >= 0"),
        ({"steps": (1.5,)}, r"steps: got \(1\.5,\), wanted shares in \(0, 1\)"),
        ({"gamma": 0.0}, r"gamma: got 0\.0, wanted > 0"),
    ],
)
def test_bad_recipes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


@pytest.mark.parametrize(
    "recipe",
    [Recipe(epochs=1), Recipe(epochs=1, momentum=0.0), Recipe(epochs=1, optimizer="adamw")],
    ids=str,
)
def test_the_state_of_an_optimizer_is_told(recipe: Recipe) -> None:
    trainer = PseudoLabelTrainer(FeatureTransferHead(10, 6, 8, output="clusters"), recipe)
    trainer.fit(ROWS, LABELS)
    for parameter in trainer.parameters.values():
        kept, told = trainer.optimizer.state[parameter], recipe.optimizer_state(parameter)
        assert kept.keys() == told.keys()
        for name, value in told.items():
            assert (kept[name].shape, kept[name].dtype) == (value.shape, value.dtype)
