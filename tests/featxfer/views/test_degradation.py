from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featxfer import BaseDegradation, Degradation, ScaledDegradation

IMAGE = torch.randint(0, 256, (3, 91, 133), dtype=torch.uint8, generator=torch.manual_seed(0))


def pil_resize(image: torch.Tensor, size: int) -> torch.Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return torch.from_numpy(
        np.array(picture.resize((size, size), Image.Resampling.BICUBIC))
    ).permute(2, 0, 1)


def assert_near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for rounding: PIL rounds its weights, torch's kernel too, in other places."""
    assert got.dtype == torch.uint8
    assert (got.int() - wanted.int()).abs().max() <= 2


def test_views_are_the_papers() -> None:
    degradation = Degradation()
    assert_near(degradation.hr(IMAGE), pil_resize(IMAGE, 224))
    assert_near(degradation.lr(IMAGE), pil_resize(pil_resize(IMAGE, 32), 224))


def test_order_hr_takes_the_small_image_from_the_hr_image() -> None:
    degradation = Degradation(order="hr")
    assert_near(degradation.lr(IMAGE), pil_resize(pil_resize(pil_resize(IMAGE, 224), 32), 224))
    assert not torch.equal(degradation.lr(IMAGE), Degradation().lr(IMAGE))


@pytest.mark.parametrize(
    "degradation",
    [
        Degradation(),
        Degradation(96, 16, "bilinear", False, "hr"),
        Degradation(64, 64, "nearest", antialias=False),
    ],
)
def test_round_trips_through_json(degradation: Degradation) -> None:
    assert Degradation.from_json(degradation.to_json()) == degradation
    assert degradation.lr(IMAGE).shape == (3, degradation.hr_size, degradation.hr_size)


def test_antialias_matters_when_shrinking() -> None:
    assert not torch.equal(Degradation(antialias=False).lr(IMAGE), Degradation().lr(IMAGE))


def test_the_hr_view_does_not_depend_on_the_lr_size() -> None:
    small, large = Degradation(lr_size=16), Degradation(lr_size=64, order="hr")
    assert small.describe_view("hr") == large.describe_view("hr")
    assert small.describe_view("lr") != large.describe_view("lr")
    assert torch.equal(small.hr(IMAGE), large.hr(IMAGE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_size": 0}, "lr_size: got 0, wanted an int >= 1"),
        ({"hr_size": 2.5}, "hr_size: got 2.5, wanted an int >= 1"),
        ({"lr_size": 225}, "lr_size: got 225, wanted at most hr_size=224"),
        (
            {"kernel": "cubic"},
            "kernel: got 'cubic', wanted one of 'bicubic', 'bilinear', 'nearest'",
        ),
        ({"order": "lr"}, "order: got 'lr', wanted one of 'original', 'hr'"),
        ({"antialias": 1}, "antialias: got 1, wanted True or False"),
        ({"kernel": "nearest"}, "antialias: got True with kernel 'nearest'"),
    ],
)
def test_bad_values_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Degradation(**arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "degradation: got list, wanted a JSON object"),
        ("{}", "resize: got None, wanted 'torch.nn"),
        (json.dumps({"resize": Degradation.RESIZE}), "degradation: got fields"),
    ],
)
def test_other_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Degradation.from_json(text)


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(4, 4)]
)
def test_other_images_are_refused(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"image: got .* wanted uint8 \(3, h, w\)"):
        Degradation().hr(image)


@pytest.mark.parametrize("view", [ScaledDegradation(), ScaledDegradation(2.5, "bilinear", False)])
def test_scaled_views_keep_the_size(view: ScaledDegradation) -> None:
    assert torch.equal(view.hr(IMAGE), IMAGE)
    low = view.lr(IMAGE)
    assert low.shape == IMAGE.shape
    small = (round(91 / view.factor), round(133 / view.factor))
    options: Any = {"mode": view.kernel, "antialias": view.antialias}
    tiny = torch.nn.functional.interpolate(IMAGE[None], size=small, **options)
    assert_near(low, torch.nn.functional.interpolate(tiny, size=(91, 133), **options)[0])
    assert float(low.float().std()) < 0.7 * float(IMAGE.float().std())
    assert view.describe_view("hr") == {"view": "hr"}
    assert view.describe_view("lr")["factor"] == view.factor
    assert BaseDegradation.from_json(view.to_json()) == view
    assert torch.equal(ScaledDegradation(1).lr(IMAGE), IMAGE)
    assert ScaledDegradation(1e6).lr(IMAGE).unique().numel() <= 3
    assert Degradation(lr_size=1).lr(IMAGE).unique().numel() <= 3


def test_one_pixel_is_the_exact_mean() -> None:
    """Of which single precision, in whatever order it adds, gives 127.5 and so 128."""
    image = torch.full((3, 1024, 1024), 127, dtype=torch.uint8)
    image.view(3, -1)[:, : 2**19 - 1] = 128
    assert Degradation(8, 1).lr(image).unique().tolist() == [127]


@pytest.mark.parametrize("factor", [0.5, float("nan"), float("inf"), "4", True])
def test_factors_that_shrink_nothing_are_refused(factor: Any) -> None:
    with pytest.raises(ValueError, match=r"factor: got .*, wanted a finite number >= 1"):
        ScaledDegradation(factor)
