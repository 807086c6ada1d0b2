"""The rows of the table: from HR and LR features to what the SVMs are trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from torch import Tensor
from tqdm import tqdm

from benchmarks.common.memo import hash_key
from benchmarks.common.method import Method
from benchmarks.common.study import PARTS, Study, Transferred
from benchmarks.common.table import TableMethod
from benchmarks.common.versions import versions
from benchmarks.gap.methods import BLOCKS, METHODS
from benchmarks.voc2007.options import Network
from featxfer import (
    Card,
    Degradation,
    FeatureTransferHead,
    diagnose,
    fit_head,
    kmeans,
    load_head,
    save_head,
)
from featxfer.modules.scaling import scale_features
from featxfer.training.pseudo_labels import Clustering, centroid_scores
from featxfer_integrations import backbone_of


@dataclass(frozen=True)
class Sizes:
    """The network's sizes and labels: k = N2, N1, "nearest" or "paired"."""

    clusters: int
    hidden: int
    labels: str


class Transfer:
    """Trains heads on the LR training features, or reads those that are already trained.

    Args:
        hr, lr: features `(n, d)` of the training rows.
        network: what all heads have in common.
        heads: folder in which trained heads are kept.
        identity: JSON-shaped; what the features are, for the heads' keys.
        card: backbone's name, its weights' hash and the degradation, for the heads' cards.
    """

    def __init__(
        self,
        hr: Tensor,
        lr: Tensor,
        network: Network,
        heads: Path,
        identity: Any,
        card: tuple[str, str, Degradation],
    ) -> None:
        self.network = network
        self.hr, self.lr = self.scale(hr), self.scale(lr)
        self._heads, self._identity, self._card = heads, identity, card
        self._clusterings: dict[tuple[int, int], Clustering] = {}

    @classmethod
    def of(cls, study: Study, view: Degradation, network: Network) -> Transfer:
        """Of the features that a study's table is made of."""
        features, backbone = study.features("train", view), backbone_of(study.model)
        return cls(
            features.hr,
            features.lr,
            network,
            study.cache / "heads",
            features.keys,
            (backbone.name, backbone.weights_sha256, view),
        )

    def scale(self, features: Tensor) -> Tensor:
        """The scaling of what k-means and the network see."""
        return scale_features(features, self.network.scaling)

    def clustering(self, k: int, seed: int) -> Clustering:
        """k-means of the HR training features."""
        if (k, seed) not in self._clusterings:
            self._clusterings[k, seed] = kmeans(self.hr, k, seed=seed, backend=self.network.kmeans)
        return self._clusterings[k, seed]

    def diagnostics(self, k: int, seed: int) -> dict[str, Any]:
        """The clusters' sizes and the agreement of nearest and paired labels."""
        found = diagnose(self.hr, self.lr, self.clustering(k, seed).centroids)
        return {**found.summary(), "hr_sizes": found.hr_sizes, "lr_sizes": found.lr_sizes}

    def untrained_head(self, sizes: Sizes, seed: int) -> FeatureTransferHead:
        """A head with the input's statistics and He initialisation, not trained."""
        head = FeatureTransferHead(
            self.lr.shape[1],
            sizes.clusters,
            sizes.hidden,
            output="clusters",
            activation=self.network.activation,
            seed=seed,
        )
        if self.network.standardize:
            head.set_input_statistics(self.lr)
        return head

    def train_heads(self, wanted: Iterable[tuple[Sizes, int]], jobs: int) -> None:
        """Trains the heads of these sizes and seeds that are missing, `jobs` at a time."""
        missing = [pair for pair in wanted if not _is_finished(self._folder(*pair)[0])]
        for sizes, seed in missing:
            self.clustering(sizes.clusters, seed)
        train = delayed(self._trained)
        started = Parallel(n_jobs=jobs, return_as="generator")(train(*pair) for pair in missing)
        for _ in tqdm(started, total=len(missing), desc="heads", unit="head", disable=None):
            pass

    def head(self, sizes: Sizes, seed: int) -> FeatureTransferHead:
        """The trained head of these sizes and this seed."""
        return FeatureTransferHead.from_pretrained(self._trained(sizes, seed))

    def log(self, sizes: Sizes, seed: int) -> dict[str, Any]:
        """Loss and match rate of its last epoch, and seconds of training."""
        details = load_head(self._trained(sizes, seed))[1].details
        epochs = details["log"]
        return {
            "loss": epochs[-1]["loss"],
            "match_rate": epochs[-1]["match_rate"],
            "seconds": sum(epoch["seconds"] for epoch in epochs),
        }

    def _folder(self, sizes: Sizes, seed: int) -> tuple[Path, dict[str, Any]]:
        """Where a head is or will be, and all that it depends on."""
        key = {
            "features": self._identity,
            "network": self.network.to_dict(),
            **dataclasses.asdict(sizes),
            "seed": seed,
            "versions": versions(),
        }
        return self._heads / hash_key(key), key

    def _trained(self, sizes: Sizes, seed: int) -> Path:
        folder, key = self._folder(sizes, seed)
        if not _is_finished(folder):
            self._train(sizes, seed, folder, key)
        return folder

    def _train(self, sizes: Sizes, seed: int, folder: Path, key: dict[str, Any]) -> None:
        head = self.untrained_head(sizes, seed)
        recipe = self.network.recipe
        name = f"head {sizes.labels} k={sizes.clusters} N1={sizes.hidden} seed={seed}"
        with tqdm(total=recipe.epochs, desc=name, unit="epoch", disable=None, leave=False) as bar:
            log = fit_head(
                head,
                self.hr,
                self.lr,
                self.clustering(sizes.clusters, seed),
                labels=sizes.labels,
                recipe=recipe,
                seed=seed,
                callback=lambda _: bar.update(),
            )
        details = {**key, "log": [dataclasses.asdict(epoch) for epoch in log]}
        name, sha256, degradation = self._card
        save_head(head, folder, Card(name, sha256, (degradation,), details))


def _is_finished(head: Path) -> bool:
    return (head / "card.json").is_file()


Make = Callable[[Study, Degradation, int], Transferred]
"""From a study, the LR view and a seed to what the SVMs of a row are trained on and tested on."""


@dataclass(frozen=True)
class Row:
    """A row of Table 1.

    Args:
        label: of the row.
        make: see `Make`.
        seeded: whether the seed changes it.
        choices: what it hangs on besides the study, the view and the seed, as JSON types.
    """

    label: str
    make: Make
    seeded: bool = True
    choices: Any = None

    @property
    def method(self) -> TableMethod:
        """What makes the row's figures."""
        return Method(
            (self.label,),
            lambda study, view, seed: [study.judge(self.make(study, view, seed))],
            self.seeded,
            lambda *_: self.choices,
        )


def paper_rows(transfer: Transfer, sizes: Sizes) -> dict[str, Row]:
    """The paper's rows and the controls, by name; `sizes.labels` is what the head is taught by."""
    other = "paired" if sizes.labels == "nearest" else "nearest"
    n1, k = sizes.hidden, sizes.clusters

    def of_lr(function: Callable[[Tensor, int], Tensor]) -> Make:
        """A row of a function of scaled LR features and the seed."""

        def make(study: Study, view: Degradation, seed: int) -> Transferred:
            test = transfer.scale(study.features("test", view).lr)
            train, tested = (function(part, seed) for part in (transfer.lr, test))
            return Transferred(train, tested, in_place=False)

        return make

    def head(labels: str, layer: str) -> Make:
        asked = dataclasses.replace(sizes, labels=labels)
        return of_lr(lambda rows, seed: transfer.head(asked, seed).transfer(rows, layer=layer))

    def random_layer(rows: Tensor, seed: int) -> Tensor:
        return transfer.untrained_head(sizes, seed).transfer(rows, layer="hidden")

    def scores(rows: Tensor, seed: int) -> Tensor:
        return centroid_scores(rows, transfer.clustering(k, seed).centroids)

    note = {"nearest": "the paper's head (nearest labels)", "paired": "head on paired labels"}
    choices = [transfer.network.to_dict(), dataclasses.asdict(sizes)]
    seeded = partial(Row, seeded=True, choices=choices)
    return {
        "hr": Row("Baseline-HR", baseline_hr, seeded=False),
        "lr": Row("Baseline-LR", baseline_lr, seeded=False),
        sizes.labels: seeded(note[sizes.labels], head(sizes.labels, "output")),
        other: seeded(note[other], head(other, "output")),
        "hidden": seeded(f"its {n1} hidden activations", head(sizes.labels, "hidden")),
        "random": seeded(f"untrained random layer of {n1}", of_lr(random_layer)),
        "centroids": seeded(f"{k} closed-form centroid scores", of_lr(scores)),
        "pca": Row(f"PCA whitening to {k}", partial(pca_whitening, k), False, choices),
    }


def table_methods(transfer: Transfer, sizes: Sizes) -> dict[str, TableMethod]:
    """All rows of the table, by name: the paper's and the controls, and what the plug-in trains."""
    rows = paper_rows(transfer, sizes)
    plugin = {"ridge": METHODS["ridge"], "head": METHODS["prototypes"], "blocks": BLOCKS}
    return {name: row.method for name, row in rows.items()} | plugin


def baseline_hr(study: Study, view: Degradation, seed: int) -> Transferred:
    """Plain HR features."""
    train, test = (study.features(part, view).hr for part in PARTS)
    return Transferred(train, test, test)


def baseline_lr(study: Study, view: Degradation, seed: int) -> Transferred:
    """Plain LR features."""
    train, test = (study.features(part, view) for part in PARTS)
    return Transferred(train.lr, test.lr, test.hr)


def pca_whitening(components: int, study: Study, view: Degradation, seed: int) -> Transferred:
    """The first principal components of the LR training features, each of unit variance."""
    from sklearn.decomposition import PCA

    train, test = (study.features(part, view).lr.double().numpy() for part in PARTS)
    count = min(components, *train.shape)
    model = PCA(count, whiten=True, svd_solver="full").fit(train)
    found, tested = (torch.from_numpy(model.transform(part)).float() for part in (train, test))
    return Transferred(found, tested, in_place=False)
