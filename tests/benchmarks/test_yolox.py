from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from benchmarks.detection.judge import Judge
from benchmarks.yolox.__main__ import main
from benchmarks.yolox.detector import (
    GREY,
    decode,
    detect,
    find,
    find_in_slices,
    kept,
    labels_among,
    letterbox,
    load,
    relabelled,
)
from benchmarks.yolox.run import ENLARGED, summary
from featxfer import Recipe, VOCDevkit
from tests.conftest import SHARED

FOLDER = Path(__file__).parents[2] / "benchmarks" / "yolox"
COCO = ("person", "airplane", "tv", "cat")
TRAINED = ("LR through blocks", "HR through blocks")


def test_an_image_is_put_in_the_upper_left_of_its_square() -> None:
    image = torch.full((3, 2, 4), 7, dtype=torch.uint8)
    square = letterbox(image, 8)
    assert (square[:, :4] == 7).all()
    assert (square[:, 4:] == GREY).all()
    assert (letterbox(image.mT, 8)[:, :, 4:] == GREY).all()


def test_boxes_are_decoded_by_hand() -> None:
    """A square of 32 pixels has 4 x 4 cells of 8, 2 x 2 of 16 and one of 32."""
    outputs = torch.zeros(21, 85)
    outputs[6, :4] = torch.tensor([0.5, 0.25, math.log(2), math.log(0.5)])
    boxes = decode(outputs, 32)
    # the second row's third cell: the middle is (2.5, 1.25) cells of 8, the sides are 16 and 4
    assert boxes[6].tolist() == pytest.approx([12, 8, 28, 12])
    assert boxes[17].tolist() == [8, -8, 24, 8]
    assert boxes[18].tolist() == [-8, 8, 8, 24]
    assert boxes[20].tolist() == [-16, -16, 16, 16]


def test_of_boxes_that_overlap_the_surest_of_a_class_is_kept() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 5]]).float()
    found = kept(boxes, torch.tensor([0.5, 0.9, 0.3, 0.8]), torch.tensor([1, 1, 2, 1]))
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.3])
    assert found.labels.tolist() == [1, 1, 2]
    assert found.boxes[1].tolist() == [0, 0, 10, 5]


class Bright(nn.Module):
    """Says that a cat is where pixels are bright, in the words of YOLOX's first cell."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        rows, columns = torch.nonzero(images[0].amin(0) > 200).T
        ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        left, top, right, bottom = (float(end) for end in ends)
        side = images.shape[2]
        outputs = torch.zeros(1, sum((side // stride) ** 2 for stride in (8, 16, 32)), 85)
        outputs[0, 0, :4] = torch.tensor(
            [
                (left + right) / 16,
                (top + bottom) / 16,
                math.log((right - left) / 8),
                math.log((bottom - top) / 8),
            ]
        )
        outputs[0, 0, 4:9] = torch.tensor([0.5, 0.1, 0.2, 0.3, 0.8])
        return outputs


def spotted() -> Tensor:
    """An image of 104 x 52 pixels, a quarter of the detector's square, with a bright box."""
    image = torch.zeros(3, 52, 104, dtype=torch.uint8)
    image[:, 8:28, 60:100] = 255
    return image


def test_the_detector_gets_blue_first_and_says_the_likeliest_class() -> None:
    image = torch.full((3, 416, 416), 250, dtype=torch.uint8)
    image[0] = 230
    model = Bright()
    found = detect(model, image)
    assert model.seen[0, :, 0, 0].tolist() == pytest.approx([250, 250, 230])
    assert found.labels.tolist() == [3]
    assert found.scores.tolist() == pytest.approx([0.5 * 0.8])


@pytest.mark.parametrize("side", [416, 640])
@pytest.mark.parametrize("factor", [None, 2])
def test_boxes_are_found_in_the_images_own_pixels(side: int, factor: int | None) -> None:
    found = find(Bright(), spotted(), factor, side)
    assert found.boxes.tolist() == [pytest.approx([60, 8, 100, 28], abs=1)]


def test_what_slices_find_is_moved_back_and_found_once() -> None:
    """The box is whole in the slice of the upper right; what others see of it is cut off."""
    image = torch.zeros(3, 52, 104, dtype=torch.uint8)
    image[:, 4:18, 70:100] = 255
    image[:, 50:, :4] = 255
    image[:, 50:, 100:] = 255
    image[:, :2, :4] = 255
    boxes = find_in_slices(Bright(), image, None).boxes
    assert boxes.tolist()[0] == pytest.approx([0, 0, 104, 52], abs=1)
    upper_right = [70, 4, 100, 18]
    assert sum(box == pytest.approx(upper_right, abs=1) for box in boxes.tolist()) == 1


def test_vocs_classes_are_found_among_cocos() -> None:
    labels = labels_among(COCO, ("aeroplane", "cat", "tvmonitor"))
    assert labels.tolist() == [-1, 0, 2, 1]
    found = {"boxes": [[0], [1], [2]], "scores": [0.9, 0.8, 0.7], "labels": [0, 3, 2]}
    assert relabelled(found, labels) == {
        "boxes": [[1], [2]],
        "scores": [0.8, 0.7],
        "labels": [1, 2],
    }
    with pytest.raises(ValueError, match="classes: got bird, which the detector does not know"):
        labels_among(COCO, ("cat", "bird"))


class Tiny(nn.Module):
    """Random, with modules of the names that YOLOX-nano's graph has; few boxes are sure."""

    def __init__(self) -> None:
        super().__init__()
        self.Mul_115 = nn.Conv2d(3, 8, 8, 8)
        self.Mul_161, self.Mul_196 = nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 2, 2)
        self.Mul_246, self.Mul_272, self.Mul_298 = (nn.Conv2d(8, 12, 1) for _ in range(3))
        self.predict = nn.Conv2d(12, 85, 1)
        with torch.no_grad():
            self.predict.weight[4], self.predict.bias[4] = 0, -4.5  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        high = self.Mul_115(images / 255)
        middle = self.Mul_161(high.relu())
        low = self.Mul_196(middle.relu())
        maps = self.Mul_246(high), self.Mul_272(middle), self.Mul_298(low)
        said = torch.cat([self.predict(level).flatten(2) for level in maps], 2).mT
        return torch.cat([said[..., :4], said[..., 4:].sigmoid()], 2)


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """Photographs in VOC layout, and the same as COCO has them."""
    rng, root = np.random.default_rng(0), tmp_path / "kit"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    annotations = []
    for index in range(10):
        pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{index}.jpg")
        (root / "Annotations" / f"{index}.xml").write_text(
            "<annotation><object><name>cat</name><bndbox><xmin>5</xmin><ymin>5</ymin>"
            "<xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>"
        )
        box = {"bbox": [4, 4, 26, 36], "category_id": 7, "image_id": index}
        annotations.append({"id": index, **box})
    for split, names in (("train", "0123456"), ("val", "789")):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    classes = ["cat", *(f"c{index}" for index in range(79))]
    described = {
        "images": [{"id": index, "file_name": f"{index}.jpg"} for index in (7, 8)],
        "categories": [{"id": 7 + index, "name": name} for index, name in enumerate(classes)],
        "annotations": annotations[7:9],
    }
    (root / "coco.json").write_text(json.dumps(described))
    return root


@pytest.mark.filterwarnings("ignore:.* not help")
def test_the_tables_of_every_row_and_the_same_once_more(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Tiny().eval()
    recipe = Recipe(epochs=2, batch_size=4, learning_rate=4e-3, optimizer="adamw", steps=())
    monkeypatch.setattr("benchmarks.yolox.run.load", lambda _: model)
    monkeypatch.setattr("benchmarks.yolox.run.RECIPE", recipe)
    monkeypatch.setattr("benchmarks.detection.run.RESAMPLES", 5)
    monkeypatch.setattr("benchmarks.yolox.run.TIMED", 1)
    out = tmp_path / "out"
    coco = [kit / "coco.json", kit / "JPEGImages"]
    arguments = ["--root", kit, "--coco", *coco, "--weights", "none", "--factors", "8"]
    arguments += ["--seeds", "2", "--train-images", "6", "--val-images", "2"]
    arguments += ["--cache", tmp_path / "cache", "--out", out]
    tables = []
    for _ in range(2):
        run = CliRunner().invoke(main, list(map(str, arguments)))
        assert run.exit_code == 0, run.output
        results = json.loads((out / "results.json").read_text())
        assert summary(results) == (out / "summary.md").read_text()
        for table in (results["tables"][name]["8"] for name in ("VOC val", "COCO val")):
            assert list(table) == ["HR", "LR", *ENLARGED, *TRAINED]
            assert [len(table[label]["AP of seeds"]) for label in ("LR", *TRAINED)] == [1, 2, 2]
            assert table["LR through blocks"]["GMACs"] > table["LR"]["GMACs"]
        tables.append(results["tables"])
        monkeypatch.setattr("benchmarks.common.fit.fit_transfer", None)
        monkeypatch.setattr("benchmarks.yolox.detector.detect", None)
    assert results["images"] == {"train": 6, "VOC val": 2, "COCO val": 2}
    assert json.dumps(tables[0]) == json.dumps(tables[1])


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_real_weights_find_what_is_on_real_photographs() -> None:
    weights = SHARED.parent / "weights" / "yolox_nano.onnx"
    if not weights.is_file():
        pytest.skip(f"no weights at {weights}")
    classes = json.loads((SHARED / "coco" / "instances_val2017.json").read_text())["categories"]
    names = [entry["name"] for entry in sorted(classes, key=lambda entry: entry["id"])]
    kit, model = VOCDevkit(SHARED / "VOC2007"), load(weights)
    images, known = kit.images("val"), kit.boxes("val")
    labels = labels_among(names, kit.classes)
    rows = range(0, 240, 20)
    found = [find(model, images.read(row), None) for row in rows]
    lists = [relabelled(part.to_lists(), labels) for part in found]
    judge = Judge([known[row] for row in rows], kit.classes)
    assert judge.voc_ap50([type(found[0]).from_lists(part) for part in lists]) > 60


RESULTS = sorted((FOLDER / "results").glob("*"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_the_readme_shows_what_the_results_hold(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert summary(results) in (FOLDER / "README.md").read_text() + "\n"
