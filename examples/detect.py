"""A torchvision detector, left as it is, finds in LR images more of what it finds in HR images.

python -m examples.detect photos/ test-photos/ --detector fasterrcnn_resnet50_fpn --factor 8
"""

from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model, list_models
from torchvision.ops import box_iou

from examples._photos import open_photos
from featxfer import Images, ScaledDegradation
from featxfer_integrations import fit_transfer, transfer_disabled

Found = list[dict[str, Tensor]]
MODELS = click.Choice(list_models(module=detection))


@click.command()
@click.argument("train")
@click.argument("test")
@click.option("--detector", type=MODELS, default="fasterrcnn_mobilenet_v3_large_fpn")
@click.option("--factor", default=4.0, help="How many times smaller LR images are.")
@click.option("--site", default="backbone", help="backbone: blocks; boxes: heads, sooner trained.")
@click.option("--cache", type=Path, default=Path("cache"), envvar="FEATXFER_CACHE")
def main(train: str, test: str, detector: str, factor: float, site: str, cache: Path) -> None:
    """TRAIN and TEST: folders of images, or DEVKIT:split; no boxes are known."""
    model, view = get_model(detector, weights="DEFAULT").eval(), ScaledDegradation(factor)
    fit_transfer(model, open_photos(train), degradation=view, site=site, cache=cache)
    images = open_photos(test)
    with transfer_disabled(model):
        hr, before = detect(model, images, view.hr), detect(model, images, view.lr)
    print(f"{sum(len(image['boxes']) for image in hr)} objects in {len(images)} HR images")
    rows = {"LR, before": before, "LR, after": detect(model, images, view.lr)}
    for name, found in {**rows, "HR, after": detect(model, images, view.hr)}.items():
        print(f"{name}: found {share(hr, found):.1%}, of what it finds {share(found, hr):.1%} so")


@torch.no_grad()
def detect(model: nn.Module, images: Images, see: Callable[[Tensor], Tensor]) -> Found:
    """Detections of score 0.5 or more."""
    found = [model([see(images.read(row)) / 255])[0] for row in range(len(images))]
    return [{k: part[image["scores"] >= 0.5] for k, part in image.items()} for image in found]


def share(wanted: Found, found: Found) -> float:
    """Of the wanted boxes, those that one found has the class of, and an overlap of 0.5 with."""
    right = 0
    for some, others in zip(wanted, found, strict=True):
        same = some["labels"][:, None] == others["labels"]
        right += int(((box_iou(some["boxes"], others["boxes"]) >= 0.5) & same).any(1).sum())
    return right / max(1, sum(len(some["labels"]) for some in wanted))


if __name__ == "__main__":
    main()
