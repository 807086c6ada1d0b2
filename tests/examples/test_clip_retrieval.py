from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples._photos import Pairs, open_photos
from featxfer import BLOCK_RECIPE, Degradation, Preprocessing
from featxfer_integrations import transfer_disabled

open_clip = pytest.importorskip("open_clip", reason="pip install 'featxfer[open-clip]'")

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}
PREPARE = Preprocessing(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


@pytest.fixture
def weights(tmp_path: Path, train_photos: Path) -> Path:
    """Of a tiny CLIP that open_clip knows by name: random, but batch norm has seen photographs."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "models")
    images, view = open_photos(str(train_photos)), Degradation(hr_size=64)
    pixels = torch.stack([view.hr(images.read(index)) for index in range(0, 60, 3)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model("tiny")
        for value in model.visual.parameters():
            if not value.any():  # a block's last norm
                nn.init.ones_(value)
    with torch.no_grad():
        for _ in range(20):
            model.visual.train()(PREPARE(pixels))
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    return tmp_path / "tiny.pt"


@pytest.mark.filterwarnings("ignore:blocks do not help")
def test_recall_before_and_after_and_what_becomes_of_the_gallery(
    figures: Callable[..., dict[str, list[float]]],
    weights: Path,
    train_photos: Path,
    test_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from examples.clip_retrieval import main

    made, create = list[Any](), open_clip.create_model

    def keep(*arguments: Any, **options: Any) -> Any:
        made.append(create(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(open_clip, "create_model", keep)
    quick = dataclasses.replace(BLOCK_RECIPE, epochs=2, batch_size=16, learning_rate=1e-3)
    monkeypatch.setattr("featxfer_integrations.stages.maps.BLOCK_RECIPE", quick)
    options = ("--model", "tiny", "--pretrained", weights, "--lr-size", 6, "--cache", tmp_path)
    printed = figures(main, train_photos, test_photos, *options)

    (model,) = made
    hr_after, lr_after = embedded(model, test_photos)
    with transfer_disabled(model):
        hr, lr = embedded(model, test_photos)
    assert not torch.equal(lr, lr_after)
    wanted = {name: recall(rows, hr) for name, rows in (("before", lr), ("after", lr_after))}
    cosine = sum(map(cosine_of, hr, hr_after)) / len(hr)
    assert {name: found[0] for name, found in printed.items()} == {
        "LR, before": pytest.approx(wanted["before"], abs=0.051),
        "LR, after": pytest.approx(wanted["after"], abs=0.051),
        "HR, after": pytest.approx(recall(hr_after, hr), abs=0.051),
        "HR, before and after": pytest.approx(cosine, abs=6e-5),
    }


@torch.no_grad()
def embedded(model: Any, photos: Path) -> tuple[Tensor, Tensor]:
    """Of HR and LR views, an image at a time."""
    pairs = Pairs(open_photos(str(photos)), Degradation(hr_size=64, lr_size=6))
    rows = [[model.encode_image(PREPARE(view[None])) for view in pairs[row]] for row in range(30)]
    hr, lr = (torch.cat(view) for view in zip(*rows, strict=True))
    return hr, lr


def recall(queries: Tensor, gallery: Tensor) -> float:
    """recall@1 in per cent, a query at a time."""
    similar = [[cosine_of(query, row) for row in gallery] for query in queries]
    return sum(row.index(max(row)) == index for index, row in enumerate(similar)) / 0.30


def cosine_of(one: Tensor, other: Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())
