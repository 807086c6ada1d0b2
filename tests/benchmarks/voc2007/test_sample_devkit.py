from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks.voc2007 import paper, sample_devkit
from benchmarks.voc2007.sample import CLASSES, draw
from benchmarks.voc2007.sample_devkit import render_sample
from featxfer import Degradation, VOCDevkit


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sample")
    render_sample(root, trainval=18, test=12)
    return root


def test_a_devkit_with_every_class_in_both_splits(rendered: Path) -> None:
    kit = VOCDevkit(rendered)
    assert kit.classes == tuple(sorted(CLASSES))
    assert len(CLASSES) == 20
    assert not set(CLASSES) & set(paper.CLASSES)
    for split, count in (("trainval", 18), ("test", 12)):
        labels = kit.labels(split)
        assert labels.shape == (count, 20)
        assert (labels == 1).any(0).all()
        assert (labels == 1).sum(1).max() > 1, "several objects an image"


def test_class_files_agree_with_the_annotations(rendered: Path, tmp_path: Path) -> None:
    kit = VOCDevkit(rendered)
    by_files = kit.labels("trainval")
    for path in (kit.root / "ImageSets" / "Main").glob("*_*_trainval.txt"):
        path.rename(tmp_path / path.name)
    try:
        assert np.array_equal(VOCDevkit(rendered).labels("trainval"), by_files)
    finally:
        for path in tmp_path.iterdir():
            path.rename(kit.root / "ImageSets" / "Main" / path.name)


def test_boxes_are_inside_the_image_and_some_objects_are_difficult(rendered: Path) -> None:
    kit, difficult = VOCDevkit(rendered), 0
    for name in kit.ids("trainval") + kit.ids("test"):
        tree = ElementTree.parse(kit.root / "Annotations" / f"{name}.xml")
        width, height = (int(tree.findtext(f"size/{side}", "")) for side in ("width", "height"))
        for node in tree.iterfind("object"):
            difficult += node.findtext("difficult") == "1"
            x0, y0, x1, y1 = (int(corner.text or "") for corner in node.find("bndbox") or [])
            assert 1 <= x0 < x1 <= width
            assert 1 <= y0 < y1 <= height
    assert difficult > 0


def test_the_same_seed_gives_the_same_bytes(rendered: Path, tmp_path: Path) -> None:
    render_sample(tmp_path, trainval=18, test=12)
    assert files(tmp_path) == files(rendered)
    render_sample(tmp_path / "other", trainval=18, test=12, seed=1)
    assert files(tmp_path / "other") != files(rendered)


def test_a_finished_sample_is_left_alone(rendered: Path) -> None:
    def never(done: int, total: int) -> None:
        raise AssertionError

    before = {p: p.stat().st_mtime_ns for p in rendered.rglob("*")}
    render_sample(rendered, trainval=18, test=12, progress=never)
    assert {p: p.stat().st_mtime_ns for p in rendered.rglob("*")} == before


def test_an_interrupted_sample_goes_on(
    rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def draw_until_interrupted(rng: np.random.Generator, items: list[object]) -> object:
        drawn.append(1)
        if len(drawn) == 8:
            raise KeyboardInterrupt
        return draw(rng, items)  # type: ignore[arg-type]

    monkeypatch.setattr(sample_devkit, "draw", draw_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_sample(tmp_path, trainval=18, test=12)
    render_sample(tmp_path, trainval=18, test=12)
    assert len(drawn) == 8 + 23, "seven images were there"
    assert files(tmp_path) == files(rendered)


def test_fine_detail_is_what_small_images_lose(rendered: Path) -> None:
    """Fine detail (differences of neighbours) shrinks far more than coarse detail does."""
    kit, degradation = VOCDevkit(rendered), Degradation(hr_size=128, lr_size=24)
    images = kit.images("test")
    hr, lr = (
        np.stack([make(images.read(i)).float().mean(0).numpy() for i in range(len(images))])
        for make in (degradation.hr, degradation.lr)
    )

    def detail(pixels: np.ndarray, step: int) -> float:
        return float(np.abs(pixels[:, :, step:] - pixels[:, :, :-step]).mean())

    assert detail(lr, 1) < 0.45 * detail(hr, 1)
    assert detail(lr, 24) > 0.65 * detail(hr, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trainval": 0}, "trainval: got 0, wanted an int >= 1"),
        ({"test": -1}, "test: got -1"),
        ({"seed": -1}, "seed: got -1, wanted an int >= 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_sample(tmp_path, **arguments)  # type: ignore[arg-type]


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    other = tmp_path / "VOCdevkit" / "VOC2007" / "mine.txt"
    other.parent.mkdir(parents=True)
    other.write_text("keep me")
    with pytest.raises(FileExistsError, match="holds something other than this sample"):
        render_sample(tmp_path)
    assert other.read_text() == "keep me"
