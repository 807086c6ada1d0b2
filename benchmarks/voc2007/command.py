"""From the command line's values to files on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.common.memo import hash_key
from benchmarks.common.plots import require_matplotlib
from benchmarks.common.results import to_json, write_files
from benchmarks.common.shell import chosen
from benchmarks.voc2007 import fetch, figures, report, tables
from benchmarks.voc2007.options import METHODS, Network, Options
from benchmarks.voc2007.run import open_bench, run
from featxfer import Degradation, Recipe

DEMO_BACKBONE = "tf_efficientnet_lite0"

PAPER = {"sample": (0, 0), "hr_size": 224, "lr_size": 32, "clusters": 100, "hidden": 4096}
"""The paper's sizes."""

SAMPLE = {"sample": (360, 240), "hr_size": 128, "lr_size": 24, "clusters": 60, "hidden": 1024}
"""Of the first run: two cores are done with it in three minutes."""


def run_command(given: Mapping[str, Any]) -> None:
    """Runs the benchmark, writes its files and prints its tables, or its JSON."""
    options = parse(given)
    if options.figures:
        require_matplotlib("--no-figures")
    options = dataclasses.replace(options, root=find_root(given, options.cache))
    if given["out"] is None:
        options = dataclasses.replace(options, out=_default_out(options))
    bench = open_bench(options)
    click.echo(tables.diagnostics(bench.transfer.diagnostics(options.clusters, 0)), err=True)
    results = run(bench)
    pictures = figures.draw(bench, results) if options.figures else {}
    bars = figures.gap_bars(results)
    files = {
        "results.json": to_json(results),
        "tables.txt": tables.render(results),
        "summary.md": tables.markdown(results),
        "gap.svg": bars,
        "report.html": report.render(results, pictures, bars),
    }
    drawn = {f"figures/{name}": data for name, data in pictures.items()}
    write_files(options.out, {**files, **drawn})
    click.echo(f"Wrote {', '.join(files)} and {len(pictures)} figures to {options.out}\n", err=True)
    click.echo(files["results.json" if given["as_json"] else "tables.txt"], nl=False)


def parse(given: Mapping[str, Any]) -> Options:
    """Checked options, before anything is fetched; defaults that depend on others are filled in."""
    is_sample = not _sources(given)
    usual = SAMPLE if is_sample else PAPER
    sizes: dict[str, Any] = {
        name: usual[name] if given[name] is None else given[name] for name in usual
    }
    weights = given["weights"] or ("demo" if is_sample else "pretrained")
    backbone = given["backbone"] or (DEMO_BACKBONE if weights == "demo" else "resnet101")
    names = {field.name for field in dataclasses.fields(Options)} & given.keys()
    filled_in = {
        **{name: sizes[name] for name in ("sample", "clusters", "hidden")},
        "methods": tuple(chosen("--methods", given["methods"], METHODS)),
        "splits": (given["train_split"], given["test_split"]),
        "backbone": backbone,
        "weights": weights,
        "degradation": Degradation(
            sizes["hr_size"],
            sizes["lr_size"],
            given["kernel"],
            given["antialias"],
            given["order"],
        ),
        "protocols": tuple(dict.fromkeys(given["protocol"]))
        or (("virtex",) if is_sample else ("vissl",)),
        "network": _network(given),
        "grid": (given["grid_clusters"], given["grid_hidden"]) if given["grid"] else None,
        "out": given["out"] or Path(),
    }
    return Options(**{**{name: given[name] for name in names}, **filled_in})


def find_root(given: Mapping[str, Any], cache: Path) -> Path | None:
    """The devkit's folder, downloaded or unpacked first if so asked; None for the sample."""
    if given["download"]:
        return fetch.download(cache / "voc2007")
    if given["tar"]:
        return fetch.unpack(given["tar"], fetch.archives_folder(given["tar"], cache))
    root: Path | None = given["root"]
    return root


def _sources(given: Mapping[str, Any]) -> list[str]:
    found = [name for name in ("root", "download", "tar", "sample") if given[name]]
    if len(found) > 1:
        raise ValueError(f"--{found[0]}, --{found[1]}: got both, wanted one source of images")
    return [name for name in found if name != "sample"]


def _default_out(options: Options) -> Path:
    """A folder that names the run and differs for every configuration."""
    size, model = options.degradation.lr_size, options.backbone.replace("/", "-")
    name = f"{options.data_name.replace('/', '-')}-{model}-{size}"
    return Path("runs") / "voc2007" / f"{name}-{hash_key(options.to_dict())[:8]}"


def _network(given: Mapping[str, Any]) -> Network:
    names = ("epochs", "batch_size", "learning_rate", "weight_decay")
    recipe = Recipe(**{name: given[name] for name in names})
    return Network(
        given["scaling"], given["standardize"], given["activation"], given["kmeans"], recipe
    )
