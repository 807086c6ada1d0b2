"""`python -m benchmarks.gap.tune`: what heads and blocks hang on, without a look at test images.

A quarter of the trainval images is held out. Heads and blocks are trained on the rest without
labels. Judged on the held-out quarter by SVMs on HR features of the rest (deploy), and by the
label-free self-check.

- `--part head`: the pooled head, one choice of the recipe changed at a time;
- `--part blocks`: blocks by stage and shape, each trained for the same time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common.fit import Fit, Found, head_of
from benchmarks.common.intervals import summarise_runs
from benchmarks.common.markdown import grid
from benchmarks.common.method import Method
from benchmarks.common.results import write_results
from benchmarks.common.study import Study, with_study
from benchmarks.common.table import recovered
from benchmarks.common.versions import versions
from benchmarks.gap.features import through_blocks
from benchmarks.gap.methods import block_macs, costs
from featxfer import BLOCK_RECIPE, FEATURES_RECIPE, FeatureTransferBlock
from featxfer_integrations import FitOptions, attach_transfer, host_of, transfers_of
from featxfer_integrations.hosts.base import find_sites

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


COLUMNS = (
    ("deploy gap %", "deploy gap", 1),
    ("accuracy gap %", "accuracy gap", 1),
    ("held-out cosine gap", "held-out cosine_gap", 3),
    ("HR cosine", "held-out hr_cosine", 3),
    ("parameters", "parameters", 0),
    ("blocks, M MACs", "block_macs", 0),
    ("epochs", "epochs", 0),
    ("training, s", "seconds", 0),
)


@click.command(context_settings={"show_default": True})
@click.option("--part", default="head", type=click.Choice(["head", "blocks"]))
@click.option("--lr-size", default=32, help="Side of the LR image, pixels.")
@click.option("--seeds", default=1)
@click.option("--seconds", default=60.0, help="Of training a block.")
@click.option("--out", type=Path, help="[default: runs/gap-tune-PART]")
@with_study
def main(
    study: Study, part: str, lr_size: int, seeds: int, seconds: float, out: Path | None
) -> None:
    """Writes results.json and summary.md. May be interrupted; the same command goes on."""
    bench = Bench(study, lr_size)
    choices = bench.heads() if part == "head" else bench.blocks(seconds)
    results = {
        "config": {
            "part": part,
            "backbone": study.name,
            "weights": study.weights,
            "lr_size": lr_size,
            "hr_size": study.resize.hr_size,
            "seeds": seeds,
            "protocol": study.protocol.name,
            "held_out": HELD_OUT,
            "seconds": seconds if part == "blocks" else None,
        },
        "versions": versions(),
        "table": bench.table(choices, seeds),
    }
    write_results(out or Path("runs") / f"gap-tune-{part}", results, summary(results))


Choice = Method[[int], dict[str, Any]]
"""From a seed to the figures of a head or of blocks."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """A study whose trainval images are split as `fit_transfer` splits them."""

    study: Study
    lr_size: int

    def heads(self) -> list[Choice]:
        """The default head, and each with one thing changed."""
        choices = [self._head("default")]
        for name, value in RECIPES:
            changed = dataclasses.replace(FEATURES_RECIPE, **{name: value})
            choices.append(self._head(f"{name} {value:g}", recipe=changed))
        choices += [self._head(f"{k} clusters", clusters=k) for k in CLUSTERS]
        return choices + [self._head(f"{width} hidden", width) for width in HIDDEN]

    def blocks(self, seconds: float) -> list[Choice]:
        """Blocks by stage and shape, each trained for so long."""
        return [self._blocks(name, *shape, seconds) for name, shape in SHAPES.items()]

    def table(self, choices: list[Choice], seeds: int) -> dict[str, Any]:
        """Summaries of figures, a row a choice."""
        table = {}
        for choice in tqdm(choices, desc="choices", disable=None):
            runs = []
            for seed in choice.seeds(seeds):
                key = {"tune": choice.label, "size": self.lr_size, **choice.choices(seed)}
                runs.append(self.study.figures(key, lambda: choice.run(seed)))  # noqa: B023
            table[choice.label] = summarise_runs(runs)
        return table

    def _head(self, label: str, hidden: int | None = None, **options: Any) -> Choice:
        def fit(seed: int) -> Fit:
            model = attach_transfer(self.study.copy(), hidden_features=hidden)
            return self._fit(seed, "head", model=model, options=_options(**options))

        def run(seed: int) -> dict[str, Any]:
            asked = fit(seed)
            found = asked.run()
            head = head_of(asked.model)
            rows = self.study.features("train", self.study.view(self.lr_size))
            judged = self._judge(head.transfer(rows.lr), seed)
            return {**judged, **costs([head], found.seconds), **held_out(found)}

        return Method((label,), run, choices=lambda seed: {"fit": fit(seed).key})

    def _blocks(
        self, label: str, sites: tuple[str, ...], config: dict[str, Any], seconds: float
    ) -> Choice:
        def fit(seed: int, epochs: int) -> Fit:
            model = self.study.copy()
            for name in sites:
                (site,) = find_sites(host_of(model), model, name)
                attach_transfer(model, FeatureTransferBlock(**site.sizes, **config), site=name)
            recipe = dataclasses.replace(BLOCK_RECIPE, epochs=epochs)
            options = _options(block_recipe=recipe, crops=0)
            return self._fit(seed, sites, model=model, options=options)

        def run(seed: int) -> dict[str, Any]:
            epochs = max(2, round(seconds / fit(seed, 1).run().blocks_seconds))
            asked = fit(seed, epochs)
            found, blocks = asked.run(), list(transfers_of(asked.model).values())
            view = self.study.view(self.lr_size)
            rows = through_blocks(self.study, asked.model, "train", view)
            return {
                **self._judge(rows.lr, seed),
                **block_macs(asked.model),
                **costs(blocks, found.blocks_seconds),
                **held_out(found),
                "epochs": epochs,
            }

        return Method(
            (label,), run, choices=lambda seed: {"fit": fit(seed, 1).key, "seconds": seconds}
        )

    def _fit(self, seed: int, site: Any, **given: Any) -> Fit:
        return self.study.fit([self.study.view(self.lr_size)], seed, site, **given)

    def _judge(self, lr: Tensor, seed: int) -> dict[str, float]:
        """Of held-out images: mAP and accuracy in %, and the gap that they recover.

        A class that only one of the two parts shows does not count.
        """
        count = len(lr)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        kept = count - round(count * HELD_OUT)
        train, test = order[:kept].sort().values, order[kept:].sort().values
        labels = self.study.labels("train")
        parts = [labels[indices.numpy()] == 1 for indices in (train, test)]
        labels = labels[:, parts[0].any(0) & parts[1].any(0)]
        plain = self.study.features("train", self.study.view(self.lr_size))
        svms = self.study.svms(plain.hr[train], labels[train.numpy()], self.study.protocol)
        hr, low, found = (
            self.study.scores(
                "deploy", "accuracy", svms.decisions(rows[test]), labels[test.numpy()]
            )
            for rows in (plain.hr, plain.lr, lr)
        )
        return {**found, **recovered(found, low, hr)}


def _options(**given: Any) -> FitOptions:
    return FitOptions(held_out=HELD_OUT, **given)


def held_out(found: Found) -> dict[str, Any]:
    """The self-check of the one degradation, if images were held out."""
    checks = found.self_check or [{}]
    return {f"held-out {name}": value for name, value in checks[0].items()}


def summary(results: Mapping[str, Any]) -> str:
    """Gaps recovered on held-out images, the self-check and what it took."""
    return grid(results["table"], COLUMNS)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gap.tune")
