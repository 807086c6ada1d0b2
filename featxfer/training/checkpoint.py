"""Checkpoints of a training: written whole, and checked whole before anything is taken from one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from featxfer.files import write_atomic
from featxfer.training.objectives import Objective
from featxfer.training.processes import Processes
from featxfer.training.recipe import Recipe
from featxfer.training.state import EpochLog, TrainingState

FORMAT = 2
"""Of the file; one of another format is refused."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or of another training; nothing has been changed."""


def settings_of(
    recipe: Recipe, seed: int, precision: str, objective: Objective, held_out: bool, processes: int
) -> dict[str, Any]:
    """What training hangs on besides the rows, as JSON types, as far as it can be told."""
    told = getattr(objective, "__dict__", {}).items()
    numbers = {name: value for name, value in told if isinstance(value, str | int | float)}
    settings = {
        "recipe": recipe.to_dict(),
        "seed": seed,
        "precision": precision,
        "objective": {"class": type(objective).__qualname__, **numbers},
        "held_out": held_out,
        "processes": processes,
    }
    as_json: dict[str, Any] = json.loads(json.dumps(settings, default=float))
    return as_json


def keep(
    path: Path, settings: Mapping[str, Any], state: TrainingState, processes: Processes
) -> None:
    """Writes a training after an epoch; of several processes the first one does, for all.

    Raises `DiskError` as `write_atomic`.
    """
    tensors = {f"weights.{name}": value for name, value in state.weights().items()}
    tensors |= {f"best.{name}": value for name, value in state.best.items()}
    for name, p in state.parameters.items():
        for part, value in state.optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{part}.{name}"] = value
    for kind, generator in state.generators.items():
        for rank, random in enumerate(processes.gather(generator.get_state())):
            tensors[f"random.{kind}.{rank}"] = random
    said = {
        "settings": {"format": FORMAT, **settings},
        "log": [dataclasses.asdict(entry) for entry in state.log],
        "lowest": state.lowest,
    }
    with processes.together():
        if processes.rank == 0:
            own = {n: v.detach().to("cpu", copy=True).contiguous() for n, v in tensors.items()}
            write_atomic(path, safetensors.torch.save(own, {"training": json.dumps(said)}))


def resume(
    path: Path, settings: Mapping[str, Any], state: TrainingState, processes: Processes
) -> None:
    """Takes weights, optimizer, randomness and log as after the checkpoint's last epoch.

    Raises `CheckpointError`, in all processes, for one that is damaged, or of other settings or
    tensors, which are named; nothing has been changed then.
    """
    own = state.weights()
    required = {f"weights.{name}": value for name, value in own.items()}
    if settings["held_out"]:
        required |= {f"best.{name}": value for name, value in own.items()}
    for kind, generator in state.generators.items():
        for rank in range(processes.size):
            required[f"random.{kind}.{rank}"] = generator.get_state()
    kept = {name: state.recipe.optimizer_state(p) for name, p in state.parameters.items()}
    moved = [{f"optimizer.{part}.{n}": v for part, v in parts.items()} for n, parts in kept.items()]
    with processes.together():
        log, lowest, tensors = _read(path, settings, required, moved)
        try:
            for kind, generator in state.generators.items():
                generator.set_state(tensors[f"random.{kind}.{processes.rank}"])
        except RuntimeError as error:
            raise _no_checkpoint(path, str(error)) from error
    state.optimizer.state.clear()
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "best":
            state.best[name] = value
        elif kind == "optimizer":
            part, _, name = name.partition(".")
            p = state.parameters[name]
            state.optimizer.state[p][part] = value.to(p.device)
    state.restore({name: tensors[f"weights.{name}"] for name in own})
    state.log.extend(log)
    state.lowest = lowest


def _read(
    path: Path,
    settings: Mapping[str, Any],
    required: Mapping[str, Tensor],
    optional: Sequence[Mapping[str, Tensor]],
) -> tuple[list[EpochLog], float, dict[str, Tensor]]:
    """Log, lowest loss and tensors: all `required`, of each of the `optional` groups all or none.

    Of both names, shapes and dtypes are compared.
    """
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        said = json.loads(header["__metadata__"]["training"])
        _check_settings(said["settings"], {"format": FORMAT, **settings})
        log = [EpochLog(**entry) for entry in said["log"]]
        _check_log(log)
        lowest = float(said["lowest"])
        _check_tensors(tensors, required, optional)
    except CheckpointError as error:
        raise _no_checkpoint(path, str(error)) from error
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise _no_checkpoint(path, f"{type(error).__name__}: {error}") from error
    return log, lowest, tensors


def _no_checkpoint(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: no checkpoint of this training ({why}); delete it to start anew"
    )


def _check_settings(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    first, second = _flat(got), _flat(wanted)
    others = [
        f"{name}: got {first.get(name)!r}, wanted {second.get(name)!r}"
        for name in dict.fromkeys([*second, *first])
        if first.get(name) != second.get(name)
    ]
    if others:
        raise CheckpointError("; ".join(others))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        entries = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{entry}".rstrip("."): part for entry, part in entries.items()}
    return flat


def _check_log(log: Sequence[EpochLog]) -> None:
    for index, entry in enumerate(log):
        *numbers, held_out = dataclasses.astuple(entry)
        if held_out is not None:
            numbers.append(held_out)
        if entry.epoch != index or not all(isinstance(part, int | float) for part in numbers):
            raise CheckpointError(f"log: got {entry}, wanted the numbers of epoch {index}")
    if not log:
        raise CheckpointError("log: got no epoch, wanted at least one")


def _check_tensors(
    tensors: Mapping[str, Tensor],
    required: Mapping[str, Tensor],
    optional: Sequence[Mapping[str, Tensor]],
) -> None:
    wanted = dict(required)
    for group in optional:
        if any(name in tensors for name in group):
            wanted |= group
    for name in dict.fromkeys([*wanted, *tensors]):
        got, like = (_kind(part.get(name)) for part in (tensors, wanted))
        if got != like:
            raise CheckpointError(f"{name}: got {got}, wanted {like}")


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
