"""The synthetic sample as a devkit in VOC layout, on disk: rendered once, resumable."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from benchmarks.voc2007.sample import CLASSES, Drawn, deal_items, draw
from featxfer.files import write_atomic

FORMAT = 2
SPLITS = ("trainval", "test")


def render_sample(
    root: Path,
    *,
    trainval: int = 360,
    test: int = 240,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Render the sample into root/VOCdevkit/VOC2007 and return that folder.

    trainval and test count images, of 300 to 500 px a side; every class has a clear object in a
    split of 12 images or more.  The same arguments give the same bytes (under one version of
    numpy and Pillow), and an image depends only on seed, its split and its place there.  progress
    is called after each image with the number done and the total.  A finished sample with the
    same arguments is left untouched, an unfinished one is completed, and one with other arguments
    is replaced.  Raises ValueError for a count under 1 or a negative seed, and FileExistsError
    where the folder holds anything but a sample.
    """
    parameters = {"format": FORMAT, "seed": seed, "trainval": trainval, "test": test}
    for argument, least in (("trainval", 1), ("test", 1), ("seed", 0)):
        if parameters[argument] < least:
            raise ValueError(f"{argument}: got {parameters[argument]}, wanted an int >= {least}")
    folder = root / "VOCdevkit" / "VOC2007"
    if _read(folder / "sample.json") == parameters:
        return folder
    _prepare(folder, parameters)
    names = [f"{number:06d}" for number in range(1, trainval + test + 1)]
    jobs = [(0, index) for index in range(trainval)] + [(1, index) for index in range(test)]
    for count, (name, (split, index)) in enumerate(zip(names, jobs, strict=True), 1):
        _render(folder, name, seed, split, index)
        if progress is not None:
            progress(count, len(jobs))
    _write_sets(folder, {"trainval": names[:trainval], "test": names[trainval:]}, seed)
    write_atomic(folder / "sample.json", json.dumps(parameters).encode())
    (folder / "sample.partial.json").unlink(missing_ok=True)
    return folder


def _annotation(name: str, size: tuple[int, int], drawn: list[Drawn]) -> bytes:
    """The VOC annotation of one image, as XML."""
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, **fields: object) -> None:
        for tag, value in fields.items():
            ElementTree.SubElement(parent, tag).text = str(value)

    add(root, folder="VOC2007", filename=f"{name}.jpg")
    add(ElementTree.SubElement(root, "source"), database="featxfer synthetic sample")
    add(ElementTree.SubElement(root, "size"), width=size[0], height=size[1], depth=3)
    add(root, segmented=0)
    for one in drawn:
        node = ElementTree.SubElement(root, "object")
        add(node, name=CLASSES[one.item.label], pose="Unspecified", truncated=int(one.truncated))
        add(node, difficult=int(one.item.kind != "clear"))
        corners = zip(("xmin", "ymin", "xmax", "ymax"), one.box, strict=True)
        add(ElementTree.SubElement(node, "bndbox"), **dict(corners))
    ElementTree.indent(root, "\t")
    return ElementTree.tostring(root) + b"\n"


def _render(folder: Path, name: str, seed: int, split: int, index: int) -> None:
    """Write one image and then its annotation, unless both are there."""
    photo, notes = folder / f"JPEGImages/{name}.jpg", folder / f"Annotations/{name}.xml"
    if photo.exists() and notes.exists():
        return
    rng = np.random.default_rng([seed, split, 2, index])
    image, drawn = draw(rng, deal_items(seed, split, index))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=90)
    write_atomic(photo, encoded.getvalue())
    write_atomic(notes, _annotation(name, image.size, drawn))


def _write_sets(folder: Path, names: dict[str, list[str]], seed: int) -> None:
    """Write the image lists of every split and class."""
    main = folder / "ImageSets/Main"
    for number, split in enumerate(SPLITS):
        items = [deal_items(seed, number, index) for index in range(len(names[split]))]
        write_atomic(main / f"{split}.txt", "".join(f"{name}\n" for name in names[split]).encode())
        for label, title in enumerate(CLASSES):
            lines = ""
            for name, shown in zip(names[split], items, strict=True):
                kinds = {item.kind for item in shown if item.label == label}
                lines += f"{name} {1 if 'clear' in kinds else 0 if kinds else -1:2d}\n"
            write_atomic(main / f"{title}_{split}.txt", lines.encode())


def _read(path: Path) -> object:
    """The parameters a marker file holds, or None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def _prepare(folder: Path, parameters: dict[str, int]) -> None:
    """Leave in folder only images with these parameters, and a marker that says so."""
    done, partial = folder / "sample.json", folder / "sample.partial.json"
    if done.exists():
        os.replace(done, partial)
    if not partial.exists() and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"root: {folder} holds something other than this sample")
    if _read(partial) != parameters:
        for part in ("JPEGImages/*.jpg", "Annotations/*.xml", "ImageSets/Main/*.txt"):
            for path in folder.glob(part):
                path.unlink()
        write_atomic(partial, json.dumps(parameters).encode())
