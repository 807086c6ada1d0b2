from __future__ import annotations

import importlib.util
import io
import os
import re
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from featxfer import Backbone, Degradation, ImageError, extract_features, open_images
from featxfer.views import decode
from featxfer.views.augment import cropped, flipped
from featxfer.views.decode import read_image, to_pixels
from featxfer.views.images import ImageSource

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
def test_an_image_that_ends_in_its_header_is_named(image_folder: Path, cut: int) -> None:
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


class Partly:
    """Three images and one that raises; `broken` says where."""

    def __init__(self, *broken: int) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if index in self.broken:
            raise OSError("it is away")
        return Image.fromarray(np.full((9, 9, 3), 20 * index, dtype=np.uint8)), index


def test_an_unreadable_item_of_a_dataset_is_an_error_when_it_is_read() -> None:
    images = open_images(Partly(2))
    assert images.targets == (0, 1, None, 3)
    assert images.ids == open_images(Partly()).ids
    assert images.fingerprint != open_images(Partly()).fingerprint
    assert images.read(3).unique().tolist() == [60]
    with pytest.raises(ImageError, match="images: item 2 cannot be read: it is away"):
        images.read(2)


def test_unreadable_items_of_a_dataset_can_be_skipped(backbone: Backbone, tmp_path: Path) -> None:
    view = Degradation(hr_size=32, lr_size=8)
    found = extract_features(backbone, open_images(Partly(1)), view, tmp_path, on_error="skip")
    assert found.ids == ("00000000", "00000002", "00000003")
    assert found.skipped == {"00000001": "images: item 1 cannot be read: it is away"}


def test_a_dataset_without_a_readable_item_is_refused() -> None:
    with pytest.raises(ImageError, match="images: item 0 cannot be read: it is away"):
        open_images(Partly(0, 1, 2, 3))


def test_a_picture_that_cannot_be_decoded_is_an_unreadable_item(tmp_path: Path) -> None:
    data = encoded("PNG")
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "a.png") as cut:
        images = open_images([(Image.fromarray(PIXELS), 0), (cut, 7)])
        assert images.targets == (0, 7)
        with pytest.raises(ImageError, match="images: item 1 cannot be read: "):
            images.read(1)


GREY12 = np.array([[100, 1000], [2000, 4095]], dtype=np.uint16)


def saved(folder: Path, kind: str) -> Path:
    """`GREY12` in a file of this kind."""
    path = folder / f"deep{kind}"
    whole = {".tif": np.float32, ".tiff": np.int32}.get(kind, np.uint16)
    image = Image.fromarray(GREY12.astype(whole))
    if kind == ".be.tif":  # big-endian
        image = Image.frombytes("I;16B", (2, 2), GREY12.astype(">u2").tobytes())
    image.save(path)
    return path


@pytest.mark.parametrize("kind", [".png", ".tif", ".tiff", ".be.tif"])
def test_deep_greyscale_is_read_over_the_range_that_is_there_or_by_its_depth(
    kind: str, tmp_path: Path
) -> None:
    """12 bits in 16-bit files, in 32-bit integers and in 32-bit floats."""
    path = saved(tmp_path, kind)
    stretched = np.round((GREY12 - 100.0) * 255 / 3995).astype(int)
    assert read_image(path).tolist() == [stretched.tolist()] * 3
    for depth in (12, 16):
        wanted = np.round(GREY12 * 255.0 / (2**depth - 1)).astype(int)
        images = open_images([path], depth=depth)
        assert images.read(0).tolist() == [wanted.tolist()] * 3
        assert images.depth == flipped(images).depth == cropped(images, 0).depth == depth
    with pytest.raises(ImageError, match=r"values from 100 to 4095, wanted 0 to 1023 \(depth=10\)"):
        read_image(path, 10)


def test_thermal_images_keep_their_small_range(tmp_path: Path) -> None:
    """Of 300 among 65536 values; the upper 8 bits of all are the same but for one step."""
    thermal = np.linspace(29_500, 29_800, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(thermal).save(tmp_path / "t.png")
    pixels = read_image(tmp_path / "t.png")
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)
    assert pixels.unique().numel() == 64


def test_constant_deep_greyscale_is_mid_grey_unless_its_depth_is_said() -> None:
    deep = Image.fromarray(np.full((2, 2), 3000, dtype=np.uint16))
    assert to_pixels(deep).unique().tolist() == [128]
    assert to_pixels(deep, 12).unique().tolist() == [187]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("depth", [None, 8])
def test_deep_greyscale_that_is_not_finite_is_refused(
    value: float, depth: int | None, tmp_path: Path
) -> None:
    Image.fromarray(np.array([[1, value]], dtype=np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ImageError, match=r"f\.tiff cannot be read: it has values .* not finite"):
        read_image(tmp_path / "f.tiff", depth)


def test_depth_is_part_of_the_fingerprint_and_leaves_8_bits_alone(image_folder: Path) -> None:
    plain, deep = open_images(image_folder), open_images(image_folder, depth=12)
    assert torch.equal(plain.read(0), deep.read(0))
    assert (plain.depth, deep.depth) == (None, 12)
    assert plain.fingerprint != deep.fingerprint
    pairs = [(Image.fromarray(GREY12), 0)]
    assert open_images(pairs, depth=12).read(0).tolist() == to_pixels(pairs[0][0], 12).tolist()
    assert open_images(pairs).fingerprint != open_images(pairs, depth=12).fingerprint
    assert open_images(deep) is open_images(deep, depth=12) is deep


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (0, "depth: got 0, wanted an int >= 1"),
        (33, "depth: got 33, wanted at most 32"),
        (8.0, "depth: got 8.0, wanted an int"),
        (True, "depth: got True, wanted an int"),
    ],
)
def test_bad_depths_are_named(image_folder: Path, depth: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_images(image_folder, depth=depth)
    with pytest.raises(ValueError, match="depth: got 12 for images that are open"):
        open_images(open_images(image_folder), depth=12)


def png_of_deep_colour(value: int) -> bytes:
    """One row of two pixels, 16 bits a channel; Pillow writes none."""
    row = b"\0" + struct.pack(">6H", *[value] * 6)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    return png_with(header, zlib.compress(row))


def test_colour_of_16_bits_whose_upper_bits_are_empty_is_not_read_as_black(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(png_of_deep_colour(60_000))
    assert read_image(path).unique().tolist() == [60_000 >> 8]
    with pytest.raises(ImageError, match=r"16-bit colour, .* which go to 234 of 255; wanted depth"):
        read_image(path, 12)
    path.write_bytes(png_of_deep_colour(4095))
    with pytest.raises(ImageError, match=r"16-bit colour, .* which go to 15 of 255; wanted depth"):
        read_image(path)
    assert read_image(path, 16).unique().tolist() == [15]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_on_white(mode: str, tmp_path: Path) -> None:
    """Opaque, half clear and clear over black."""
    image = Image.fromarray(np.array([[100, 100, 0]], dtype=np.uint8)).convert(mode)
    image.putalpha(Image.fromarray(np.array([[255, 127, 0]], dtype=np.uint8)))
    image.save(tmp_path / "a.png")
    for pixels in (read_image(tmp_path / "a.png"), to_pixels(image)):
        assert pixels.tolist() == [[[100, 178, 255]]] * 3
    if mode == "LA":
        palette = image.convert("L").convert("P").convert("PA")
        palette.putalpha(image.getchannel("A"))
        assert to_pixels(palette).tolist() == [[[100, 178, 255]]] * 3


@pytest.mark.parametrize(
    ("mode", "clear"), [("P", 0), ("P", b"\0\xff"), ("L", 0), ("RGB", (0, 0, 0)), ("1", 0)]
)
def test_the_value_that_is_marked_transparent_is_white(
    mode: str, clear: Any, tmp_path: Path
) -> None:
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8))
    if mode == "P":
        image.putpalette([0, 0, 0] * 255 + [90, 90, 90])
    else:
        image = image.convert(mode)
    image.save(tmp_path / "a.png", transparency=clear)
    other = 90 if mode == "P" else 255
    assert read_image(tmp_path / "a.png").tolist() == [[[255, other]]] * 3
    image.save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").tolist() == [[[0, other]]] * 3


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_that_lacks_its_last_bytes_is_read_as_far_as_it_goes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    data = encoded("JPEG", Image.fromarray(picture(160, 160)), quality=95, **options)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data)
    whole = read_image(path)
    for lacking in range(3, len(data) // 3, 37):  # without its end mark it may be whole
        path.write_bytes(data[:-lacking])
        with pytest.warns(UserWarning, match=r"image .*cut\.jpg lacks its last bytes: it is read"):
            pixels = read_image(path)
        assert pixels.shape == whole.shape
        assert torch.equal(pixels[:, :16], whole[:, :16]) or "progressive" in options
        assert float((pixels.float() - whole.float()).abs().mean()) < 40
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_jpeg_that_ends_before_its_first_pixels_is_refused(tmp_path: Path) -> None:
    data = encoded("JPEG")
    scan = data.index(b"\xff\xda")
    for end in (scan, scan + 7, scan + 14):
        (tmp_path / "cut.jpg").write_bytes(data[:end])
        with pytest.raises(ImageError, match=r"cut\.jpg cannot be read: "):
            read_image(tmp_path / "cut.jpg")


def test_many_threads_read_what_one_reads(tmp_path: Path) -> None:
    files = {name: data for name, (data, wanted) in odd_files().items() if wanted is not None}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    images = open_images([tmp_path / name for name in files])
    alone = [images.read(index) for index in range(len(images))]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(images.read, list(range(len(images))) * 3))
    assert all(torch.equal(pixels, alone[i % len(alone)]) for i, pixels in enumerate(found))


@pytest.mark.parametrize("order", ["patched first", "imported first"])
def test_packages_that_replace_pillows_open_do_not_change_what_is_read(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def foreign(*args: object, **options: object) -> None:
        raise ModuleNotFoundError("pi-heif is wanted")

    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    (tmp_path / "b.png").write_bytes(b"no image")
    monkeypatch.setattr(Image, "open", foreign)
    module = decode
    if order == "patched first":
        spec = importlib.util.spec_from_file_location("fresh_decode", decode.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "fresh_decode", module)
        spec.loader.exec_module(module)
    pixels = module.read_image(tmp_path / "a.png")
    assert torch.equal(pixels.permute(1, 2, 0), torch.from_numpy(picture()))
    with pytest.raises(
        module.ImageError, match=r"b\.png cannot be read: its content is none of JP"
    ):
        module.read_image(tmp_path / "b.png")


def tree(folder: Path, *names: str) -> Path:
    """A folder with these files, of which those that end so are PNG images."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded("PNG") if name.lower().endswith(".png") else b"")
    return folder


def test_a_folder_of_images_alone_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(open_images(tree(tmp_path, "a.png", "B.PNG"))) == 2
    assert capsys.readouterr().err == ""


def test_what_is_left_out_of_a_folder_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("a.png", "a.txt", "b.TXT", "c.md", "README", ".DS_Store", ".cache/x.png")
    images = open_images(tree(tmp_path / "photos", *names))
    assert images.ids == ("a.png",)
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")
    (tmp_path / "photos" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert capsys.readouterr().err == (
        f"featxfer: {tmp_path}/photos/: 1 images; left out: "
        "4 of other kinds (.txt 2, .md 1, no ending 1), 2 hidden\n"
    )
    open_images(tmp_path / "photos")
    assert capsys.readouterr().err.endswith(
        "(.txt 2, .md 1, no ending 1), 2 hidden, 2 no ordinary files\n"
    )


def test_images_beside_subfolders_with_images_are_all_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = open_images(tree(tmp_path, "z.png", "b/c/d/1.png", "b/0.png", "a/9.png"))
    assert images.ids == ("a/9.png", "b/0.png", "b/c/d/1.png", "z.png")
    assert images.targets is None
    said = capsys.readouterr().err
    assert said == (
        f"featxfer: {tmp_path}/: 4 images; no targets, as 1 images lie beside the subfolders\n"
    )


def test_the_classes_of_a_deep_tree_are_its_first_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = open_images(tree(tmp_path, "cat/1.png", "dog/big/old/2.png", "dog/3.png", ".x/4.png"))
    assert images.ids == ("cat/1.png", "dog/3.png", "dog/big/old/2.png")
    assert images.targets == (0, 1, 1)
    (tmp_path / "cow").mkdir()
    assert open_images(tmp_path).targets == (0, 2, 2)
    assert capsys.readouterr().err.endswith("left out: 1 hidden; classes without images: cow\n")


def test_crops_are_parts_of_images_and_the_same_every_time(image_folder: Path) -> None:
    images = open_images(image_folder)
    crops = [cropped(images, draw, least=0.5) for draw in (0, 0, 1)]
    first, again, other = ([part.read(i) for i in range(len(images))] for part in crops)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(first, other, strict=False))
    assert crops[0].fingerprint == crops[1].fingerprint != crops[2].fingerprint
    for index, crop in enumerate(first):
        whole = images.read(index)
        assert 0.4 < crop[0].numel() / whole[0].numel() <= 1
        windows = whole.unfold(1, crop.shape[1], 1).unfold(2, crop.shape[2], 1)
        found = [
            (windows == part[:, None, None]).all(-1).all(-1).all(0)
            for part in (crop, crop.flip(-1))
        ]
        assert bool(torch.stack(found).any())
    with pytest.raises(ValueError, match=r"least: got 0, wanted a share in \(0, 1\]"):
        cropped(images, 0, least=0)


def test_linked_folders_are_followed_and_never_for_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tree(tmp_path / "photos", "cat/1.png")
    tree(tmp_path / "elsewhere", "2.png")
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    (folder / "cat" / "again").symlink_to(folder)
    images = open_images(folder)
    assert (images.ids, images.targets) == (("cat/1.png", "dog/2.png"), (0, 1))
    assert capsys.readouterr().err.endswith("2 images; left out: 1 links to a folder above\n")


def test_formats_that_this_pillow_lacks_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode.suffixes.cache_clear()
    there = [name for name in features.get_supported() if name != "avif"]
    with monkeypatch.context() as patch:
        patch.setattr(features, "get_supported", lambda: there)
        assert ".avif" not in decode.suffixes()
    assert len(open_images(tree(tmp_path, "a.png", "b.avif", "c.heic"))) == 1
    assert "2 of other kinds (.avif 1, .heic 1)" in capsys.readouterr().err
    monkeypatch.setitem(Image.OPEN, "PNG", (Image.OPEN["PNG"][0], lambda start: "no PNG here"))
    with pytest.raises(ImageError, match=r"a\.png cannot be read: no PNG here"):
        read_image(tmp_path / "a.png")
    decode.suffixes.cache_clear()


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
        ([(torch.zeros(3, 8, 8), 0)], ImageError, r"item 0 is float32 of shape \(3, 8, 8\), want"),
        ([(torch.ones(1, 8, 8).byte(), 0)], ImageError, r"item 0 is uint8 of shape \(1, 8, 8\)"),
        (__file__, FileNotFoundError, r"is not a folder, wanted \[path\] for one file"),
    ],
)
def test_bad_sources_are_named(source: ImageSource, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        open_images(source)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: no image"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match=r"no image .*; left out: 1 of other kinds \(\.txt 1\)"):
        open_images(tree(tmp_path, "deep/a.txt"))


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
    return png_with(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), zlib.compress(b""))


def png_with(header: bytes, pixels: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def odd_files() -> dict[str, tuple[bytes, np.ndarray[Any, Any] | None]]:
    """Bytes by name, and the pixels that are right, or None for a file that must be refused."""
    whole = picture()
    image = Image.fromarray(whole)
    jpeg = encoded("JPEG", quality=95)
    files: dict[str, tuple[bytes, np.ndarray[Any, Any] | None]] = {}
    for share in range(0, 65, 5):  # its header is that long
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
    few = image.quantize(64)
    gif = encoded("GIF", few)
    for name in ("whole.gif", "gif-named.png"):
        files[name] = gif, np.array(few.convert("RGB"))
    files["cut.gif"] = gif[: len(gif) // 2], None
    files["whole.jfif"] = jpeg, whole
    for name in ("whole.jp2", "whole.j2k", "jp2-named.jpg"):
        files[name] = encoded("JPEG2000", no_jp2=name.endswith("j2k")), whole
    for lacking in (2, 99):  # all that it shows are 99
        files[f"cut-{lacking}.jp2"] = files["whole.jp2"][0][:-lacking], None
    files["ascii.pgm"] = b"P2 2 1 255 9 200", np.array([[[9], [200]]])
    files["ico-named.png"] = encoded("ICO"), None
    files["text.jpg"] = b"no image at all", None
    files["zero-bytes.png"] = bytes(4096), None
    files["svg-named.png"] = b"<svg xmlns='http://www.w3.org/2000/svg'/>", None
    files["postscript.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", None
    files["cmyk.jpg"] = encoded("JPEG", image.convert("CMYK"), quality=95), whole
    grey = whole.mean(-1).astype(np.uint8)
    files["grey.jpg"] = encoded("JPEG", Image.fromarray(grey), quality=95), grey[..., None]
    files["grey.png"] = encoded("PNG", Image.fromarray(grey)), grey[..., None]
    deep = Image.fromarray(grey.astype(np.uint16) << 4)
    span = np.round((grey - float(grey.min())) * 255 / float(np.ptp(grey)))[..., None]
    files["sixteen.png"] = encoded("PNG", deep), span
    files["sixteen.tif"] = encoded("TIFF", deep), span
    files["bits.png"] = encoded("PNG", Image.fromarray(grey > 99)), 255 * (grey > 99)[..., None]
    palette = image.quantize(256)
    files["palette.png"] = encoded("PNG", palette), np.array(palette.convert("RGB"))
    seen = np.array(palette.convert("RGB"))
    seen[np.asarray(palette) == 3] = 255
    files["palette-alpha.png"] = encoded("PNG", palette, transparency=3), seen
    clear = image.copy()
    clear.putalpha(51)  # a fifth
    files["alpha.png"] = encoded("PNG", clear), np.round(204 + whole / 5)
    on_white = np.round(204 + np.array(image.convert("L"))[..., None] / 5)
    files["grey-alpha.png"] = encoded("PNG", clear.convert("LA")), on_white
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
    files["animated.gif"] = encoded("GIF", frames[0], **moving), np.full_like(whole, 10)
    files["animated.png"] = encoded("PNG", frames[1], **moving), np.full_like(whole, 200)
    files["pages.tif"] = encoded("TIFF", frames[0], **moving), np.full_like(whole, 10)
    if features.check("avif"):
        files["whole.avif"] = encoded("AVIF", quality=100), whole
        files["cut.avif"] = files["whole.avif"][0][:-99], None
    files["bomb.png"] = png_of(2**15, 2**14), None
    files["bomb-wide.png"] = png_of(2**31 - 1, 1), None
    files["bomb-none.png"] = png_of(0, 0), None
    files["long-text.png"] = png[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt" + png[33:], None
    return files


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
    lossy = data.startswith(b"\xff\xd8") or name.endswith(".avif")
    assert abs(difference).max() <= (12 if lossy else 0)


def test_odd_files_leave_their_neighbours_as_they_are_and_where_they_are(
    image_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    """Every other image is whole; the folder lies in a folder with pipes and folders."""
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
    found = extract_features(backbone, images, view, tmp_path / "cache", on_error="skip")
    refused = {
        f"{index:02d}-{name}" for index, (name, (_, w)) in enumerate(files.items()) if w is None
    }
    assert set(found.skipped) == refused
    assert found.ids == tuple(name for name in images.ids if name not in refused)
    mine = torch.tensor([name.endswith("zz.jpg") for name in found.ids])
    torch.testing.assert_close(found.hr[mine], found.hr[mine][:1].expand(len(files), -1))


def test_pipes_and_folders_are_refused_and_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg", "nothing.jpg"):
        with pytest.raises(ImageError, match=f"{name} cannot be read: it is not a file"):
            read_image(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=f"{name} is not a file"):
            open_images([tmp_path / name])
