"""A YOLO, left as it is, finds in LR images more of what it finds in HR images.

python -m examples.yolo photos/ test-photos/ --model yolo11n.pt --factor 4
"""

from collections.abc import Callable
from pathlib import Path

import click
from PIL import Image
from torch import Tensor
from ultralytics import YOLO

from examples._photos import open_photos
from examples.detect import Found, share
from featxfer import Images, ScaledDegradation
from featxfer_integrations import fit_transfer, transfer_disabled


@click.command()
@click.argument("train")
@click.argument("test")
@click.option("--model", default="yolo11n.pt", help="A file, or a name that ultralytics downloads.")
@click.option("--factor", default=4.0, help="How many times smaller LR images are.")
@click.option("--score", default=0.5, help="Of boxes that count.")
@click.option("--cache", type=Path, default=Path("cache"), envvar="FEATXFER_CACHE")
def main(train: str, test: str, model: str, factor: float, score: float, cache: Path) -> None:
    """TRAIN and TEST: folders of images, or DEVKIT:split; no boxes are known."""
    yolo, view = YOLO(model), ScaledDegradation(factor)
    fit_transfer(yolo, open_photos(train), degradation=view, cache=cache)
    images = open_photos(test)
    with transfer_disabled(yolo):
        hr, before = detect(yolo, images, view.hr, score), detect(yolo, images, view.lr, score)
    print(f"{sum(len(image['boxes']) for image in hr)} objects in {len(images)} HR images")
    rows = {"LR, before": before, "LR, after": detect(yolo, images, view.lr, score)}
    for name, found in {**rows, "HR, after": detect(yolo, images, view.hr, score)}.items():
        print(f"{name}: found {share(hr, found):.1%}, of what it finds {share(found, hr):.1%} so")


def detect(yolo: YOLO, images: Images, see: Callable[[Tensor], Tensor], score: float) -> Found:
    """Detections of that score or more."""
    found = []
    for row in range(len(images)):
        picture = Image.fromarray(see(images.read(row)).movedim(0, -1).numpy())
        boxes = yolo.predict(picture, conf=score, verbose=False)[0].boxes
        found.append({"boxes": boxes.xyxy, "labels": boxes.cls})
    return found


if __name__ == "__main__":
    main()
