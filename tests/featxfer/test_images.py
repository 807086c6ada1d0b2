from __future__ import annotations

import io
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featxfer import Backbone, Degradation, ImageError, extract_features, open_images
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
        (torch.zeros(4, 3, 8, 8), ImageError, r"item 0 is Tensor, wanted a pair \(image, target\)"),
        (__file__, FileNotFoundError, r"is not a folder, wanted \[path\] for one file"),
    ],
)
def test_bad_sources_are_named(source: ImageSource, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        open_images(source)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: no image"):
        open_images(tmp_path)


def picture(height: int = 24, width: int = 36) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth, so that lossy formats keep it."""
    rows, columns = np.mgrid[:height, :width]
    channels = [255 * rows / height, 255 * columns / width, np.full((height, width), 128)]
    return np.stack(channels, -1).astype(np.uint8)


def encoded(format: str, image: Image.Image | None = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(picture()) if image is None else image).save(stream, format, **options)
    return stream.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG file that says it is so large, and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    data = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def odd_files() -> dict[str, tuple[bytes, np.ndarray[Any, Any] | None]]:
    """Bytes by name, and the pixels that are right, or None for a file that must be refused."""
    whole = picture()
    image = Image.fromarray(whole)
    jpeg = encoded("JPEG", quality=95)
    files: dict[str, tuple[bytes, np.ndarray[Any, Any] | None]] = {}
    for share in range(0, 100, 5):
        files[f"cut-{share:02d}.jpg"] = jpeg[: len(jpeg) * share // 100], None
    png = encoded("PNG")
    for share in (10, 40, 70):
        files[f"cut-{share}.png"] = png[: len(png) * share // 100], None
        webp = encoded("WEBP", quality=95)
        files[f"cut-{share}.webp"] = webp[: len(webp) * share // 100], None
    files["whole.jpg"] = jpeg, whole
    files["progressive.jpg"] = encoded("JPEG", quality=95, progressive=True), whole
    files["whole.png"] = png, whole
    files["whole.webp"] = encoded("WEBP", lossless=True), whole
    files["whole.bmp"] = encoded("BMP"), whole
    files["whole.tif"] = encoded("TIFF"), whole
    files["whole.ppm"] = encoded("PPM"), whole
    files["lzw.tiff"] = encoded("TIFF", compression="tiff_lzw"), whole
    files["upper.JPG"] = jpeg, whole
    files["png-named.jpg"] = png, whole
    files["jpg-named.png"] = jpeg, whole
    files["gif-named.png"] = encoded("GIF"), None
    files["ico-named.png"] = encoded("ICO"), None
    files["text.jpg"] = b"no image at all", None
    files["zero-bytes.png"] = bytes(4096), None
    files["svg-named.png"] = b"<svg xmlns='http://www.w3.org/2000/svg'/>", None
    files["postscript.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", None
    files["cmyk.jpg"] = encoded("JPEG", image.convert("CMYK"), quality=95), whole
    grey = whole.mean(-1).astype(np.uint8)
    files["grey.jpg"] = encoded("JPEG", Image.fromarray(grey), quality=95), grey[..., None]
    files["grey.png"] = encoded("PNG", Image.fromarray(grey)), grey[..., None]
    deep = Image.fromarray(grey.astype(np.uint16) << 8)
    files["sixteen.png"] = encoded("PNG", deep), grey[..., None]
    files["sixteen.tif"] = encoded("TIFF", deep), grey[..., None]
    files["bits.png"] = encoded("PNG", Image.fromarray(grey > 99)), 255 * (grey > 99)[..., None]
    palette = image.quantize(256)
    files["palette.png"] = encoded("PNG", palette), np.array(palette.convert("RGB"))
    seen = np.array(palette.convert("RGB"))
    files["palette-alpha.png"] = encoded("PNG", palette, transparency=3), seen
    clear = image.copy()
    clear.putalpha(90)
    files["alpha.png"] = encoded("PNG", clear), whole
    files["grey-alpha.png"] = encoded("PNG", clear.convert("LA")), None
    files["grey-alpha.png"] = files["grey-alpha.png"][0], np.array(image.convert("L"))[..., None]
    for side in ((1, 1), (1, 20_000), (20_000, 1), (3, 5)):
        some = picture(*side)
        files[f"{side[0]}x{side[1]}.png"] = encoded("PNG", Image.fromarray(some)), some
    for turn, wanted in {
        2: whole[:, ::-1], 3: whole[::-1, ::-1], 4: whole[::-1], 5: whole.transpose(1, 0, 2),
        6: np.rot90(whole, -1), 7: np.rot90(whole, 2).transpose(1, 0, 2), 8: np.rot90(whole, 1),
        9: whole,
    }.items():  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = turn
        files[f"turned-{turn}.png"] = encoded("PNG", exif=exif), wanted
    frames = [Image.fromarray(np.full_like(whole, value)) for value in (10, 200)]
    moving = {"save_all": True, "append_images": [image], "lossless": True}
    files["animated.webp"] = encoded("WEBP", frames[0], **moving), np.full_like(whole, 10)
    moving = {"save_all": True, "append_images": [image]}
    files["animated.png"] = encoded("PNG", frames[1], **moving), np.full_like(whole, 200)
    files["pages.tif"] = encoded("TIFF", frames[0], **moving), np.full_like(whole, 10)
    files["bomb.png"] = png_of(2**15, 2**14), None
    files["bomb-wide.png"] = png_of(2**31 - 1, 1), None
    files["bomb-none.png"] = png_of(0, 0), None
    files["long-text.png"] = png[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt" + png[33:], None
    return files


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("name", "content"), odd_files().items())
def test_odd_files_give_the_right_pixels_or_one_error_that_names_them(
    name: str, content: tuple[bytes, np.ndarray[Any, Any] | None], tmp_path: Path
) -> None:
    data, wanted = content
    (tmp_path / name).write_bytes(data)
    if wanted is None:
        with pytest.raises(ImageError, match=f"{re.escape(name)} cannot be read: .+"):
            read_image(tmp_path / name)
        return
    pixels = read_image(tmp_path / name)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, *wanted.shape[:2])
    difference = pixels.permute(1, 2, 0).numpy().astype(int) - wanted
    lossy = data.startswith((b"\xff\xd8",))
    assert abs(difference).max() <= (12 if lossy else 0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_odd_files_leave_their_neighbours_as_they_are_and_where_they_are(
    image_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    """Every third of 70 images is whole; the folder lies in a folder with pipes and folders."""
    files, whole = odd_files(), encoded("JPEG", quality=95)
    folder = tmp_path / "odd"
    folder.mkdir()
    for index, (name, (data, _)) in enumerate(files.items()):
        (folder / f"{index:02d}-{name}").write_bytes(data)
        (folder / f"{index:02d}-zz.jpg").write_bytes(whole)
    (folder / "directory.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    images = open_images(folder)
    assert list(images.ids) == sorted(images.ids)
    assert len(images) == 2 * len(files)
    view = Degradation(hr_size=32, lr_size=8)
    features = extract_features(backbone, images, view, tmp_path / "cache", on_error="skip")
    refused = {
        f"{index:02d}-{name}" for index, (name, (_, w)) in enumerate(files.items()) if w is None
    }
    assert set(features.skipped) == refused
    assert features.ids == tuple(name for name in images.ids if name not in refused)
    mine = torch.tensor([name.endswith("zz.jpg") for name in features.ids])
    torch.testing.assert_close(features.hr[mine], features.hr[mine][:1].expand(len(files), -1))


def test_pipes_and_folders_are_refused_and_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg", "nothing.jpg"):
        with pytest.raises(ImageError, match=f"{name} cannot be read: it is not a file"):
            read_image(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=f"{name} is not a file"):
            open_images([tmp_path / name])
