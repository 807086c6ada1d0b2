"""Checkpoints of a training: written whole, and checked whole before anything is taken from one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from featxfer.files import write_atomic


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or of another training; nothing has been changed."""


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


@dataclass(frozen=True)
class Checkpoint:
    """A training after an epoch.

    Args:
        settings: what it hangs on besides the rows, as JSON types; of dicts each entry is compared.
        log: an entry an epoch.
        lowest: the lowest held-out loss; infinity where there are no held-out rows.
        tensors: by name.
    """

    settings: Mapping[str, Any]
    log: Sequence[EpochLog]
    lowest: float
    tensors: Mapping[str, Tensor]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint; raises `DiskError` as `write_atomic`."""
    said = {
        "settings": checkpoint.settings,
        "log": [dataclasses.asdict(entry) for entry in checkpoint.log],
        "lowest": checkpoint.lowest,
    }
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in checkpoint.tensors.items()
    }
    write_atomic(path, safetensors.torch.save(tensors, {"training": json.dumps(said)}))


def read_checkpoint(
    path: Path,
    settings: Mapping[str, Any],
    required: Mapping[str, Tensor],
    optional: Sequence[Mapping[str, Tensor]],
) -> Checkpoint:
    """Reads a checkpoint of one's own training.

    Args:
        path: that `write_checkpoint` wrote.
        settings: that it has to have.
        required: tensors as those that it has to have: names, shapes and dtypes.
        optional: groups of tensors, each of which it has as a whole or not at all.

    Raises:
        CheckpointError: it is damaged, or of other settings or tensors, which are named.
    """
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        said = json.loads(header["__metadata__"]["training"])
        _check_settings(said["settings"], settings)
        log = [EpochLog(**entry) for entry in said["log"]]
        _check_log(log)
        lowest = float(said["lowest"])
        _check_tensors(tensors, required, optional)
    except (
        safetensors.SafetensorError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, CheckpointError):
            why = str(error)
        raise CheckpointError(
            f"{path}: no checkpoint of this training ({why}); delete it to start anew"
        ) from error
    return Checkpoint(settings, log, lowest, tensors)


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
