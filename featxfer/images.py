"""Images from a folder, a class tree, a list of files or a Dataset, decoded once to uint8 RGB."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
"""Files with these endings, in any case, are taken from folders."""

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")
"""Pillow's readers that may be used, whatever a file's ending says."""

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
    """

    ids: tuple[str, ...]
    read: Callable[[int], Tensor]
    fingerprint: str
    targets: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def open_images(source: ImageSource) -> Images:
    """Opens a flat folder, an ImageFolder tree, a list of files or a map-style Dataset.

    A folder with images of its own is flat. One whose images lie in its subfolders is an
    ImageFolder tree: the subfolders' sorted names are the classes and targets their indices.
    A devkit in VOC layout is opened by `featxfer.voc.VOCDevkit`, by split. A Dataset has no files
    to tell a change by, so it is read once, whole, for its fingerprint and targets.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no image in it, or one name twice.
    """
    if isinstance(source, Images):
        return source
    if isinstance(source, str | Path):
        return _open_folder(Path(source))
    if isinstance(source, list | tuple) and all(isinstance(p, str | Path) for p in source):
        paths = [Path(p) for p in source]
        return from_files([str(p) for p in paths], paths)
    return _from_dataset(source)


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
    ids: Sequence[str], paths: Sequence[Path], targets: Iterable[Any] | None = None
) -> Images:
    """Images from files; errors as `open_images`."""
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
        lambda index: read_image(paths[index]),
        _fingerprint(ids, paths),
        None if targets is None else tuple(targets),
    )


def read_image(path: str | Path) -> Tensor:
    """Decodes one file to uint8 RGB `(3, h, w)`, turned as its EXIF orientation says.

    16-bit greyscale keeps its upper 8 bits; transparency is dropped; of an animation the first
    frame is taken. Raises `ImageError`, which names the file, for anything that does not decode
    whole, has more than `MAX_PIXELS` or is no ordinary file.
    """
    try:
        if not Path(path).is_file():  # to open a named pipe would wait for ever
            raise ValueError("it is not a file")
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(
                    f"it has {width} x {height} pixels, at most {MAX_PIXELS:,} are read"
                )
            return to_pixels(image)
    except Exception as error:  # Pillow's readers raise all kinds for damaged files
        reason = str(error) or type(error).__name__
        raise ImageError(f"image {path} cannot be read: {reason}") from error


def to_pixels(image: Image.Image) -> Tensor:
    """A PIL image as uint8 RGB `(3, h, w)`, turned as its EXIF orientation says."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} (32 bits a pixel) has no agreed range")
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open_folder(folder: Path) -> Images:
    if not folder.is_dir():
        wanted = "[path] for one file" if folder.is_file() else "a folder that exists"
        raise FileNotFoundError(f"images: {folder} is not a folder, wanted {wanted}")
    flat = _image_files(folder)
    if flat:
        return from_files([p.name for p in flat], flat)
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    files = [(path, label) for label, c in enumerate(classes) for path in _image_files(c)]
    if not files:
        raise ValueError(f"images: no image ({', '.join(SUFFIXES)}) in {folder} or its subfolders")
    ids = [path.relative_to(folder).as_posix() for path, _ in files]
    return from_files(ids, [path for path, _ in files], [label for _, label in files])


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def _from_dataset(dataset: SizedDataset) -> Images:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"images: got {type(dataset).__name__}, wanted a folder, a list of files or a Dataset"
        )
    if len(dataset) == 0:
        raise ValueError("images: got an empty Dataset, wanted at least one image")

    lock = threading.Lock()  # a Dataset of a user's own may not be made for several threads

    def read(index: int) -> Tensor:
        with lock:
            return _as_pixels(_item(dataset, index)[0], index)

    digest, targets = hashlib.sha256(), []
    for index in range(len(dataset)):
        image, target = _item(dataset, index)
        pixels = _as_pixels(image, index)
        digest.update(str(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes())
        targets.append(target)
    ids = tuple(f"{index:08d}" for index in range(len(dataset)))
    return Images(ids, read, digest.hexdigest(), tuple(targets))


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


def _as_pixels(image: object, index: int) -> Tensor:
    if isinstance(image, Image.Image):
        return to_pixels(image)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
        return image
    raise ImageError(
        f"images: item {index} is {type(image).__name__}, "
        "wanted (image, target) with a PIL image or a uint8 (3, h, w) tensor"
    )


def _fingerprint(ids: Sequence[str], paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for name, path in zip(ids, paths, strict=True):
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
