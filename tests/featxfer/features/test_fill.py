"""Rows that are no features of whole images; the rest is in `test_extract.py`."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featxfer import ImageError, Images
from featxfer.features.fill import fill_rows
from featxfer.features.store import FeatureStore, Manifest, StoreError

MANIFEST = Manifest(
    view={},
    backbone="tiny",
    host="host 1.0",
    architecture_sha256="12" * 32,
    weights_sha256="ab" * 32,
    preprocessing={},
    precision="fp32",
    images_fingerprint="cd" * 32,
    image_count=7,
    part_rows=3,
    software={},
)


def images(*broken: int) -> Images:
    """Seven of them, some of which cannot be read."""

    def read(index: int) -> Tensor:
        if index in broken:
            raise ImageError(f"image {index} is away")
        return torch.full((3, 4, 4), index, dtype=torch.uint8)

    return Images(tuple("abcdefg"), read, "cd" * 32)


class Corners:
    """Rows of two stores at once, from two views of an image."""

    def __init__(self, root: Path) -> None:
        self.stores = {
            name: FeatureStore(root, dataclasses.replace(MANIFEST, view={"view": name}))
            for name in ("left", "right")
        }
        self.threads: set[str] = set()
        self.computed: list[tuple[tuple[int, ...], tuple[str, ...]]] = []
        self.shift: Callable[[], float] = lambda: 0.0

    def prepare(self, image: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.threads.add(threading.current_thread().name)
        return image, image.flip(-1)

    def compute(
        self,
        indices: Sequence[int],
        prepared: Sequence[tuple[Tensor, Tensor]],
        names: Sequence[str],
        advance: Callable[[int], object],
    ) -> list[tuple[str, Tensor]]:
        self.computed.append((tuple(indices), tuple(names)))
        rows = torch.stack([(a + b)[0, 0, :2].float() for a, b in prepared]) + self.shift()
        advance(len(names) * len(rows))
        return [(name, rows * {"left": 1, "right": 10}[name]) for name in names]

    def fill(self, source: Images, **options: Any) -> None:
        fill_rows(self.stores, source, self.prepare, self.compute, **options)

    def read(self) -> list[list[float]]:
        return [store.read().features[:, 0].tolist() for store in self.stores.values()]


def test_rows_of_all_stores_are_computed_at_once_and_each_gets_what_it_lacks(
    tmp_path: Path,
) -> None:
    corners = Corners(tmp_path)
    corners.fill(images(), parts=range(1, 2))
    assert corners.computed == [((3, 4, 5), ("left", "right"))]
    assert all(name.startswith("featxfer-reader") for name in corners.threads)
    corners.stores["right"].drop_part(1)
    corners.computed.clear()
    corners.fill(images())
    assert corners.computed == [
        ((3,), ("left",)),
        ((0, 1, 2), ("left", "right")),
        ((3, 4, 5), ("right",)),
        ((6,), ("left", "right")),
    ]
    wanted = [2.0 * index for index in range(7)]
    assert corners.read() == [wanted, [10 * value for value in wanted]]


def test_another_kept_row_is_told_and_its_store_is_computed_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corners = Corners(tmp_path)
    corners.fill(images())
    corners.shift = lambda: 1.0
    corners.fill(images(0), on_error="skip")
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" has ")[2] for line in said] == [
        f"other {name} features of image b than are computed now; its 3 finished parts are "
        "computed anew"
        for name in corners.stores
    ]
    assert corners.read()[0] == [2.0 * index + 1 for index in range(1, 7)]
    assert [store.read().skipped for store in corners.stores.values()] == [
        {"a": "image 0 is away"}
    ] * 2


def test_rows_that_differ_each_time_are_an_error_and_nothing_is_dropped(tmp_path: Path) -> None:
    corners = Corners(tmp_path)
    corners.fill(images())
    numbers = iter(range(1, 100))
    corners.shift = lambda: float(next(numbers))
    before = sorted(tmp_path.rglob("part-*"))
    with pytest.raises(ValueError, match="tiny: got other features of image a each time"):
        corners.fill(images())
    assert sorted(tmp_path.rglob("part-*")) == before


def test_bad_rows_and_images_are_named(tmp_path: Path) -> None:
    corners = Corners(tmp_path)
    with pytest.raises(ImageError, match="image 4 is away"):
        corners.fill(images(4))
    corners.shift = lambda: torch.nan
    with pytest.raises(ValueError, match="left features of image a are NaN or infinite"):
        corners.fill(images())
    with pytest.raises(ValueError, match="on_error: got 'warn', wanted"):
        corners.fill(images(), on_error="warn")


def test_a_part_of_which_no_image_can_be_read_has_no_rows(tmp_path: Path) -> None:
    corners = Corners(tmp_path)
    corners.fill(images(3, 4, 5), on_error="skip")
    assert corners.read()[0] == [0.0, 2.0, 4.0, 12.0]
    assert len(corners.stores["left"].open_rows()) == 4
    corners.fill(images())
    assert corners.read()[0] == [2.0 * index for index in range(7)]


def test_a_store_of_other_images_is_refused(tmp_path: Path) -> None:
    corners = Corners(tmp_path)
    corners.fill(images(1), on_error="skip")
    renamed = dataclasses.replace(images(), ids=tuple("uvwxyz_"))
    with pytest.raises(StoreError, match="part 0 is of image 'a', which is none of these"):
        corners.fill(renamed)
