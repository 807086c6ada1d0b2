"""The head in somebody's own training loop: their loader, loss and optimizer; saved and loaded.

python -m examples.dropin train-photos/ test-photos/ head/ --backbone resnet50
"""

from __future__ import annotations

import copy

import click
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import DataLoader

from examples._photos import Pairs, open_photos, run
from featxfer import Card, Degradation, FeatureTransferHead, Preprocessing
from featxfer_integrations import attach_transfer, load_backbone, train_transfer_only


@click.command()
@click.argument("train")
@click.argument("test")
@click.argument("out")
@click.option("--backbone", default="resnet50")
@click.option("--weights", default="pretrained")
@click.option("--lr-size", default=32)
def main(train: str, test: str, out: str, backbone: str, weights: str, lr_size: int) -> None:
    """TRAIN and TEST: a folder of images, or DEVKIT:split; OUT: where the head is saved."""
    torch.manual_seed(0)
    plain, view = load_backbone(backbone, weights), Degradation(lr_size=lr_size)
    fitted, tested = (Pairs(open_photos(photos), view) for photos in (train, test))
    model, prepare = attach_transfer(copy.deepcopy(plain.module)), plain.preprocessing
    their_loop(model, plain.module, fitted, prepare)
    head = model.get_submodule("feature_transfer.head")
    assert isinstance(head, FeatureTransferHead)
    head.card = Card(plain.name, plain.weights_sha256, (view,))
    head.save_pretrained(out)
    loaded = attach_transfer(load_backbone(backbone, weights).module, head=out)
    (hr, lr), (hr_after, lr_after) = (run(m, tested, prepare) for m in (plain.module, loaded))
    for name, rows in {"LR, before": lr, "LR, after": lr_after, "HR, after": hr_after}.items():
        print(f"{name}: cosine to the HR feature {cosine_similarity(rows, hr).mean():.4f}")


def their_loop(model: nn.Module, teacher: nn.Module, pairs: Pairs, prepare: Preprocessing) -> None:
    """A loop like any other; only the choice of parameters is featxfer's."""
    optimizer = torch.optim.AdamW(train_transfer_only(model), lr=1e-3)
    for epoch in range(2):
        for hr, lr in DataLoader(pairs, batch_size=32, shuffle=True):
            with torch.no_grad():
                wanted = teacher(prepare(hr)).repeat(2, 1)
            loss = 1 - cosine_similarity(model(prepare(torch.cat([hr, lr]))), wanted).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss:.3f}")


if __name__ == "__main__":
    main()
