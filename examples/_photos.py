"""What the examples share: where images come from, and both views of them through a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from featxfer import Degradation, Images, Preprocessing, VOCDevkit, open_images


def open_photos(source: str, *, classes: bool = False) -> Images:
    """A flat folder, an ImageFolder tree, or `ROOT:split` of a devkit in VOC layout.

    With `classes`, `targets` are class indices; None for a devkit's image of no or several classes.
    """
    root, _, split = source.rpartition(":")
    if Path(source).is_dir() or not root:
        images = open_images(source)
    else:
        devkit = VOCDevkit(root)
        images = devkit.images(split)
        if classes:
            shown = devkit.labels(split) == 1
            targets = (int(row.argmax()) if row.sum() == 1 else None for row in shown)
            images = dataclasses.replace(images, targets=tuple(targets))
    if classes and images.targets is None:
        raise ValueError(f"{source}: a flat folder has no classes, wanted a subfolder a class")
    return images


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """For a DataLoader: the HR and the LR view of each image, uint8 `(3, hr_size, hr_size)`."""

    def __init__(self, images: Images, degradation: Degradation) -> None:
        self.images, self.degradation = images, degradation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Both are made from the same pixels."""
        image = self.images.read(index)
        return self.degradation.hr(image), self.degradation.lr(image)


@torch.no_grad()
def run(
    model: Callable[[Tensor], Tensor], pairs: Pairs, prepare: Preprocessing
) -> tuple[Tensor, Tensor]:
    """What the model gives for the HR views and for the LR views of all images, each `(n, d)`."""
    loader = DataLoader(pairs, batch_size=64)
    rows = [(model(prepare(hr)), model(prepare(lr))) for hr, lr in loader]
    return torch.cat([hr for hr, _ in rows]), torch.cat([lr for _, lr in rows])
