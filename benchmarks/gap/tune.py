"""`python -m benchmarks.gap.tune`: what heads and blocks hang on, without a look at test images.

A quarter of the trainval images is held out. Heads and blocks are trained on the rest without
labels. Judged on the held-out quarter by SVMs on HR features of the rest (deploy), and by the
label-free self-check.

- `--part head`: the pooled head, one choice of the recipe changed at a time;
- `--part blocks`: blocks by stage and shape, each trained for the same time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.gap.features import through_blocks
from benchmarks.gap.methods import block_macs, costs, report
from benchmarks.gap.study import Study
from benchmarks.gap.tables import grid, summarised
from benchmarks.shell import told_errors
from benchmarks.versions import versions
from featxfer import (
    BLOCK_RECIPE,
    FEATURES_RECIPE,
    PROTOCOLS,
    Degradation,
    FeatureTransferBlock,
    FeatureTransferHead,
    Recipe,
    VOCDevkit,
)
from featxfer.features.extract import default_cache
from featxfer.files import write_atomic
from featxfer_integrations import TransferFit, attach_transfer, fit_transfer, transfers_of
from featxfer_integrations.attach import find_place, maps_at

HELD_OUT = 0.25
RECIPES: tuple[tuple[str, Any], ...] = (
    ("epochs", 20),
    ("epochs", 160),
    ("learning_rate", 1e-4),
    ("learning_rate", 1e-3),
    ("batch_size", 64),
    ("batch_size", 1024),
    ("weight_decay", 0.0),
    ("weight_decay", 0.5),
)
CLUSTERS = (10, 30, 300)
HIDDEN = (128, 2048)

Shape = tuple[tuple[str, ...], dict[str, Any]]
"""Modules that blocks follow, and the blocks' arguments."""

PLACES = ("blocks.4", "blocks.6")

SHAPES: Mapping[str, Shape] = {
    "after blocks.1": (("blocks.1",), {"hidden_channels": 88}),
    "after blocks.2": (("blocks.2",), {"hidden_channels": 240}),
    "after blocks.4": (("blocks.4",), {"hidden_channels": 352}),
    "after blocks.6": (("blocks.6",), {"hidden_channels": 504}),
    "after blocks.4 and 6 (default)": (PLACES, {"hidden_channels": 200}),
    "these, one unit": (PLACES, {"hidden_channels": 408, "units": 1}),
    "these, depthwise 3 x 3": (PLACES, {"hidden_channels": 216, "kernel_size": 3}),
    "these, one full 3 x 3": (
        PLACES,
        {"hidden_channels": 88, "kernel_size": 3, "units": 1, "depthwise": False},
    ),
}
"""After the last stage of each resolution, by timm's names of an EfficientNet, and after two of
them; two depthwise 7 x 7 units each where nothing else is said.
All take the same arithmetic, 8.4% to 8.8% of EfficientNet-Lite0's."""


@click.command(context_settings={"show_default": True})
@click.option("--root", type=Path, required=True, help="A devkit in VOC layout.")
@click.option("--part", default="head", type=click.Choice(["head", "blocks"]))
@click.option("--backbone", default="timm/tf_efficientnet_lite0")
@click.option("--weights", default="demo", help="pretrained, demo or a file.")
@click.option("--lr-size", default=32, help="Side of the LR image, pixels.")
@click.option("--hr-size", default=224, help="Side of the model's input, pixels.")
@click.option("--seeds", default=1)
@click.option("--protocol", default="vissl", type=click.Choice(list(PROTOCOLS)))
@click.option("--seconds", default=60.0, help="Of training a block.")
@click.option("--cache", type=Path, help="[default: $FEATXFER_CACHE or ~/.cache/featxfer]")
@click.option("--out", type=Path, help="[default: runs/gap-tune-PART]")
def main(
    root: Path,
    part: str,
    backbone: str,
    weights: str,
    lr_size: int,
    hr_size: int,
    seeds: int,
    protocol: str,
    seconds: float,
    cache: Path | None,
    out: Path | None,
) -> None:
    """Writes results.json and summary.md. May be interrupted; the same command goes on."""
    with told_errors():
        devkit, kept = VOCDevkit(root), cache or default_cache()
        resize = Degradation(hr_size=hr_size)
        study = Study(backbone, weights, devkit, kept, resize, PROTOCOLS[protocol])
        bench = Bench(study, lr_size, seeds)
        table = bench.heads() if part == "head" else bench.blocks(seconds)
        results = {
            "config": {
                "part": part,
                "backbone": backbone,
                "weights": weights,
                "lr_size": lr_size,
                "hr_size": hr_size,
                "seeds": seeds,
                "protocol": protocol,
                "held_out": HELD_OUT,
                "seconds": seconds if part == "blocks" else None,
            },
            "versions": versions(),
            "table": table,
        }
        out = out or Path("runs") / f"gap-tune-{part}"
        write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        summary = to_markdown(table)
        write_atomic(out / "summary.md", summary.encode())
        click.echo(summary)
        click.echo(f"Wrote results.json and summary.md to {out}")


@dataclasses.dataclass(frozen=True)
class Bench:
    """A study whose trainval images are split as `fit_transfer` splits them."""

    study: Study
    lr_size: int
    seeds: int

    def heads(self) -> dict[str, Any]:
        """The default head, and each with one thing changed."""
        options: dict[str, dict[str, Any]] = {"default": {}}
        for name, value in RECIPES:
            changed = dataclasses.replace(FEATURES_RECIPE, **{name: value})
            options[f"{name} {value:g}"] = {"recipe": changed}
        options |= {f"{k} clusters": {"clusters": k} for k in CLUSTERS}
        options |= {f"{width} hidden": {"hidden": width} for width in HIDDEN}
        return self._table({name: (self._head, given) for name, given in options.items()})

    def blocks(self, seconds: float) -> dict[str, Any]:
        """Blocks by stage and shape."""
        rows: dict[str, tuple[Any, dict[str, Any]]] = {
            name: (self._blocks, {"at": at, "config": config, "seconds": seconds})
            for name, (at, config) in SHAPES.items()
        }
        return self._table(rows)

    def _table(self, rows: Mapping[str, tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
        table = {}
        for name, (run, given) in tqdm(rows.items(), desc="choices", disable=None):
            runs = []
            for seed in range(self.seeds):
                described = {
                    key: value.to_dict() if isinstance(value, Recipe) else value
                    for key, value in given.items()
                }
                key = {
                    "tune": described,
                    "size": self.lr_size,
                    "seed": seed,
                    "recipes": [FEATURES_RECIPE.to_dict(), BLOCK_RECIPE.to_dict()],
                }
                runs.append(self.study.figures(key, lambda: run(seed, **given)))  # noqa: B023
            table[name] = summarised(runs)
        return table

    def _head(self, seed: int, **options: Any) -> dict[str, Any]:
        model = self.study.copy()
        hidden = options.pop("hidden", None)
        if hidden is not None:
            attach_transfer(model, hidden_features=hidden)
        fit = self._fit(model, seed, depth="pooled", **options)
        head = transfers_of(model)["pooled"]
        assert isinstance(head, FeatureTransferHead)
        rows = self.study.features("trainval", self.study.view(self.lr_size))
        return {
            **self._judge(head.transfer(rows.lr), seed),
            **costs([head], fit.log),
            **held_out(fit),
        }

    def _blocks(
        self, seed: int, at: tuple[str, ...], config: dict[str, Any], seconds: float
    ) -> dict[str, Any]:
        once = dataclasses.replace(BLOCK_RECIPE, epochs=1)
        _, timed = self._fit_blocks(seed, at, config, once)
        epochs = max(2, round(seconds / timed.blocks_log[0].seconds))
        recipe = dataclasses.replace(BLOCK_RECIPE, epochs=epochs)
        model, fit = self._fit_blocks(seed, at, config, recipe)
        view = self.study.view(self.lr_size)
        rows = through_blocks(self.study, model, "trainval", view)
        blocks = list(transfers_of(model).values())
        found = {**block_macs(model), **costs(blocks, fit.blocks_log), **held_out(fit)}
        found["epochs"] = epochs
        return {**self._judge(rows.lr, seed), **found}

    def _fit_blocks(
        self, seed: int, at: tuple[str, ...], config: dict[str, Any], recipe: Any
    ) -> tuple[nn.Module, TransferFit]:
        model = self.study.copy()
        for name in at:
            channels, layout, _ = maps_at(model, find_place(model, at=name))
            block = FeatureTransferBlock(channels, **{"layout": layout, **config})
            attach_transfer(model, block, at=name)
        options = {"block_recipe": recipe, "crops": 0}
        return model, self._fit(model, seed, depth="deep", at=at, **options)

    def _fit(self, model: nn.Module, seed: int, **options: Any) -> TransferFit:
        return fit_transfer(
            model,
            self.study.images("trainval"),
            degradation=self.study.view(self.lr_size),
            held_out=HELD_OUT,
            cache=self.study.cache,
            seed=seed,
            **options,
        )

    def _judge(self, lr: Tensor, seed: int) -> dict[str, float]:
        """Of held-out images: mAP and accuracy in %, and the gap that they recover.

        A class that only one of the two parts shows does not count.
        """
        count = len(lr)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        kept = count - round(count * HELD_OUT)
        train, test = order[:kept].sort().values, order[kept:].sort().values
        labels = self.study.labels("trainval")
        parts = [labels[indices.numpy()] == 1 for indices in (train, test)]
        labels = labels[:, parts[0].any(0) & parts[1].any(0)]
        plain = self.study.features("trainval", self.study.view(self.lr_size))
        svms = self.study.svms(plain.hr[train], labels[train.numpy()], self.study.protocol)
        hr, low, found = (
            self.study.scores(
                "deploy", "accuracy", svms.decisions(rows[test]), labels[test.numpy()]
            )
            for rows in (plain.hr, plain.lr, lr)
        )
        gaps = {
            f"{name} gap": 100 * (found[name] - low[name]) / (hr[name] - low[name])
            for name in found
            if hr[name] > low[name]
        }
        return {**found, **gaps}


def held_out(fit: TransferFit) -> dict[str, Any]:
    """The self-check of the one degradation, if images were held out."""
    checks = report(fit)["self_check"] or [{}]
    return {f"held-out {name}": value for name, value in checks[0].items()}


def to_markdown(table: Mapping[str, Any]) -> str:
    """Gaps recovered on held-out images, the self-check and what it took."""
    columns = [
        ("deploy gap %", "deploy gap", 1),
        ("accuracy gap %", "accuracy gap", 1),
        ("held-out cosine gap", "held-out cosine_gap", 3),
        ("HR cosine", "held-out hr_cosine", 3),
        ("parameters", "parameters", 0),
        ("blocks, M MACs", "block_macs", 0),
        ("epochs", "epochs", 0),
        ("training, s", "seconds", 0),
    ]
    return grid(table, columns)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gap.tune")
