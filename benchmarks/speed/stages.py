"""The stages of the main job against what a user would write without featxfer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from benchmarks.common.markdown import entry, nested, to_markdown
from benchmarks.speed.pairs import Way, quartiles, time_pairs
from featxfer import (
    PROTOCOLS,
    Backbone,
    Degradation,
    FeatureTransferHead,
    Recipe,
    VOCDevkit,
    assign,
    extract_features,
    fit_head,
    kmeans,
    open_images,
    pseudo_labels,
    train_svms,
)
from featxfer.evaluation.svm import LinearSVMs, average_precisions
from featxfer.evaluation.voc import Labels
from featxfer.modules.scaling import scale_features

Row = dict[str, Any]

ARITHMETICS = (("fp32", "off"), ("fp32", "on"), ("bf16", "off"), ("bf16", "on"))
"""`precision` and `compile` of `extract_features`."""


class Plain(Dataset[Tensor]):
    """One view of a devkit's images, as most people write it."""

    def __init__(self, paths: Sequence[Path], backbone: Backbone, view: Degradation, lr: bool):
        size, bicubic = view.hr_size, v2.InterpolationMode.BICUBIC
        small = [v2.Resize((view.lr_size, view.lr_size), bicubic)] if lr else []
        prepare = backbone.preprocessing
        self.paths = paths
        self.transform = v2.Compose(
            [
                *small,
                v2.Resize((size, size), bicubic),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(prepare.mean, prepare.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        pixels: Tensor = self.transform(Image.open(self.paths[index]).convert("RGB"))
        return pixels


@torch.no_grad()
def plain_loop(
    backbone: Backbone, paths: Sequence[Path], view: Degradation, workers: int
) -> dict[str, Tensor]:
    """Both views of image files, one after the other, by a DataLoader."""
    model, found = backbone.module.eval(), {}
    for name in ("hr", "lr"):
        dataset = Plain(paths, backbone, view, name == "lr")
        loader = DataLoader(dataset, batch_size=64, num_workers=workers)
        found[name] = torch.cat([model(batch) for batch in loader])
    return found


def measure_extraction(
    backbone: Backbone, paths: Sequence[Path], cache: Path, pairs: int, workers: int
) -> Iterator[Row]:
    """Both views of files into a store, in each arithmetic, against `plain_loop`.

    A compilation is warmed up, not timed.
    """
    images, view, numbers = open_images(list(paths)), Degradation(), itertools.count()

    def ours(precision: str, compiled: str) -> None:
        fresh = cache / str(next(numbers))
        extract_features(backbone, images, view, fresh, precision=precision, compile=compiled)

    plain = Way(lambda: None, lambda: plain_loop(backbone, paths, view, workers))
    for precision, compiled in ARITHMETICS:
        name = precision + (", compiled" if compiled == "on" else "")
        way = Way(lambda: None, partial(ours, precision, compiled))
        yield {"what": f"extraction, {name}", **time_pairs(name, way, plain, pairs)}


def measure_map(backbone: Backbone, devkit: VOCDevkit, cache: Path) -> Iterator[Row]:
    """MAP of SVMs on HR and LR features in each arithmetic, against float32."""
    labels = {split: devkit.labels(split) for split in ("trainval", "test")}
    reference: dict[str, float] = {}
    for precision, compiled in ARITHMETICS:
        name = precision + (", compiled" if compiled == "on" else "")
        taken = {
            split: extract_features(
                backbone,
                devkit.images(split),
                Degradation(),
                cache,
                precision=precision,
                compile=compiled,
            )
            for split in labels
        }
        row: Row = {"what": name}
        for view in ("hr", "lr"):
            train, test = (getattr(taken[split], view) for split in ("trainval", "test"))
            svms = train_svms(train, labels["trainval"], PROTOCOLS["vissl"], solver="batched")
            value = _map(svms, test, labels["test"])
            reference.setdefault(view, value)
            row |= {f"{view} mAP": value, f"{view} apart": value - reference[view]}
        yield row


def _map(svms: LinearSVMs, features: Tensor, labels: Labels) -> float:
    """Mean average precision in %."""
    return 100 * float(np.mean(average_precisions(svms.decisions(features), labels)))


def made_features(
    rows: int, width: int, classes: int, *, noise: float = 3.0
) -> tuple[Tensor, Labels]:
    """Features like those of a pooled layer, >= 0, of low rank and noise, and labels; seed 0.

    SVMs tell classes without error at noise 3 and with about 90% mAP at 20, of 5,011 x 2,048.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = torch.rand(rows, classes, generator=generator) < 1.5 / classes
    kinds[torch.arange(rows), torch.randint(classes, (rows,), generator=generator)] = True
    directions = torch.randn(classes + 40, width, generator=generator)
    others = torch.randn(rows, 40, generator=generator)
    made = torch.cat([2 * kinds.float(), others], 1) @ directions
    made = (made + noise * torch.randn(rows, width, generator=generator)).clamp(min=0) / 8
    return made, np.where(kinds.numpy(), 1, -1).astype(np.int8)


def measure_svms(rows: int, width: int, pairs: int, jobs: int) -> Iterator[Row]:
    """Every class, value of C and fold of VISSL's protocol: batched, against `LinearSVC`.

    The other half of as many rows again judges.
    """
    features, labels = made_features(2 * rows, width, 20, noise=20.0)
    found: dict[str, LinearSVMs] = {}

    def train(solver: str) -> None:
        found[solver] = train_svms(
            features[:rows],
            labels[:rows],
            PROTOCOLS["vissl"],
            solver=solver,
            jobs=jobs if solver == "liblinear" else None,
        )

    ours, theirs = (Way(lambda: None, partial(train, name)) for name in ("batched", "liblinear"))
    timed = time_pairs("SVMs", ours, theirs, pairs, warm_up=pairs > 1)
    maps = {solver: _map(svms, features[rows:], labels[rows:]) for solver, svms in found.items()}
    same = sum(a == b for a, b in zip(*(svms.costs for svms in found.values()), strict=True))
    yield {
        "what": f"{found['batched'].fits} SVMs on {rows:,} x {width:,}",
        **timed,
        "mAP": maps["batched"],
        "mAP apart": maps["batched"] - maps["liblinear"],
        "classes with the same C": same,
    }


def measure_kmeans(rows: int, width: int, pairs: int) -> Iterator[Row]:
    """100 clusters by faiss against scikit-learn, as many iterations and starts at the most."""
    features = scale_features(made_features(rows, width, 20)[0], "l2")
    found: dict[str, float] = {}

    def cluster(backend: str) -> None:
        found[backend] = kmeans(features, 100, seed=0, backend=backend).inertia

    ours, theirs = (Way(lambda: None, partial(cluster, name)) for name in ("faiss", "sklearn"))
    timed = time_pairs("k-means", ours, theirs, pairs)
    yield {"what": f"k-means of {rows:,} x {width:,}", **timed, "inertia": found}


def measure_samples(rows: int, width: int) -> Iterator[Row]:
    """100 clusters of a sample, of 64, 256 and 1,024 rows a cluster, and of all rows.

    Inertia is the mean squared distance of all rows to the nearest centroid, over that of all's.
    """
    features = made_features(rows, width, 20)[0]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    found = []
    for count in (rows, *(size for size in (102_400, 25_600, 6_400) if size < rows)):
        start = time.perf_counter()
        centroids = kmeans(features[order[:count]], 100, seed=0).centroids
        seconds = time.perf_counter() - start
        nearest = centroids[assign(features, centroids)]
        inertia = float((features - nearest).square().sum(1).mean())
        found.append({"rows": count, "seconds": seconds, "inertia": inertia})
    for row in found:
        yield {**row, "inertia": row["inertia"] / found[0]["inertia"]}


def samples_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a sample."""
    columns = [
        entry("clustered rows", "rows", ","),
        entry("k-means, s", "seconds", ".1f"),
        entry("inertia of all rows", "inertia", ".4f"),
    ]
    return to_markdown(rows, columns)


def loader_loop(head: nn.Module, rows: Tensor, labels: Tensor, recipe: Recipe) -> None:
    """The same training as most people write it."""
    loader = DataLoader(TensorDataset(rows, labels), recipe.batch_size, shuffle=True)
    optimizer = torch.optim.SGD(
        head.parameters(),
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    for _ in range(recipe.epochs):
        for batch, wanted in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(batch), wanted).backward()
            optimizer.step()


def measure_heads(rows: int, width: int, hidden: int, pairs: int) -> Iterator[Row]:
    """The paper's head, three epochs, in each precision, against a DataLoader in float32."""
    features = scale_features(made_features(rows, width, 20)[0], "l2")
    clustering = kmeans(features, 100, seed=0)
    labels = pseudo_labels(features, features, clustering.centroids, "nearest")
    recipe = Recipe(epochs=3)
    make = partial(FeatureTransferHead, width, 100, hidden, output="clusters")
    losses: dict[str, float] = {}

    def train(precision: str) -> None:
        head = make()
        log = fit_head(head, features, features, clustering, recipe=recipe, precision=precision)
        losses[precision] = log[-1].loss

    theirs = Way(lambda: None, lambda: loader_loop(make().train(), features, labels, recipe))
    for precision in ("fp32", "bf16"):
        timed = time_pairs("heads", Way(lambda: None, partial(train, precision)), theirs, pairs)
        what = f"a head of {hidden:,} hidden on {rows:,} x {width:,}, {precision}"
        yield {"what": what, **timed, "last loss": losses[precision]}


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a row: ours, theirs, and how many times sooner ours is."""
    return to_markdown(
        rows,
        [
            entry("", "what"),
            entry("ours, s", "first_ms", ".2f", 0.001),
            entry("theirs, s", "second_ms", ".2f", 0.001),
            entry("times sooner", "ratio", ".2f"),
            quartiles(".2f"),
            entry("pairs", "pairs"),
            ("besides", _besides),
        ],
    )


def _besides(row: Mapping[str, Any]) -> str:
    return "; ".join(f"{n} {nested(v, '.4g')}" for n, v in row.items() if n not in _TIMED)


def map_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line an arithmetic: mAP, and how far it is from float32's, in points."""
    headings = ("HR mAP, %", "apart", "LR mAP, %", "apart")
    names = ("hr mAP", "hr apart", "lr mAP", "lr apart")
    figures = (entry(*named, ".2f") for named in zip(headings, names, strict=True))
    return to_markdown(rows, [entry("", "what"), *figures])


_TIMED = ("what", "first_ms", "second_ms", "ratio", "ratio_quartiles", "pairs")
