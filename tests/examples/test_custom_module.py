from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from examples import custom_module
from examples.custom_module import SmallNet, main


def printed(train: Path, test: Path, cache: Path) -> dict[str, str]:
    """What the example prints, as name -> figure or answer."""
    arguments = [str(train), str(test), "--lr-size", "12", "--cache", str(cache)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    lines = [line.split(": ") for line in result.output.splitlines()]
    return {name: text.split()[-1] for name, text in lines}


def test_lr_features_come_nearer_to_hr_and_are_as_before_in_the_end(
    train_photos: Path, test_photos: Path, tmp_path: Path
) -> None:
    told = printed(train_photos, test_photos, tmp_path)
    answers = [told.pop(f"{n}, features unchanged") for n in ("untrained", "disabled", "detached")]
    assert answers == ["True"] * 3
    before, after, hr = (float(told.pop(name)) for name in ("LR, before", "LR, after", "HR, after"))
    assert before < after <= 1
    assert before < hr <= 1
    assert not told


def test_it_would_say_if_features_were_changed(
    train_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom_module, "detach_transfer", lambda model: model)
    told = printed(train_photos, train_photos / "plain", tmp_path)
    assert told["disabled, features unchanged"] == "True"
    assert told["detached, features unchanged"] == "False"


def test_the_network_classifies() -> None:
    assert SmallNet()(torch.zeros(2, 3, 40, 40)).shape == (2, 10)
