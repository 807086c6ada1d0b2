"""The most memory that extraction takes, over the number of images, each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common.markdown import Column, entry, to_markdown
from benchmarks.common.memory import forget_peak, memory_mib
from benchmarks.torture.crash import small_backbone
from featxfer import Degradation, fill_stores, open_images

FILES = 100
"""Different JPEG files; more images are other names of these."""

VIEW = Degradation(hr_size=64, lr_size=16)


def measure_memory(counts: Sequence[int], folder: Path) -> Iterator[dict[str, Any]]:
    """Fills both stores from so many images of 160 x 120 pixels, with a backbone of one layer."""
    originals = _render(folder / "originals")
    for count in counts:
        images = folder / str(count)
        images.mkdir()
        for index in range(count):
            os.link(originals[index % FILES], images / f"{index:08d}.jpg")
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(images), str(folder / f"cache-{count}")],
            check=True,
            stdout=subprocess.PIPE,
        )
        yield {"images": count, **json.loads(done.stdout)}


def _render(folder: Path) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"{index}.jpg" for index in range(FILES)]
    for path in paths:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((160, 120), Image.Resampling.BICUBIC).save(path)
    return paths


def _extract(folder: Path, cache: Path) -> dict[str, float]:
    """MiB before anything is opened, with the list of images, and at the most; seconds."""
    small_backbone()
    before, start = memory_mib("VmRSS"), time.perf_counter()
    images = open_images(folder)
    listed = memory_mib("VmRSS")
    forget_peak()
    fill_stores(small_backbone(), images, VIEW, cache)
    return {
        "listed_mib": listed - before,
        "extraction_mib": memory_mib("VmHWM") - listed,
        "seconds": time.perf_counter() - start,
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a number of images."""
    columns: list[Column[Any]] = [
        entry("images", "images", ","),
        entry("list of images, MiB", "listed_mib", ".0f"),
        entry("extraction, MiB more", "extraction_mib", ".0f"),
        ("images a second", lambda row: f"{row['images'] / row['seconds']:.0f}"),
    ]
    return to_markdown(rows, columns)


if __name__ == "__main__":
    print(json.dumps(_extract(Path(sys.argv[1]), Path(sys.argv[2]))))
