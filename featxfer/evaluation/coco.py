"""Images and their objects in COCO's layout: a file of instances and a folder of images."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featxfer.evaluation.voc import DevkitError, ObjectBoxes
from featxfer.views.images import Images, from_files


@dataclass(frozen=True)
class CocoSet:
    """A set of images in COCO's layout, in the order of its file.

    Args:
        images: their ids are the names of their files.
        image_ids: COCO's number of each image.
        boxes: the objects of each image, some without any; crowds are `difficult`.
        classes: names, in the order of `category_ids`.
        category_ids: COCO's number of each class, ascending. These have gaps, so `labels` of boxes
            are indices of this tuple: `category_ids[label]` is the way back.
    """

    images: Images
    image_ids: tuple[int, ...]
    boxes: tuple[ObjectBoxes, ...]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]


def open_coco(instances: str | Path, images: str | Path) -> CocoSet:
    """Opens a file of instances as COCO has it, such as `instances_val2017.json`, and its images.

    Boxes are `(left, top, width, height)` in pixels in the file and corners here; those without
    area are left out and counted. An object without `iscrowd` is no crowd.

    Args:
        instances: the JSON file; it is read by pycocotools.
        images: the folder that the names of images in it start from.

    Raises:
        FileNotFoundError: no such file, or no file of an image; the first is named.
        DevkitError: JSON that cannot be read or lacks a part; an image or a category that is there
            twice; an object of an image or a category that is not there; a box, an area or a flag
            that is no number of its kind. The message names the file and the object.
        ValueError: no images.
        ImportError: pycocotools is not installed.
    """
    path, folder = Path(instances), Path(images)
    coco = _read(path)
    labels = {number: label for label, number in enumerate(sorted(coco.cats))}
    names = [str(image.get("file_name")) for image in coco.imgs.values()]
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DevkitError(f"{path}: got file_name {name!r}, wanted one below {folder}")
    return CocoSet(
        from_files(names, [folder / name for name in names]),
        tuple(coco.imgs),
        tuple(_boxes(path, coco.imgToAnns.get(image, []), labels) for image in coco.imgs),
        tuple(str(coco.cats[number].get("name")) for number in labels),
        tuple(labels),
    )


def _read(path: Path) -> Any:
    """The file as pycocotools has it, in which each object is of an image that is there."""
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise ImportError("open_coco needs it: pip install 'featxfer[detect]'") from error
    if not path.is_file():
        raise FileNotFoundError(f"instances: {path} is not a file")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(path))
        parts = [len(coco.dataset[part]) for part in ("images", "categories", "annotations")]
    except (
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as e:
        why = f"{type(e).__name__}: {e}"
        raise DevkitError(f"{path} cannot be read as COCO's instances ({why})") from e
    if parts[:2] != [len(coco.imgs), len(coco.cats)]:
        raise DevkitError(f"{path}: got an image or a category of one id twice, wanted each once")
    strangers = [number for number in coco.imgToAnns if number not in coco.imgs]
    if strangers:
        raise DevkitError(f"{path}: got an object of image {strangers[0]!r}, which is not in it")
    return coco


def _boxes(
    path: Path, annotations: Sequence[Mapping[str, Any]], labels: Mapping[int, int]
) -> ObjectBoxes:
    """The objects of one image."""
    boxes, kinds, crowds, areas = [], [], [], []
    for found in annotations:
        box: Any = found.get("bbox")
        category: Any = found.get("category_id")
        crowd, area = found.get("iscrowd", 0), found.get("area", 0)
        for name, is_right, wanted in (
            ("category_id", category in labels, f"one of {tuple(labels)}"),
            ("bbox", _are_finite(box, 4), "left, top, width and height, finite numbers"),
            ("area", _are_finite([area], 1), "a finite number"),
            ("iscrowd", crowd in (0, 1), "0 or 1"),
        ):
            if not is_right:
                where = f"{path}: annotation {found.get('id')}"
                raise DevkitError(f"{where}: got {name} {found.get(name)!r}, wanted {wanted}")
        left, top, width, height = box
        if width > 0 and height > 0:
            boxes.append((left, top, left + width, top + height))
            kinds.append(labels[category])
            crowds.append(crowd)
            areas.append(found.get("area", width * height))
    return ObjectBoxes(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(kinds, dtype=np.int64),
        np.array(crowds, dtype=np.bool_),
        len(annotations) - len(boxes),
        np.array(areas, dtype=np.float32),
    )


def _are_finite(values: object, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
    )
