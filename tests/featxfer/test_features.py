from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from featxfer import (
    Backbone,
    Degradation,
    ImageError,
    Images,
    Preprocessing,
    StoreError,
    extract_features,
    fill_stores,
    open_images,
)
from featxfer.backbone import frozen, weights_sha256

DEGRADATION = Degradation(hr_size=32, lr_size=8)


def by_hand(backbone: Backbone, images: Images, view: str) -> torch.Tensor:
    make = getattr(DEGRADATION, view)
    pixels = torch.stack([make(images.read(i)) for i in range(len(images))])
    with frozen(backbone.module):
        rows: torch.Tensor = backbone.module((pixels / 255 - 0.5) / 0.5)
    return rows.clone()


def test_both_views_of_every_image(backbone: Backbone, image_folder: Path, tmp_path: Path) -> None:
    images = open_images(image_folder)
    features = extract_features(
        backbone, images, DEGRADATION, tmp_path / "cache", batch_size=3, part_rows=4
    )
    assert features.ids == images.ids
    assert features.hr.dtype == torch.float32
    torch.testing.assert_close(features.hr, by_hand(backbone, images, "hr"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.lr, by_hand(backbone, images, "lr"), rtol=1e-4, atol=1e-5)


def test_a_second_run_reads_the_store(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    images = open_images(image_folder)
    first = extract_features(backbone, images, DEGRADATION, tmp_path)

    def no_read(index: int) -> torch.Tensor:
        raise AssertionError(f"image {index} was read again")

    again = extract_features(
        backbone, dataclasses.replace(images, read=no_read), DEGRADATION, tmp_path
    )
    assert torch.equal(first.hr, again.hr)
    assert torch.equal(first.lr, again.lr)


def test_another_lr_size_keeps_the_hr_store(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    images = open_images(image_folder)
    first = extract_features(backbone, images, DEGRADATION, tmp_path)
    other = extract_features(backbone, images, Degradation(hr_size=32, lr_size=16), tmp_path)
    assert other.keys["hr"] == first.keys["hr"]
    assert other.keys["lr"] != first.keys["lr"]
    assert len(list(tmp_path.glob("hr-*"))) == 1


@pytest.mark.parametrize(
    "change", ["weights", "preprocessing", "degradation", "images", "precision", "name", "host"]
)
def test_a_changed_key_never_reads_the_old_store(
    backbone: Backbone, image_folder: Path, tmp_path: Path, change: str
) -> None:
    keys = extract_features(backbone, open_images(image_folder), DEGRADATION, tmp_path).keys
    degradation, precision = DEGRADATION, "fp32"
    other = dataclasses.replace(backbone)
    if change == "weights":
        with torch.no_grad():
            next(other.module.parameters()).mul_(2)
    if change == "preprocessing":
        other = dataclasses.replace(backbone, preprocessing=Preprocessing())
    if change == "name":
        other = dataclasses.replace(backbone, name="other")
    if change == "host":
        other = dataclasses.replace(backbone, host="library 2.0")
    if change == "degradation":
        degradation = dataclasses.replace(DEGRADATION, antialias=False)
    if change == "images":
        Image.new("RGB", (50, 50)).save(image_folder / "00.jpg")
    if change == "precision":
        precision = "bf16"
    images = open_images(image_folder)
    new = extract_features(other, images, degradation, tmp_path, precision=precision)
    assert set(new.keys.values()).isdisjoint(keys.values())


def test_interrupted_and_resumed(backbone: Backbone, image_folder: Path, tmp_path: Path) -> None:
    images = open_images(image_folder)
    undisturbed = extract_features(backbone, images, DEGRADATION, tmp_path / "a", part_rows=2)
    decoded: list[int] = []

    def read_until_interrupted(index: int) -> torch.Tensor:
        decoded.append(index)
        if len(decoded) == 6:
            raise KeyboardInterrupt
        return images.read(index)

    with pytest.raises(KeyboardInterrupt):
        extract_features(
            backbone,
            dataclasses.replace(images, read=read_until_interrupted),
            DEGRADATION,
            tmp_path / "b",
            part_rows=2,
        )
    decoded = list(range(100))
    resumed = extract_features(
        backbone,
        dataclasses.replace(images, read=read_until_interrupted),
        DEGRADATION,
        tmp_path / "b",
        part_rows=2,
    )
    assert decoded[100:] == [4, 5, 6, 7, 8, 9], "two parts were finished before"
    assert torch.equal(resumed.hr, undisturbed.hr)
    assert torch.equal(resumed.lr, undisturbed.lr)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_any_number_of_processes_gives_the_same_rows(
    backbone: Backbone, image_folder: Path, tmp_path: Path, processes: int
) -> None:
    """Of 1 to 10 images, two a part, the processes in any order, one of them started twice."""
    files = sorted(image_folder.iterdir())
    for count in range(1, len(files) + 1):
        images = open_images(files[:count])
        alone = extract_features(backbone, images, DEGRADATION, tmp_path / "one", part_rows=2)
        cache = tmp_path / f"{processes}"
        for rank in [*reversed(range(processes)), 0]:
            before = set(cache.rglob("part-*"))
            stores = fill_stores(
                backbone, images, DEGRADATION, cache, part_rows=2, rank=rank, world_size=processes
            )
            new = {int(path.name[5:11]) for path in set(cache.rglob("part-*")) - before}
            assert all(index % processes == rank for index in new)
        assert [store.missing_parts() for store in stores.values()] == [[], []]
        hr, lr = (store.read() for store in stores.values())
        assert (hr.ids, lr.ids) == (images.ids, images.ids)
        assert torch.equal(hr.features, alone.hr)
        assert torch.equal(lr.features, alone.lr)


def test_a_process_that_died_is_made_up_for_by_others(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    images = open_images(image_folder)
    options: dict[str, Any] = {"part_rows": 2, "world_size": 3}
    for rank in (0, 2):
        stores = fill_stores(backbone, images, DEGRADATION, tmp_path, rank=rank, **options)
    assert stores["hr"].missing_parts() == [1, 4]
    with pytest.raises(StoreError, match="part 1 of 5 is missing"):
        stores["hr"].read()
    features = extract_features(backbone, images, DEGRADATION, tmp_path, part_rows=2)
    assert features.ids == images.ids
    with pytest.raises(ValueError, match="rank: got 3, wanted one of 3 processes, from 0"):
        fill_stores(backbone, images, DEGRADATION, tmp_path, rank=3, **options)


def test_modes_are_restored_and_statistics_unmoved(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    module = backbone.module.train()
    module[1].eval()  # type: ignore[index]
    before = weights_sha256(module)
    extract_features(backbone, open_images(image_folder), DEGRADATION, tmp_path)
    assert [child.training for child in module.modules()] == [True, True, False, True, True, True]
    assert weights_sha256(module) == before
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_a_bad_image_is_named_or_skipped_and_listed(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    (image_folder / "03.jpg").write_bytes(b"no image")
    images = open_images(image_folder)
    with pytest.raises(ImageError, match=r"03\.jpg cannot be read"):
        extract_features(backbone, images, DEGRADATION, tmp_path)
    features = extract_features(backbone, images, DEGRADATION, tmp_path, on_error="skip")
    assert features.ids == tuple(f"{i:02d}.jpg" for i in range(10) if i != 3)
    assert list(features.skipped) == ["03.jpg"]
    assert len(features.hr) == len(features.lr) == 9
    with pytest.raises(ImageError, match=r"03\.jpg cannot be read"):
        extract_features(backbone, images, DEGRADATION, tmp_path)


def test_a_skipped_image_that_can_be_read_later_is_computed(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    images = open_images(image_folder)
    broken = [3]

    def read(index: int) -> torch.Tensor:
        if index in broken:
            raise ImageError(f"image {index} is away")
        return images.read(index)

    flaky = dataclasses.replace(images, read=read)
    first = extract_features(backbone, flaky, DEGRADATION, tmp_path, part_rows=4, on_error="skip")
    assert len(first.ids) == 9
    broken.clear()
    again = extract_features(backbone, flaky, DEGRADATION, tmp_path, part_rows=4)
    assert again.ids == images.ids
    assert again.skipped == {}


def test_an_image_skipped_in_one_view_is_left_out_of_both(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    images = open_images(image_folder)
    extract_features(backbone, images, DEGRADATION, tmp_path)

    def read(index: int) -> torch.Tensor:
        if index == 5:
            raise ImageError("image 5 is away")
        return images.read(index)

    features = extract_features(
        backbone,
        dataclasses.replace(images, read=read),
        Degradation(hr_size=32, lr_size=4),
        tmp_path,
        on_error="skip",
    )
    assert features.ids == tuple(f"{i:02d}.jpg" for i in range(10) if i != 5)
    assert len(features.hr) == len(features.lr) == 9


def test_another_architecture_of_the_same_name_and_weights_is_another_store(
    image_folder: Path, tmp_path: Path
) -> None:
    images, rows = open_images(image_folder), []
    for pool in (nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)):
        module = nn.Sequential(pool, nn.Flatten())
        rows.append(extract_features(Backbone(module), images, DEGRADATION, tmp_path).hr)
    assert not torch.equal(*rows)


def test_no_readable_image_at_all(backbone: Backbone, image_folder: Path, tmp_path: Path) -> None:
    for path in image_folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="images: none of 10 could be read"):
        extract_features(
            backbone, open_images(image_folder), DEGRADATION, tmp_path, on_error="skip"
        )


class Constant(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: torch.Tensor) -> Any:
        return (
            self.value.expand(len(images), *self.value.shape) if torch.is_tensor(self.value) else 7
        )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3, 2, 2), r"backbone custom: got output \(10, 3, 2, 2\), wanted \(10, d\)"),
        (None, r"backbone custom: got output int, wanted \(10, d\)"),
        (torch.tensor([1.0, float("nan")]), r"hr features of image 00\.jpg are NaN or infinite"),
    ],
)
def test_bad_outputs_are_named(
    image_folder: Path, tmp_path: Path, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extract_features(
            Backbone(Constant(value)), open_images(image_folder), DEGRADATION, tmp_path
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"part_rows": 0}, "part_rows: got 0"),
        ({"precision": "fp8"}, "precision: got 'fp8', wanted one of 'auto', 'fp32', 'bf16'"),
        ({"compile": "maybe"}, "compile: got 'maybe', wanted one of 'auto', 'on', 'off'"),
        ({"on_error": "warn"}, "on_error: got 'warn', wanted one of 'raise', 'skip'"),
    ],
)
def test_bad_arguments(
    backbone: Backbone, image_folder: Path, tmp_path: Path, arguments: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        extract_features(backbone, open_images(image_folder), DEGRADATION, tmp_path, **arguments)
    assert list(tmp_path.glob("?r-*")) == []


def test_a_fixed_input_size_is_kept_to(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    fixed = dataclasses.replace(backbone, preprocessing=Preprocessing(input_size=224))
    with pytest.raises(ValueError, match="got hr_size=32, backbone tiny wants 224"):
        extract_features(fixed, open_images(image_folder), DEGRADATION, tmp_path)
