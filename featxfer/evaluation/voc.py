"""A devkit in PASCAL VOC layout: its classes, splits, labels of images and boxes, and images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from featxfer.views.decode import suffixes
from featxfer.views.images import Images, from_files

Labels = npt.NDArray[np.int8]
"""`(n, classes)`: 1 the class is there, -1 it is not, 0 only difficult instances of it are."""


MOST_BYTES, MOST_DEPTH = 2**24, 32
"""Of an annotation; larger ones are refused."""

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


@dataclass(frozen=True)
class ObjectBoxes:
    """The objects of one image.

    Args:
        boxes: float32 `(n, 4)`: left, top, right, bottom in pixels, from 0, of positive area.
        labels: int64 `(n,)`, indices of the classes.
        difficult: bool `(n,)`; neither right nor wrong where detections are judged. COCO's crowds.
        without_area: how many objects were left out since their box has no area.
        areas: float32 `(n,)`, of the objects' outlines, in pixels; None: those of the boxes.
    """

    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    difficult: npt.NDArray[np.bool_]
    without_area: int = 0
    areas: npt.NDArray[np.float32] | None = None


class DevkitError(ValueError):
    """Files in no devkit's layout, or that contradict themselves; the message names the file."""


class VOCDevkit:
    """A devkit in the layout of VOC2007.

    Args:
        root: the folder with `JPEGImages` and `ImageSets`, or one that holds it as `VOC2007` or
            `VOCdevkit/VOC2007`, of any year.

    Raises:
        FileNotFoundError: no such folder.
        DevkitError: no `ImageSets/Main` or `JPEGImages` in it.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = _find_root(Path(root))
        self._sets = self.root / "ImageSets" / "Main"

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted: of `ImageSets/Main/<class>_<split>.txt`, or else of the XML."""
        parts = [p.stem.rpartition("_") for p in self._sets.glob("*_*.txt")]
        names = {
            name for name, _, split in parts if name and (self._sets / f"{split}.txt").is_file()
        }
        if not names:
            names = {name for ids in self._all_ids() for name, _ in self._objects(ids)}
        if not names:
            raise DevkitError(f"{self._sets}: no <class>_<split>.txt, and no object in Annotations")
        return tuple(sorted(names))

    def ids(self, split: str) -> tuple[str, ...]:
        """The image names of a split, in the file's order; `DevkitError` where there are none."""
        path = self._sets / f"{split}.txt"
        if not path.is_file():
            raise DevkitError(f"split: no {path}; there is {self._splits()}")
        ids: dict[str, int] = {}
        for number, fields in _lines(path):
            name = fields[0]
            if len(fields) != 1:
                raise DevkitError(f"{path}:{number}: got {fields}, wanted one image name a line")
            if Path(name).name != name:
                raise DevkitError(f"{path}:{number}: got {name!r}, wanted an image name, no path")
            if name in ids:
                raise DevkitError(f"{path}:{number}: got {name!r} again, as in line {ids[name]}")
            ids[name] = number
        if not ids:
            raise DevkitError(f"split: {path} is empty, wanted one image name a line")
        return tuple(ids)

    def labels(self, split: str) -> Labels:
        """Image-level labels of a split, `(n, classes)` int8 in {1, 0, -1}.

        Read from `ImageSets/Main/<class>_<split>.txt`; for a class without that file from the
        XML annotations: 1 if an instance is not marked difficult, 0 if all are, else -1.

        Raises `DevkitError` for a line that is not `<image> <-1|0|1>`, an image that has two, one
        of the split that has none, a class without a single positive, and annotations as `boxes`.
        """
        ids = self.ids(split)
        labels = np.full((len(ids), len(self.classes)), -1, dtype=np.int8)
        for column, name in enumerate(self.classes):
            path = self._sets / f"{name}_{split}.txt"
            labels[:, column] = (
                _read_class_file(path, ids)
                if path.is_file()
                else [self._label_from_xml(i, name) for i in ids]
            )
            if not (labels[:, column] == 1).any():
                raise DevkitError(f"class {name!r} has no positive image in {split!r} ({path})")
        return labels

    def boxes(self, split: str) -> list[ObjectBoxes]:
        """The objects of each image of a split, of the XML annotations, in the order of `ids`.

        VOC counts pixels from 1 and both corners belong to the box, so left and top lose 1. Boxes
        that leave the image are as they are. An object without `difficult` is not difficult.
        Raises `DevkitError` for an annotation that cannot be read, a corner that is no finite
        number, a class that is not among `classes`, a `difficult` that is not 0, 1, false or true.
        """
        return [
            _read_boxes(self.root / "Annotations" / f"{name}.xml", self.classes)
            for name in self.ids(split)
        ]

    def images(self, split: str) -> Images:
        """The images of a split, in the order of `ids`; `FileNotFoundError` names a missing one."""
        ids = self.ids(split)
        return from_files(ids, [self._image_path(name) for name in ids])

    def _image_path(self, name: str) -> Path:
        folder = self.root / "JPEGImages"
        candidates = (folder / f"{name}{suffix}" for suffix in suffixes())
        return next((p for p in candidates if p.is_file()), folder / f"{name}.jpg")

    def _splits(self) -> str:
        plain = sorted(p.stem for p in self._sets.glob("*.txt") if "_" not in p.stem)
        return ", ".join(plain) or "none"

    def _all_ids(self) -> list[str]:
        return sorted(p.stem for p in (self.root / "Annotations").glob("*.xml"))

    def _label_from_xml(self, image: str, name: str) -> int:
        objects = self._objects(image)
        unknown = {found for found, _ in objects} - set(self.classes)
        if unknown:
            path = self.root / "Annotations" / f"{image}.xml"
            raise DevkitError(_unknown_class(path, min(unknown), self.classes))
        difficult = [d for found, d in objects if found == name]
        return -1 if not difficult else 0 if all(difficult) else 1

    def _objects(self, image: str) -> list[tuple[str, bool]]:
        path = self.root / "Annotations" / f"{image}.xml"
        if path not in self._parsed:
            self._parsed[path] = _read_objects(path)
        return self._parsed[path]

    @cached_property
    def _parsed(self) -> dict[Path, list[tuple[str, bool]]]:
        return {}


def _find_root(root: Path) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root} is not a folder")
    candidates = [root, *sorted(root.glob("VOC[0-9]*")), *sorted(root.glob("VOCdevkit/VOC[0-9]*"))]
    for candidate in candidates:
        if (candidate / "ImageSets" / "Main").is_dir() and (candidate / "JPEGImages").is_dir():
            return candidate
    raise DevkitError(f"root: {root} has no ImageSets/Main and JPEGImages, wanted a VOC devkit")


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of each line of a list that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DevkitError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.split()


def _read_class_file(path: Path, ids: Sequence[str]) -> list[int]:
    found: dict[str, int] = {}
    for number, fields in _lines(path):
        if len(fields) != 2 or fields[1] not in {"-1", "0", "1"}:
            line = " ".join(fields)
            raise DevkitError(f"{path}:{number}: got {line!r}, wanted '<image> <-1|0|1>'")
        if fields[0] in found:
            raise DevkitError(f"{path}:{number}: got {fields[0]!r} again, wanted one line an image")
        found[fields[0]] = int(fields[1])
    missing = [name for name in ids if name not in found]
    if missing:
        raise DevkitError(f"{path}: no line for image {missing[0]} ({len(missing)} missing)")
    return [found[name] for name in ids]


def _parse(path: Path) -> list[Element]:
    """The objects of one annotation; `DevkitError` for XML that is bad, too large or too deep."""
    from xml.etree.ElementTree import ParseError, TreeBuilder

    import defusedxml.ElementTree

    class Shallow(TreeBuilder):
        depth = 0

        def start(self, tag: str, attributes: dict[str, str], /) -> Element:
            self.depth += 1
            if self.depth > MOST_DEPTH:
                raise ParseError(f"elements are nested over {MOST_DEPTH} deep")
            return super().start(tag, attributes)

        def end(self, tag: str, /) -> Element:
            self.depth -= 1
            return super().end(tag)

    try:
        if path.stat().st_size > MOST_BYTES:
            raise ParseError(f"it has over {MOST_BYTES:,} bytes")
        parser = defusedxml.ElementTree.DefusedXMLParser(target=Shallow())
        tree = defusedxml.ElementTree.parse(path, parser=parser)
    except (
        OSError,
        ParseError,
        LookupError,
        ValueError,
    ) as error:  # of encodings, and defusedxml's
        raise DevkitError(f"annotation {path} cannot be read: {error}") from error
    return list(tree.iterfind("object"))


def _read_objects(path: Path) -> list[tuple[str, bool]]:
    """Name and difficult flag of each object in one annotation."""
    return [(_name(path, element), _is_difficult(path, element)) for element in _parse(path)]


def _name(path: Path, element: Element) -> str:
    name = element.findtext("name", "").strip()
    if not name:
        raise DevkitError(f"annotation {path}: got an object without a name, wanted its class")
    return name


_FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}


def _is_difficult(path: Path, element: Element) -> bool:
    text = element.findtext("difficult", "0")
    if text.strip().lower() not in _FLAGS:
        raise DevkitError(f"annotation {path}: got difficult {text!r}, wanted 0 or 1")
    return _FLAGS[text.strip().lower()]


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _corners(path: Path, element: Element) -> list[float]:
    texts = [element.findtext(f"bndbox/{side}", "") for side in _CORNERS]
    try:
        corners = [float(text) for text in texts]
    except ValueError:
        corners = [math.nan]
    if not all(abs(corner) <= _LARGEST for corner in corners):
        raise DevkitError(f"annotation {path}: got corners {texts}, wanted finite numbers")
    return corners


_LARGEST = float(np.finfo(np.float32).max)


def _unknown_class(path: Path, name: str, classes: Sequence[str]) -> str:
    return f"annotation {path}: got class {name!r}, known are {classes}"


def _read_boxes(path: Path, classes: Sequence[str]) -> ObjectBoxes:
    boxes, labels, difficult, without_area = [], [], [], 0
    for element in _parse(path):
        name, is_difficult = _name(path, element), _is_difficult(path, element)
        if name not in classes:
            raise DevkitError(_unknown_class(path, name, classes))
        left, top, right, bottom = _corners(path, element)
        if not (right > left and bottom > top):
            without_area += 1
            continue
        boxes.append((left - 1, top - 1, right, bottom))
        labels.append(classes.index(name))
        difficult.append(is_difficult)
    return ObjectBoxes(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(difficult, dtype=np.bool_),
        without_area,
    )
