from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from torch import Tensor, nn

from featxfer import (
    ArtifactError,
    Card,
    Degradation,
    FeatureTransferBlock,
    FeatureTransferHead,
    load_head,
)
from featxfer.modules.hub import LARGEST_Z, SMALLEST_SHARE, TransferModule, find_files

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


def test_arguments_of_the_mixin_are_not_swallowed(
    head: FeatureTransferHead, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="config, model_card_kwargs: wanted None"):
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

    monkeypatch.setattr("featxfer.modules.hub.snapshot_download", download)
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


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 16
STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda rows: rows * 0,
    "ordinary": lambda rows: rows,
    "one channel hardly varies": lambda rows: rows * torch.tensor([2e-9] + [1.0] * (WIDTH - 1)),
    "all channels hardly vary": lambda rows: rows * 1e-9,
    "tiny": lambda rows: rows * 1e-30,
    "large means": lambda rows: rows + 1e5,
    "huge": lambda rows: rows * 1e16,
    "one is sparse": lambda rows: rows * (torch.arange(len(rows)) == 0)[:, None],
}


def nasty(dtype: torch.dtype) -> Tensor:
    """Rows of finite values, each of which has undone somebody's arithmetic: `(n, WIDTH)`."""
    limits = torch.finfo(dtype)
    values = [0.0, 1e-9, 1.0, 1e4, 65504.0, limits.tiny, limits.smallest_normal / 2, limits.max]
    values += [limits.max / 2, 1e38]
    column = torch.tensor([value for value in values if value <= limits.max], dtype=torch.float64)
    column = torch.cat([column, -column])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(column), (60, WIDTH), generator=generator)
    chosen[: len(column)] = torch.arange(len(column))[:, None]
    rows = column[chosen].to(dtype)
    assert torch.isfinite(rows).all()
    return rows


def shaped(kind: str, rows: Tensor) -> Tensor:
    """Rows `(60, WIDTH)` as rows, maps with channels first, or with channels last."""
    if kind in ("rows", "gelu"):
        return rows
    maps = rows.view(3, 4, 5, WIDTH)
    return maps if kind.endswith("nhwc") else maps.movedim(-1, 1)


MODULES: dict[str, Callable[[], TransferModule]] = {
    "rows": lambda: FeatureTransferHead(WIDTH, 4, 24),
    "gelu": lambda: FeatureTransferHead(WIDTH, 4, 24, activation="gelu"),
    "maps": lambda: FeatureTransferHead(WIDTH, 4, 24),
    "block": lambda: FeatureTransferBlock(WIDTH, 8, kernel_size=3),
    "block of one unit": lambda: FeatureTransferBlock(WIDTH, 8, units=1, kernel_size=3),
    "full block": lambda: FeatureTransferBlock(WIDTH, 8, kernel_size=3, depthwise=False),
    "block, nhwc": lambda: FeatureTransferBlock(WIDTH, 8, kernel_size=3, layout="nhwc"),
}


def take_statistics(module: Any, kind: str, name: str) -> None:
    rows = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1))
    rows = STATISTICS[name](rows)
    module.set_input_statistics(shaped(kind, rows) if "block" in kind else rows)


def same_bits(left: Tensor, right: Tensor) -> bool:
    as_bits = torch.int32 if left.dtype == torch.float32 else torch.int16
    return left.dtype == right.dtype and torch.equal(
        left.contiguous().view(as_bits), right.contiguous().view(as_bits)
    )


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODULES)
@torch.no_grad()
def test_an_untrained_module_is_the_identity_for_every_finite_input(
    kind: str, dtype: torch.dtype, weights: torch.dtype
) -> None:
    inputs = shaped(kind, nasty(dtype))
    for name in STATISTICS:
        module = MODULES[kind]()
        take_statistics(module, kind, name)
        assert same_bits(module.to(weights)(inputs), inputs), name


@torch.no_grad()
def test_far_inputs_along_the_weights_of_a_wide_module_do_not_overflow_half_precision() -> None:
    head = FeatureTransferHead(8192, 4, 16).half()
    far = head.fc1.weight.sign() * 65504
    assert torch.isfinite(head.hidden(far)).all()
    assert float(head.hidden(far).max()) > 1000
    assert same_bits(head(far), far)
    block = FeatureTransferBlock(2048, 4, units=1).half()
    unit: Any = block.units[0]
    signs = unit.spatial.weight.sign() * unit.expand.weight[0].sign().view(-1, 1, 1, 1)
    maps = signs.movedim(0, 1) * 65504
    assert same_bits(block(maps), maps)


@pytest.mark.parametrize("kind", ["rows", "block"])
def test_a_channel_that_hardly_varies_counts_as_a_share_of_the_others(kind: str) -> None:
    module = MODULES[kind]()
    take_statistics(module, kind, "ordinary")
    std = module.input_std.flatten()
    take_statistics(module, kind, "one channel hardly varies")
    floored = module.input_std.flatten()
    assert torch.equal(floored[1:], std[1:])
    assert float(floored[0]) == pytest.approx(SMALLEST_SHARE * float(std.median()), rel=0.2)


@pytest.mark.parametrize("kind", ["rows", "block of one unit"])
def test_inputs_count_as_no_further_than_the_bound(kind: str) -> None:
    module = MODULES[kind]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    take_statistics(module, kind, "ordinary")
    module.eval()
    mean, std = (part.view(-1) for part in (module.input_mean, module.input_std))

    def change(z: float) -> Tensor:
        rows = shaped(kind, (mean + z * std).expand(60, WIDTH))
        changed: Tensor = module(rows) - rows
        return changed.detach()

    torch.testing.assert_close(change(16_000), change(LARGEST_Z), rtol=1e-3, atol=1e-2)
    assert not torch.allclose(change(LARGEST_Z - 10), change(LARGEST_Z), rtol=1e-2)


def test_statistics_stay_wide_whatever_a_module_is_converted_to() -> None:
    host = nn.Sequential(FeatureTransferHead(4, 3, 5), FeatureTransferBlock(4, 3, kernel_size=1))
    head: Any = host[0]
    head.set_input_statistics(torch.tensor([[1e5, 1e-9, 3.0, 0], [1e5 + 1, 2e-9, 3.0, 0]]))
    mean, std = head.input_mean.clone(), head.input_std.clone()
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float16):
        host.to(dtype)
        assert {value.dtype for value in host.parameters()} == {dtype}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {value.dtype for value in host.buffers()} == {wide}
        assert torch.equal(head.input_mean.float(), mean)
        assert torch.equal(head.input_std.float(), std)
    assert {value.device.type for value in host.to("meta").state_dict().values()} == {"meta"}


def test_statistics_are_wide_under_another_default_dtype() -> None:
    torch.set_default_dtype(torch.float16)
    try:
        head = FeatureTransferHead(4, 3, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert head.fc1.weight.dtype == torch.float16
    assert {value.dtype for value in head.buffers()} == {torch.float32}
