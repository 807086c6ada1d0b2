"""`featxfer extract`: from images to HR and LR feature stores, by any host's backbone."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(context_settings={"show_default": True})
@click.argument("images", type=Path)
@click.option("--split", help="Of a devkit in VOC layout; without it IMAGES is a folder.")
@click.option("--backbone", required=True, help="A torchvision or timm model.")
@click.option("--weights", default="pretrained", help="pretrained, demo or a file.")
@click.option("--lr-size", default=32, help="Side of the LR image, pixels.")
@click.option(
    "--hr-size", type=int, help="Side of the backbone's input, by default what its weights are for."
)
@click.option("--cache", type=Path, required=True, help="Folder of the feature stores.")
@click.option(
    "--precision", default="auto", help="fp32, for reproduction; bf16; auto: if it is fast."
)
@click.option("--compile", default="auto", help="on, off; auto: for many images.")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--part-rows", default=256, help="Images a part, the most that a loss costs.")
@click.option("--on-error", default="raise", help="At an unreadable image: raise or skip.")
def extract(
    images: Path,
    split: str | None,
    backbone: str,
    weights: str,
    lr_size: int,
    hr_size: int | None,
    cache: Path,
    precision: str,
    compile: str,
    device: str,
    part_rows: int,
    on_error: str,
) -> None:
    """Extract HR and LR features of IMAGES: a folder, a class tree, or a devkit with --split.

    Under torchrun every process computes its own parts; what is missing at the end is told, and
    the same command, with any number of processes, computes that.
    """
    import os

    import torch

    from featxfer import Degradation, VOCDevkit, extract_features, fill_stores, open_images
    from featxfer_integrations import load_backbone

    source = VOCDevkit(images).images(split) if split else open_images(images)
    rank, world_size, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "auto":
        gpus = torch.cuda.device_count()
        device = f"cuda:{local % gpus}" if gpus else "cpu"
    try:
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError and others, by what is missing
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device: got {device!r}, wanted 'auto' or one that torch can use here: {reason}"
        ) from error
    loaded = load_backbone(backbone, weights)
    loaded.module.to(device)
    degradation = Degradation(loaded.image_size if hr_size is None else hr_size, lr_size)
    if world_size > 1:
        stores = fill_stores(
            loaded, source, degradation, cache, precision=precision, compile=compile,
            part_rows=part_rows, on_error=on_error, rank=rank, world_size=world_size,
        )  # fmt: skip
        for filled in stores.values():
            left, count = len(filled.missing_parts()), filled.part_count
            click.echo(f"process {rank}: {filled.directory}, {left} of {count} parts are missing")
        return
    features = extract_features(
        loaded, source, degradation, cache, precision=precision, compile=compile,
        part_rows=part_rows, on_error=on_error,
    )  # fmt: skip
    click.echo(f"{len(features.ids)} images, {features.hr.shape[1]} features")
    for view, key in features.keys.items():
        click.echo(cache / f"{view}-{key}")
