from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from torch import nn

from featxfer import (
    ArtifactError,
    Card,
    Degradation,
    FeatureTransferBlock,
    FeatureTransferHead,
    load_head,
)
from featxfer.modules.hub import find_files

CARD = Card(
    "tiny",
    "ab" * 32,
    (Degradation(lr_size=16), Degradation(lr_size=32)),
    {"seed": 3, "held_out": {"cosine": 0.5}, "log": list(range(100))},
)


@pytest.fixture
def head() -> FeatureTransferHead:
    head = FeatureTransferHead(6, 4, 8, seed=1)
    nn.init.normal_(head.fc2.weight)
    head.card = CARD
    return head


def test_save_and_load_with_the_card(head: FeatureTransferHead, tmp_path: Path) -> None:
    assert head.save_pretrained(tmp_path / "head") is None
    again = FeatureTransferHead.from_pretrained(tmp_path / "head")
    rows = torch.randn(3, 6)
    assert torch.equal(again(rows), head.eval()(rows))
    assert again.card == CARD
    assert not again.training


def test_the_readme_is_filled_in(head: FeatureTransferHead, tmp_path: Path) -> None:
    head.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: featxfer\n")
    for said in ("for tiny", "ab" * 32, '"lr_size": 16', '"lr_size": 32', "| seed | `3` |"):
        assert said in text
    assert "| held_out.cosine | `0.5` |" in text
    assert "99" not in text
    assert "log" in json.loads((tmp_path / "card.json").read_text())["details"]


def test_a_block_is_saved_as_a_block(head: FeatureTransferHead, tmp_path: Path) -> None:
    block = FeatureTransferBlock(4, 8, units=1, kernel_size=3, layout="nhwc")
    for parameter in block.units.parameters():
        nn.init.normal_(parameter)
    block.card = CARD
    block.save_pretrained(tmp_path / "block")
    head.save_pretrained(tmp_path / "head")
    again = FeatureTransferBlock.from_pretrained(tmp_path / "block")
    maps = torch.randn(2, 3, 3, 4)
    assert torch.equal(again(maps), block(maps))
    with pytest.raises(ArtifactError, match="holds a head, wanted a FeatureTransferBlock"):
        FeatureTransferBlock.from_pretrained(tmp_path / "head")


def test_dtypes_are_kept(head: FeatureTransferHead, tmp_path: Path) -> None:
    head.to(torch.bfloat16).save_pretrained(tmp_path)
    again = FeatureTransferHead.from_pretrained(tmp_path)
    assert again.fc1.weight.dtype == torch.bfloat16
    assert again.input_mean.dtype == torch.float32
    assert torch.equal(again(torch.ones(1, 6)), head.eval()(torch.ones(1, 6)))


def test_without_a_card_nothing_is_written(head: FeatureTransferHead, tmp_path: Path) -> None:
    head.card = None
    with pytest.raises(ValueError, match="card: this head has none; train it with fit_transfer"):
        head.save_pretrained(tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_weights_that_are_not_finite_are_not_saved(
    head: FeatureTransferHead, tmp_path: Path
) -> None:
    with torch.no_grad():
        head.fc1.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"head: tensor fc1\.bias has NaN"):
        head.save_pretrained(tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_arguments_are_not_swallowed(head: FeatureTransferHead, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"got \['config'\] without push_to_hub=True"):
        head.save_pretrained(tmp_path, config={"a": 1})
    with pytest.raises(TypeError, match=r"got \['private'\] without push_to_hub=True"):
        head.save_pretrained(tmp_path, private=True)
    with pytest.raises(TypeError, match=r"got \['repo_id'\] without push_to_hub=True"):
        head.save_pretrained(tmp_path, repo_id="me/head")
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match=r"got \['revision'\] with the folder"):
        FeatureTransferHead.from_pretrained(tmp_path, revision="v1")


def test_push_to_hub_uploads_the_three_files(
    head: FeatureTransferHead, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against a stand-in for the hub, which cannot be reached here."""
    uploaded: dict[str, bytes] = {}

    class Repository:
        repo_id = "me/head"

    def upload_folder(self: HfApi, *, folder_path: Path, **_: Any) -> str:
        uploaded.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})
        return "commit address"

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert head.push_to_hub("me/head") == "commit address"
    assert sorted(uploaded) == ["README.md", "card.json", "head.safetensors"]
    for name, data in uploaded.items():
        (tmp_path / name).write_bytes(data)
    assert load_head(tmp_path)[1] == CARD
    assert head.save_pretrained(tmp_path / "b", push_to_hub=True) == "commit address"


def test_a_hub_id_is_downloaded(
    head: FeatureTransferHead, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    head.save_pretrained(tmp_path / "there")
    asked: list[Any] = []

    def download(repo_id: str, **arguments: Any) -> str:
        asked.append((repo_id, arguments))
        return str(tmp_path / "there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    again = FeatureTransferHead.from_pretrained("me/head", revision="v1")
    assert again.card == CARD
    assert asked == [
        ("me/head", {"allow_patterns": ["head.safetensors", "card.json"], "revision": "v1"})
    ]


@pytest.mark.parametrize("source", ["no/such/folder/at/all", "me/head"])
def test_neither_a_folder_nor_a_hub_id(source: str) -> None:
    with pytest.raises(
        FileNotFoundError, match=f"head: '{source}' is no folder, and the model hub"
    ):
        find_files(source, local_files_only=True)
