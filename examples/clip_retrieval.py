"""A frozen CLIP finds the photograph that a thumbnail was made from; its gallery stays as it is.

The gallery is embedded once, by the plain model. Blocks in the visual tower bring the embeddings of
thumbnails to where their photographs' are; photographs come out nearly where they were.

python -m examples.clip_retrieval train-photos/ gallery-photos/ --pretrained openai
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import open_clip
from torch.nn.functional import cosine_similarity

from examples._photos import Pairs, open_photos, run
from examples.retrieval import recall
from featxfer import Degradation
from featxfer_integrations import fit_transfer, host_of


@click.command()
@click.argument("train")
@click.argument("gallery")
@click.option("--model", default="ViT-B-32", help="a name of open_clip.list_models()")
@click.option("--pretrained", required=True, help="a tag of open_clip's, or a file of weights")
@click.option("--lr-size", default=32)
@click.option("--seed", default=0)
@click.option("--cache", type=Path, default=Path("cache"), envvar="FEATXFER_CACHE")
def main(
    train: str, gallery: str, model: str, pretrained: str, lr_size: int, seed: int, cache: Path
) -> None:
    """TRAIN and GALLERY, of other images: a folder of images, or DEVKIT:split."""
    clip = open_clip.create_model(model, pretrained=pretrained).eval()
    host = host_of(clip)
    degradation = Degradation(hr_size=host.input_size(clip), lr_size=lr_size)
    pairs = Pairs(open_photos(gallery), degradation)
    embed = partial(run, clip.encode_image, pairs, host.preprocessing(clip))
    kept, before = embed()
    fit_transfer(clip, open_photos(train), degradation=degradation, seed=seed, cache=cache)
    hr, after = embed()

    print(f"own image found in a gallery of {len(pairs)} HR images, LR {lr_size} pixels")
    for name, query in {"LR, before": before, "LR, after": after, "HR, after": hr}.items():
        print(f"{name}: recall@1 {recall(query, kept, 1):.1%}")
    print(f"HR, before and after: cosine {cosine_similarity(hr, kept).mean():.4f}")


if __name__ == "__main__":
    main()
