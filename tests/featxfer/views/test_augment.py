from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featxfer.views.augment import cropped, flipped
from featxfer.views.images import open_images


def test_flipped_images_are_mirrored_and_have_another_fingerprint(image_folder: Path) -> None:
    images = open_images(image_folder)
    mirrored = flipped(images)
    assert torch.equal(mirrored.read(3), images.read(3).flip(-1))
    assert mirrored.ids == images.ids
    assert mirrored.fingerprint != images.fingerprint


def test_crops_are_parts_of_the_image_the_same_every_time(image_folder: Path) -> None:
    images = open_images(image_folder)
    whole = images.read(5)
    first, again = cropped(images, 0), cropped(images, 0)
    part = first.read(5)
    assert torch.equal(part, again.read(5))
    assert first.fingerprint == again.fingerprint != cropped(images, 1).fingerprint
    shapes, mirrored = set(), 0
    rows, columns = whole.shape[1:]
    for draw in range(20):
        part = cropped(images, draw).read(5)
        height, width = part.shape[1:]
        shapes.add((height, width))
        assert 0.35 < height * width / (rows * columns) <= 1
        places = [
            (top, left, flip)
            for flip in (0, 1)
            for top in range(rows - height + 1)
            for left in range(columns - width + 1)
            if torch.equal(
                whole[:, top : top + height, left : left + width],
                part.flip(-1) if flip else part,
            )
        ]
        assert len(places) == 1
        mirrored += places[0][2]
    assert len(shapes) > 10
    assert 4 <= mirrored <= 16
    with pytest.raises(ValueError, match="least: got 0, wanted a share"):
        cropped(images, 0, least=0)
