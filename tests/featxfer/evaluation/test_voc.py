from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featxfer import VOCDevkit
from featxfer.evaluation.voc import DevkitError

CAT = {"1": "1", "2": "-1", "3": "0"}
DOG = {"1": "-1", "2": "1", "3": "1"}


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2007"
    sets = root / "ImageSets" / "Main"
    for folder in (sets, root / "JPEGImages", root / "Annotations"):
        folder.mkdir(parents=True)
    for name in CAT:
        Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(
            root / "JPEGImages" / f"{name}.jpg"
        )
    (sets / "test.txt").write_text("3\n1\n2\n")
    for name, labels in (("cat", CAT), ("dog", DOG)):
        lines = "".join(f"{image} {label:>2}\n" for image, label in labels.items())
        (sets / f"{name}_test.txt").write_text(lines)
    return root


def write_annotation(root: Path, image: str, objects: list[tuple[str, int]]) -> None:
    body = "".join(
        f"<object><name>{name}</name><difficult>{hard}</difficult></object>"
        for name, hard in objects
    )
    (root / "Annotations" / f"{image}.xml").write_text(f"<annotation>{body}</annotation>")


def test_labels_in_the_order_of_the_split(devkit: Path) -> None:
    kit = VOCDevkit(devkit)
    assert kit.classes == ("cat", "dog")
    assert kit.ids("test") == ("3", "1", "2")
    assert kit.labels("test").tolist() == [[0, 1], [1, -1], [-1, 1]]
    assert kit.images("test").ids == ("3", "1", "2")


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_the_root_may_be_a_folder_above(devkit: Path, levels: int) -> None:
    root = [devkit, *devkit.parents][levels]
    assert VOCDevkit(root).root == devkit


def test_labels_from_xml_where_class_files_are_missing(devkit: Path) -> None:
    for path in (devkit / "ImageSets" / "Main").glob("*_test.txt"):
        path.unlink()
    write_annotation(devkit, "1", [("cat", 1), ("cat", 0)])
    write_annotation(devkit, "2", [("dog", 0)])
    write_annotation(devkit, "3", [("cat", 1), ("dog", 0)])
    assert VOCDevkit(devkit).labels("test").tolist() == [[0, 1], [1, -1], [-1, 1]]


def test_an_xml_bomb_is_refused(devkit: Path) -> None:
    for path in (devkit / "ImageSets" / "Main").glob("*_test.txt"):
        path.unlink()
    (devkit / "Annotations" / "1.xml").write_text(
        '<!DOCTYPE a [<!ENTITY b "cat"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'
    )
    with pytest.raises(DevkitError, match=r"annotation .*1\.xml cannot be read"):
        VOCDevkit(devkit).labels("test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<a>" * 10**6, "elements are nested over 32 deep"),
        ("<a>" + " " * 2**24 + "</a>", "it has over 16,777,216 bytes"),
        ('<?xml version="1.0" encoding="nonsense"?><a/>', "unknown encoding"),
        ('<?xml version="1.0" encoding="utf-32"?><a/>', ".+"),
    ],
)
def test_xml_that_is_too_deep_or_too_large_or_in_no_encoding_is_refused_at_once(
    devkit: Path, text: str, message: str
) -> None:
    (devkit / "Annotations" / "3.xml").write_text(text)
    with pytest.raises(DevkitError, match=rf"annotation .*3\.xml cannot be read: {message}"):
        VOCDevkit(devkit).boxes("test")


def test_no_such_root() -> None:
    with pytest.raises(FileNotFoundError, match="root: /nowhere is not a folder"):
        VOCDevkit("/nowhere")


def test_no_image_sets(tmp_path: Path) -> None:
    with pytest.raises(DevkitError, match="has no ImageSets/Main and JPEGImages"):
        VOCDevkit(tmp_path)


def test_no_such_split(devkit: Path) -> None:
    with pytest.raises(DevkitError, match=r"split: no .*val\.txt; there is test"):
        VOCDevkit(devkit).ids("val")


def test_an_empty_class(devkit: Path) -> None:
    (devkit / "ImageSets" / "Main" / "cat_test.txt").write_text("1 -1\n2 -1\n3 0\n")
    with pytest.raises(DevkitError, match="class 'cat' has no positive image in 'test'"):
        VOCDevkit(devkit).labels("test")


def test_a_split_with_an_underscore_is_no_class(devkit: Path) -> None:
    sets = devkit / "ImageSets" / "Main"
    (sets / "test_small.txt").write_text("1\n")
    (sets / "cat_test_small.txt").write_text("1 1\n")
    assert VOCDevkit(devkit).classes == ("cat", "dog")


def test_a_malformed_line(devkit: Path) -> None:
    (devkit / "ImageSets" / "Main" / "cat_test.txt").write_text("1 1\n2 yes\n")
    with pytest.raises(DevkitError, match=r"cat_test\.txt:2: got '2 yes'"):
        VOCDevkit(devkit).labels("test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 1\n2 -1\n3 0\n1 -1\n", r"cat_test\.txt:4: got '1' again, wanted one line an image"),
        ("1 1.0\n", r"cat_test\.txt:1: got '1 1\.0', wanted '<image> <-1\|0\|1>'"),
        ("1 +1\n", r"cat_test\.txt:1: got '1 \+1'"),
        ("1\n", r"cat_test\.txt:1: got '1', wanted"),
    ],
)
def test_lines_of_class_files_that_cannot_be_read(devkit: Path, text: str, message: str) -> None:
    (devkit / "ImageSets" / "Main" / "cat_test.txt").write_text(text)
    with pytest.raises(DevkitError, match=message):
        VOCDevkit(devkit).labels("test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"3 1\n1 -1\n", r"test\.txt:1: got \['3', '1'\], wanted one image name a line"),
        (b"3\n\n1\n3\n", r"test\.txt:4: got '3' again, as in line 1"),
        (b"3\n\xff\xfe\n", r"test\.txt cannot be read: 'utf-8' codec"),
        (b" \n", r"test\.txt is empty"),
    ],
)
def test_lines_of_image_sets_that_cannot_be_read(devkit: Path, text: bytes, message: str) -> None:
    (devkit / "ImageSets" / "Main" / "test.txt").write_bytes(text)
    with pytest.raises(DevkitError, match=message):
        VOCDevkit(devkit).ids("test")


def test_lists_as_other_systems_write_them(devkit: Path) -> None:
    sets = devkit / "ImageSets" / "Main"
    (sets / "test.txt").write_bytes(b"\xef\xbb\xbf3\r\n\r\n 1 \r\n2\r\n")
    (sets / "cat_test.txt").write_bytes(b"\xef\xbb\xbf1\t1\r\n2  -1\r\n3 0\r\n\r\n")
    kit = VOCDevkit(devkit)
    assert kit.ids("test") == ("3", "1", "2")
    assert kit.labels("test")[:, 0].tolist() == [0, 1, -1]


def test_an_image_without_label(devkit: Path) -> None:
    (devkit / "ImageSets" / "Main" / "cat_test.txt").write_text("1 1\n2 -1\n")
    with pytest.raises(DevkitError, match=r"no line for image 3 \(1 missing\)"):
        VOCDevkit(devkit).labels("test")


def test_a_missing_image_is_named(devkit: Path) -> None:
    (devkit / "JPEGImages" / "2.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.jpg is not a file"):
        VOCDevkit(devkit).images("test")


def test_names_in_a_split_are_not_used_as_paths_outside(devkit: Path) -> None:
    (devkit / "ImageSets" / "Main" / "test.txt").write_text("../../../../etc/passwd\n")
    with pytest.raises(DevkitError, match=r"test\.txt:1: got '.*passwd', wanted an image name, no"):
        VOCDevkit(devkit).ids("test")


def write_boxes(root: Path, image: str, objects: list[tuple[str, int, list[Any]]]) -> None:
    sides = ("xmin", "ymin", "xmax", "ymax")
    body = "".join(
        f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox>"
        + "".join(f"<{side}>{value}</{side}>" for side, value in zip(sides, box, strict=True))
        + "</bndbox></object>"
        for name, hard, box in objects
    )
    (root / "Annotations" / f"{image}.xml").write_text(f"<annotation>{body}</annotation>")


def test_boxes_count_from_zero_and_those_without_area_are_left_out(devkit: Path) -> None:
    write_boxes(devkit, "1", [("dog", 0, [1, 1, 4, 3]), ("cat", 1, [2.5, 1, 900, 3])])
    write_boxes(devkit, "2", [])
    write_boxes(devkit, "3", [("cat", 0, [2, 2, 2, 9]), ("cat", 0, [3, 9, 2, 9])])
    third, first, second = VOCDevkit(devkit).boxes("test")
    assert first.boxes.tolist() == [[0, 0, 4, 3], [1.5, 0, 900, 3]]
    assert first.labels.tolist() == [1, 0]
    assert first.difficult.tolist() == [False, True]
    assert (second.boxes.shape, second.without_area) == ((0, 4), 0)
    assert (third.boxes.shape, third.without_area) == ((0, 4), 2)


@pytest.mark.parametrize(
    ("name", "box", "message"),
    [
        ("dog", ["left", 1, 2, 3], r"1\.xml: got corners \['left', '1', '2', '3'\]"),
        ("bird", [1, 1, 2, 3], r"1\.xml: got class 'bird', known are \('cat', 'dog'\)"),
    ],
)
def test_boxes_that_cannot_be_read(devkit: Path, name: str, box: list[Any], message: str) -> None:
    for image in ("2", "3"):
        write_boxes(devkit, image, [])
    write_boxes(devkit, "1", [(name, 0, box)])
    with pytest.raises(DevkitError, match=message):
        VOCDevkit(devkit).boxes("test")


def write_object(root: Path, image: str, fields: str) -> None:
    corners = "<xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>3</ymax>"
    (root / "Annotations" / f"{image}.xml").write_text(
        f"<annotation><object>{fields}<bndbox>{corners}</bndbox></object></annotation>"
    )


@pytest.fixture
def annotated(devkit: Path) -> Path:
    """The labels of "cat" come from annotations, of which those of 2 and 3 are a plain cat."""
    (devkit / "ImageSets" / "Main" / "cat_test.txt").rename(
        devkit / "ImageSets" / "Main" / "cat_train.txt"
    )
    (devkit / "ImageSets" / "Main" / "train.txt").write_text("1\n")
    for image in ("2", "3"):
        write_object(devkit, image, "<name>cat</name>")
    return devkit


@pytest.mark.parametrize("text", ["1", " 1 ", "1.0", "true", "True", "\n1\n"])
def test_what_is_marked_difficult_is_difficult(annotated: Path, text: str) -> None:
    write_object(annotated, "1", f"<name> cat\n</name><difficult>{text}</difficult>")
    kit = VOCDevkit(annotated)
    assert kit.boxes("test")[1].difficult.tolist() == [True]
    assert kit.labels("test")[1, 0] == 0


@pytest.mark.parametrize(
    "field", ["", *(f"<difficult>{text}</difficult>" for text in ("0", " 0 ", "0.0", "False"))]
)
def test_what_is_not_marked_difficult_is_not(annotated: Path, field: str) -> None:
    write_object(annotated, "1", f"<name>cat</name>{field}")
    kit = VOCDevkit(annotated)
    assert kit.boxes("test")[1].difficult.tolist() == [False]
    assert kit.labels("test")[1, 0] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("<name>cat</name><difficult>yes?</difficult>", "got difficult 'yes\\?', wanted 0 or 1"),
        ("<name>cat</name><difficult>2</difficult>", "got difficult '2', wanted 0 or 1"),
        ("<name>cat</name><difficult/>", "got difficult '', wanted 0 or 1"),
        ("<name> </name>", "got an object without a name, wanted its class"),
        ("<difficult>0</difficult>", "got an object without a name, wanted its class"),
        ("<name>Cat</name>", r"got class 'Cat', known are \('cat', 'dog'\)"),
    ],
)
def test_fields_of_objects_are_read_alike_for_labels_and_for_boxes(
    annotated: Path, fields: str, message: str
) -> None:
    write_object(annotated, "1", fields)
    for read in (VOCDevkit(annotated).labels, VOCDevkit(annotated).boxes):
        with pytest.raises(DevkitError, match=rf"annotation .*1\.xml: {message}"):
            read("test")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e39", "", "1,5"])
@pytest.mark.parametrize("corner", range(4))
def test_corners_that_are_no_finite_numbers_are_refused(
    devkit: Path, value: str, corner: int
) -> None:
    for image in ("2", "3"):
        write_boxes(devkit, image, [])
    box: list[Any] = [1, 1, 4, 3]
    box[corner] = value
    write_boxes(devkit, "1", [("cat", 0, box)])
    with pytest.raises(DevkitError, match=r"1\.xml: got corners \[.*\], wanted finite numbers"):
        VOCDevkit(devkit).boxes("test")
