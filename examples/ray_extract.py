"""Features of more images than one machine takes: the store's parts as a Ray Data pipeline.

Every machine sees the same two folders. After any loss the same command goes on.

python -m examples.ray_extract photos/ cache/ --backbone resnet101 --actors 16 --gpus 1
"""

from typing import Any

import click
import ray.data
import torch

from examples._photos import open_photos
from featxfer import Degradation, fill_stores
from featxfer_integrations import load_backbone


class Extractor:
    """An actor: the model and the images."""

    def __init__(self, photos: str, cache: str, model: tuple[str, str], part_rows: int) -> None:
        self.backbone = load_backbone(*model)
        self.backbone.module.to("cuda" if torch.cuda.is_available() else "cpu")
        self.images, self.cache, self.part_rows = open_photos(photos), cache, part_rows

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Fills these parts, each as one process of as many as there are parts."""
        count = -(-len(self.images) // self.part_rows)
        for part in batch["part"].tolist():
            fill_stores(
                self.backbone, self.images, Degradation(), self.cache,
                part_rows=self.part_rows, rank=part, world_size=count,
            )  # fmt: skip
        return batch


@click.command()
@click.argument("photos")
@click.argument("cache")
@click.option("--backbone", default="resnet50")
@click.option("--weights", default="pretrained")
@click.option("--part-rows", default=256, help="Images a part.")
@click.option("--actors", default=2)
@click.option("--gpus", default=0.0, help="Of each actor.")
def main(
    photos: str, cache: str, backbone: str, weights: str, part_rows: int, actors: int, gpus: float
) -> None:
    """PHOTOS: a folder of images, or DEVKIT:split. CACHE: a folder for the stores."""
    count = -(-len(open_photos(photos)) // part_rows)
    items = [{"part": part} for part in range(count)]
    done = ray.data.from_items(items, override_num_blocks=count).map_batches(
        Extractor, batch_size=1, num_gpus=gpus, compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_args=(photos, cache, (backbone, weights), part_rows),
    )  # fmt: skip
    print(f"{done.count()} parts of each view are in {cache}")


if __name__ == "__main__":
    main()
