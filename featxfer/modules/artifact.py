"""A trained head or block on disk: `head.safetensors`, `card.json` and a README, no pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from featxfer.files import write_together
from featxfer.modules.base import Card, TransferModule
from featxfer.views.degradation import BaseDegradation

FORMAT = 3
WEIGHTS, CARD, README = "head.safetensors", "card.json", "README.md"
_BUFFER_DTYPES = {torch.float32, torch.float64}
_CARD_LIMIT = 1 << 20
_HEADER_LIMIT = 1 << 16


class ArtifactError(ValueError):
    """A saved head that cannot be used; the message says which file and what is wrong with it."""


def save_head(head: TransferModule, folder: str | Path, card: Card) -> Path:
    """Writes a head or a block and its card into `folder` (made if need be), and returns it.

    The card holds the hash of the weights' file, so a mixed pair is found on loading; the README
    is the card for readers. Raises `DiskError` where the disk refuses (an older head is then as it
    was), `TypeError` for a card that is not JSON and `ValueError` for weights with NaN or infinity.
    """
    folder = Path(folder)
    state = {name: value.detach().contiguous() for name, value in head.state_dict().items()}
    _check_finite(state, "head")
    weights = safetensors.torch.save(state)
    description = {
        "format": FORMAT,
        "kind": head.kind,
        "head": head.config,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        **dataclasses.asdict(card),
        "degradations": [degradation.to_dict() for degradation in card.degradations],
    }
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    readme = card_readme(head.kind, head.config, card)
    write_together(
        {
            folder / WEIGHTS: weights,
            folder / CARD: text.encode(),
            folder / README: readme.encode(),
        }
    )
    return folder


def load_head(
    folder: str | Path, *, in_features: int | None = None, backbone_sha256: str | None = None
) -> tuple[TransferModule, Card]:
    """Reads a head or a block and its card (kept in `card` as well), on the CPU, in eval mode.

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
    try:
        # of no memory, so that a card may claim any size
        with torch.device("meta"):
            head = TransferModule.KINDS[description["kind"]](**description["head"])
        tensors = _read_weights(folder / WEIGHTS, description.get("weights_sha256"), head)
        _fill(head, tensors)
        head.card = Card(
            str(description["backbone"]),
            str(description["backbone_sha256"]),
            tuple(BaseDegradation.from_dict(fields) for fields in description["degradations"]),
            dict(description["details"]),
        )
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{folder}: {type(error).__name__}: {error}") from error
    check_fit(head, head.card, folder, in_features=in_features, backbone_sha256=backbone_sha256)
    return head.eval(), head.card


def check_fit(
    head: TransferModule,
    card: Card | None,
    source: object,
    *,
    in_features: int | None = None,
    backbone_sha256: str | None = None,
) -> None:
    """Raises `ArtifactError` for a head of another width or for another backbone's weights."""
    if in_features not in (None, head.in_features):
        raise ArtifactError(
            f"{source}: {head.kind} for features of width {head.in_features}, wanted {in_features}"
        )
    if card is not None and backbone_sha256 not in (None, card.backbone_sha256):
        raise ArtifactError(
            f"{source}: {head.kind} for backbone {card.backbone} with weights "
            f"{card.backbone_sha256[:12]}, wanted weights {str(backbone_sha256)[:12]}"
        )


def card_readme(kind: str, config: Mapping[str, Any], card: Card) -> str:
    """The card as a README with the front matter that the model hub reads."""
    place = "".join(
        f', {name}="{card.details[name]}"' for name in ("site", "branch") if name in card.details
    )
    lines = [
        "---",
        "library_name: featxfer",
        "tags: [featxfer, feature-transfer, low-resolution, unsupervised]",
        "---",
        "",
        f"# A feature transfer {kind} for {card.backbone}",
        "",
        "For low-resolution images on a frozen backbone, trained without labels by featxfer, after",
        "[Wu, Zhang and Wang 2019](https://arxiv.org/abs/1908.10012).",
        "",
        "```python",
        "from featxfer_integrations import attach_transfer",
        "",
        f"model = attach_transfer(model, head=PATH_OR_HUB_ID{place})",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| backbone | {card.backbone} |",
        f"| its weights' SHA-256 | `{card.backbone_sha256}` |",
        *(f"| degradation | `{d.to_json()}` |" for d in card.degradations),
        *(f"| {name} | `{value}` |" for name, value in config.items()),
        *(f"| {name} | `{value}` |" for name, value in _flat(card.details)),
    ]
    return "\n".join(lines) + "\n"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Scalars of nested mappings by dotted name; long lists are left to the JSON."""
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list | tuple) or len(value) <= 8:
            flat.append((f"{prefix}{name}", value))
    return flat


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


def _read_weights(path: Path, sha256: object, module: TransferModule) -> dict[str, Tensor]:
    """The tensors of a file that is no larger than those of the module can be."""
    most = _HEADER_LIMIT + 8 * sum(value.numel() for value in module.state_dict().values())
    if path.stat().st_size > most:
        raise ArtifactError(f"{path}: over {most} bytes, which the card's head cannot have")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactError(f"{path}: its {len(data)} bytes are not those that {CARD} names")
    if int.from_bytes(data[:8], "little") > _HEADER_LIMIT:
        raise ArtifactError(f"{path}: a header of over {_HEADER_LIMIT} bytes, this is no head")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    try:
        _check_finite(tensors, str(path))
    except ValueError as error:
        raise ArtifactError(str(error)) from error
    return tensors


def _check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: tensor {name} has NaN or infinity")


def _fill(module: TransferModule, tensors: Mapping[str, Tensor]) -> None:
    """Gives a module without memory its tensors; `ValueError` says all that does not fit."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    faults = [
        f"{kind} {name}"
        for kind, names in (
            ("missing tensor", wanted.keys() - got.keys()),
            ("unexpected tensor", got.keys() - wanted.keys()),
        )
        for name in sorted(names)
    ]
    faults += [
        f"tensor {name} is {got[name]}, the card says {wanted[name]}"
        for name in wanted
        if name in got and got[name] != wanted[name]
    ]
    buffers = {name for name, _ in module.named_buffers()}
    dtypes = {value.dtype for name, value in tensors.items() if name not in buffers}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        faults.append("weights of several dtypes, or of one that is no floating point")
    if not {tensors[name].dtype for name in buffers & tensors.keys()} <= _BUFFER_DTYPES:
        faults.append("statistics or centroids that are neither float32 nor float64")
    if faults:
        raise ValueError("; ".join(faults))
    module.load_state_dict(dict(tensors), assign=True)
