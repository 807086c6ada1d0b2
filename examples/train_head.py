"""Train the paper's head on a folder of unlabelled HR images, save it, load it, use it.

python examples/train_head.py photos/ head/ --backbone tf_efficientnet_lite0 --weights demo
"""

from __future__ import annotations

from pathlib import Path

import click

from featxfer import (
    Card,
    Degradation,
    FeatureTransferHead,
    diagnose,
    extract_features,
    fit_head,
    kmeans,
    open_images,
    save_head,
)
from featxfer_integrations import load_backbone


@click.command()
@click.argument("images", type=Path)
@click.argument("out", type=Path)
@click.option("--backbone", default="resnet101")
@click.option("--weights", default="pretrained")
@click.option("--clusters", default=100)
@click.option("--cache", type=Path, default=Path("cache"))
def main(images: Path, out: Path, backbone: str, weights: str, clusters: int, cache: Path) -> None:
    """Images to features, features to pseudo-labels, pseudo-labels to a head on disk."""
    frozen, degradation = load_backbone(backbone, weights), Degradation(lr_size=32)
    features = extract_features(frozen, open_images(images), degradation, cache)
    hr, lr = features.hr, features.lr

    head = FeatureTransferHead(lr.shape[1], clusters, output="clusters", scaling="l2", seed=0)
    clustering = kmeans(head.scale(hr), clusters, seed=0)
    agreement = diagnose(head.scale(hr), head.scale(lr), clustering.centroids).agreement
    print(f"nearest and paired labels agree for {agreement:.0%} of {len(lr)} images")

    head.set_input_statistics(lr)
    log = fit_head(head, hr, lr, clustering, labels="nearest", seed=0)
    print(f"loss {log[0].loss:.2f} -> {log[-1].loss:.2f}, labels {log[-1].match_rate:.0%} right")

    details = {"labels": "nearest", "seed": 0, "agreement": agreement}
    save_head(head, out, Card(frozen.name, frozen.weights_sha256, (degradation,), details))
    head = FeatureTransferHead.from_pretrained(out)
    print(f"{out}: {tuple(head.transfer(lr).shape)} features")


if __name__ == "__main__":
    main()
