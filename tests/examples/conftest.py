"""Rendered photographs of three classes and a tiny classifier, for the examples to run on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from click import Command
from click.testing import CliRunner
from PIL import Image

from examples._photos import Pairs, run
from featxfer import Degradation, Preprocessing, open_images

CLASSES = ("checks", "plain", "stripes")


@pytest.fixture
def figures() -> Callable[..., dict[str, list[float]]]:
    """Runs an example: of each line `name: ...` that it prints, the figures by name."""

    def invoke(command: Command, *arguments: object) -> dict[str, list[float]]:
        result = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        lines = [line.split(": ") for line in result.stdout.splitlines() if ": " in line]
        return {name: [float(f) for f in re.findall(r"\d+\.\d+", text)] for name, text in lines}

    return invoke


@pytest.fixture
def check_shares(
    figures: Callable[..., dict[str, list[float]]],
    train_photos: Path,
    test_photos: Path,
    tmp_path: Path,
) -> Callable[..., None]:
    """Runs an example of detectors, with more options: each line has two shares in percent."""

    def check(command: Command, *options: object) -> None:
        printed = figures(command, train_photos, test_photos, "--cache", tmp_path, *options)
        assert list(printed) == ["LR, before", "LR, after", "HR, after"]
        for shares in printed.values():
            assert len(shares) == 2
            assert all(0 < part <= 100 for part in shares)

    return check


@pytest.fixture
def options(weights: Path) -> tuple[object, ...]:
    """The tiny model, and LR images that lose their texture."""
    return ("--backbone", "timm/test_efficientnet", "--weights", weights, "--lr-size", 12)


@pytest.fixture(scope="session")
def train_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder tree of 60 images."""
    return save_tree(tmp_path_factory.mktemp("train"), range(20))


@pytest.fixture(scope="session")
def test_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder tree of 30 other images."""
    return save_tree(tmp_path_factory.mktemp("test"), range(100, 110))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, test_photos: Path) -> Path:
    """Of timm's test_efficientnet: random, and a classifier whose ten first choices do vary."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet").eval()
        state, classifier = model.state_dict(), torch.randn(10, model.num_features)
    model.reset_classifier(0)
    hr, _ = run(model, Pairs(open_images(test_photos), Degradation()), Preprocessing())
    state["classifier.weight"][:10] = classifier
    state["classifier.bias"][:] = -1e6
    state["classifier.bias"][:10] = -classifier @ hr.mean(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    safetensors.torch.save_file(state, path)
    return path


def save_tree(root: Path, seeds: range) -> Path:
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for seed in seeds:
            render(label, seed).save(root / name / f"{seed}.png")
    return root


def render(label: int, seed: int) -> Image.Image:
    """A rectangle on a ground in the class's colours; its texture does not show in 12 pixels."""
    rng = np.random.default_rng([label, seed])
    pixels = np.tile(rng.uniform(60, 120, 3), (56, 64, 1))
    y, x = rng.integers(0, 40, 2)
    pixels[y : y + 16, x : x + 20] = rng.uniform(60, 120, 3)
    pixels[:, :, label] += 60
    rows, columns = np.indices((56, 64))
    texture = ((rows + columns) // 2 % 2, np.full((56, 64), 0.5), rows // 2 % 2)[label]
    pixels += 100 * (texture[:, :, None] - 0.5)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
