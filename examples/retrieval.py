"""Find the photograph that a thumbnail was made from: LR queries against an HR gallery.

The gallery is made once, by the plain model, and stays as it is; the queries go through the head.

python -m examples.retrieval train-photos/ gallery-photos/ --backbone resnet50
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from examples._photos import open_photos
from featxfer import Degradation, extract_features
from featxfer_integrations import fit_transfer, load_backbone


@click.command()
@click.argument("train")
@click.argument("gallery")
@click.option("--backbone", default="resnet50")
@click.option("--weights", default="pretrained")
@click.option("--lr-size", default=32)
@click.option("--seed", default=0)
@click.option("--cache", type=Path, default=Path("cache"), envvar="FEATXFER_CACHE")
def main(
    train: str, gallery: str, backbone: str, weights: str, lr_size: int, seed: int, cache: Path
) -> None:
    """TRAIN and GALLERY, of other images: a folder of images, or DEVKIT:split."""
    frozen, images = load_backbone(backbone, weights), open_photos(gallery)
    degradation = Degradation(lr_size=lr_size)
    before = extract_features(frozen, images, degradation, cache / "features")
    photos = open_photos(train)
    fit_transfer(
        frozen.module, photos, degradation=degradation, site="head", seed=seed, cache=cache
    )
    after = extract_features(frozen, images, degradation, cache / "features")

    queries = {"LR, before": before.lr, "LR, after": after.lr, "HR, after": after.hr}
    print(f"own image found in a gallery of {len(images)} HR images, LR {lr_size} pixels")
    for name, query in queries.items():
        first, five = recall(query, before.hr, 1), recall(query, before.hr, 5)
        print(f"{name}: recall@1 {first:.1%}, recall@5 {five:.1%}")


def recall(queries: Tensor, gallery: Tensor, k: int) -> float:
    """Share of queries whose own row is among the k rows of the gallery with the highest cosine."""
    similar = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    nearest = similar.topk(min(k, len(gallery)), dim=1).indices
    return float((nearest == torch.arange(len(queries))[:, None]).any(1).float().mean())


if __name__ == "__main__":
    main()
