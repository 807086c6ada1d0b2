"""A detector of transformers, left as it is, finds in LR images more of what it finds in HR images.

python -m examples.detr photos/ test-photos/ --detector rtdetr/ --factor 4
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from examples._photos import open_photos
from examples.detect import Found, share
from featxfer import Images, ScaledDegradation
from featxfer_integrations import fit_transfer, save_transfers, transfer_disabled


@click.command()
@click.argument("train")
@click.argument("test")
@click.option("--detector", required=True, help="Folder (or hub id) of a model and its processor.")
@click.option("--factor", default=4.0, help="How many times smaller LR images are.")
@click.option("--save", type=Path, help="Folder for the blocks; `load_transfers` attaches them.")
@click.option("--cache", type=Path, default=Path("cache"), envvar="FEATXFER_CACHE")
def main(
    train: str, test: str, detector: str, factor: float, save: Path | None, cache: Path
) -> None:
    """TRAIN and TEST: folders of images, or DEVKIT:split; no boxes are known."""
    processor = AutoImageProcessor.from_pretrained(detector)
    model = AutoModelForObjectDetection.from_pretrained(detector).eval()
    view, images = ScaledDegradation(factor), open_photos(test)
    fit_transfer(model, open_photos(train), degradation=view, cache=cache)
    if save is not None:
        save_transfers(model, save)
    with transfer_disabled(model):
        hr, before = (detect(model, processor, images, see) for see in (view.hr, view.lr))
    print(f"{sum(len(image['boxes']) for image in hr)} objects in {len(images)} HR images")
    after, hr_after = (detect(model, processor, images, see) for see in (view.lr, view.hr))
    for name, found in {"LR, before": before, "LR, after": after, "HR, after": hr_after}.items():
        print(f"{name}: found {share(hr, found):.1%}, of what it finds {share(found, hr):.1%} so")


@torch.no_grad()
def detect(model: Any, processor: Any, images: Images, see: Callable[[Tensor], Tensor]) -> Found:
    """Detections of score 0.5 or more."""
    found: Found = []
    for row in range(len(images)):
        image = see(images.read(row))
        said = model(**processor(images=[image], return_tensors="pt"))
        found += processor.post_process_object_detection(said, 0.5, [tuple(image.shape[1:])])
    return found


if __name__ == "__main__":
    main()
