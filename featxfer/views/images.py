"""Images from a folder, a class tree, a list of files or a Dataset, decoded once to uint8 RGB."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, features
from torch import Tensor
from tqdm import tqdm

from featxfer.checks import check_integer

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
}
"""Pillow's readers that may be used, whatever a file's ending says, and their usual endings."""

_NEEDS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
"""What Pillow may be built without."""

SUFFIXES = tuple(
    suffix
    for name, suffixes in FORMATS.items()
    if name not in _NEEDS or _NEEDS[name] in features.get_supported()
    for suffix in suffixes
)
"""Files with these endings, in any case, are taken from folders: those that this Pillow reads."""

_EOI, _BLOCK = b"\xff\xd9", 16
"""JPEG's end of image, and the side of what it mostly encodes at once."""

_SOC, _EOC = b"\xff\x4f\xff\x51", b"\xff\xd9"
"""The start of JPEG 2000's codestream and its end, which does not occur within."""

MAX_PIXELS = 2**27
"""Larger images are refused before they are decoded: a small file may say that it is huge."""


class ImageError(ValueError):
    """An image could not be read; the message names it."""


class SizedDataset(Protocol):
    """A map-style dataset of (image, target): image a PIL image or a uint8 `(3, h, w)` tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


ImageSource: TypeAlias = "str | Path | Sequence[str | Path] | SizedDataset | Images"


@dataclass(frozen=True)
class Images:
    """A sequence of named images that are decoded when asked for.

    Args:
        ids: one name an image, unique.
        read: index -> uint8 RGB `(3, h, w)`; raises `ImageError`. Called by several threads.
        fingerprint: hash of what the pixels depend on (names, sizes, modification times).
        targets: the dataset's target of each image, or None where there are none.
        depth: how many bits of deep greyscale were read, None for the range of each image.
    """

    ids: tuple[str, ...]
    read: Callable[[int], Tensor]
    fingerprint: str
    targets: tuple[Any, ...] | None = None
    depth: int | None = None

    def __len__(self) -> int:
        return len(self.ids)


def open_images(source: ImageSource, *, depth: int | None = None) -> Images:
    """Opens a folder, an ImageFolder tree, a list of files or a map-style Dataset.

    Of a folder, the images at any depth are taken, by their endings (`SUFFIXES`); ids are paths
    below it. Where all of them lie in subfolders it is an ImageFolder tree: the sorted names of
    its own subfolders are the classes, and targets their indices. Names that begin with a dot,
    files of other kinds and links to a folder above are left out; what is left out is printed.
    A devkit in VOC layout is opened by `featxfer.VOCDevkit`, by split. A Dataset has no files
    to tell a change by, so it is read once, whole, for its fingerprint and targets; an item that
    cannot be read keeps its place, with None for a target that is not known.

    Args:
        source: any of these, or `Images`, which are given back.
        depth: bits of greyscale that is deeper than 8 bits, 1 to 32: `2**depth - 1` is white.
            None stretches each such image from its least value, black, to its greatest, white;
            one of a single value is mid-grey.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no image in it, one name twice, a depth out of range.
        ImageError: a Dataset of which no item can be read.
    """
    if depth is not None:
        check_integer("depth", depth, at_least=1)
        if depth > 32:
            raise ValueError(f"depth: got {depth}, wanted at most 32")
    if isinstance(source, Images):
        if depth not in (None, source.depth):
            raise ValueError(f"depth: got {depth} for images that are open, wanted it when opened")
        return source
    if isinstance(source, str | Path):
        return _open_folder(Path(source), depth)
    if isinstance(source, list | tuple) and all(isinstance(p, str | Path) for p in source):
        paths = [Path(p) for p in source]
        return from_files([str(p) for p in paths], paths, depth=depth)
    return _from_dataset(source, depth)


def flipped(images: Images) -> Images:
    """The same images under the same names, mirrored left to right."""
    digest = hashlib.sha256(f"flipped {images.fingerprint}".encode()).hexdigest()
    return dataclasses.replace(
        images, read=lambda index: images.read(index).flip(-1), fingerprint=digest
    )


def cropped(images: Images, draw: int, *, least: float = 0.4) -> Images:
    """The same images under the same names, each cropped and every other one mirrored, by chance.

    Args:
        images: any.
        draw: which crop: another one for each draw and image, the same one every time.
        least: share of the area that a crop keeps at the least, in (0, 1]; sides keep their ratio.

    Raises:
        ValueError: a share outside of (0, 1].
    """
    if not 0 < least <= 1:
        raise ValueError(f"least: got {least!r}, wanted a share in (0, 1]")
    text = f"cropped {draw} {least} {images.fingerprint}"

    def read(index: int) -> Tensor:
        image = images.read(index)
        generator = torch.Generator().manual_seed(draw * 1_000_003 + index)
        area, down, right, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        side = (least + (1 - least) * area) ** 0.5
        height, width = (max(1, round(length * side)) for length in image.shape[1:])
        top = int(down * (image.shape[1] - height + 1))
        left = int(right * (image.shape[2] - width + 1))
        part = image[:, top : top + height, left : left + width]
        return (part.flip(-1) if mirror < 0.5 else part).contiguous()

    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return dataclasses.replace(images, read=read, fingerprint=fingerprint)


def from_files(
    ids: Sequence[str],
    paths: Sequence[Path],
    targets: Iterable[Any] | None = None,
    *,
    depth: int | None = None,
) -> Images:
    """Images from files; depth and errors as `open_images`."""
    if not ids:
        raise ValueError("images: got an empty list, wanted at least one image")
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"images: got {twice!r} twice, wanted unique names")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"images: {path} is not a file")
    return Images(
        tuple(ids),
        lambda index: read_image(paths[index], depth),
        _fingerprint(ids, paths, depth),
        None if targets is None else tuple(targets),
        depth,
    )


def read_image(path: str | Path, depth: int | None = None) -> Tensor:
    """Decodes one file to uint8 RGB `(3, h, w)`, as `to_pixels` says; the first frame of several.

    A JPEG file that lacks its last bytes is read as far as it goes, with a warning that names it.
    Raises `ImageError`, which names the file, for anything else that does not decode whole, is
    of none of `FORMATS`, has more than `MAX_PIXELS` or is no ordinary file.
    """
    try:
        if not Path(path).is_file():  # to open a named pipe would wait for ever
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            try:
                return _decode(file, depth)
            except OSError:
                file.seek(0)
                pixels = _decode_cut(file.read(), depth)
                if pixels is None:
                    raise
    except Exception as error:  # Pillow's readers raise all kinds for damaged files
        reason = str(error) or type(error).__name__
        raise ImageError(f"image {path} cannot be read: {reason}") from error
    warnings.warn(f"image {path} lacks its last bytes: it is read as far as it goes", stacklevel=2)
    return pixels


def to_pixels(image: Image.Image, depth: int | None = None) -> Tensor:
    """A PIL image as uint8 RGB `(3, h, w)`, turned as its EXIF orientation says.

    What is transparent is laid on white. Greyscale of over 8 bits is read by `depth`, see
    `open_images`; of colour of 16 bits Pillow keeps the upper 8.

    Raises:
        ValueError: greyscale with values beyond `depth` or not finite; 16-bit colour of which the
            upper bits are empty, or with a depth other than 16.
    """
    is_deep_colour = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_scale(np.asarray(image).astype(np.float64), depth))
    elif is_deep_colour and depth != 16:
        _check_deep_colour(image, depth)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open(file: IO[bytes]) -> Image.Image:
    """As `Image.open`, which other packages put their own function in the place of."""
    Image.init()
    start = file.read(16)
    for name in FORMATS:
        opener, accept = Image.OPEN.get(name, (None, None))
        accepted = opener is not None and accept is not None and accept(start)
        if isinstance(accepted, str):  # why this Pillow cannot
            raise ValueError(accepted)
        if opener is not None and accepted:
            file.seek(0)
            if name == "JPEG2000" and _EOC not in file.read().partition(_SOC)[2]:
                raise ValueError("it lacks its last bytes")  # of which its decoder may say nothing
            file.seek(0)
            return opener(file, "")
    raise ValueError(f"its content is none of {', '.join(FORMATS)}")


def _decode(file: IO[bytes], depth: int | None) -> Tensor:
    image = _open(file)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, at most {MAX_PIXELS:,} are read")
    return to_pixels(image, depth)


def _decode_cut(data: bytes, depth: int | None) -> Tensor | None:
    """What there is of a JPEG file without its end; None if it is no such file or shows nothing.

    The block that it ends in is noise, and what would follow is even.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    for part in (data, data[: data.rfind(b"\xff")]):  # it may end within a marker
        try:
            pixels = _decode(io.BytesIO(part + _EOI), depth)
        except OSError:
            continue
        is_even = (pixels == pixels[:, -1:, -1:]).all(0)
        return None if bool(is_even[_BLOCK:].all() and is_even[:, _BLOCK:].all()) else pixels
    return None


def _scale(values: npt.NDArray[np.float64], depth: int | None) -> npt.NDArray[np.uint8]:
    """Deep greyscale `(h, w)` as uint8, as `open_images` says."""
    least, most = float(values.min()), float(values.max())
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    if depth is not None:
        white = 2**depth - 1
        if least < 0 or most > white:
            raise ValueError(
                f"it has values from {least:g} to {most:g}, wanted 0 to {white} (depth={depth})"
            )
        least, most = 0.0, float(white)
    elif least == most:
        return np.full(values.shape, 128, dtype=np.uint8)
    return ((values - least) * 255 / (most - least)).round().astype(np.uint8)


def _check_deep_colour(image: Image.Image, depth: int | None) -> None:
    bands: Any = image.getextrema()
    most = max(high for _, high in bands[: 1 if image.mode == "LA" else 3])
    if depth is not None or most < 16:
        raise ValueError(
            f"it is 16-bit colour, read by its upper 8 bits, which go to {most} of 255; wanted "
            "depth=16 if that is right, or greyscale"
        )


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:9]


@dataclass
class _LeftOut:
    """What a folder holds beside images."""

    kinds: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    no_files: int = 0
    loops: int = 0

    def __str__(self) -> str:
        endings = ", ".join(f"{kind} {count}" for kind, count in _most(self.kinds))
        said = (
            (self.kinds.total(), f"of other kinds ({endings})"),
            (self.hidden, "hidden"),
            (self.no_files, "no ordinary files"),
            (self.loops, "links to a folder above"),
        )
        return ", ".join(f"{count} {what}" for count, what in said if count)


def _open_folder(folder: Path, depth: int | None) -> Images:
    if not folder.is_dir():
        wanted = "[path] for one file" if folder.is_file() else "a folder that exists"
        raise FileNotFoundError(f"images: {folder} is not a folder, wanted {wanted}")
    left = _LeftOut()
    paths = list(_image_files(folder, left, frozenset()))
    notes = [f"left out: {left}"] if str(left) else []
    if not paths:
        raise ValueError(
            f"images: no image ({', '.join(SUFFIXES)}) in {folder} or its subfolders"
            + "".join(f"; {note}" for note in notes)
        )
    parts = [path.relative_to(folder).parts for path in paths]
    at_root = sum(len(names) == 1 for names in parts)
    targets = None
    if at_root == 0:
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
        places = {name: index for index, name in enumerate(classes)}
        targets = [places[names[0]] for names in parts]
        empty = sorted(places.keys() - {names[0] for names in parts})
        if empty:
            notes.append(f"classes without images: {', '.join(empty)}")
    elif at_root < len(paths):
        notes.append(f"no targets, as {at_root} images lie beside the subfolders")
    if notes:
        said = "; ".join([f"{folder}/: {len(paths)} images", *notes])
        tqdm.write(f"featxfer: {said}", file=sys.stderr)
    return from_files(["/".join(names) for names in parts], paths, targets, depth=depth)


def _image_files(folder: Path, left: _LeftOut, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """The images in a folder and below, sorted; `above` are the folders that it lies in."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        left.loops += 1
        return
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path, suffix = folder / entry.name, Path(entry.name).suffix.lower()
        if entry.name.startswith("."):
            left.hidden += 1
        elif entry.is_dir():
            yield from _image_files(path, left, above | {here})
        elif suffix not in SUFFIXES:
            left.kinds[suffix or "no ending"] += 1
        elif not entry.is_file():
            left.no_files += 1
        else:
            yield path


def _from_dataset(dataset: SizedDataset, depth: int | None) -> Images:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"images: got {type(dataset).__name__}, wanted a folder, a list of files or a Dataset"
        )
    if len(dataset) == 0:
        raise ValueError("images: got an empty Dataset, wanted at least one image")

    lock = threading.Lock()  # a Dataset of a user's own may not be made for several threads

    def read(index: int) -> Tensor:
        with lock:
            return _as_pixels(_item(dataset, index)[0], index, depth)

    digest, targets = hashlib.sha256(f"depth {depth}\n".encode()), []
    unreadable: list[ImageError] = []
    for index in range(len(dataset)):
        target = None
        try:
            image, target = _item(dataset, index)
            pixels = _as_pixels(image, index, depth)
        except ImageError as error:
            unreadable.append(error)
            digest.update(b"unreadable")
        else:
            digest.update(str(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes())
        targets.append(target)
    if len(unreadable) == len(targets):
        raise unreadable[0]
    ids = tuple(f"{index:08d}" for index in range(len(targets)))
    return Images(ids, read, digest.hexdigest(), tuple(targets), depth)


def _item(dataset: SizedDataset, index: int) -> tuple[Any, Any]:
    try:
        item = dataset[index]
    except Exception as error:  # whatever the dataset's own code raises
        raise ImageError(f"images: item {index} cannot be read: {error}") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ImageError(
            f"images: item {index} is {type(item).__name__}, wanted a pair (image, target)"
        )
    return item[0], item[1]


def _as_pixels(image: object, index: int, depth: int | None) -> Tensor:
    if isinstance(image, Image.Image):
        try:
            return to_pixels(image, depth)
        except Exception as error:  # it may be read from its file only now
            raise ImageError(f"images: item {index} cannot be read: {error}") from error
    got = type(image).__name__
    if isinstance(image, Tensor):
        if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3 and image.numel():
            return image
        got = f"{str(image.dtype).removeprefix('torch.')} of shape {tuple(image.shape)}"
    raise ImageError(
        f"images: item {index} is {got}, "
        "wanted (image, target) with a PIL image or a uint8 (3, h, w) tensor"
    )


def _fingerprint(ids: Sequence[str], paths: Sequence[Path], depth: int | None) -> str:
    digest = hashlib.sha256(f"depth {depth}\n".encode())
    for name, path in zip(ids, paths, strict=True):
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
