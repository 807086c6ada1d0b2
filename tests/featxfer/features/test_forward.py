from __future__ import annotations

import dataclasses
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featxfer import Backbone, Degradation, Images, extract_features, open_images
from featxfer.features.extract import fill_stores
from featxfer.features.forward import COMPILE_FROM, Arithmetic, Forward, rounding_of
from featxfer.features.readers import read_ahead, reader_count

CPU = torch.device("cpu")
DEGRADATION = Degradation(hr_size=32, lr_size=8)


def test_what_auto_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    many = COMPILE_FROM
    for fast in (False, True):
        monkeypatch.setattr(
            "featxfer.features.forward.bf16_is_fast", lambda device, fast=fast: fast
        )
        assert Arithmetic.choose("auto", "off", CPU, many) == Arithmetic(bf16=fast)
    monkeypatch.setattr("featxfer.features.forward.shutil.which", lambda name: "/bin/c++")
    assert not Arithmetic.choose("fp32", "auto", CPU, many - 1).compiled
    assert Arithmetic.choose("fp32", "auto", CPU, many).name == "fp32 compiled"
    assert Arithmetic.choose("bf16", "on", CPU, 1).name == "bf16 compiled"
    monkeypatch.setattr("featxfer.features.forward.shutil.which", lambda name: None)
    assert not Arithmetic.choose("fp32", "auto", CPU, many).compiled
    with pytest.raises(ValueError, match="compile: got 'on', and no C\\+\\+ compiler is found"):
        Arithmetic.choose("fp32", "on", CPU, 1)


def test_rounding_by_any_of_torchs_interfaces_is_part_of_the_name() -> None:
    cuda = torch.device("cuda")
    assert rounding_of(CPU) == rounding_of(torch.device("meta")) == ""
    assert rounding_of(cuda) == "conv tf32, rnn tf32", "as torch is when it starts"
    torch.set_float32_matmul_precision("medium")
    try:
        assert rounding_of(CPU) == "matmul bf16"
        assert rounding_of(cuda) == "matmul tf32, conv tf32, rnn tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    backends: Any = torch.backends
    of = (backends.mkldnn.conv, backends.cudnn.conv)
    before = [kind.fp32_precision for kind in of]
    of[0].fp32_precision, of[1].fp32_precision = "tf32", "ieee"
    try:
        assert Arithmetic.choose("fp32", "off", CPU, 1).name == "fp32 conv tf32"
        assert rounding_of(cuda) == "rnn tf32"
    finally:
        of[0].fp32_precision, of[1].fp32_precision = before


@pytest.mark.parametrize(
    ("cores", "processes", "readers"),
    [(1, None, 1), (2, None, 2), (64, None, 16), (64, "8", 8), (2, "4", 1)],
)
def test_readers_follow_the_cores_that_a_process_has(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: str | None, readers: int
) -> None:
    monkeypatch.setattr(
        "featxfer.features.readers.os.sched_getaffinity", lambda _: set(range(cores)), raising=False
    )
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert reader_count() == readers


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_backbone_gives_nearly_the_same_rows_under_another_key(
    backbone: Backbone, image_folder: Path, tmp_path: Path, precision: str
) -> None:
    images = open_images(image_folder)
    found = {
        compiled: extract_features(
            backbone,
            images,
            DEGRADATION,
            tmp_path,
            batch_size=4,
            precision=precision,
            compile=compiled,
        )
        for compiled in ("off", "on")
    }
    assert found["on"].keys["hr"] != found["off"].keys["hr"]
    assert found["on"].ids == images.ids
    for view in ("hr", "lr"):
        plain, compiled = (getattr(part, view) for part in found.values())
        apart = float((plain - compiled).abs().max() / plain.abs().max())
        assert apart < (1e-5 if precision == "fp32" else 2e-2)


def test_a_compiled_backbone_sees_batches_of_one_shape(backbone: Backbone) -> None:
    seen: list[int] = []
    forward = Forward(backbone, Arithmetic(compiled=True), 4)

    def module(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.mean((2, 3))

    forward._module = module
    pixels = [torch.full((3, 8, 8), index, dtype=torch.uint8) for index in range(10)]
    counts: list[int] = []
    rows = forward(pixels, counts.append)
    assert seen == [4, 4, 4]
    assert counts == [4, 4, 2]
    assert rows[:, 0].argsort().tolist() == list(range(10))
    assert forward([], counts.append).shape == (0, 0)


def test_images_are_read_ahead_in_order_by_threads_of_one_core() -> None:
    threads, begun = set(), []

    def run(item: int) -> tuple[int, int]:
        begun.append(item)
        threads.add(threading.current_thread().name)
        time.sleep(0.01 * (item % 3))
        return item, torch.get_num_threads()

    before = torch.get_num_threads()
    found = read_ahead(run, range(40), 5)
    assert next(found) == (0, 1)
    time.sleep(0.2)
    assert len(begun) == 6, "five ahead of the one that was asked for, and no more"
    assert [item for item, _ in found] == list(range(1, 40))
    assert all("featxfer-reader" in name for name in threads)
    assert torch.get_num_threads() == before


def test_what_is_read_ahead_is_dropped_at_an_error() -> None:
    begun: list[int] = []

    def run(item: int) -> float:
        begun.append(item)
        return 1 / (item - 3)

    found = read_ahead(run, range(1000), 4)
    with pytest.raises(ZeroDivisionError):
        list(found)
    assert len(begun) < 12
    assert not [t for t in threading.enumerate() if t.name.startswith("featxfer-reader")]


def test_a_dataset_is_asked_by_one_thread_at_a_time(backbone: Backbone, tmp_path: Path) -> None:
    inside = threading.Semaphore(1)

    class Shy:
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Any:
            assert inside.acquire(blocking=False), "another thread is here"
            time.sleep(0.002)
            inside.release()
            return torch.full((3, 40, 40), index, dtype=torch.uint8), 0

    images = open_images(Shy())
    wanted = extract_features(backbone, images, DEGRADATION, tmp_path)
    assert len(wanted.ids) == 12


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Of pixels, no more than two batches and a part are held at once."""
    alive: set[int] = set()
    most = 0

    class Counted(Tensor):
        pass

    def read(index: int) -> Tensor:
        nonlocal most
        image = torch.zeros(3, 8, 8, dtype=torch.uint8).as_subclass(Counted)
        alive.add(id(image))
        weakref.finalize(image, alive.discard, id(image))
        most = max(most, len(alive))
        return image

    images = Images(tuple(map(str, range(300))), read, "of no file")
    plain = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for count in (100, 300):
        most = 0
        part = dataclasses.replace(images, ids=images.ids[:count], fingerprint=str(count))
        view = Degradation(hr_size=8, lr_size=4)
        fill_stores(Backbone(plain), part, view, tmp_path, batch_size=8, part_rows=16)
        assert 0 < most <= 2 * 8 + 16 + 4
