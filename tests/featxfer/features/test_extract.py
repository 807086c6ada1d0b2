from __future__ import annotations

import dataclasses
import json
from collections import Counter
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
    extract_features,
    open_images,
)
from featxfer.features.backbone import frozen, weights_sha256
from featxfer.features.extract import fill_stores, write_skipped
from featxfer.features.store import StoreError

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


def counted(images: Images) -> tuple[Images, list[int]]:
    """The images, and which of them have been read."""
    read: list[int] = []

    def note(index: int) -> torch.Tensor:
        read.append(index)
        return images.read(index)

    return dataclasses.replace(images, read=note), read


def test_a_second_run_reads_the_store_and_one_image(
    backbone: Backbone,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each part once, but for the one whose first row is compared."""
    images, read = counted(open_images(image_folder))
    first = extract_features(backbone, images, DEGRADATION, tmp_path, part_rows=2)
    read.clear()
    opened: Counter[Path] = Counter()
    batches: list[int] = []
    backbone.module.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    read_bytes = Path.read_bytes

    def note(path: Path) -> bytes:
        opened[path] += 1
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", note)
    again = extract_features(backbone, images, DEGRADATION, tmp_path, part_rows=2)
    assert torch.equal(first.hr, again.hr)
    assert torch.equal(first.lr, again.lr)
    assert (read, batches) == ([0], [1, 1])
    assert {p.name[:11]: n for p, n in opened.items()} == {
        f"part-{part:06d}": 2 if part == 0 else 1 for part in range(5)
    }
    assert len(opened) == 10
    assert capsys.readouterr().err == ""


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
    assert decoded[100:] == [0, 4, 5, 6, 7, 8, 9], "two parts were finished, and one is checked"
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


class Scaled(nn.Module):
    """Pooled pixels, times a number that no layer shows."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.scale * images.mean((2, 3))


def edited(self: Scaled, images: torch.Tensor) -> torch.Tensor:
    """Another `forward`, of the same attributes."""
    self.calls += 1
    return self.scale * images.amax((2, 3))


def test_a_plain_attribute_is_part_of_the_key(image_folder: Path, tmp_path: Path) -> None:
    images, module = open_images(image_folder), Scaled(2.0)
    first = extract_features(Backbone(module), images, DEGRADATION, tmp_path)
    module.scale = 4.0
    other = extract_features(Backbone(module), images, DEGRADATION, tmp_path)
    assert torch.equal(other.hr, 2 * first.hr)
    module.scale = 2.0
    again = extract_features(Backbone(module), images, DEGRADATION, tmp_path)
    assert module.calls > 2
    assert again.keys == first.keys
    assert set(other.keys.values()).isdisjoint(first.keys.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_of_an_edited_forward_are_told_and_computed_anew(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
) -> None:
    images, backbone = open_images(image_folder), Backbone(Scaled(2.0))
    options: dict[str, Any] = {"part_rows": 4, "precision": precision}
    first = extract_features(backbone, images, DEGRADATION, tmp_path, **options)

    monkeypatch.setattr(Scaled, "forward", edited)
    wanted = extract_features(backbone, images, DEGRADATION, tmp_path / "new", **options)
    assert capsys.readouterr().err == ""
    found = extract_features(backbone, images, DEGRADATION, tmp_path, **options)
    assert found.keys == first.keys, "no key knows of it"
    assert torch.equal(found.hr, wanted.hr)
    assert torch.equal(found.lr, wanted.lr)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"featxfer: {tmp_path / view}-{key} has other {view} features of image 00.jpg than are "
        "computed now; its 3 finished parts are computed anew"
        for view, key in found.keys.items()
    ]
    extract_features(backbone, images, DEGRADATION, tmp_path, **options)
    assert capsys.readouterr().err == ""


def test_rows_of_an_edited_degradation_are_computed_anew_in_its_view_alone(
    backbone: Backbone,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = open_images(image_folder)
    first = extract_features(backbone, images, Noisy(32, 8), tmp_path)
    monkeypatch.setattr(Noisy, "corrupt", lambda self, small: 255 - small)
    other = extract_features(backbone, images, Noisy(32, 8), tmp_path)
    assert other.keys == first.keys
    assert torch.equal(other.hr, first.hr)
    assert not torch.allclose(other.lr, first.lr, rtol=0.01)
    assert capsys.readouterr().err.count("has other lr features") == 1


def test_the_first_image_that_can_be_read_is_compared(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, backbone = open_images(image_folder), Backbone(Scaled(2.0))
    extract_features(backbone, images, DEGRADATION, tmp_path, part_rows=2)

    def read(index: int) -> torch.Tensor:
        if index < 3:
            raise ImageError(f"image {index} is away")
        return images.read(index)

    flaky = dataclasses.replace(images, read=read)
    assert len(extract_features(backbone, flaky, DEGRADATION, tmp_path, part_rows=2).ids) == 10
    monkeypatch.setattr(Scaled, "forward", edited)
    found = extract_features(backbone, flaky, DEGRADATION, tmp_path, part_rows=2, on_error="skip")
    assert "features of image 03.jpg than" in capsys.readouterr().err
    assert found.ids == images.ids[3:]


@pytest.mark.parametrize(
    ("dtype", "precision", "anew"),
    [
        (torch.float32, "fp32", True),
        (torch.float32, "bf16", False),
        (torch.bfloat16, "fp32", False),
    ],
)
def test_what_may_be_rounding_is_no_change(
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: torch.dtype,
    precision: str,
    anew: bool,
) -> None:
    images, module = open_images(image_folder), Scaled(2.0)
    module.weight = nn.Parameter(torch.ones(1, dtype=dtype))
    extract_features(Backbone(module), images, DEGRADATION, tmp_path, precision=precision)

    def nearly(self: Scaled, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.scale * images.mean((2, 3)) * 1.01

    monkeypatch.setattr(Scaled, "forward", nearly)
    extract_features(Backbone(module), images, DEGRADATION, tmp_path, precision=precision)
    assert ("computed anew" in capsys.readouterr().err) == anew


def test_a_backbone_that_gives_other_features_each_time_is_named(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, backbone = open_images(image_folder), Backbone(Scaled(2.0))
    extract_features(backbone, images, DEGRADATION, tmp_path)

    def counting(self: Scaled, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return images.mean((2, 3)) * self.calls

    monkeypatch.setattr(Scaled, "forward", counting)
    before = sorted(tmp_path.rglob("part-*"))
    with pytest.raises(ValueError, match=r"custom: got other features of image 00\.jpg each time"):
        extract_features(backbone, images, DEGRADATION, tmp_path)
    assert sorted(tmp_path.rglob("part-*")) == before


def test_a_process_drops_only_what_was_there_when_it_looked(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finds the same old rows and is done while this one compares."""
    images, backbone = open_images(image_folder), Backbone(Scaled(2.0))
    options: dict[str, Any] = {"part_rows": 4, "world_size": 2}
    extract_features(backbone, images, DEGRADATION, tmp_path, part_rows=4)
    monkeypatch.setattr(Scaled, "forward", edited)
    begun: list[int] = []

    def read(index: int) -> torch.Tensor:
        begun.append(index)
        if len(begun) == 1:
            fill_stores(backbone, images, DEGRADATION, tmp_path, rank=0, **options)
        return images.read(index)

    slow = dataclasses.replace(images, read=read)
    stores = fill_stores(backbone, slow, DEGRADATION, tmp_path, rank=1, **options)
    wanted = extract_features(backbone, images, DEGRADATION, tmp_path / "new", part_rows=4)
    assert torch.equal(stores["hr"].read().features, wanted.hr)
    assert torch.equal(stores["lr"].read().features, wanted.lr)


@dataclasses.dataclass(frozen=True)
class Noisy(Degradation):
    """Noise from a generator of its own, whose seed is the image's pixels."""

    def corrupt(self, small: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(small.sum()))
        noise = torch.randint(-20, 21, small.shape, generator=generator, dtype=torch.int16)
        return (small.to(torch.int16) + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("view", [DEGRADATION, Noisy(32, 8)], ids=["plain", "noisy"])
def test_any_number_of_reader_threads_gives_the_same_bits(
    backbone: Backbone,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    view: Degradation,
) -> None:
    files = [path for _ in range(3) for path in sorted(image_folder.iterdir())]
    for number, path in enumerate(files[10:]):
        path.with_name(f"more-{number:02d}.jpg").write_bytes(path.read_bytes())
    images, found, state = open_images(image_folder), [], torch.get_rng_state()
    for readers in (1, 2, 4, 16):
        monkeypatch.setattr(
            "featxfer.features.readers.reader_count", lambda readers=readers: readers
        )
        cache = tmp_path / str(readers)
        found.append(extract_features(backbone, images, view, cache, batch_size=4, part_rows=8))
    assert len(found[0].ids) == 30
    for other in found[1:]:
        assert torch.equal(other.hr, found[0].hr)
        assert torch.equal(other.lr, found[0].lr)
    assert torch.equal(torch.get_rng_state(), state)


def test_torchs_own_threads_change_rounding_at_the_most(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    images, found, before = open_images(image_folder), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 4, 16):
            torch.set_num_threads(threads)
            cache = tmp_path / str(threads)
            found.append(extract_features(backbone, images, Noisy(32, 8), cache))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(other.hr, found[0].hr, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.lr, found[0].lr, rtol=1e-5, atol=1e-6)


def test_features_are_taken_whatever_the_default_device(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    (image_folder / "03.jpg").write_bytes(b"no image")
    images = open_images(image_folder)
    wanted = extract_features(
        backbone, images, DEGRADATION, tmp_path / "cpu", part_rows=1, on_error="skip"
    )
    with torch.device("meta"):
        for _ in range(2):
            found = extract_features(
                backbone, images, DEGRADATION, tmp_path / "meta", part_rows=1, on_error="skip"
            )
    assert torch.equal(found.hr, wanted.hr)
    assert torch.equal(found.lr, wanted.lr)


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


def test_what_was_skipped_is_in_one_list_that_stderr_names(
    backbone: Backbone, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (image_folder / "03.jpg").read_bytes()
    for name in ("03.jpg", "07.jpg"):
        (image_folder / name).write_bytes(b"no image")
    images = open_images(image_folder)
    options: dict[str, Any] = {"part_rows": 4, "on_error": "skip"}
    for _ in range(2):
        features = extract_features(backbone, images, DEGRADATION, tmp_path, **options)
        (path,) = tmp_path.rglob("skipped.json")
        assert json.loads(path.read_text()) == features.skipped
        assert list(features.skipped) == ["03.jpg", "07.jpg"]
        assert capsys.readouterr().err.splitlines() == [
            f"featxfer: 2 of 10 images could not be read and are left out, see {path}"
        ]
    status = (image_folder / "03.jpg").stat()
    (image_folder / "03.jpg").write_bytes(whole)
    (image_folder / "07.jpg").write_bytes(whole)
    mended = dataclasses.replace(open_images(image_folder), fingerprint=images.fingerprint)
    assert status.st_size != len(whole)
    assert extract_features(backbone, mended, DEGRADATION, tmp_path, **options).skipped == {}
    assert not path.exists()


def test_processes_together_write_the_list_of_what_was_skipped(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    for name in ("03.jpg", "07.jpg"):
        (image_folder / name).write_bytes(b"no image")
    images = open_images(image_folder)
    for rank in range(3):
        stores = fill_stores(
            backbone, images, DEGRADATION, tmp_path,
            part_rows=2, on_error="skip", rank=rank, world_size=3,
        )  # fmt: skip
    listed = json.loads((stores["hr"].directory / "skipped.json").read_text())
    assert list(listed) == ["03.jpg", "07.jpg"]


def test_a_name_of_a_skipped_image_may_hold_any_bytes(tmp_path: Path) -> None:
    write_skipped(tmp_path / "skipped.json", {"a\udcff.jpg": "é"}, 2)
    assert json.loads((tmp_path / "skipped.json").read_bytes()) == {"a\udcff.jpg": "é"}


def test_an_image_that_was_skipped_ends_a_later_run_before_anything_is_computed(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    (image_folder / "09.jpg").write_bytes(b"no image")
    images = open_images(image_folder)
    stores = fill_stores(backbone, images, DEGRADATION, tmp_path, part_rows=4, on_error="skip")
    for store in stores.values():
        store.drop_part(0)
    with pytest.raises(ImageError, match=r"09\.jpg cannot be read"):
        extract_features(backbone, images, DEGRADATION, tmp_path, part_rows=4)
    assert all(store.missing_parts() == [0] for store in stores.values())


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


def test_features_without_some_images(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    features = extract_features(backbone, open_images(image_folder), DEGRADATION, tmp_path)
    left = features.without({"02.jpg", "05.jpg"})
    kept = [index for index in range(10) if index not in (2, 5)]
    assert left.ids == tuple(features.ids[index] for index in kept)
    assert torch.equal(left.hr, features.hr[kept])
    assert torch.equal(left.lr, features.lr[kept])


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
