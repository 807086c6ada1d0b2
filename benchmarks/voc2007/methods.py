"""The rows of the table: from the HR and LR features of a split to what the SVMs are trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from torch import Tensor
from tqdm import tqdm

from benchmarks.common.memo import hash_key
from benchmarks.common.method import Method
from benchmarks.common.ridge import ridge
from benchmarks.common.versions import versions
from benchmarks.voc2007.data import Data
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

Pair = tuple[Tensor, Tensor]
"""Features of the training rows and of the test rows."""


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
        precision: of the heads' training, that of the features.
    """

    def __init__(
        self,
        hr: Tensor,
        lr: Tensor,
        network: Network,
        heads: Path,
        identity: Any,
        card: tuple[str, str, Degradation],
        precision: str = "fp32",
    ) -> None:
        self.network, self.precision = network, precision
        self.hr, self.lr = self.scale(hr), self.scale(lr)
        self._heads, self._identity, self._card = heads, identity, card
        self._clusterings: dict[tuple[int, int], Clustering] = {}

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
                precision=self.precision,
                callback=lambda _: bar.update(),
            )
        details = {**key, "log": [dataclasses.asdict(epoch) for epoch in log]}
        name, sha256, degradation = self._card
        save_head(head, folder, Card(name, sha256, (degradation,), details))


def _is_finished(head: Path) -> bool:
    return (head / "card.json").is_file()


Row = Method[[int], Pair]
"""Of Table 1: from a seed to the features of the training and the test rows."""


def table_rows(data: Data, transfer: Transfer, sizes: Sizes) -> dict[str, Row]:
    """The paper's rows and the controls, by name; `sizes.labels` is what the head is taught by."""
    hr: Pair = (data.trainval.features.hr, data.test.features.hr)
    lr: Pair = (data.trainval.features.lr, data.test.features.lr)
    scaled = (transfer.lr, transfer.scale(lr[1]))
    other = "paired" if sizes.labels == "nearest" else "nearest"
    n1, k = sizes.hidden, sizes.clusters

    def through_head(labels: str, layer: str) -> Callable[[int], Pair]:
        def make(seed: int) -> Pair:
            head = transfer.head(dataclasses.replace(sizes, labels=labels), seed)
            return head.transfer(scaled[0], layer=layer), head.transfer(scaled[1], layer=layer)

        return make

    def random_layer(seed: int) -> Pair:
        head = transfer.untrained_head(sizes, seed)
        return head.transfer(scaled[0], layer="hidden"), head.transfer(scaled[1], layer="hidden")

    def closed_form(seed: int) -> Pair:
        centroids = transfer.clustering(k, seed).centroids
        return centroid_scores(scaled[0], centroids), centroid_scores(scaled[1], centroids)

    note = {"nearest": "the paper's head (nearest labels)", "paired": "head on paired labels"}
    return {
        "baseline-hr": Method(("Baseline-HR",), lambda _: hr, seeded=False),
        "baseline-lr": Method(("Baseline-LR",), lambda _: lr, seeded=False),
        sizes.labels: Method((note[sizes.labels],), through_head(sizes.labels, "output")),
        other: Method((note[other],), through_head(other, "output")),
        "hidden": Method((f"its {n1} hidden activations",), through_head(sizes.labels, "hidden")),
        "random": Method((f"untrained random layer of {n1}",), random_layer),
        "centroids": Method((f"{k} closed-form centroid scores",), closed_form),
        "ridge": Method(("ridge regression LR -> HR",), lambda _: ridge(lr, hr[0]), seeded=False),
        "pca": Method((f"PCA whitening to {k}",), lambda _: pca_whitening(lr, k), seeded=False),
    }


def pca_whitening(lr: Pair, components: int) -> Pair:
    """The first principal components of the LR training features, each of unit variance."""
    from sklearn.decomposition import PCA

    count = min(components, *lr[0].shape)
    model = PCA(count, whiten=True, svd_solver="full").fit(lr[0].double().numpy())
    train, test = (torch.from_numpy(model.transform(rows.double().numpy())).float() for rows in lr)
    return train, test
