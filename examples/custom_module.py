"""Any nn.Module: name the module whose output is the feature, and take the head away again.

The network below has random weights: the figures show how it works, not what it is worth.

python -m examples.custom_module train-photos/ test-photos/
"""

from __future__ import annotations

import click
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from examples._photos import Pairs, open_photos, run
from featxfer import Degradation, Preprocessing
from featxfer_integrations import attach_transfer, detach_transfer, fit_transfer, transfer_disabled


class SmallNet(nn.Module):
    """Images `(n, 3, h, w)` -> 10 logits. Nothing in it knows of featxfer."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU()]
        self.body = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The whole model; only its `body` is run below."""
        logits: Tensor = self.classifier(self.body(images))
        return logits


@click.command()
@click.argument("train")
@click.argument("test")
@click.option("--lr-size", default=32)
@click.option("--cache", default="cache", envvar="FEATXFER_CACHE")
def main(train: str, test: str, lr_size: int, cache: str) -> None:
    """TRAIN and TEST: a folder of images, or DEVKIT:split."""
    torch.manual_seed(0)
    model, view, prepare = SmallNet().eval(), Degradation(lr_size=lr_size), Preprocessing()
    pairs = Pairs(open_photos(test), view)
    hr, lr = run(model.body, pairs, prepare)
    attach_transfer(model, site="body")
    print(f"untrained, features unchanged: {run(model.body, pairs, prepare)[1].equal(lr)}")
    fit_transfer(model, open_photos(train), degradation=view, site="body", cache=cache)
    hr_after, lr_after = run(model.body, pairs, prepare)
    for name, rows in {"LR, before": lr, "LR, after": lr_after, "HR, after": hr_after}.items():
        print(f"{name}: cosine to the HR feature {cosine_similarity(rows, hr).mean():.4f}")
    with transfer_disabled(model):
        print(f"disabled, features unchanged: {run(model.body, pairs, prepare)[1].equal(lr)}")
    detach_transfer(model)
    print(f"detached, features unchanged: {run(model.body, pairs, prepare)[1].equal(lr)}")


if __name__ == "__main__":
    main()
