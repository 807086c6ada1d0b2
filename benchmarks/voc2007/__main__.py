"""`python -m benchmarks.voc2007`: Table 1 (and 2) of Wu et al. 2019 on a devkit in VOC layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from benchmarks.common.shell import cache_option, numbers, split_options, told_errors

GRID_CLUSTERS, GRID_HIDDEN = "20,100,200,500,1000,2048", "256,512,1024,2048,4096"


_sizes = numbers(int, "integers such as 20,100")


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.option(
    "--methods",
    help="Rows besides the baselines, with commas: nearest, paired, hidden, random, centroids, "
    "pca, ridge, head, blocks.  [default: every one]",
)
@click.option("--root", type=Path, help="A devkit in VOC layout. Default: the rendered sample.")
@click.option("--download", is_flag=True, help="Download VOC2007 (md5 checked) into --cache.")
@click.option("--tar", type=Path, multiple=True, help="VOC2007's archives on disk, instead.")
@click.option("--sample", type=(int, int), help="Trainval and test images to render.")
@click.option(
    "--backbone", help="A torchvision or timm model.  [default: resnet101, or the demo's]"
)
@click.option("--weights", help="pretrained, demo or a file.  [default: pretrained; sample: demo]")
@split_options
@click.option(
    "--lr-size", type=int, help="Side of the LR image, pixels.  [default: 32; sample: 24]"
)
@click.option(
    "--hr-size", type=int, help="Side of the backbone's input, pixels.  [default: 224; sample: 128]"
)
@click.option("--kernel", default="bicubic", help="Of resizing: bicubic, bilinear, nearest.")
@click.option("--antialias/--no-antialias", default=True)
@click.option("--order", default="original", help="LR from the original, or from the hr image.")
@click.option("--clusters", type=int, help="k, the paper's N2.  [default: 100; sample: 60]")
@click.option("--hidden", type=int, help="The paper's N1.  [default: 4096; sample: 1024]")
@click.option("--labels", default="nearest", help="nearest (the paper) or paired.")
@click.option("--seeds", default=3, help="How many.")
@click.option(
    "--protocol",
    multiple=True,
    help="vissl, virtex, plain; several.  [default: vissl; sample: virtex]",
)
@click.option("--ap", default="11point", help="11point (VOC2007), area or step.")
@click.option("--grid", is_flag=True, help="Table 2 too.")
@click.option("--grid-clusters", callback=_sizes, default=GRID_CLUSTERS, help="Rows of Table 2.")
@click.option("--grid-hidden", callback=_sizes, default=GRID_HIDDEN, help="Columns of Table 2.")
@click.option("--curve", is_flag=True, help="The mAP over C too.")
@click.option("--figures/--no-figures", default=True, help="AP bars, t-SNE, image pairs.")
@click.option("--scaling", default="l2", help="Before k-means and network: none, l2.")
@click.option("--standardize/--no-standardize", default=True, help="The network's input.")
@click.option("--activation", default="relu", help="relu, gelu, identity.")
@click.option("--kmeans", default="faiss", help="faiss, sklearn.")
@click.option("--epochs", default=30)
@click.option("--batch-size", default=128)
@click.option("--learning-rate", default=0.03)
@click.option("--weight-decay", default=5e-4)
@click.option("--svm", default="batched", help="batched: all at once; reference: LIBLINEAR.")
@click.option("--jobs", default=os.cpu_count() or 1, help="Heads at a time.")
@click.option("--out", type=Path, help="Folder of the results.  [default: runs/voc2007/...]")
@cache_option
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of tables.")
def main(**given: Any) -> None:
    """Classify VOC2007 at low resolution: the paper's rows and controls, with intervals.

    Without --root, --download or --tar it runs on a synthetic sample that it renders, with weights
    of the `demo` extra. Interrupt it anywhere: the same command goes on.
    """
    with told_errors():
        from benchmarks.voc2007.command import run_command

        run_command(given)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.voc2007")
