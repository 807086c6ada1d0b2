"""Images from a folder, a class tree, a list of files or a Dataset, decoded once to uint8 RGB."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from featxfer.checks import check_integer
from featxfer.console import tell
from featxfer.views.decode import ImageError, read_image, suffixes, to_pixels


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

    Of a folder, the images at any depth are taken, by their endings (`suffixes`); ids are paths
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
            f"images: no image ({', '.join(suffixes())}) in {folder} or its subfolders"
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
        tell("; ".join([f"{folder}/: {len(paths)} images", *notes]))
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
        elif suffix not in suffixes():
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
    from PIL import Image

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
