"""Do clusters of low-resolution images match their categories? Nothing is told of the categories.

k-means makes as many clusters as there are categories; labels only judge them.

python -m examples.discovery train-photos/ class-tree/ --backbone resnet50
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn import metrics

from examples._photos import open_photos
from featxfer import Degradation, assign, extract_features, kmeans
from featxfer_integrations import fit_transfer, load_backbone


@click.command()
@click.argument("train")
@click.argument("test")
@click.option("--backbone", default="resnet50")
@click.option("--weights", default="pretrained")
@click.option("--lr-size", default=32)
@click.option("--cache", type=Path, default=Path("cache"), envvar="FEATXFER_CACHE")
def main(train: str, test: str, backbone: str, weights: str, lr_size: int, cache: Path) -> None:
    """TRAIN: a folder of images; TEST: a tree of classes; or DEVKIT:split for either."""
    frozen, images = load_backbone(backbone, weights), open_photos(test, classes=True)
    view = Degradation(lr_size=lr_size)
    before = extract_features(frozen, images, view, cache / "features")
    fit_transfer(frozen.module, open_photos(train), degradation=view, site="head", cache=cache)
    after = extract_features(frozen, images, view, cache / "features")

    classes = np.array([-1 if c is None else c for c in images.targets or ()])
    one = classes >= 0  # images of one class
    found = f"{one.sum()} images of {len(set(classes[one]))} categories"
    print(f"{found}, LR {lr_size} pixels, mean ± deviation over 5 k-means seeds")
    rows = {"HR": before.hr, "LR, before": before.lr, "LR, after": after.lr, "HR, after": after.hr}
    for name, features in rows.items():
        scores = [judge(features[one], classes[one], seed) for seed in range(5)]
        means = zip(("accuracy", "NMI", "ARI"), np.mean(scores, 0), np.std(scores, 0), strict=True)
        print(f"{name}:", ", ".join(f"{what} {mean:.3f} ± {std:.3f}" for what, mean, std in means))


def judge(features: torch.Tensor, classes: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Accuracy where each cluster stands for the class that makes it best, NMI, ARI."""
    rows = torch.nn.functional.normalize(features)
    clusters = assign(rows, kmeans(rows, len(set(classes)), seed=seed).centroids).numpy()
    table = metrics.cluster.contingency_matrix(classes, clusters)
    accuracy = table[linear_sum_assignment(table, maximize=True)].sum() / len(classes)
    nmi = metrics.normalized_mutual_info_score(classes, clusters)
    return accuracy, nmi, metrics.adjusted_rand_score(classes, clusters)


if __name__ == "__main__":
    main()
