"""`python -m benchmarks.speed`: timings, side by side in one run."""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.common.results import write_results
from benchmarks.common.shell import told_errors
from benchmarks.common.versions import versions
from benchmarks.speed import attached, job, memory, stages
from featxfer import VOCDevkit
from featxfer_integrations import load_backbone


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Timings against what a user would do without featxfer: ratios and medians of pairs."""


@main.command("attached")
@click.option("--model", "models", multiple=True, default=attached.MODELS, help="Of timm.")
@click.option("--batch", "batches", multiple=True, default=(1, 32))
@click.option("--seconds", default=60.0, help="About how long a row takes.")
@click.option("--device", default="cpu")
@click.option("--out", type=Path, help="[default: runs/speed/attached, or runs/speed/blocks]")
@click.option("--blocks", is_flag=True, help="Default blocks instead of heads.")
def time_attached(
    models: tuple[str, ...],
    batches: tuple[int, ...],
    seconds: float,
    device: str,
    out: Path | None,
    blocks: bool,
) -> None:
    """A model with a head, or blocks, attached against the same model without."""
    with told_errors():
        out = out or Path("runs") / "speed" / ("blocks" if blocks else "attached")
        measure = attached.measure_blocks if blocks else attached.measure
        rows = []
        for row in measure(models, batches, seconds, device):
            rows.append(row)
            click.echo(json.dumps(row))
        summary = attached.blocks_table(rows) if blocks else attached.summary(rows)
        _write(out, {"rows": rows}, summary, device)


STAGES = ("extraction", "svms", "kmeans", "heads")


@main.command("stages")
@click.option("--root", type=Path, help="A devkit in VOC layout: extraction and its mAP.")
@click.option("--only", type=click.Choice(STAGES), multiple=True, default=STAGES)
@click.option("--backbone", default="tf_efficientnet_lite0")
@click.option("--weights", default="demo")
@click.option("--images", default=256, help="Of the devkit's trainval, for timing.")
@click.option("--workers", default=2, help="Of the plain loop's DataLoader.")
@click.option("--rows", default=5011, help="Of made features: VOC2007's trainval.")
@click.option("--width", default=2048, help="Of made features: ResNet-101's.")
@click.option("--pairs", default=5)
@click.option("--svm-pairs", default=3, help="LIBLINEAR takes minutes for each.")
@click.option("--out", type=Path, default=Path("runs/speed/stages"))
def time_stages(
    root: Path | None,
    only: tuple[str, ...],
    backbone: str,
    weights: str,
    images: int,
    workers: int,
    rows: int,
    width: int,
    pairs: int,
    svm_pairs: int,
    out: Path,
) -> None:
    """Extraction, SVMs, k-means and head training against what most people write."""
    with told_errors(), tempfile.TemporaryDirectory() as folder:
        if "extraction" in only and root is None:
            raise ValueError("root: got none, wanted a devkit for extraction; or --only the others")
        timed: list[dict[str, Any]] = []
        apart: list[dict[str, Any]] = []
        if "extraction" in only and root is not None:
            devkit, model = VOCDevkit(root), load_backbone(backbone, weights)
            names = devkit.ids("trainval")[:images]
            paths = [devkit.root / "JPEGImages" / f"{name}.jpg" for name in names]
            timed += stages.measure_extraction(model, paths, Path(folder) / "timed", pairs, workers)
            apart += stages.measure_map(model, devkit, Path(folder) / "judged")
        if "svms" in only:
            timed += stages.measure_svms(rows, width, svm_pairs, torch.get_num_threads())
        if "kmeans" in only:
            timed += stages.measure_kmeans(rows, width, pairs)
        if "heads" in only:
            timed += stages.measure_heads(rows, width, 4096, pairs)
        summary = stages.summary(timed)
        if apart:
            summary += "\n" + stages.map_table(apart)
        _write(out, {"rows": timed, "map": apart}, summary)


@main.command("job")
@click.option("--out", type=Path, default=Path("runs/speed/job"))
def time_job(out: Path) -> None:
    """`python -m benchmarks.voc2007`, as README has it, cold and warm, and where its time goes."""
    with told_errors(), tempfile.TemporaryDirectory() as folder:
        measured = job.measure_job([], Path(folder))
        _write(out, measured, job.summary(measured))


@main.command("samples")
@click.option("--rows", default=1_000_000)
@click.option("--width", default=64)
@click.option("--out", type=Path, default=Path("runs/speed/samples"))
def cluster_samples(rows: int, width: int, out: Path) -> None:
    """k-means of a sample of made features against k-means of all."""
    with told_errors():
        found = list(stages.measure_samples(rows, width))
        _write(out, {"width": width, "rows": found}, stages.samples_table(found))


@main.command("memory")
@click.option("--images", "counts", multiple=True, default=(1_000, 10_000, 100_000))
@click.option("--out", type=Path, default=Path("runs/speed/memory"))
def watch_memory(counts: tuple[int, ...], out: Path) -> None:
    """The most memory that extraction takes, over the number of images."""
    with told_errors(), tempfile.TemporaryDirectory() as folder:
        rows = list(memory.measure_memory(counts, Path(folder)))
        _write(out, {"rows": rows}, memory.summary(rows))


def _write(out: Path, measured: dict[str, Any], summary: str, device: str = "cpu") -> None:
    """Writes `results.json` and `summary.md` and prints the latter."""
    write_results(out, {"machine": _machine(device), "versions": versions(), **measured}, summary)


def _machine(device: str) -> dict[str, str | int]:
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "cpu": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
