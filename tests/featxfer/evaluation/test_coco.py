from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.detection.judge import Detections, Judge
from featxfer import open_coco
from featxfer.evaluation.voc import DevkitError
from tests.conftest import SHARED

CATEGORIES = [{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "sign"}]
ANNOTATIONS: list[dict[str, Any]] = [
    {"id": 5, "image_id": 42, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 7.5, "iscrowd": 0},
    {"id": 6, "image_id": 7, "category_id": 1, "bbox": [0, 0, 4.5, 2], "area": 9, "iscrowd": 1},
    {"id": 7, "image_id": 42, "category_id": 13, "bbox": [2, 2, 2, 5]},
    {"id": 8, "image_id": 42, "category_id": 13, "bbox": [2, 2, 0, 5]},
]
IMAGES = [{"id": i, "file_name": f"{i:06d}.png", "width": 8, "height": 9} for i in (42, 7, 9)]


def described(**changed: Any) -> dict[str, Any]:
    return {"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES, **changed}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for image in IMAGES:
        Image.new("RGB", (8, 9)).save(tmp_path / str(image["file_name"]))
    return tmp_path


def write(folder: Path, text: str | dict[str, Any]) -> Path:
    path = folder / "instances.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_labels_have_no_gaps_and_lead_back_to_category_ids(folder: Path) -> None:
    found = open_coco(write(folder, described()), folder)
    assert found.category_ids == (1, 13, 90)
    assert found.classes == ("person", "sign", "brush")
    first, second, _ = found.boxes
    assert first.labels.tolist() == [2, 1]
    assert [found.category_ids[label] for label in first.labels] == [90, 13]
    assert second.labels.tolist() == [0]


def test_boxes_areas_and_crowds_of_images_in_the_files_order(folder: Path) -> None:
    """Also of one without objects; what has no area is left out, and counted."""
    found = open_coco(write(folder, described()), str(folder))
    assert found.images.ids == ("000042.png", "000007.png", "000009.png")
    assert found.image_ids == (42, 7, 9)
    assert found.images.read(1).shape == (3, 9, 8)
    first, second, third = found.boxes
    assert first.boxes.tolist() == [[1, 2, 4, 6], [2, 2, 4, 7]]
    assert first.areas is not None
    assert first.areas.tolist() == [7.5, 10]
    assert (first.difficult.tolist(), second.difficult.tolist()) == ([False, False], [True])
    assert [part.without_area for part in found.boxes] == [1, 0, 0]
    assert (third.boxes.shape, third.labels.shape) == ((0, 4), (0,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', r"instances\.json cannot be read as COCO's instances \(JSONDecodeError"),
        ("[]", r"cannot be read as COCO's instances \(AssertionError: .* <class 'list'>"),
        ("[" * 10**5, r"cannot be read as COCO's instances \(RecursionError"),
        ({"images": [], "annotations": []}, r"COCO's instances \(KeyError: 'categories'\)"),
        (described(images=[{"file_name": "a.png"}]), r"COCO's instances \(KeyError: 'id'\)"),
        (described(annotations=[{"id": 1}]), r"COCO's instances \(KeyError: 'image_id'\)"),
        (described(images=7), r"COCO's instances \(TypeError"),
        (described(images=[*IMAGES, IMAGES[0]]), "got an image or a category of one id twice"),
        (described(categories=[*CATEGORIES, CATEGORIES[0]]), "a category of one id twice"),
        (described(images=IMAGES[1:]), "got an object of image 42, which is not in it"),
        (
            described(images=[{**IMAGES[0], "file_name": "../x.png"}, *IMAGES[1:]]),
            r"instances\.json: got file_name '\.\./x\.png', wanted one below",
        ),
    ],
)
def test_files_that_are_damaged_or_contradict_themselves_are_told(
    folder: Path, text: str | dict[str, Any], message: str
) -> None:
    with pytest.raises(DevkitError, match=message):
        open_coco(write(folder, text), folder)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("category_id", 12, r"one of \(1, 13, 90\)"),
        ("bbox", [1, 2, 3], "left, top, width and height, finite numbers"),
        ("bbox", None, "left, top, width and height"),
        ("bbox", [1, 2, 3, float("nan")], "left, top, width and height"),
        ("bbox", [1, 2, 3, "4"], "left, top, width and height"),
        ("area", float("inf"), "a finite number"),
        ("iscrowd", 2, "0 or 1"),
        ("iscrowd", "0", "0 or 1"),
    ],
)
def test_objects_that_cannot_be_read_are_told_with_file_and_field(
    folder: Path, field: str, value: object, wanted: str
) -> None:
    path = write(folder, described(annotations=[{**ANNOTATIONS[0], field: value}]))
    message = rf"instances\.json: annotation 5: got {field} .*, wanted {wanted}"
    with pytest.raises(DevkitError, match=message):
        open_coco(path, folder)


def test_what_is_missing_is_named(folder: Path) -> None:
    path = write(folder, described())
    (folder / "000007.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"images: .*000007\.png is not a file"):
        open_coco(path, folder)
    with pytest.raises(FileNotFoundError, match=r"instances: .*none\.json is not a file"):
        open_coco(folder / "none.json", folder)
    with pytest.raises(ValueError, match="images: got an empty list"):
        open_coco(write(folder, described(images=[], annotations=[])), folder)


def detections(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Detections:
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Detections(corners, np.array(scores), np.array(labels, dtype=np.int64))


def by_pycocotools(path: Path, rows: list[dict[str, Any]]) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(path))
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * max(float(value), 0) for value in evaluation.stats[:6]]


def test_a_crowd_makes_no_detection_right_or_wrong(folder: Path) -> None:
    found = open_coco(write(folder, described()), folder)
    judge = Judge(found.boxes, found.classes)
    right = detections([[1, 2, 4, 6], [2, 2, 4, 7]], [2, 1], [0.9, 0.8])
    nothing = detections([], [], [])
    in_crowd = detections([[0, 0, 2, 2], [2, 0, 4, 2]], [0, 0], [0.95, 0.9])
    without = judge.evaluate([right, nothing, nothing]).figures()
    assert without["AP"] == pytest.approx(100)
    assert judge.evaluate([right, in_crowd, nothing]).figures()["AP"] == without["AP"]
    late = [right, nothing, detections([[0, 0, 2, 2]], [1], [0.99])]
    assert judge.evaluate(late).figures()["AP50"] == pytest.approx(75)


def test_figures_on_cocos_photographs_are_pycocotools_own() -> None:
    """Of each object a box that is a little off, and every tenth of another class."""
    path = SHARED / "coco" / "instances_val2017.json"
    if not path.is_file():
        pytest.skip(f"no photographs of COCO at {path}")
    found = open_coco(path, SHARED / "coco" / "val2017")
    assert (len(found.images), len(found.classes)) == (204, 80)
    assert found.category_ids[11:13] == (13, 14)
    assert sum(int(part.difficult.sum()) for part in found.boxes) == 5
    rng, given, rows = np.random.default_rng(0), [], []
    for number, known in zip(found.image_ids, found.boxes, strict=True):
        labels = np.where(rng.random(len(known.labels)) < 0.1, 3, known.labels)
        boxes = (known.boxes + rng.normal(0, 4, known.boxes.shape)).astype(np.float64)
        scores = rng.random(len(labels))
        given.append(Detections(boxes, scores, labels))
        for (left, top, right, bottom), label, score in zip(boxes, labels, scores, strict=True):
            box = [left, top, right - left, bottom - top]
            row = {"image_id": number, "category_id": found.category_ids[label]}
            rows.append({**row, "bbox": box, "score": score})
    figures = list(Judge(found.boxes, found.classes).evaluate(given).figures().values())
    assert figures == pytest.approx(by_pycocotools(path, rows), abs=1e-3)
    assert 20 < figures[0] < 80
