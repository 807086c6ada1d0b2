from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featxfer import ImageError, open_images
from featxfer.images import ImageSource, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_a_flat_folder(image_folder: Path) -> None:
    images = open_images(image_folder)
    assert images.ids == tuple(f"{i:02d}.jpg" for i in range(10))
    assert images.targets is None
    assert images.read(3).shape == (3, 43, 57)


def test_an_image_folder_tree_gives_targets(image_folder: Path, tmp_path: Path) -> None:
    for index, path in enumerate(sorted(image_folder.iterdir())):
        folder = tmp_path / "tree" / ("cat" if index < 4 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    images = open_images(tmp_path / "tree")
    assert images.targets == (0,) * 4 + (1,) * 6
    assert images.ids[0] == "cat/00.jpg"


def test_a_list_of_files_keeps_its_order(image_folder: Path) -> None:
    paths = [image_folder / "07.jpg", image_folder / "01.jpg"]
    images = open_images(paths)
    assert torch.equal(images.read(0), read_image(paths[0]))
    assert torch.equal(images.read(1), read_image(paths[1]))


def test_a_dataset_of_pil_images_or_tensors() -> None:
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    images = open_images([(Image.fromarray(PIXELS), 4), (tensor, 2)])
    assert images.targets == (4, 2)
    assert torch.equal(images.read(0), tensor)
    assert torch.equal(images.read(1), tensor)


def test_fingerprints_follow_the_content(image_folder: Path) -> None:
    before = open_images(image_folder).fingerprint
    assert open_images(image_folder).fingerprint == before
    Image.fromarray(PIXELS).save(image_folder / "05.jpg")
    assert open_images(image_folder).fingerprint != before
    first = open_images([(Image.fromarray(PIXELS), 0)])
    other = open_images([(Image.fromarray(255 - PIXELS), 0)])
    assert first.fingerprint != other.fingerprint


def test_modes_become_rgb(tmp_path: Path) -> None:
    grey16 = np.array([[0, 256], [65535, 32768]], dtype=np.uint16)
    Image.fromarray(grey16).save(tmp_path / "16.png")
    assert read_image(tmp_path / "16.png")[0].tolist() == [[0, 1], [255, 128]]
    for mode in ("L", "P", "RGBA", "1"):
        Image.fromarray(PIXELS).convert(mode).save(tmp_path / f"{mode}.png")
        assert read_image(tmp_path / f"{mode}.png").shape == (3, 5, 7)
    Image.fromarray(PIXELS).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert read_image(tmp_path / "cmyk.jpg").shape == (3, 5, 7)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    turned = torch.from_numpy(np.rot90(PIXELS, -1).copy()).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "turned.png"), turned)


@pytest.mark.parametrize("cut", [0, 10, 200])
def test_a_truncated_image_is_named(image_folder: Path, cut: int) -> None:
    path = image_folder / "02.jpg"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ImageError, match=r"image .*02\.jpg cannot be read: "):
        open_images(image_folder).read(2)


def test_damaged_exif_is_an_image_error(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    start = data.index(b"Exif")
    for position in range(start, start + 40):
        for value in (0, 7, 255):
            changed = data[:position] + bytes([value]) + data[position + 1 :]
            (tmp_path / "b.jpg").write_bytes(changed)
            try:
                assert read_image(tmp_path / "b.jpg").shape[0] == 3
            except ImageError as error:
                assert "b.jpg cannot be read" in str(error)  # noqa: PT017 - either is right


def test_a_dataset_that_raises_is_an_image_error() -> None:
    class Broken:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            raise OSError("truncated")

    with pytest.raises(ImageError, match="images: item 0 cannot be read: truncated"):
        open_images(Broken())


def test_32_bit_greyscale_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), dtype=np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ImageError, match="mode F"):
        read_image(tmp_path / "f.tiff")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("/nowhere", FileNotFoundError, "images: /nowhere is not a folder"),
        ([], ValueError, "images: got an empty list"),
        (["/nowhere.jpg"], FileNotFoundError, "images: /nowhere.jpg is not a file"),
        (["a.jpg", "a.jpg"], ValueError, "images: got 'a.jpg' twice"),
        (7, TypeError, "images: got int, wanted a folder"),
        ({}, ValueError, "images: got an empty Dataset"),
        ([("text", 0)], ImageError, "images: item 0 is str"),
    ],
)
def test_bad_sources_are_named(source: ImageSource, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        open_images(source)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: no image"):
        open_images(tmp_path)
