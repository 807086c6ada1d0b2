"""`python -m benchmarks.plugin`: a trained model with its classifier left in place, LR images in.

Heads are fitted by `fit_transfer` on the trainval images, without labels. Judged on test images:

- deploy: SVMs trained on HR trainval features and never changed, tested on LR features as they
  come, through ridge regression, and through the head; and on HR features through the head, which
  is what it costs;
- retrain: SVMs trained and tested on the LR features of the row (the paper's protocol);
- the model's own ImageNet classifier, on the same features: how often its first choice is the one
  that it gives for the HR image.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.memo import Memo, hash_key
from benchmarks.plugin.tables import to_markdown
from benchmarks.shell import told_errors
from benchmarks.versions import versions
from benchmarks.voc2007.methods import ridge
from benchmarks.voc2007.run import summarise
from featxfer import (
    FEATURES_RECIPE,
    PROTOCOLS,
    Degradation,
    Features,
    FeatureTransferHead,
    Protocol,
    VOCDevkit,
    extract_features,
    train_svms,
)
from featxfer.evaluation.svm import LinearSVMs, average_precisions
from featxfer.evaluation.voc import Labels
from featxfer.features.extract import default_cache
from featxfer.files import write_atomic
from featxfer_integrations import (
    attach_transfer,
    backbone_of,
    fit_transfer,
    load_model,
    transfers_of,
)
from featxfer_integrations.attach import find_place

SPLITS = ("trainval", "test")


@click.command(context_settings={"show_default": True})
@click.option("--root", type=Path, required=True, help="A devkit in VOC layout.")
@click.option("--backbone", default="timm/tf_efficientnet_lite0")
@click.option("--weights", default="demo", help="pretrained, demo or a file.")
@click.option("--lr-size", "sizes", multiple=True, default=(32,), help="May be repeated.")
@click.option("--seeds", default=5)
@click.option("--hidden", default=None, type=int, help="The head's hidden width.")
@click.option("--protocol", default="vissl", type=click.Choice(list(PROTOCOLS)))
@click.option("--jobs", default=1, help="SVMs at a time.")
@click.option("--cache", type=Path, help="[default: $FEATXFER_CACHE or ~/.cache/featxfer]")
@click.option("--out", type=Path, default=Path("runs") / "plugin")
def main(cache: Path | None, out: Path, **options: Any) -> None:
    """Writes results.json and summary.md. May be interrupted; the same command goes on."""
    with told_errors():
        study = Study.open(cache or default_cache(), **options)
        results = study.run()
        text = json.dumps(results, indent=1) + "\n"
        write_atomic(out / "results.json", text.encode())
        summary = to_markdown(results)
        write_atomic(out / "summary.md", summary.encode())
        click.echo(summary)
        click.echo(f"Wrote {out}/results.json and summary.md")


@dataclass(frozen=True)
class Study:
    """A model, a devkit, and where finished work is kept."""

    model: nn.Module
    devkit: VOCDevkit
    cache: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, cache: Path, root: Path, backbone: str, weights: str, **config: Any) -> Study:
        """Reads the model and the devkit."""
        config = {**config, "backbone": backbone, "weights": weights}
        return cls(load_model(backbone, weights), VOCDevkit(root), cache, config)

    def run(self) -> dict[str, Any]:
        """All rows; several sizes are served by one head each, and by one head for all."""
        sizes = tuple(self.config["sizes"])
        fits = {str(size): (size,) for size in sizes}
        if len(sizes) > 1:
            fits["all"] = sizes
        heads = {
            name: [self.head(trained, seed) for seed in range(self.config["seeds"])]
            for name, trained in fits.items()
        }
        return {
            "config": {**self.config, "sizes": sizes},
            "images": {split: len(self.devkit.ids(split)) for split in SPLITS},
            "versions": versions(),
            "tables": {
                str(size): self.table(size, {n: h for n, h in heads.items() if size in fits[n]})
                for size in sizes
            },
            "held_out": {
                name: [head.card.details["held_out"] for head in group if head.card]
                for name, group in heads.items()
            },
            "end_to_end": self.end_to_end(sizes[0], heads[str(sizes[0])][0]),
        }

    def table(self, size: int, heads: dict[str, list[FeatureTransferHead]]) -> dict[str, Any]:
        """Rows by name; of each the figures of its runs, a run a seed."""
        train, test = (self.features(split, size) for split in SPLITS)
        train_mapped, both = ridge((train.lr, torch.cat([test.lr, test.hr])), train.hr)
        lr_mapped, hr_mapped = both.split(len(test.lr))
        rows: dict[str, list[tuple[Tensor | None, Tensor]]] = {
            "HR": [(train.hr, test.hr)],
            "LR": [(train.lr, test.lr)],
            "LR through ridge regression": [(train_mapped, lr_mapped)],
            "HR through ridge regression": [(None, hr_mapped)],
        }
        for name, group in heads.items():
            label = "the head" if name != "all" else "one head for all sizes"
            rows[f"LR through {label}"] = [
                (h.transfer(train.lr), h.transfer(test.lr)) for h in group
            ]
            if name != "all":
                halves = [copy.deepcopy(h).to(torch.bfloat16) for h in group]
                rows["LR through the head, its weights in bfloat16"] = [
                    (None, h.transfer(test.lr)) for h in halves
                ]
            rows[f"HR through {label}"] = [(None, h.transfer(test.hr)) for h in group]
        deployed = self.svms(train.hr)
        choice = self.classify(test.hr).argmax(1)
        figures = {
            label: [self.judge(deployed, choice, run) for run in runs]
            for label, runs in rows.items()
        }
        return {
            label: {name: summarise([run[name] for run in runs]) for name in runs[0]}
            for label, runs in figures.items()
        }

    def judge(
        self, deployed: LinearSVMs, choice: Tensor, run: tuple[Tensor | None, Tensor]
    ) -> dict[str, float]:
        """Percentages: deploy mAP and accuracy, classifier agreement, and retrain mAP if asked."""
        train, test = run
        truth = self.devkit.labels("test")
        decisions = deployed.decisions(test)
        right = truth[np.arange(len(truth)), decisions.argmax(1)] == 1
        figures = {
            "deploy": 100 * float(np.mean(average_precisions(decisions, truth))),
            "accuracy": 100 * float(right.mean()),
            "classifier": 100 * float((self.classify(test).argmax(1) == choice).float().mean()),
        }
        if train is not None:
            retrained = self.svms(train).decisions(test)
            figures["retrain"] = 100 * float(np.mean(average_precisions(retrained, truth)))
        return figures

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Logits of the model's own classifier."""
        logits: Tensor = self.model.get_submodule(find_place(self.model).inputs[0])(features)
        return logits

    @torch.no_grad()
    def end_to_end(self, size: int, head: FeatureTransferHead) -> float:
        """Largest difference of logits: the attached model on images, the head on stored rows."""
        attached = attach_transfer(copy.deepcopy(self.model), copy.deepcopy(head))
        images, degradation = self.devkit.images("test"), Degradation(lr_size=size)
        first = range(min(16, len(images)))
        pixels = torch.stack([degradation.lr(images.read(index)) for index in first])
        backbone = backbone_of(self.model)
        logits = attached(backbone.preprocessing(pixels))
        stored = self.features("test", size).lr[: len(first)]
        return float((logits - self.classify(head.transfer(stored))).abs().max())

    @property
    def protocol(self) -> Protocol:
        """Of the SVMs."""
        return PROTOCOLS[self.config["protocol"]]

    def features(self, split: str, size: int) -> Features:
        """HR and LR features, from the cache as far as it has them."""
        return extract_features(
            backbone_of(self.model),
            self.devkit.images(split),
            Degradation(lr_size=size),
            self.cache / "features",
        )

    def head(self, sizes: tuple[int, ...], seed: int) -> FeatureTransferHead:
        """The head that `fit_transfer` leaves in a model; kept by all that it hangs on."""
        images = self.devkit.images("trainval")
        key = {
            "sizes": sizes,
            "seed": seed,
            "hidden": self.config["hidden"],
            "recipe": FEATURES_RECIPE.to_dict(),
            "backbone": backbone_of(self.model).weights_sha256,
            "images": images.fingerprint,
            "versions": versions(),
        }
        folder = self.cache / "plugin" / hash_key(key)
        if not (folder / "card.json").is_file():
            model = copy.deepcopy(self.model)
            attach_transfer(model, hidden_features=self.config["hidden"])
            views = [Degradation(lr_size=size) for size in sizes]
            fit_transfer(
                model, images, degradation=views, depth="pooled", seed=seed, cache=self.cache
            )
            transfers_of(model)["pooled"].save_pretrained(folder)
        return FeatureTransferHead.from_pretrained(folder)

    def svms(self, rows: Tensor) -> LinearSVMs:
        """SVMs on trainval rows; kept by what they are trained on."""
        labels = self.devkit.labels("trainval")
        key = {
            "rows": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
            "labels": hash_key({"labels": labels.tolist()}),
            "protocol": dataclasses.asdict(self.protocol),
        }
        kept = Memo(self.cache / "svms").get(key, lambda: self.train(rows, labels))
        coef, intercept = np.array(kept["coef"]), np.array(kept["intercept"])
        return LinearSVMs(
            self.protocol, coef, intercept, tuple(kept["costs"]), kept["unconverged"], kept["fits"]
        )

    def train(self, rows: Tensor, labels: Labels) -> dict[str, Any]:
        """The SVMs as JSON types."""
        with tqdm(total=labels.shape[1], desc="SVMs", unit="svm", disable=None, leave=False) as bar:
            svms = train_svms(
                rows,
                labels,
                self.protocol,
                jobs=self.config["jobs"],
                callback=lambda _: bar.update(),
            )
        return {
            "coef": svms.coef.tolist(),
            "intercept": svms.intercept.tolist(),
            "costs": list(svms.costs),
            "unconverged": svms.unconverged,
            "fits": svms.fits,
        }


if __name__ == "__main__":
    main()
