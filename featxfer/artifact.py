"""A trained head on disk: `head.safetensors` and `card.json`, no pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from featxfer._files import write_together
from featxfer.degrade import Degradation
from featxfer.head import FeatureTransferHead

FORMAT = 1
WEIGHTS, CARD = "head.safetensors", "card.json"
_CARD_LIMIT = 1 << 20


class ArtifactError(ValueError):
    """A saved head that cannot be used; the message says which file and what is wrong with it."""


@dataclass(frozen=True)
class Card:
    """What a head was made of and for.

    Args:
        backbone: the backbone's name.
        backbone_sha256: hash of its weights (`featxfer.backbone.weights_sha256`).
        degradation: how the LR images were made that it was trained on.
        details: the rest, as JSON types: recipe, seeds, diagnostics, data, measured figures.
    """

    backbone: str
    backbone_sha256: str
    degradation: Degradation
    details: Mapping[str, Any] = field(default_factory=dict)


def save_head(head: FeatureTransferHead, folder: str | Path, card: Card) -> Path:
    """Writes the head and its card into `folder` (made if need be), and returns it.

    The card holds the hash of the weights' file, so a mixed pair is found on loading. Raises
    `DiskError` where the disk refuses (an older head is then as it was), and `TypeError` for a
    card that is not JSON.
    """
    folder = Path(folder)
    weights = safetensors.torch.save({k: v.contiguous() for k, v in head.state_dict().items()})
    description = {
        "format": FORMAT,
        "head": head.config,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        **dataclasses.asdict(card),
        "degradation": card.degradation.to_dict(),
    }
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    write_together({folder / WEIGHTS: weights, folder / CARD: text.encode()})
    return folder


def load_head(
    folder: str | Path, *, in_features: int | None = None, backbone_sha256: str | None = None
) -> tuple[FeatureTransferHead, Card]:
    """Reads a head and its card, on the CPU, in eval mode.

    Args:
        folder: what `save_head` wrote.
        in_features: the width that the head must take, if given.
        backbone_sha256: the weights' hash that the head must be made for, if given.

    Raises:
        FileNotFoundError: no such folder or files.
        ArtifactError: damaged files, another format, a head for another width or backbone.
    """
    folder = Path(folder)
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"head: no {name} in {folder}")
    description = _read_card(folder / CARD)
    tensors = _read_weights(folder / WEIGHTS, description.get("weights_sha256"))
    try:
        config = description["head"]
        card = Card(
            str(description["backbone"]),
            str(description["backbone_sha256"]),
            Degradation.from_dict(description["degradation"]),
            dict(description["details"]),
        )
        _check_shapes(config, tensors)
        head = FeatureTransferHead(**config)
        head.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{folder}: {type(error).__name__}: {error}") from error
    if in_features not in (None, config["in_features"]):
        raise ArtifactError(
            f"{folder}: head for features of width {config['in_features']}, wanted {in_features}"
        )
    if backbone_sha256 not in (None, card.backbone_sha256):
        raise ArtifactError(
            f"{folder}: head for backbone {card.backbone} with weights "
            f"{card.backbone_sha256[:12]}, wanted weights {str(backbone_sha256)[:12]}"
        )
    return head.eval(), card


def _read_card(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _CARD_LIMIT:
        raise ArtifactError(f"{path}: over {_CARD_LIMIT} bytes, this is no card")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not a head's card of format {FORMAT}")
    return description


def _read_weights(path: Path, sha256: object) -> dict[str, Tensor]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactError(f"{path}: its {len(data)} bytes are not those that {CARD} names")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{path}: tensor {name} has NaN or infinity")
    return tensors


def _check_shapes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Sizes are believed only as far as the tensors bear them out, before memory is taken."""
    wanted = {
        "fc1.weight": (config["hidden_features"], config["in_features"]),
        "fc2.weight": (config["out_features"], config["hidden_features"]),
    }
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"tensor {name} is {tuple(tensors[name].shape)}, the card says {shape}"
            )
