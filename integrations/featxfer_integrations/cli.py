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
@click.option("--hr-size", default=224, help="Side of the backbone's input, pixels.")
@click.option("--cache", type=Path, required=True, help="Folder of the feature stores.")
@click.option("--precision", default="fp32", help="fp32 or bf16.")
@click.option("--on-error", default="raise", help="At an unreadable image: raise or skip.")
def extract(
    images: Path,
    split: str | None,
    backbone: str,
    weights: str,
    lr_size: int,
    hr_size: int,
    cache: Path,
    precision: str,
    on_error: str,
) -> None:
    """Extract HR and LR features of IMAGES: a folder, a class tree, or a devkit with --split."""
    from featxfer import Degradation, VOCDevkit, extract_features, open_images
    from featxfer_integrations import load_backbone

    source = VOCDevkit(images).images(split) if split else open_images(images)
    features = extract_features(
        load_backbone(backbone, weights),
        source,
        Degradation(hr_size, lr_size),
        cache,
        precision=precision,
        on_error=on_error,
    )
    for name, reason in features.skipped.items():
        click.echo(f"skipped {name}: {reason}", err=True)
    click.echo(f"{len(features.ids)} images, {features.hr.shape[1]} features")
    for view, key in features.keys.items():
        click.echo(cache / f"{view}-{key}")
