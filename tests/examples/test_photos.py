from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples._photos import Pairs, open_photos, run
from featxfer import Degradation, Preprocessing

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_has_at_most_60_lines(script: Path) -> None:
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 60


def test_there_are_examples_to_count() -> None:
    names = {path.stem for path in EXAMPLES.glob("[!_]*.py")}
    wanted = {"train_head", "classify", "retrieval", "discovery", "custom_module", "dropin"}
    assert wanted <= names


def test_every_example_is_in_the_readme() -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in EXAMPLES.glob("[!_]*.py"):
        assert f"python -m examples.{script.stem} " in readme


@pytest.fixture
def devkit(test_photos: Path, tmp_path: Path) -> Path:
    """Three images of the classes checks and plain: one of the first, of both, of the second."""
    root = tmp_path / "VOC2007"
    (root / "JPEGImages").mkdir(parents=True)
    sets = root / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    names = ("a", "b", "c")
    for name, file in zip(names, sorted((test_photos / "plain").iterdir()), strict=False):
        (root / "JPEGImages" / f"{name}.png").symlink_to(file)
    (sets / "test.txt").write_text("\n".join(names))
    (sets / "checks_test.txt").write_text("a 1\nb 1\nc -1\n")
    (sets / "plain_test.txt").write_text("a -1\nb 1\nc 1\n")
    return tmp_path


def test_a_split_of_a_devkit(devkit: Path) -> None:
    images = open_photos(f"{devkit}:test")
    assert images.ids == ("a", "b", "c")
    assert images.targets is None
    assert open_photos(f"{devkit}:test", classes=True).targets == (0, None, 1)


def test_a_folder_and_a_tree(image_folder: Path, test_photos: Path) -> None:
    assert len(open_photos(str(image_folder))) == 10
    assert open_photos(str(test_photos), classes=True).targets == (0,) * 10 + (1,) * 10 + (2,) * 10
    with pytest.raises(ValueError, match="flat folder has no classes"):
        open_photos(str(image_folder), classes=True)
    with pytest.raises(FileNotFoundError):
        open_photos(str(image_folder / "none"))


def test_run_keeps_the_order_of_images_and_views(test_photos: Path) -> None:
    images, degradation = open_photos(str(test_photos)), Degradation(lr_size=2)
    hr, lr = run(lambda x: x.mean((2, 3)), Pairs(images, degradation), Preprocessing((0, 0, 0)))
    for rows, view in ((hr, degradation.hr), (lr, degradation.lr)):
        wanted = torch.stack([view(images.read(i)).float().mean((1, 2)) for i in range(30)])
        std = torch.tensor(Preprocessing().std)
        assert torch.allclose(rows, wanted / 255 / std, atol=1e-5)
