"""A frozen classifier of Hugging Face agrees with itself more often on low-resolution images.

No labels anywhere. The model is saved by `save_pretrained`, what was trained by `save_transfers`.

python -m examples.hugging_face train-photos/ test-photos/ out/ --model google/vit-base-patch16-224
"""

from __future__ import annotations

from pathlib import Path

import click
from torch import Tensor
from transformers import AutoModelForImageClassification

from examples._photos import Pairs, open_photos, run
from examples.classify import agreement
from featxfer import Degradation
from featxfer_integrations import backbone_of, fit_transfer, load_transfers, save_transfers


@click.command()
@click.argument("train")
@click.argument("test")
@click.argument("out", type=Path)
@click.option("--model", "name", required=True, help="Of a hub, or a folder.")
@click.option("--hr-size", default=224, help="What the model is used at.")
@click.option("--lr-size", default=32)
@click.option("--seed", default=0)
@click.option("--cache", default="cache", envvar="FEATXFER_CACHE")
def main(
    train: str, test: str, out: Path, name: str, hr_size: int, lr_size: int, seed: int, cache: str
) -> None:
    """TRAIN and TEST: a folder of images, or DEVKIT:split. OUT: for what is trained."""
    plain = AutoModelForImageClassification.from_pretrained(name).eval()
    view, photos = Degradation(hr_size=hr_size, lr_size=lr_size), open_photos(train)

    model = AutoModelForImageClassification.from_pretrained(name).eval()
    fit_transfer(model, photos, degradation=view, seed=seed, cache=cache)
    save_transfers(model, out)

    loaded = AutoModelForImageClassification.from_pretrained(name).eval()
    load_transfers(loaded, out, degradation=view)
    prepare, pairs = backbone_of(plain).preprocessing, Pairs(open_photos(test), view)

    def logits(of: object, views: Pairs) -> tuple[Tensor, Tensor]:
        return run(lambda images: of(images).logits, views, prepare)  # type: ignore[operator]

    (hr, lr), (hr_after, lr_after) = logits(plain, pairs), logits(loaded, pairs)
    print(f"same first choice as for the HR image, of {len(hr)} images, LR {lr_size} pixels")
    for row, said in {"LR, before": lr, "LR, after": lr_after, "HR, after": hr_after}.items():
        print(f"{row}: {agreement(said, hr):.1%}")


if __name__ == "__main__":
    main()
