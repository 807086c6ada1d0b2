"""The `featxfer` command: each stage of the data flow from the saved output of the one before."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import click

PACKAGES = ("featxfer", "torch", "torchvision", "timm", "numpy", "faiss-cpu", "scikit-learn")


class _Commands(click.Group):
    """Commands of this module and of the entry points "featxfer.commands"; errors in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, sorted."""
        plugged = {entry.name for entry in entry_points(group="featxfer.commands")}
        return sorted({*super().list_commands(ctx), *plugged})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by name; a plugged one is imported now."""
        for entry in entry_points(group="featxfer.commands", name=cmd_name):
            command: click.Command = entry.load()
            return command
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; what callers can mend is told without a traceback."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError) as error:
            if isinstance(error, click.exceptions.Exit):
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"show_default": True})
@click.version_option(package_name="featxfer")
def main() -> None:
    """Label-free feature transfer for low-resolution images."""


@main.command()
def env() -> None:
    """Print the versions that results depend on."""
    import platform

    click.echo(f"python {platform.python_version()}")
    for name in PACKAGES:
        try:
            click.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            click.echo(f"{name} not installed")


@main.command()
@click.argument("hr", type=Path)
@click.argument("lr", type=Path)
@click.option("--out", type=Path, required=True, help="Folder of the trained head.")
@click.option("--clusters", default=100, help="k, the paper's N2.")
@click.option("--hidden", default=4096, help="The paper's N1.")
@click.option("--labels", default="nearest", help="nearest (the paper) or paired.")
@click.option("--scaling", default="l2", help="Before k-means and in the network: none, l2.")
@click.option("--seed", default=0)
def fit(
    hr: Path, lr: Path, out: Path, clusters: int, hidden: int, labels: str, scaling: str, seed: int
) -> None:
    """Train a head from two feature stores, HR and LR, of the same images."""
    import dataclasses

    from featxfer import Card, FeatureTransferHead, diagnose, fit_head, kmeans, save_head
    from featxfer.checks import check_choice
    from featxfer.features.extract import shared_degradation
    from featxfer.features.store import FeatureStore, align
    from featxfer.training.pseudo_labels import ASSIGNMENTS

    check_choice("labels", labels, ASSIGNMENTS)
    stores = [FeatureStore.open(folder) for folder in (hr, lr)]
    degradation = shared_degradation(*(store.manifest for store in stores))
    rows = [store.read() for store in stores]
    align(rows)
    manifest = stores[1].manifest
    hr_rows, lr_rows = (part.features for part in rows)
    head = FeatureTransferHead(
        lr_rows.shape[1], clusters, hidden, output="clusters", scaling=scaling, seed=seed
    )
    hr_scaled, lr_scaled = head.scale(hr_rows), head.scale(lr_rows)
    clustering = kmeans(hr_scaled, clusters, seed=seed)
    diagnostics = diagnose(hr_scaled, lr_scaled, clustering.centroids).summary()
    click.echo(json.dumps(diagnostics, indent=1))
    head.set_input_statistics(lr_rows)
    log = fit_head(head, hr_rows, lr_rows, clustering, labels=labels, seed=seed)
    details = {
        "labels": labels,
        "seed": seed,
        "images": len(lr_rows),
        "diagnostics": diagnostics,
        "log": [dataclasses.asdict(epoch) for epoch in log],
    }
    card = Card(manifest.backbone, manifest.weights_sha256, (degradation,), details)
    click.echo(f"Wrote {save_head(head, out, card)}")


@main.command()
@click.argument("head", type=Path)
def show(head: Path) -> None:
    """Check a saved head and print its card."""
    from featxfer.modules.artifact import CARD, load_head

    load_head(head)
    click.echo((head / CARD).read_text(encoding="utf-8"), nl=False)


@main.group()
def cache() -> None:
    """Look after a folder of feature stores."""


@cache.command("list")
@click.argument("folder", type=Path)
def list_stores(folder: Path) -> None:
    """List the stores in FOLDER with their backbone and how complete they are."""
    from featxfer.features.store import FeatureStore

    for path in _stores(folder):
        store = FeatureStore.open(path)
        done = store.part_count - len(store.missing_parts())
        click.echo(
            f"{path.name}  {store.manifest.backbone}  {store.manifest.image_count} images  "
            f"{done} of {store.part_count} parts"
        )


@cache.command()
@click.argument("folder", type=Path)
def verify(folder: Path) -> None:
    """Read every byte of the stores in FOLDER; exit 1 and name the parts that are damaged."""
    from featxfer.features.store import FeatureStore, StoreError, damaged_parts

    stores = _stores(folder)
    damaged = [part for path in stores for part in damaged_parts(path)]
    for path in stores:
        try:
            FeatureStore.open(path)
        except StoreError:
            damaged.append(path / "manifest.json")
    for part in damaged:
        click.echo(f"damaged: {part}; delete it and run again to compute it anew")
    click.echo(f"{len(stores)} stores, {len(damaged)} damaged files")
    raise SystemExit(bool(damaged))


def _stores(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    return sorted(path.parent for path in folder.glob("**/manifest.json"))


if __name__ == "__main__":
    main()
