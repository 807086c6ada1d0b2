"""The devkit and its features: what every row of the table is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.voc2007.options import Options
from benchmarks.voc2007.sample_devkit import render_sample
from featxfer import PROTOCOLS, Backbone, Features, VOCDevkit, extract_features
from featxfer.evaluation.protocols import check_classes
from featxfer.evaluation.voc import Labels


@dataclass(frozen=True)
class Split:
    """Features `(n, d)` of both views and labels `(n, classes)` of the same images."""

    features: Features
    labels: Labels


@dataclass(frozen=True)
class Data:
    """Both splits of a devkit, by one backbone and one degradation."""

    devkit: VOCDevkit
    synthetic: bool
    trainval: Split
    test: Split

    def describe(self) -> dict[str, Any]:
        """Counts, classes and images left out, as JSON types."""
        splits = {"trainval": self.trainval, "test": self.test}
        return {
            "synthetic": self.synthetic,
            "classes": list(self.devkit.classes),
            "images": {name: len(split.features.ids) for name, split in splits.items()},
            "skipped": {name: split.features.skipped for name, split in splits.items()},
            "width": self.trainval.features.hr.shape[1],
            "feature_keys": {name: split.features.keys for name, split in splits.items()},
        }


def open_devkit(options: Options) -> VOCDevkit:
    """The devkit at the root that was given, or the rendered sample."""
    if options.root is not None:
        return VOCDevkit(options.root)
    trainval, test = options.sample or (500, 400)
    folder = options.cache / f"sample-{trainval}-{test}"
    with tqdm(total=trainval + test, desc="rendering the sample", unit="img", disable=None) as bar:
        render_sample(folder, trainval=trainval, test=test, progress=lambda done, _: _to(bar, done))
    return VOCDevkit(folder)


def load_data(options: Options, devkit: VOCDevkit, backbone: Backbone) -> Data:
    """Features of both splits, from the cache as far as it has them."""
    splits = [_load_split(options, devkit, backbone, name) for name in ("trainval", "test")]
    return Data(devkit, options.root is None, splits[0], splits[1])


def check_devkit(options: Options, devkit: VOCDevkit) -> None:
    """Raises what labels, missing images and too many clusters would raise after the long work."""
    labels = {}
    for split in ("trainval", "test"):
        devkit.images(split)
        labels[split] = devkit.labels(split)
    for protocol in options.protocols:
        check_classes(labels["trainval"], PROTOCOLS[protocol], devkit.classes)
    count = len(labels["trainval"])
    for k in options.cluster_counts:
        if k > count:
            raise ValueError(
                f"clusters: got {k} for {count} trainval images, wanted at most {count}"
            )


def _load_split(options: Options, devkit: VOCDevkit, backbone: Backbone, split: str) -> Split:
    labels = devkit.labels(split)
    images = devkit.images(split)
    features = extract_features(
        backbone,
        images,
        options.degradation,
        options.cache / "features",
        precision=options.precision,
        compile=options.compile,
        on_error=options.on_error,
    )
    kept = set(features.ids)
    return Split(features, labels[np.array([name in kept for name in images.ids])])


def _to(bar: tqdm[Any], done: int) -> None:
    bar.update(done - bar.n)
