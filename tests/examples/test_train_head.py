from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from examples.train_head import main


def test_it_says_what_it_does(image_folder: Path, tmp_path: Path) -> None:
    arguments = [str(image_folder), str(tmp_path / "head"), "--cache", str(tmp_path / "cache")]
    arguments += ["--backbone", "timm/test_resnet", "--weights", "random", "--clusters", "3"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "of 10 images" in result.output
    assert "(10, 3) features" in result.output
    assert (tmp_path / "head" / "head.safetensors").is_file()
