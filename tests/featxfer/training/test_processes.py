"""One training in several processes, as `DistributedDataParallel` has it: gloo on the CPU."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from featxfer import EpochLog, FeatureTransferHead, PseudoLabelTrainer, Recipe

WORLD = 3
GENERATOR = torch.Generator().manual_seed(3)
ROWS = torch.randn(36 + 13, 6, generator=GENERATOR)
NOISE = torch.randn(len(ROWS), 4, generator=GENERATOR)
LABELS = (ROWS @ torch.randn(6, 4, generator=GENERATOR) + 2 * NOISE).argmax(1)
RECIPE = Recipe(epochs=30, batch_size=12, learning_rate=0.1, steps=(), patience=3)
"""Labels are noisy, so the held-out loss falls and soon rises."""


@dataclasses.dataclass(frozen=True)
class InOrder:
    """Rows as they are; of several processes each takes its share of every batch."""

    inputs: Tensor
    targets: Tensor

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.arange(len(self.inputs))

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[indices], self.targets[indices]


def share(part: slice, rank: int, size: int) -> InOrder:
    return InOrder(ROWS[part][rank::size].clone(), LABELS[part][rank::size])


def new_head(rank: int = 0, dropout: float = 0.0) -> FeatureTransferHead:
    return FeatureTransferHead(6, 4, 16, output="clusters", dropout=dropout, seed=rank)


class Member:
    """One process of a group: runs trainings and keeps what came of them."""

    def __init__(self, rank: int, size: int, group: Any, folder: Path) -> None:
        self.rank, self.size, self.group, self.folder = rank, size, group, folder
        self.said: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}

    def trainer(self, head: nn.Module, **changes: Any) -> PseudoLabelTrainer:
        batch = RECIPE.batch_size // self.size
        recipe = dataclasses.replace(RECIPE, **{"batch_size": batch, **changes})
        if self.group is not None:
            head = DistributedDataParallel(head, process_group=self.group)
        return PseudoLabelTrainer(head, recipe)

    def train(
        self, name: str, trainer: PseudoLabelTrainer, rows: Any = None, **options: Any
    ) -> None:
        """Keeps the log and the weights, or the error."""
        rows = rows or share(slice(36), self.rank, self.size)
        try:
            log = trainer.fit_rows(rows, **options)
        except Exception as error:
            self.said[name] = f"{type(error).__name__}: {error}"
        else:
            self.said[name] = [[entry.loss, entry.held_out_loss] for entry in log]
        state = trainer.module.state_dict()
        self.weights |= {f"{name}.{key}": value.clone() for key, value in state.items()}

    def judged(self) -> None:
        held_out = share(slice(36, None), self.rank, self.size)
        self.train("judged", self.trainer(new_head(self.rank)), held_out=held_out)

    def bad(self) -> None:
        """What is wrong in one process alone."""
        last = self.rank == self.size - 1
        plain = {"patience": 0, "epochs": 2}
        fewer = share(slice(36 - 12 * last), self.rank, self.size)
        self.train("unequal", self.trainer(new_head(), **plain), fewer)
        broken = share(slice(36), self.rank, self.size)
        if last:
            broken.inputs[-1] = torch.nan
        self.train("diverged", self.trainer(new_head(), **plain), broken)
        self.train("recipe", self.trainer(new_head(), **(plain | {"epochs": 2 + last})))

        def stop(log: EpochLog) -> None:
            if last:
                raise LookupError("enough")

        self.train("callback", self.trainer(new_head(), **plain), callback=stop)
        self.train("labels", self.trainer(new_head(), **plain), held_out=Unreadable(last))

    def checkpoints(self) -> None:
        path, seeds = self.folder / "checkpoint", []
        plain = {"patience": 0, "epochs": 5}

        def stop(log: EpochLog) -> None:
            if log.epoch == 2:
                raise LookupError("enough")

        def make() -> PseudoLabelTrainer:
            return self.trainer(new_head(dropout=0.5), **plain)

        whole = make()

        def look(log: EpochLog) -> None:
            head: Any = whole.module
            seeds.append(head.generator.initial_seed())

        self.train("whole", whole, callback=look)
        self.said["seeds"] = seeds
        self.train("stopped", make(), checkpoint=path, callback=stop)
        self.train("resumed", make(), checkpoint=path)
        self.train("finished", make(), checkpoint=path)
        if self.rank == 0:
            alone = Member(0, 1, None, self.folder)
            alone.train("alone", alone.trainer(new_head(dropout=0.5), **plain), checkpoint=path)
            self.said["alone"] = alone.said["alone"]

    def statistics(self) -> None:
        module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
        self.train("statistics", self.trainer(module, patience=0, epochs=2))


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Held-out rows that one process cannot read."""

    broken: bool

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.arange(4)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if self.broken:
            raise OSError("cannot be read")
        return ROWS[indices], LABELS[indices]


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=30)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=limit
    )
    groups = [dist.new_group(list(range(size)), timeout=limit) for size in range(1, WORLD + 1)]
    if rank == 0:
        alone = Member(0, 1, None, folder)
        alone.judged()
        save(alone, folder / "ordinary")
    for size, group in enumerate(groups, start=1):
        if rank < size:
            member = Member(rank, size, group, folder)
            parts: list[Callable[[], None]] = [member.judged]
            if size == 2:
                parts += [member.bad, member.checkpoints, member.statistics]
            for part in parts:
                part()
            save(member, folder / f"{size}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def save(member: Member, path: Path) -> None:
    path.with_name(path.name + ".json").write_text(json.dumps(member.said))
    safetensors.torch.save_file(member.weights, path.with_name(path.name + ".safetensors"))


Found = dict[str, tuple[dict[str, Any], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each process said and its weights, by "size.rank"; and those of no group at all."""
    folder = tmp_path_factory.mktemp("processes")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=run, args=(rank, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(150)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * WORLD
    return {
        path.stem: (
            json.loads(path.read_text()),
            safetensors.torch.load_file(path.with_suffix(".safetensors")),
        )
        for path in folder.glob("*.json")
    }


def part(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {
        key.partition(".")[2]: value
        for key, value in weights.items()
        if key.partition(".")[0] == name
    }


def test_one_two_and_three_processes_judge_stop_and_keep_as_one_does(found: Found) -> None:
    alone = Member(0, 1, None, Path())
    alone.judged()
    log, weights = alone.said["judged"], part(alone.weights, "judged")
    assert 3 < len(log) < RECIPE.epochs, "patience ended it"
    for size in (1, 2, 3):
        first = part(found[f"{size}.0"][1], "judged")
        for rank in range(size):
            said, own = found[f"{size}.{rank}"]
            assert said["judged"] == found[f"{size}.0"][0]["judged"]
            torch.testing.assert_close(torch.tensor(said["judged"]), torch.tensor(log))
            assert all(value.equal(first[key]) for key, value in part(own, "judged").items())
        for key, value in first.items():
            torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-5)
    assert not weights["fc1.weight"].equal(new_head().fc1.weight)


def test_a_head_that_is_not_distributed_waits_for_no_process(found: Found) -> None:
    """The first of three trained it while the others were elsewhere."""
    assert found["ordinary"][0] == found["1.0"][0]


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("unequal", ["ValueError: rows: got [18, 12] rows in 2 processes, wanted some"] * 2),
        ("diverged", ["DivergenceError: loss or weights are not finite at epoch 0, step 2"] * 2),
        ("recipe", ["ValueError: recipe, seed, precision, objective, held_out: got others"] * 2),
        ("callback", ["RuntimeError: training has ended in all", "LookupError: enough"]),
        ("labels", ["RuntimeError: training has ended in all", "OSError: cannot be read"]),
    ],
)
def test_what_is_wrong_in_one_process_ends_all(
    found: Found, name: str, messages: list[str]
) -> None:
    for rank, message in enumerate(messages):
        said, weights = found[f"2.{rank}"]
        assert str(said[name]).startswith(message), said[name]
        unchanged = part(weights, name)["fc1.weight"].equal(new_head().fc1.weight)
        assert unchanged == (name != "callback")


def test_processes_go_on_from_one_checkpoint_to_the_same_weights(found: Found) -> None:
    for rank in (0, 1):
        said, weights = found[f"2.{rank}"]
        assert said["stopped"] == "LookupError: enough"
        assert len(said["whole"]) == 5
        assert said["whole"] == said["resumed"] == said["finished"]
        whole = part(weights, "whole")
        for name in ("resumed", "finished"):
            assert all(value.equal(whole[key]) for key, value in part(weights, name).items())
        assert all(value.equal(whole[key]) for key, value in part(found["2.0"][1], "whole").items())
    assert "CheckpointError" in found["2.0"][0]["alone"]
    assert "processes: got 2, wanted 1" in found["2.0"][0]["alone"]


def test_each_process_drops_what_the_others_keep(found: Found) -> None:
    assert found["2.0"][0]["seeds"] != found["2.1"][0]["seeds"]


def test_running_statistics_are_the_same_in_all_processes(found: Found) -> None:
    first, second = (part(found[f"2.{rank}"][1], "statistics") for rank in (0, 1))
    assert "1.running_mean" in first
    assert all(value.equal(second[key]) for key, value in first.items())
    assert first["1.running_mean"].any()


def test_a_distributed_module_inside_another_is_refused(tmp_path: Path) -> None:
    rendezvous = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        module = nn.Sequential(DistributedDataParallel(new_head()))
        with pytest.raises(ValueError, match="head: got a DistributedDataParallel inside it"):
            PseudoLabelTrainer(module)
    finally:
        dist.destroy_process_group()
