from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from benchmarks.detection.__main__ import main
from benchmarks.detection.detectors import KINDS, build, trained
from benchmarks.detection.judge import COLUMNS, Detections, Judge, overlaps
from benchmarks.detection.methods import (
    METHODS,
    TUNING,
    Setting,
    blocks_alone,
    blocks_and_heads,
)
from benchmarks.detection.pictures import sort_out
from benchmarks.detection.run import summary
from featxfer import Recipe, ScaledDegradation, VOCDevkit, open_images
from featxfer.evaluation.voc import ObjectBoxes
from featxfer_integrations import transfers_of

FOLDER = Path(__file__).parents[2] / "benchmarks" / "detection"


def objects(boxes: list[list[float]], labels: list[int], hard: list[bool]) -> ObjectBoxes:
    return ObjectBoxes(
        np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(labels), np.array(hard, bool)
    )


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(scores, dtype=np.float64),
        np.array(labels, dtype=np.int64),
    )


KNOWN = [
    objects([[0, 0, 50, 50], [60, 60, 90, 90]], [0, 1], [False, False]),
    objects([[10, 10, 200, 200]], [0], [False]),
    objects([], [], []),
]
PERFECT = [
    found([[0, 0, 50, 50], [60, 60, 90, 90]], [0.9, 0.8], [0, 1]),
    found([[10, 10, 200, 200]], [0.7], [0]),
    found([], [], []),
]


def test_perfect_detections_are_perfect_at_every_size() -> None:
    judge = Judge(KNOWN, ("cat", "dog"))
    figures = judge.evaluate(PERFECT).figures()
    assert tuple(figures) == COLUMNS
    assert all(value == pytest.approx(100) for value in figures.values())
    assert judge.voc_ap50(PERFECT) == pytest.approx(100)


def test_no_detection_is_nothing() -> None:
    judge = Judge(KNOWN, ("cat", "dog"))
    nothing = [found([], [], [])] * 3
    assert judge.evaluate(nothing).figures()["AP"] == 0
    assert judge.voc_ap50(nothing) == 0


def test_voc_counts_doubles_as_wrong_and_difficult_objects_not_at_all() -> None:
    known = [objects([[0, 0, 10, 10], [20, 20, 30, 30]], [0, 0], [False, True])]
    judge = Judge(known, ("cat",))
    double = [found([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]], [0.9, 0.8, 0.7], [0] * 3)]
    assert judge.voc_ap50(double) == pytest.approx(100)
    late = [found([[50, 50, 60, 60], [0, 0, 10, 10]], [0.9, 0.8], [0, 0])]
    assert judge.voc_ap50(late) == pytest.approx(50)


def test_figures_over_resampled_images() -> None:
    """An image that is missed counts as often as it is drawn."""
    judge = Judge(KNOWN, ("cat", "dog"))
    missed = [PERFECT[0], found([], [], []), PERFECT[2]]
    evaluated = judge.evaluate(missed)
    whole = evaluated.figures()
    only_first = evaluated.figures(np.array([0, 0, 2]))
    assert only_first["AP50"] == pytest.approx(100)
    assert evaluated.figures(np.array([1, 1, 1]))["AP50"] == 0
    assert 0 < whole["AP50"] < 100
    assert evaluated.figures() == whole
    rows = np.array([0, 1, 2])
    assert evaluated.figures(rows) == whole
    for drawn in ([0, 0, 2], [1, 1, 1], [0, 1, 2], [1, 0, 1]):
        assert evaluated.ap(np.array(drawn)) == evaluated.figures(np.array(drawn))["AP"]
    assert np.isnan(evaluated.ap(np.array([2, 2, 2])))
    assert evaluated.figures() == whole


def test_overlap_and_json() -> None:
    box = np.array([0.0, 0.0, 10.0, 10.0])
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]], dtype=np.float64)
    assert overlaps(box, boxes).tolist() == pytest.approx([1, 1 / 3, 0])
    back = Detections.from_lists(PERFECT[0].to_lists())
    assert np.array_equal(back.boxes, PERFECT[0].boxes)
    assert np.array_equal(back.labels, PERFECT[0].labels)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_to_the_same_detector(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    known = []
    for index in range(4):
        pixels = rng.integers(0, 80, (60, 80, 3), dtype=np.uint8)
        left, top = int(rng.integers(5, 40)), int(rng.integers(5, 30))
        pixels[top : top + 20, left : left + 24] += 120
        Image.fromarray(pixels).save(folder / f"{index}.png")
        known.append(objects([[left, top, left + 24, top + 20]], [0], [False]))
    images = open_images(folder)
    monkeypatch.setattr("benchmarks.detection.detectors.SHORT_SIDE", 64)
    recipe = Recipe(epochs=2, batch_size=2, learning_rate=1e-3, optimizer="adamw", steps=())

    def train(cache: str, callback: Any = None) -> nn.Module:
        folder = tmp_path / cache
        return trained(
            kind,
            images,
            known,
            ("box",),
            folder,
            weights="random",
            recipe=recipe,
            callback=callback,
        )

    def stop(entry: Any) -> None:
        raise KeyboardInterrupt

    losses: list[float] = []
    whole = train("one", lambda entry: losses.append(entry.loss)).state_dict()
    assert len(losses) == 2
    with pytest.raises(KeyboardInterrupt):
        train("two", stop)
    detectors = tmp_path / "two" / "detectors"
    assert list(detectors.glob("*.checkpoint"))
    again = train("two").state_dict()
    assert not list(detectors.glob("*.checkpoint"))
    assert all(torch.equal(value, whole[name]) for name, value in again.items())
    assert build(kind, 1, "random").state_dict().keys() == whole.keys()
    monkeypatch.setattr("featxfer.PseudoLabelTrainer.fit_rows", None)
    crowd = [*known[0].boxes.tolist(), [0, 0, 60, 40]]
    known[0] = objects(crowd, [0, 0], [False, True])  # which is not trained on
    kept = train("one").state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in kept.items())


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """Six photographs of a bright box each, in VOC layout."""
    rng, root = np.random.default_rng(0), tmp_path / "kit"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for index in range(6):
        pixels = rng.integers(0, 80, (60, 80, 3), dtype=np.uint8)
        left, top = int(rng.integers(5, 40)), int(rng.integers(5, 30))
        pixels[top : top + 20, left : left + 24] += 120
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{index}.jpg", quality=95)
        box = {"xmin": left + 1, "ymin": top + 1, "xmax": left + 24, "ymax": top + 20}
        corners = "".join(f"<{side}>{value}</{side}>" for side, value in box.items())
        (root / "Annotations" / f"{index}.xml").write_text(
            f"<annotation><object><name>box</name><bndbox>{corners}</bndbox></object></annotation>"
        )
    for split, names in (("trainval", "0123"), ("test", "45")):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    return root


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images, few epochs and few resamples."""
    recipe = Recipe(epochs=4, batch_size=2, learning_rate=1e-3, optimizer="adamw", steps=())
    for module, name in (
        ("benchmarks.detection.run", "TRAINING"),
        ("benchmarks.detection.methods", "BOX_RECIPE"),
        ("benchmarks.detection.methods", "DETECTOR_RECIPE"),
        ("featxfer_integrations.stages.boxes", "BOX_RECIPE"),
        ("featxfer_integrations.stages.pyramid", "DETECTOR_RECIPE"),
    ):
        monkeypatch.setattr(f"{module}.{name}", recipe)
    monkeypatch.setattr("benchmarks.detection.detectors.SHORT_SIDE", 64)
    monkeypatch.setattr("benchmarks.detection.run.RESAMPLES", 5)


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore:.* not help")
@pytest.mark.parametrize("detector", KINDS)
def test_the_table_of_every_method(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detector: str
) -> None:
    out = tmp_path / "out"
    arguments = ["--root", kit, "--weights", "random", "--factors", "2", "--seeds", "2"]
    arguments += ["--detector", detector, "--cache", tmp_path / "cache", "--out", out]
    for _ in range(2):
        run = CliRunner().invoke(main, list(map(str, arguments)))
        assert run.exit_code == 0, run.output
        monkeypatch.setattr("benchmarks.common.fit.fit_transfer", None)
    results = json.loads((out / "results.json").read_text())
    table = results["tables"]["2"]
    assert list(table) == ["HR", "LR", *(method.label for method in METHODS.values())]
    plain = {name: table["LR"][name] for name in COLUMNS}
    assert {name: table["heads, untrained"][name] for name in COLUMNS} == pytest.approx(
        plain, nan_ok=True
    )
    assert summary(results) == (out / "summary.md").read_text()
    assert results["images"] == {"trainval": 4, "test": 2}
    assert results["curve"]["2"]["AP"] == pytest.approx(plain["AP"])
    assert [len(table[label]["AP of seeds"]) for label in ("LR", "blocks on the pyramid")] == [1, 2]
    with Image.open(out / "boxes.png") as picture:
        assert picture.width > picture.height


def write_coco(kit: VOCDevkit, split: str, path: Path) -> list[str]:
    """A split of a devkit as COCO has it, with a class that no image has; arguments of --coco."""
    names = [f"{name}.jpg" for name in kit.ids(split)]
    boxes = [known.boxes.tolist()[0] for known in kit.boxes(split)]
    described = {
        "categories": [{"id": 3, "name": "box"}, {"id": 5, "name": "none"}],
        "images": [{"id": 10 * i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": 10 * i, "category_id": 3, "bbox": [x, y, x2 - x, y2 - y]}
            for i, (x, y, x2, y2) in enumerate(boxes)
        ],
    }
    path.write_text(json.dumps(described))
    return ["--coco", str(path), str(kit.root / "JPEGImages")]


@pytest.mark.usefixtures("quick")
def test_sets_in_cocos_layout_are_judged_as_a_devkit_is(kit: Path, tmp_path: Path) -> None:
    splits = [write_coco(VOCDevkit(kit), s, tmp_path / f"{s}.json") for s in ("trainval", "test")]
    usual = ["--weights", "random", "--factors", "2", "--methods", "identity", "--no-figures"]
    usual += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(main, [*splits[0], *splits[1], *usual])
    assert run.exit_code == 0, run.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["config"]["classes"] == ["box", "none"]
    assert results["images"] == {"train": 4, "val": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.detection.__main__.VOCDevkit.classes", ("box", "none"))
        run = CliRunner().invoke(main, ["--root", str(kit), *usual])
    same = json.loads((tmp_path / "out" / "results.json").read_text())
    assert json.dumps(results["tables"]) == json.dumps(same["tables"])
    for given in (splits[0], [*splits[0], *splits[1], "--root", str(kit)], []):
        run = CliRunner().invoke(main, given)
        assert run.exit_code == 2
        assert "wanted --root, or --coco twice" in run.output


def test_sets_of_other_classes_are_refused(kit: Path, tmp_path: Path) -> None:
    pair = write_coco(VOCDevkit(kit), "test", tmp_path / "a.json")
    other = tmp_path / "b.json"
    other.write_text((tmp_path / "a.json").read_text().replace("none", "other"))
    run = CliRunner().invoke(main, [*pair, "--coco", str(other), pair[2], "--no-figures"])
    assert run.exit_code == 1
    assert "--coco: got sets of other classes, wanted those trained on" in run.output


@pytest.mark.filterwarnings("ignore:.* not help")
@pytest.mark.usefixtures("quick")
def test_choices_of_blocks_are_judged_on_val(kit: Path, tmp_path: Path) -> None:
    for split, names in (("train", "012"), ("val", "3")):
        (kit / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    arguments = ["--root", kit, "--weights", "random", "--factors", "2", "--seeds", "1", "--tune"]
    arguments += ["--methods", "late,half", "--cache", tmp_path, "--out", tmp_path / "out"]
    run = CliRunner().invoke(main, list(map(str, [*arguments, "--no-figures"])))
    assert run.exit_code == 0, run.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["images"] == {"train": 3, "val": 1}
    labels = [TUNING[name].label for name in ("late", "half")]
    assert list(results["tables"]["2"]) == ["HR", "LR", *labels]
    assert not (tmp_path / "out" / "boxes.png").exists()


@pytest.mark.filterwarnings("ignore:.* not help")
@pytest.mark.usefixtures("quick")
def test_blocks_are_trained_once_and_stay_as_they_are_below_heads(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = VOCDevkit(kit).images("trainval")
    detector = build("faster-rcnn", 1, "random")
    setting = Setting(detector, images, ScaledDegradation(2), tmp_path / "cache", 0)
    trained_blocks = blocks_alone(setting)
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.common.fit.fit_transfer", None)
        kept = transfers_of(blocks_alone(setting))
    anew = dataclasses.replace(setting, cache=tmp_path / "other").fit("backbone")
    anew.run()
    again = anew.model
    both = transfers_of(blocks_and_heads(setting))
    assert list(kept) == list(transfers_of(again)) == [name for name in both if name != "boxes"]
    for name, block in transfers_of(trained_blocks).items():
        for key, value in block.state_dict().items():
            for other in (kept, transfers_of(again), both):
                assert value.equal(other[name].state_dict()[key])


def test_detections_are_sorted_into_right_and_wrong_and_objects_into_found_and_missed() -> None:
    known = objects([[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]], [0, 0, 1], [False] * 3)
    seen = found(
        [[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50], [90, 90, 99, 99]],
        [0.9, 0.8, 0.4, 0.7, 0.6],
        [0, 0, 0, 1, 0],
    )
    assert sort_out(known, seen) == ([0, 3], [1, 4], [1])
    other_class = found([[40, 40, 50, 50]], [0.9], [0])
    assert sort_out(known, other_class) == ([], [0], [0, 1, 2])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--methods", "magic", "got magic, wanted some of"), ("--factors", "big", "got 'big'")],
)
def test_bad_options_are_told(kit: Path, option: str, value: str, message: str) -> None:
    run = CliRunner().invoke(main, ["--root", str(kit), option, value])
    assert run.exit_code == 2
    assert message in run.output


RESULTS = sorted((FOLDER / "results").glob("*"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_the_readme_shows_what_the_results_hold(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert summary(results) in (FOLDER / "README.md").read_text() + "\n"
