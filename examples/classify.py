"""A frozen classifier, untouched, agrees with itself more often on low-resolution images.

No labels anywhere: the first choice for an LR image is compared with that for its HR image.

python -m examples.classify train-photos/ test-photos/ --backbone resnet50
"""

from __future__ import annotations

import click
from torch import Tensor

from examples._photos import Pairs, open_photos, run
from featxfer import Degradation
from featxfer_integrations import backbone_of, fit_transfer, load_model, transfer_disabled


@click.command()
@click.argument("train")
@click.argument("test")
@click.option("--backbone", default="resnet50")
@click.option("--weights", default="pretrained")
@click.option("--lr-size", default=32)
@click.option("--seed", default=0)
@click.option("--cache", default="cache", envvar="FEATXFER_CACHE")
def main(
    train: str, test: str, backbone: str, weights: str, lr_size: int, seed: int, cache: str
) -> None:
    """TRAIN and TEST: a folder of images, or DEVKIT:split."""
    model, view = load_model(backbone, weights), Degradation(lr_size=lr_size)
    fit_transfer(model, open_photos(train), degradation=view, site="head", seed=seed, cache=cache)

    prepare = backbone_of(model).preprocessing
    pairs = Pairs(open_photos(test), view)
    with transfer_disabled(model):
        hr, lr = run(model, pairs, prepare)
    hr_after, lr_after = run(model, pairs, prepare)

    print(f"same first choice as for the HR image, of {len(hr)} images, LR {lr_size} pixels")
    for name, logits in {"LR, before": lr, "LR, after": lr_after, "HR, after": hr_after}.items():
        print(f"{name}: {agreement(logits, hr):.1%}")


def agreement(logits: Tensor, wanted: Tensor) -> float:
    """Share of images for which two sets of logits `(n, classes)` have the same first choice."""
    return float((logits.argmax(1) == wanted.argmax(1)).float().mean())


if __name__ == "__main__":
    main()
