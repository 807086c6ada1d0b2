from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featxfer import Card, Degradation, FeatureTransferHead, load_head, save_head
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


class Watcher:
    """Reads the state of the process-wide generator all the time, in a thread of its own."""

    def __init__(self) -> None:
        self.before = torch.get_rng_state()
        self.changes, self.ends = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def watch(self) -> None:
        while not self.ends.is_set():
            self.changes += not torch.equal(torch.get_rng_state(), self.before)

    def __enter__(self) -> Watcher:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ends.set()
        self.thread.join()


def test_many_threads_give_what_one_gives_and_draw_nothing_from_the_process() -> None:
    view = CorruptedDegradation(**SIZES, blur_sigma=0.8, noise_std=0.1, jpeg_quality=40)
    images = list(
        torch.randint(
            0, 256, (60, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
    )
    with Watcher() as watcher:
        alone = [view.lr(image) for image in images]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(view.lr, images * 3))
    assert watcher.changes == 0
    assert torch.equal(torch.get_rng_state(), watcher.before)
    assert all(torch.equal(pixels, alone[i % 60]) for i, pixels in enumerate(found))


def test_the_number_of_torch_threads_does_not_show() -> None:
    view = CorruptedDegradation(hr_size=128, lr_size=128, blur_sigma=2.0, noise_std=0.1)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(view.lr(IMAGE))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("side", "sigma"), [(300, 3.0), (32, 1.0), (8, 9.0), (1, 2.0)])
def test_blur_is_the_gaussian_rounded_once(side: int, sigma: float) -> None:
    """Against torchvision's, which adds in single precision and so rounds some pixels otherwise."""
    from torchvision.transforms.v2.functional import gaussian_blur

    whole = Degradation(hr_size=side, lr_size=side).lr(IMAGE)
    reach = min(round(3 * sigma), side - 1)
    wanted = gaussian_blur(whole, [2 * reach + 1] * 2, [sigma] * 2)
    got = CorruptedDegradation(hr_size=side, lr_size=side, blur_sigma=sigma).corrupt(whole)
    differ = (got.int() - wanted.int()).abs()
    assert int(differ.max()) <= 1
    assert float(differ.float().mean()) < 1e-3


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
    whole = CorruptedDegradation(**SIZES, noise_std=1)
    assert whole.to_json() == CorruptedDegradation(**SIZES, noise_std=1.0).to_json()
    save_head(FeatureTransferHead(4, 2, 3), tmp_path, Card("x", "0", (view, Degradation())))
    assert load_head(tmp_path)[1].degradations == (view, Degradation())
    with pytest.raises(ValueError, match="kind: got degradation 'Rain', known are Degr"):
        Degradation.from_dict({**view.to_dict(), "kind": "Rain"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur_sigma": -1.0}, "blur_sigma: got -1.0"),
        ({"noise_std": float("nan")}, "noise_std: got nan"),
        ({"noise_std": "0.1"}, "noise_std: got '0.1', wanted a finite number >= 0"),
        ({"blur_sigma": True}, "blur_sigma: got True, wanted a finite number >= 0"),
        ({"jpeg_quality": 0}, "jpeg_quality: got 0"),
        ({"jpeg_quality": 101}, "jpeg_quality: got 101, wanted at most 100"),
        ({"lr_size": 65}, "lr_size: got 65"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorruptedDegradation(**{**SIZES, **options})
