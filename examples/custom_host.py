"""A library that featxfer does not know, made up here: told in one class, and fitted like others.

python -m examples.custom_host train-photos/ test-photos/
"""

import click
import torch
from torch import nn

from examples._photos import Pairs, open_photos, run
from featxfer import Degradation, Preprocessing
from featxfer_integrations import Host, Site, fit_transfer, register_host


class TinyNet(nn.Sequential):
    """A model of the library "tiny", of random weights: images `(n, 3, h, w)` -> 10 logits."""

    def __init__(self) -> None:
        first, second = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 64, 3, 2)
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(first, nn.ReLU(), second, nn.ReLU(), *pool, nn.Linear(64, 10))


class Tiny(Host):
    """What "tiny" says of its models."""

    name = "tiny"

    def owns(self, model: nn.Module) -> bool:
        """Whether it is one of them."""
        return isinstance(model, TinyNet)

    def blocks(self, model: nn.Module) -> list[str]:
        """After which modules blocks go."""
        return ["1"]

    def head(self, model: nn.Module) -> Site:
        """Where a head goes; what passes there is what LR images have to match."""
        return Site("head", ("6",), "input", width=64, kind="head")


@click.command()
@click.argument("train")
@click.argument("test")
@click.option("--cache", default="cache", envvar="FEATXFER_CACHE")
def main(train: str, test: str, cache: str) -> None:
    """TRAIN and TEST: a folder of images, or DEVKIT:split."""
    register_host(Tiny())
    torch.manual_seed(0)
    model, view = TinyNet().eval(), Degradation(hr_size=64, lr_size=12)
    pairs = Pairs(open_photos(test), view)
    hr, lr = run(model, pairs, Preprocessing())
    fit_transfer(model, open_photos(train), degradation=view, site="blocks", cache=cache)
    hr_after, lr_after = run(model, pairs, Preprocessing())
    for name, rows in {"LR, before": lr, "LR, after": lr_after, "HR, after": hr_after}.items():
        print(f"{name}: cosine to the HR logits {torch.cosine_similarity(rows, hr).mean():.4f}")


if __name__ == "__main__":
    main()
