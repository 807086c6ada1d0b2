from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featxfer import Degradation, FeatureTransferHead, load_head, save_head
from featxfer.artifact import Card
from featxfer_integrations import CorruptedDegradation

IMAGE = torch.randint(
    0, 256, (3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
SIZES: dict[str, Any] = {"hr_size": 64, "lr_size": 16}


def test_without_corruptions_it_is_the_plain_degradation() -> None:
    plain, none = Degradation(**SIZES), CorruptedDegradation(**SIZES)
    assert torch.equal(none.lr(IMAGE), plain.lr(IMAGE))
    assert torch.equal(none.hr(IMAGE), plain.hr(IMAGE))
    assert none.describe_view("hr") == plain.describe_view("hr")
    assert none.describe_view("lr") != plain.describe_view("lr")


@pytest.mark.parametrize(
    "options", [{"blur_sigma": 1.0}, {"noise_std": 0.1}, {"jpeg_quality": 10}], ids=str
)
def test_each_changes_the_lr_view_alone_and_always_alike(options: dict[str, Any]) -> None:
    view = CorruptedDegradation(**SIZES, **options)
    state = torch.get_rng_state()
    first = view.lr(IMAGE)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 64, 64)
    torch.manual_seed(9)
    assert torch.equal(view.lr(IMAGE), first)
    assert not torch.equal(first, Degradation(**SIZES).lr(IMAGE))
    assert torch.equal(view.hr(IMAGE), Degradation(**SIZES).hr(IMAGE))


def test_jpeg_and_noise_are_what_they_say() -> None:
    """JPEG against Pillow's, noise by its spread."""
    same: dict[str, Any] = {"hr_size": 64, "lr_size": 64, "kernel": "bilinear"}
    whole = Degradation(**same).lr(IMAGE)
    flat = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    noisy = CorruptedDegradation(**same, noise_std=0.05).corrupt(flat).float() / 255
    assert float(noisy.std()) == pytest.approx(0.05, rel=0.05)
    written = io.BytesIO()
    Image.fromarray(whole.permute(1, 2, 0).numpy()).save(written, "JPEG", quality=20)
    wanted = np.asarray(Image.open(written)).astype(int)
    got = CorruptedDegradation(**same, jpeg_quality=20).corrupt(whole).permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - wanted).mean() < 4
    blurred = CorruptedDegradation(**same, blur_sigma=2.0).corrupt(whole).float()
    assert float(blurred.std()) < 0.5 * float(whole.float().std())


def test_it_is_saved_with_a_head(tmp_path: Any) -> None:
    view = CorruptedDegradation(**SIZES, jpeg_quality=30, noise_std=0.02)
    assert Degradation.from_json(view.to_json()) == view
    save_head(FeatureTransferHead(4, 2, 3), tmp_path, Card("x", "0", (view, Degradation())))
    assert load_head(tmp_path)[1].degradations == (view, Degradation())
    with pytest.raises(ValueError, match="kind: got degradation 'Rain', known are Degr"):
        Degradation.from_dict({**view.to_dict(), "kind": "Rain"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur_sigma": -1.0}, "blur_sigma: got -1.0"),
        ({"noise_std": float("nan")}, "noise_std: got nan"),
        ({"jpeg_quality": 0}, "jpeg_quality: got 0"),
        ({"jpeg_quality": 101}, "jpeg_quality: got 101, wanted at most 100"),
        ({"lr_size": 65}, "lr_size: got 65"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorruptedDegradation(**{**SIZES, **options})
