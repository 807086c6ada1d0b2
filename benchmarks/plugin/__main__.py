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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common.fit import head_of
from benchmarks.common.intervals import summarise_runs
from benchmarks.common.memo import Memo, hash_key
from benchmarks.common.results import write_results
from benchmarks.common.ridge import ridge
from benchmarks.common.study import PARTS, Study, with_study
from benchmarks.common.versions import versions
from benchmarks.plugin.tables import summary
from featxfer import FeatureTransferHead, train_svms
from featxfer.evaluation.svm import LinearSVMs
from featxfer_integrations import attach_transfer, backbone_of, host_of


@click.command(context_settings={"show_default": True})
@click.option("--lr-size", "sizes", multiple=True, default=(32,), help="May be repeated.")
@click.option("--seeds", default=5)
@click.option("--hidden", default=None, type=int, help="The head's hidden width.")
@click.option("--jobs", default=1, help="SVMs at a time.")
@click.option("--out", type=Path, default=Path("runs") / "plugin")
@with_study
def main(study: Study, out: Path, **options: Any) -> None:
    """Writes results.json and summary.md. May be interrupted; the same command goes on."""
    results = PlugIn(study, **options).run()
    write_results(out, results, summary(results))


@dataclass(frozen=True)
class PlugIn:
    """Heads of a study's model.

    Args:
        study: model, devkit and protocol.
        sizes: sides of LR images, pixels.
        seeds: how many heads of each.
        hidden: their hidden width; None for the default.
        jobs: SVMs that are trained at a time.
    """

    study: Study
    sizes: tuple[int, ...]
    seeds: int
    hidden: int | None
    jobs: int

    def run(self) -> dict[str, Any]:
        """All rows; several sizes are served by one head each, and by one head for all."""
        study = self.study
        fits: dict[str, tuple[int, ...]] = {str(size): (size,) for size in self.sizes}
        if len(self.sizes) > 1:
            fits["all"] = self.sizes
        heads = {
            name: [self.head(trained, seed) for seed in range(self.seeds)]
            for name, trained in fits.items()
        }
        asked = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        model = {"backbone": study.name, "weights": study.weights}
        return {
            "config": {**asked, **model, "protocol": study.protocol.name},
            "images": study.counts,
            "versions": versions(),
            "tables": {
                str(size): self.table(size, {n: h for n, h in heads.items() if size in fits[n]})
                for size in self.sizes
            },
            "held_out": {
                name: [head.card.details["held_out"] for head in group if head.card]
                for name, group in heads.items()
            },
            "end_to_end": self.end_to_end(self.sizes[0], heads[str(self.sizes[0])][0]),
        }

    def table(self, size: int, heads: dict[str, list[FeatureTransferHead]]) -> dict[str, Any]:
        """Rows by name; of each the figures of its runs, a run a seed."""
        train, test = (self.study.features(split, self.study.view(size)) for split in PARTS)
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
        return {label: summarise_runs(runs) for label, runs in figures.items()}

    def judge(
        self, deployed: LinearSVMs, choice: Tensor, run: tuple[Tensor | None, Tensor]
    ) -> dict[str, float]:
        """Percentages: deploy mAP and accuracy, classifier agreement, and retrain mAP if asked."""
        train, test = run
        study, truth = self.study, self.study.labels("test")
        figures = study.scores("deploy", "accuracy", deployed.decisions(test), truth)
        agrees = self.classify(test).argmax(1) == choice
        figures["classifier"] = 100 * float(agrees.float().mean())
        if train is not None:
            figures["retrain"] = study.precision(self.svms(train).decisions(test), truth)
        return figures

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Logits of the model's own classifier."""
        model = self.study.model
        logits: Tensor = model.get_submodule(host_of(model).head(model).modules[0])(features)
        return logits

    @torch.no_grad()
    def end_to_end(self, size: int, head: FeatureTransferHead) -> float:
        """Largest difference of logits: the attached model on images, the head on stored rows."""
        attached = attach_transfer(self.study.copy(), copy.deepcopy(head))
        images, view = self.study.images("test"), self.study.view(size)
        first = range(min(16, len(images)))
        pixels = torch.stack([view.lr(images.read(index)) for index in first])
        logits = attached(backbone_of(self.study.model).preprocessing(pixels))
        stored = self.study.features("test", view).lr[: len(first)]
        return float((logits - self.classify(head.transfer(stored))).abs().max())

    def head(self, sizes: tuple[int, ...], seed: int) -> FeatureTransferHead:
        """The head that `fit_transfer` leaves in a model; kept by all that it hangs on."""
        model = attach_transfer(self.study.copy(), hidden_features=self.hidden)
        views = [self.study.view(size) for size in sizes]
        self.study.fit(views, seed, model=model).run()
        return head_of(model)

    def svms(self, rows: Tensor) -> LinearSVMs:
        """SVMs on trainval rows; kept by what they are trained on."""
        labels, protocol = self.study.labels("train"), self.study.protocol

        def train() -> dict[str, Any]:
            progress = tqdm(
                total=labels.shape[1], desc="SVMs", unit="svm", disable=None, leave=False
            )
            with progress as bar:
                svms = train_svms(
                    rows, labels, protocol, jobs=self.jobs, callback=lambda _: bar.update()
                )
            arrays = {"coef": svms.coef.tolist(), "intercept": svms.intercept.tolist()}
            told = {"unconverged": svms.unconverged, "fits": svms.fits}
            return {**arrays, "costs": list(svms.costs), **told}

        key = {
            "rows": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
            "labels": hash_key({"labels": labels.tolist()}),
            "protocol": dataclasses.asdict(protocol),
        }
        kept = Memo(self.study.cache / "svms").get(key, train)
        arrays = {name: np.array(kept[name]) for name in ("coef", "intercept")}
        return LinearSVMs(protocol, **{**kept, **arrays, "costs": tuple(kept["costs"])})


if __name__ == "__main__":
    main()
