from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from featxfer import EpochLog, FeatureTransferHead, PseudoLabelTrainer, Recipe
from featxfer.training.checkpoint import CheckpointError
from featxfer.training.objectives import LabelCrossEntropy, PairedRegression

GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.randn(300, 10, generator=GENERATOR)
LABELS = torch.randint(6, (300,), generator=GENERATOR)
RECIPE = Recipe(
    epochs=6, batch_size=32, learning_rate=0.05, optimizer="adamw", schedule="one-cycle"
)


class Rows:
    """Rows of a trainer, by the protocol."""

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(300, generator=generator)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return ROWS[indices], LABELS[indices]


class Other(Rows):
    """With other labels, so that the loss on them rises."""

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return ROWS[indices], (LABELS[indices] + 1) % 6


class Untouched(Rows):
    """Rows that nobody may take."""

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("rows were taken")


def make(**options: Any) -> PseudoLabelTrainer:
    head = FeatureTransferHead(10, 6, 16, output="clusters", dropout=0.5)
    return PseudoLabelTrainer(head, **{"recipe": RECIPE, **options})


def stop(log: EpochLog) -> None:
    if log.epoch == 3:
        raise KeyboardInterrupt


def interrupt(trainer: PseudoLabelTrainer, path: Path, rows: Rows | None = None) -> None:
    """Trains until four epochs are in the checkpoint."""
    rows = rows or Rows()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit_rows(rows, held_out=rows, checkpoint=path, callback=stop)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    "recipe", [RECIPE, dataclasses.replace(RECIPE, optimizer="sgd", momentum=0.0)], ids=str
)
def test_training_goes_on_from_a_checkpoint_to_the_same_weights(
    tmp_path: Path, recipe: Recipe
) -> None:
    whole, resumed, path = make(recipe=recipe), make(recipe=recipe), tmp_path / "c.safetensors"
    wanted = whole.fit_rows(Rows(), held_out=Rows())
    interrupt(make(recipe=recipe), path)
    log = resumed.fit_rows(Rows(), held_out=Rows(), checkpoint=path)
    assert [entry.loss for entry in log] == [entry.loss for entry in wanted]
    assert same(whole.head, resumed.head)


def test_a_finished_training_gives_its_log_and_its_best_weights_and_trains_nothing(
    tmp_path: Path,
) -> None:
    path, whole, again = tmp_path / "c", make(), make()
    log = whole.fit_rows(Rows(), held_out=Other(), checkpoint=path)
    losses = [entry.held_out_loss or 0 for entry in log]
    assert min(losses) < losses[-1], "the last weights are not the best"
    assert again.fit_rows(Untouched(), held_out=Untouched(), checkpoint=path) == log
    assert same(whole.head, again.head)


class Normalised(nn.Sequential):
    """With running statistics, and a layer that draws from torch's global generator."""

    def __init__(self) -> None:
        linear = nn.Linear(10, 6)
        super().__init__(nn.BatchNorm1d(10), linear, nn.Dropout(0.2))
        nn.init.ones_(linear.weight)
        nn.init.zeros_(linear.bias)


class Seeding(Rows):
    """Rows that seed torch's global generator, as their protocol says."""

    def order(self, generator: torch.Generator) -> Tensor:
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return super().order(generator)


@pytest.mark.filterwarnings("ignore:head. 2 draws from torch's global generator")
def test_running_statistics_and_layers_of_ones_own_go_on_as_well(tmp_path: Path) -> None:
    whole, resumed = (PseudoLabelTrainer(Normalised(), RECIPE) for _ in range(2))
    whole.fit_rows(Seeding(), held_out=Rows())
    interrupt(PseudoLabelTrainer(Normalised(), RECIPE), tmp_path / "c", Seeding())
    torch.manual_seed(99)
    resumed.fit_rows(Seeding(), held_out=Rows(), checkpoint=tmp_path / "c")
    assert same(whole.head, resumed.head)


class Weighted(LabelCrossEntropy):
    """An objective with a number."""

    def __init__(self, weight: float) -> None:
        self.weight = weight


@pytest.mark.parametrize(
    ("kept", "wanted", "message"),
    [
        ({}, {"seed": 1}, "seed: got 0, wanted 1"),
        ({}, {"recipe": dataclasses.replace(RECIPE, epochs=7)}, "recipe.epochs: got 6, wanted 7"),
        (
            {},
            {"recipe": dataclasses.replace(RECIPE, optimizer="sgd", steps=(0.1,))},
            r"recipe.steps: got \[0.5, 0.75\], wanted \[0.1\]; recipe.optimizer: got 'adamw', ",
        ),
        ({}, {"precision": "bf16"}, "precision: got 'fp32', wanted 'bf16'"),
        ({}, {"objective": PairedRegression(1.0)}, "objective.class: got 'LabelCrossEntropy'"),
        (
            {"objective": Weighted(0.5)},
            {"objective": Weighted(2.0)},
            "objective.weight: got 0.5, wanted 2.0",
        ),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, kept: dict[str, Any], wanted: dict[str, Any], message: str
) -> None:
    interrupt(make(**kept), tmp_path / "c")
    other = make(**wanted)
    before = copy.deepcopy(other.head)
    with pytest.raises(CheckpointError, match=rf"c: no checkpoint of this training \({message}"):
        other.fit_rows(Rows(), held_out=Rows(), checkpoint=tmp_path / "c")
    assert same(other.head, before)
    assert not other.optimizer.state


def test_held_out_rows_belong_to_the_training(tmp_path: Path) -> None:
    interrupt(make(), tmp_path / "c")
    with pytest.raises(CheckpointError, match="held_out: got True, wanted False"):
        make().fit_rows(Rows(), checkpoint=tmp_path / "c")


def test_a_checkpoint_of_another_module_is_refused(tmp_path: Path) -> None:
    interrupt(make(), tmp_path / "c")
    head = FeatureTransferHead(10, 6, 17, output="clusters", dropout=0.5)
    before = copy.deepcopy(head)
    wanted = r"weights.fc1.weight: got torch.float32 \(16, 10\), wanted torch.float32 \(17, 10\)"
    with pytest.raises(CheckpointError, match=wanted):
        PseudoLabelTrainer(head, RECIPE).fit_rows(
            Rows(), held_out=Rows(), checkpoint=tmp_path / "c"
        )
    assert same(head, before)


Edit = Callable[[dict[str, Tensor], dict[str, Any]], object]
DAMAGE: dict[str, tuple[Edit, str]] = {
    "a weight is missing": (
        lambda tensors, said: tensors.pop("weights.fc2.bias"),
        r"weights.fc2.bias: got none, wanted torch.float32 \(6,\)",
    ),
    "a best weight is missing": (
        lambda tensors, said: tensors.pop("best.fc2.bias"),
        "best.fc2.bias: got none",
    ),
    "another dtype": (
        lambda tensors, said: tensors.update({"weights.fc2.bias": torch.zeros(6).double()}),
        r"weights.fc2.bias: got torch.float64 \(6,\), wanted torch.float32 \(6,\)",
    ),
    "part of an optimizer's state": (
        lambda tensors, said: tensors.pop("optimizer.exp_avg.fc2.bias"),
        r"optimizer.exp_avg.fc2.bias: got none, wanted torch.float32 \(6,\)",
    ),
    "another optimizer's state": (
        lambda tensors, said: tensors.update({"optimizer.momentum_buffer.fc2.bias": torch.ones(6)}),
        r"optimizer.momentum_buffer.fc2.bias: got torch.float32 \(6,\), wanted none",
    ),
    "a parameter that is not there": (
        lambda tensors, said: tensors.update({"optimizer.step.fc3.bias": torch.ones(())}),
        r"optimizer.step.fc3.bias: got torch.float32 \(\), wanted none",
    ),
    "no random state": (
        lambda tensors, said: tensors.pop("random.dropout.0"),
        "random.dropout.0: got none, wanted torch.uint8",
    ),
    "a random state of another size": (
        lambda tensors, said: tensors.update({"random.order.0": torch.zeros(4).byte()}),
        r"random.order.0: got torch.uint8 \(4,\), wanted torch.uint8",
    ),
    "a random state of nothing": (
        lambda tensors, said: tensors["random.order.0"].zero_(),
        "mt19937",
    ),
    "an epoch is missing": (
        lambda tensors, said: said["log"].pop(1),
        "log: got EpochLog.epoch=2, .*, wanted the numbers of epoch 1",
    ),
    "a log of text": (
        lambda tensors, said: said["log"][1].update(loss="low"),
        "log: got EpochLog.epoch=1, loss='low'.*, wanted the numbers of epoch 1",
    ),
    "another format": (
        lambda tensors, said: said["settings"].update(format=1),
        "format: got 1, wanted 2",
    ),
    "no log": (lambda tensors, said: said["log"].clear(), "log: got no epoch"),
    "a log with more fields": (
        lambda tensors, said: said["log"][0].update(more=1),
        "unexpected keyword argument 'more'",
    ),
    "no lowest loss": (lambda tensors, said: said.pop("lowest"), "KeyError: 'lowest'"),
    "settings of another form": (
        lambda tensors, said: said.update(settings=3),
        "AttributeError",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused_before_anything_changes(tmp_path: Path, name: str) -> None:
    path, (edit, message) = tmp_path / "c", DAMAGE[name]
    interrupt(make(), path)
    tensors = safetensors.torch.load(path.read_bytes())
    with safetensors.safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["training"])
    edit(tensors, said)
    path.write_bytes(safetensors.torch.save(tensors, {"training": json.dumps(said)}))
    check_refused(path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-9], "SafetensorError"),
        (lambda data: b"", "SafetensorError"),
        (lambda data: safetensors.torch.save({"a": torch.zeros(1)}), "KeyError: '__metadata__'"),
    ],
)
def test_another_file_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    interrupt(make(), tmp_path / "c")
    (tmp_path / "c").write_bytes(change((tmp_path / "c").read_bytes()))
    check_refused(tmp_path / "c", message)


def check_refused(path: Path, message: str) -> None:
    """That a training refuses it and is as it was."""
    trainer, data = make(), path.read_bytes()
    before = copy.deepcopy(trainer.head)
    with pytest.raises(CheckpointError, match=rf"{message}[\s\S]*delete it to start anew"):
        trainer.fit_rows(Untouched(), held_out=Untouched(), checkpoint=path)
    assert same(trainer.head, before)
    assert not trainer.optimizer.state
    assert path.read_bytes() == data
