"""A torchvision detector, left as it is, finds in LR images more of what it finds in HR images.

No boxes are known: what the plain detector finds in the HR image is what LR images should show.

python -m examples.detect photos/ test-photos/ --detector fasterrcnn_resnet50_fpn --factor 8
"""

from __future__ import annotations

from pathlib import Path

import click
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.ops import box_iou

from examples._photos import open_photos
from featxfer import BaseDegradation, Images, ScaledDegradation
from featxfer_integrations import fit_transfer, transfer_disabled

Found = list[dict[str, Tensor]]


@click.command()
@click.argument("train")
@click.argument("test")
@click.option("--detector", default="fasterrcnn_mobilenet_v3_large_fpn")
@click.option("--weights", type=Path, help="A safetensors file.  [default: torchvision's]")
@click.option("--factor", default=4.0, help="How many times smaller LR images are.")
@click.option("--depth", default="auto", help="deep: blocks; pooled: heads; auto: as time allows.")
@click.option("--cache", type=Path, default=Path("cache"), envvar="FEATXFER_CACHE")
def main(
    train: str, test: str, detector: str, weights: Path | None, factor: float, depth: str,
    cache: Path,
) -> None:  # fmt: skip
    """TRAIN and TEST: folders of images, or DEVKIT:split."""
    model: nn.Module = get_model(
        detector, weights="DEFAULT" if weights is None else None, weights_backbone=None
    )
    if weights is not None:
        model.load_state_dict(safetensors.torch.load_file(weights))
    images, view = open_photos(test), ScaledDegradation(factor)
    fit_transfer(model.eval(), open_photos(train), degradation=view, depth=depth, cache=cache)
    with transfer_disabled(model):
        hr, before = detect(model, images, None), detect(model, images, view)
    print(f"{sum(len(image['boxes']) for image in hr)} objects in {len(images)} HR images")
    rows = {"LR, before": before, "LR, after": detect(model, images, view)}
    for name, found in {**rows, "HR, after": detect(model, images, None)}.items():
        print(f"{name}: found {share(hr, found):.1%}, of what it finds {share(found, hr):.1%} so")


@torch.inference_mode()
def detect(model: nn.Module, images: Images, view: BaseDegradation | None) -> Found:
    """Detections of score 0.5 or more."""
    found = []
    for row in range(len(images)):
        pixels = images.read(row) if view is None else view.lr(images.read(row))
        (image,) = model([pixels / 255])
        found.append({key: value[image["scores"] >= 0.5] for key, value in image.items()})
    return found


def share(wanted: Found, found: Found) -> float:
    """Of the wanted boxes, those that one found has the class of, and an overlap of 0.5 with."""
    right, total = 0, 0
    for some, others in zip(wanted, found, strict=True):
        same = some["labels"][:, None] == others["labels"]
        right += int(((box_iou(some["boxes"], others["boxes"]) >= 0.5) & same).any(1).sum())
        total += len(some["labels"])
    return right / max(1, total)


if __name__ == "__main__":
    main()
