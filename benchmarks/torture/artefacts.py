"""Malformed heads: each is one typed error, soon, without memory for what a file claims."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from benchmarks.common.memory import forget_peak, memory_mib
from benchmarks.torture.outcome import Outcome
from featxfer import ArtifactError, Card, Degradation, FeatureTransferHead, load_head, save_head
from featxfer.modules.artifact import CARD, WEIGHTS

MOST_SECONDS = 1.0
MOST_MIB = 64.0

Files = dict[str, bytes]
"""What is in the folder of a head."""


def _with_weights(files: Files, weights: bytes) -> Files:
    """Other weights, and a card that vouches for them."""
    card = {**json.loads(files[CARD]), "weights_sha256": hashlib.sha256(weights).hexdigest()}
    return {CARD: json.dumps(card).encode(), WEIGHTS: weights}


def _tensor_file(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _headers(weights: bytes) -> Iterator[tuple[str, bytes]]:
    """Safetensors files by hand."""
    size = int.from_bytes(weights[:8], "little")
    header, data = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    plain = json.dumps(header).encode()
    for length in (0, len(plain) - 1, len(plain) + 1, 2**31, 2**64 - 1):
        yield f"a header of {length} bytes", _tensor_file(plain, data, length)
    for text in (b"", b"[]", b"\xff" * 40, b"[" * 100_000, b'{"a":' * 50_000):
        yield f"the header {text[:8]!r}", _tensor_file(text, data)
    name = "fc1.weight"
    begin, end = header[name]["data_offsets"]
    changes: list[dict[str, Any]] = [
        *(
            {"shape": shape}
            for shape in ([-8, -6], [2**32] * 2, ["8"], [8.0, 6.0], None, [1] * 9999)
        ),
        *({"data_offsets": offsets} for offsets in ([end, begin], [begin, 2**62], [-8, end], [0])),
        *({"dtype": dtype} for dtype in ("F7", 3, None, "BOOL", "I64", "F64", "C64", "F8_E4M3")),
    ]
    for change in changes:
        made = {**header, name: {**header[name], **change}}
        yield f"{name} with {str(change)[:40]}", _tensor_file(json.dumps(made).encode(), data)
    odd: tuple[Any, ...] = ([], {"a": 1}, "text", {"a": "b" * 1_000_000})
    for metadata in odd:
        made = {**header, "__metadata__": metadata}
        yield f"metadata {str(metadata)[:20]}", _tensor_file(json.dumps(made).encode(), data)
    many = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
    yield "a hundred thousand tensors", _tensor_file(json.dumps(many).encode(), b"")
    yield "every tensor twice", _tensor_file(plain[:-1] + b"," + plain[1:], data)
    yield "bytes behind", _tensor_file(plain, data + bytes(8))


def _tensors(head: FeatureTransferHead) -> Iterator[tuple[str, bytes]]:
    """Whole files of other tensors."""
    state = {name: value.contiguous() for name, value in head.state_dict().items()}
    for name, value in state.items():
        others: dict[str, dict[str, torch.Tensor]] = {
            f"{name} is missing": {k: v for k, v in state.items() if k != name},
            f"{name} has NaN": {**state, name: torch.full_like(value, float("nan"))},
            f"{name} has infinity": {**state, name: torch.full_like(value, float("inf"))},
            f"{name} is longer": {**state, name: torch.zeros(*value.shape, 2)},
            f"{name} is a number": {**state, name: torch.zeros(())},
            f"{name} is of integers": {**state, name: value.to(torch.int64)},
            f"{name} is half": {**state, name: value.half()},
            f"{name} is there as {name}2": {**state, f"{name}2": value.clone()},
        }
        for said, tensors in others.items():
            yield said, safetensors.torch.save(tensors)


HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, -0.5, "", "6", "x" * 100_000, [], [[]], {},
    {"a": {}}, [1] * 10_000, "../../etc", "__class__", "\ud800",
)  # fmt: skip
"""In the place of every value of a card."""


def _cards(files: Files) -> Iterator[tuple[str, bytes]]:
    """Cards of hostile JSON; some change nothing that matters, and load."""
    card = json.loads(files[CARD])
    for name in card:
        yield (
            f"a card without {name}",
            json.dumps({k: v for k, v in card.items() if k != name}).encode(),
        )
        for value in HOSTILE:
            yield f"{name} {str(value)[:12]}", json.dumps({**card, name: value}).encode()
    for name in card["head"]:
        for value in HOSTILE:
            changed = {**card, "head": {**card["head"], name: value}}
            yield f"head.{name} {str(value)[:12]}", json.dumps(changed).encode()
    for name in card["degradations"][0]:
        for value in HOSTILE:
            changed = {**card, "degradations": [{**card["degradations"][0], name: value}]}
            yield f"degradations.{name} {str(value)[:12]}", json.dumps(changed).encode()
    for text in ('{"format": NaN}', "[" * 100_000, '{"a":' * 100_000, "\ufeff{}", "\x00" * 1000):
        yield f"JSON: {text[:8]!r}", text.encode()
    yield "JSON: over a megabyte", files[CARD][:-2] + b" " * 2**21 + b"}"


def malformed(seed: int, flips: int, every: int = 1) -> Iterator[tuple[str, Files, bool]]:
    """Names, files, and whether they must be refused."""
    head = FeatureTransferHead(6, 4, 8, output="clusters", seed=1)
    with torch.no_grad():
        for value in head.state_dict().values():
            value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(2)))
    card = Card("tiny", "ab" * 32, (Degradation(lr_size=16),), {"seed": 3, "log": [1.5]})
    with tempfile.TemporaryDirectory() as folder:
        save_head(head, folder, card)
        files = {name: (Path(folder) / name).read_bytes() for name in (CARD, WEIGHTS)}
    yield "as it was saved", files, False
    weights, rng = files[WEIGHTS], np.random.default_rng(seed)
    for cut in range(0, len(weights), every):
        yield f"cut at byte {cut}", {**files, WEIGHTS: weights[:cut]}, True
        yield f"cut at byte {cut}, vouched for", _with_weights(files, weights[:cut]), True
    for bit in rng.integers(8 * len(weights), size=flips).tolist():
        flipped = bytearray(weights)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} flipped", {**files, WEIGHTS: bytes(flipped)}, True
        yield f"bit {bit} flipped, vouched for", _with_weights(files, bytes(flipped)), False
    for bit in rng.integers(8 * len(files[CARD]), size=flips).tolist():
        flipped = bytearray(files[CARD])
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit} of the card flipped", {**files, CARD: bytes(flipped)}, False
    for said, made in _headers(weights):
        yield said, _with_weights(files, made), False
    for said, made in _tensors(head):
        yield said, _with_weights(files, made), not said.startswith("every")
    for said, made in _cards(files):
        yield said, {**files, CARD: made}, False


def run_artefacts(folder: Path, seed: int, flips: int = 200, every: int = 1) -> Outcome:
    """Loads every malformed head; of cut ones, one in `every`. Linux alone tells of memory."""
    folder.mkdir(parents=True)
    cases, refused, slowest, most, faults = 0, 0, 0.0, 0.0, []
    for said, files, must_fail in malformed(seed, flips, every):
        for name, data in files.items():
            (folder / name).write_bytes(data)
        cases += 1
        forget_peak()
        before, begin = memory_mib("VmRSS"), time.perf_counter()
        try:
            module, _ = load_head(folder)
        except ArtifactError:
            refused += 1
        except Exception as error:  # what this looks for
            faults.append(f"{said}: {type(error).__name__}: {error}"[:300])
        else:
            finite = all(bool(torch.isfinite(v).all()) for v in module.state_dict().values())
            if must_fail or not finite:
                faults.append(f"{said}: loaded")
        seconds, grown = time.perf_counter() - begin, memory_mib("VmHWM") - before
        slowest, most = max(slowest, seconds), max(most, grown)
        if seconds > MOST_SECONDS or grown > MOST_MIB:
            faults.append(f"{said}: {seconds:.1f} s, {grown:.0f} MiB")
    figures = {"refused": refused, "slowest, s": slowest, "most memory, MiB": most}
    return Outcome(cases, faults, figures)
