"""Images as people have them, for the stages of detectors."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def odd_images(discs: Path, tmp_path: Path) -> Path:
    """Eight that can be read, one of them grey and one of 16 bits, and one that is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in list(discs.iterdir())[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    Image.new("L", (70, 60), 99).save(folder / "grey.png")
    Image.new("I;16", (40, 90), 30_000).save(folder / "sixteen.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder
