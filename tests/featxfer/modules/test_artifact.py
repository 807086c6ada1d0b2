from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from featxfer import ArtifactError, Card, Degradation, FeatureTransferHead, load_head, save_head
from featxfer.files import DiskError

CARD = Card("tiny", "ab" * 32, (Degradation(lr_size=16),), {"seed": 3, "log": [1.5]})


@pytest.fixture
def head() -> FeatureTransferHead:
    head = FeatureTransferHead(6, 4, 8, output="clusters", activation="gelu", seed=1)
    head.set_input_statistics(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    return head


def rewrite_card(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "card.json"
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))


def rewrite_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A weights file with a card that vouches for it."""
    import hashlib

    data = safetensors.torch.save(tensors)
    (folder / "head.safetensors").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    rewrite_card(folder, lambda card: card.update(weights_sha256=digest))


def test_round_trip(head: FeatureTransferHead, tmp_path: Path) -> None:
    save_head(head, tmp_path / "new" / "head", CARD)
    loaded, card = load_head(
        tmp_path / "new" / "head", in_features=6, backbone_sha256=CARD.backbone_sha256
    )
    assert card == CARD
    assert loaded.config == head.config
    assert not loaded.training
    for name, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_only_safetensors_and_json_are_written(head: FeatureTransferHead, tmp_path: Path) -> None:
    save_head(head, tmp_path, CARD)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "card.json",
        "head.safetensors",
    ]
    assert set(safetensors.torch.load_file(tmp_path / "head.safetensors")) == set(head.state_dict())
    assert json.loads((tmp_path / "card.json").read_text())["degradations"][0]["lr_size"] == 16


def test_another_width_or_backbone_is_refused(head: FeatureTransferHead, tmp_path: Path) -> None:
    save_head(head, tmp_path, CARD)
    with pytest.raises(ArtifactError, match="head for features of width 6, wanted 2048"):
        load_head(tmp_path, in_features=2048)
    with pytest.raises(
        ArtifactError, match=r"for backbone tiny with weights abab\w+, wanted weights cdcd"
    ):
        load_head(tmp_path, backbone_sha256="cd" * 32)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"head: no card\.json in .*nowhere"):
        load_head(tmp_path / "nowhere")


def test_every_truncation_and_flip_is_one_error(head: FeatureTransferHead, tmp_path: Path) -> None:
    save_head(head, tmp_path, CARD)
    path = tmp_path / "head.safetensors"
    data = path.read_bytes()
    for cut in range(0, len(data), 37):
        path.write_bytes(data[:cut])
        with pytest.raises(ArtifactError, match="are not those that card"):
            load_head(tmp_path)
    for position in range(0, len(data), 37):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ArtifactError, match="are not those that card"):
            load_head(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=99), "not a head's card of format 3"),
        (lambda c: c.pop("head"), "KeyError: 'head'"),
        (lambda c: c.update(kind="tail"), "KeyError: 'tail'"),
        (lambda c: c.pop("weights_sha256"), "are not those that card"),
        (lambda c: c["head"].update(in_features=10**9), "the card says"),
        (lambda c: c["head"].update(hidden_features=-8), "hidden_features: got -8"),
        (lambda c: c["head"].update(in_features="6"), "in_features: got '6'"),
        (lambda c: c["head"].update(output="other"), "output: got 'other'"),
        (lambda c: c["head"].update(extra=1), "TypeError"),
        (lambda c: c.update(head=[]), "TypeError"),
        (lambda c: c["degradations"][0].update(lr_size=0), "lr_size: got 0"),
        (lambda c: c["degradations"][0].pop("kernel"), "degradation: got fields"),
        (lambda c: c.update(degradations=3), "TypeError"),
    ],
)
def test_hostile_cards_are_one_typed_error(
    head: FeatureTransferHead, tmp_path: Path, change: Any, message: str
) -> None:
    save_head(head, tmp_path, CARD)
    rewrite_card(tmp_path, change)
    with pytest.raises(ArtifactError, match=message):
        load_head(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, "\xff", '{"a":' + " " * 2**21 + "1}"]
)
def test_cards_that_are_no_card(head: FeatureTransferHead, tmp_path: Path, text: str) -> None:
    save_head(head, tmp_path, CARD)
    (tmp_path / "card.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"card\.json"):
        load_head(tmp_path)


def test_missing_extra_and_nan_tensors(head: FeatureTransferHead, tmp_path: Path) -> None:
    save_head(head, tmp_path, CARD)
    state = dict(head.state_dict())
    rewrite_weights(tmp_path, {k: v for k, v in state.items() if k != "fc2.bias"})
    with pytest.raises(ArtifactError, match=r"missing tensor fc2\.bias"):
        load_head(tmp_path)
    rewrite_weights(tmp_path, {**state, "fc3.bias": torch.zeros(2)})
    with pytest.raises(ArtifactError, match=r"unexpected tensor fc3\.bias"):
        load_head(tmp_path)
    rewrite_weights(tmp_path, {**state, "fc1.bias": torch.full((8,), float("nan"))})
    with pytest.raises(ArtifactError, match=r"fc1\.bias has NaN or infinity"):
        load_head(tmp_path)
    rewrite_weights(tmp_path, {**state, "fc1.bias": torch.zeros(8, dtype=torch.float16)})
    with pytest.raises(ArtifactError, match="weights of several dtypes"):
        load_head(tmp_path)
    rewrite_weights(tmp_path, {**state, "input_std": torch.ones(6, dtype=torch.float16)})
    with pytest.raises(ArtifactError, match="statistics or centroids that are neither float32"):
        load_head(tmp_path)


def test_a_card_without_its_scaling_is_of_an_older_format(tmp_path: Path) -> None:
    head = FeatureTransferHead(6, 4, 8, output="clusters", scaling="l2")
    save_head(head, tmp_path, CARD)
    assert load_head(tmp_path)[0].config["scaling"] == "l2"
    rewrite_card(tmp_path, lambda card: (card["head"].pop("scaling"), card.update(format=2)))
    with pytest.raises(ArtifactError, match="not a head's card of format 3"):
        load_head(tmp_path)


def test_a_full_disk_keeps_the_older_head(
    head: FeatureTransferHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_head(head, tmp_path, CARD)

    for calls, name in ((1, "head.safetensors"), (2, "card.json")):
        made: list[int] = []

        def full(descriptor: int, calls: int = calls, made: list[int] = made) -> None:
            made.append(descriptor)
            if len(made) == calls:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr("featxfer.files.os.fsync", full)
        with pytest.raises(DiskError, match=rf"could not write .*{name}: No space left"):
            save_head(FeatureTransferHead(6, 4, 8, output="clusters", seed=9), tmp_path, CARD)
        assert torch.equal(load_head(tmp_path)[0].state_dict()["fc1.weight"], head.fc1.weight)
        assert len(list(tmp_path.iterdir())) == 3


def test_files_that_are_too_large_are_not_read(tmp_path: Path) -> None:
    save_head(FeatureTransferHead(64, 4, 512), tmp_path, CARD)
    path = tmp_path / "head.safetensors"
    tensors = {f"t{n}": torch.zeros(0) for n in range(1_200)}
    rewrite_weights(tmp_path, tensors)
    with pytest.raises(ArtifactError, match="a header of over 65536 bytes, this is no head"):
        load_head(tmp_path)
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ArtifactError, match=r"over \d+ bytes, which the card's head cannot have"):
        load_head(tmp_path)
