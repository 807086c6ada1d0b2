"""Heads on features in memory: plain ones of whole images, or those that come through blocks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featxfer import (
    FEATURES_RECIPE,
    FeatureTransferHead,
    Recipe,
    diagnose,
    extract_features,
    kmeans,
)
from featxfer.evaluation.pairs import report_pairs
from featxfer.features.extract import check_readable
from featxfer.training.heads import features_task, labels_task
from featxfer_integrations.mechanism.attach import attached_at, gives_clusters
from featxfer_integrations.mechanism.fingerprint import backbone_at
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.stages.base import Judged, Stage, Task, Training
from featxfer_integrations.stages.maps import WHOLE, MapsStage


@dataclass(frozen=True)
class HeadRows:
    """Features `(n, d)` that a head is trained on, or judged by.

    Args:
        hr: plain, of HR views.
        lr: plain, of each LR view.
        wanted: HR features that the head is trained towards.
        given: what it gets, an array for each of the views.
        hr_given: what it gets of HR views; `hr` where nothing is attached before it.
    """

    hr: Tensor
    lr: list[Tensor]
    wanted: Tensor
    given: list[Tensor]
    hr_given: Tensor


class HeadStage(Stage):
    """A head towards the HR features of the same images, or on the paper's pseudo-labels.

    Args:
        task: of the fit.
        site: of the head.
    """

    what = "the head"
    usual = FEATURES_RECIPE

    def __init__(self, task: Task, site: Site) -> None:
        super().__init__(task, [site])
        self.site, self.attached = site, attached_at(task.model, site)
        self.labelled = gives_clusters(self.attached)
        self.recipe = task.options.recipe or (Recipe() if self.labelled else self.usual)

    @abstractmethod
    def rows(self) -> tuple[HeadRows, HeadRows]:
        """Features to train on, and those to judge by."""

    def training(self) -> Training:
        """Takes features and clusters them; the head gets its statistics and centroids."""
        task = self.task
        self.train, self.test = self.rows()
        rows = self.train
        config = {} if self.attached is None else self.attached.config
        k = config["clusters"] if self.labelled else task.options.k(len(rows.hr))
        head = task.new(self.site, {}, in_features=rows.hr.shape[1], clusters=k)
        assert isinstance(head, FeatureTransferHead)
        self.head = self.modules[self.site.name] = head
        if self.labelled:
            self.clustering = kmeans(head.scale(rows.hr), k, seed=task.seed)
            lr, hr = torch.cat(rows.given), rows.hr.repeat(len(rows.given), 1)
            head.set_input_statistics(lr)
            return Training(head, *labels_task(head, hr, lr, self.clustering))
        self.clustering = kmeans(F.normalize(rows.hr, dim=1), k, seed=task.seed)
        pairs = features_task(
            head, rows.wanted, rows.given, self.clustering, objective=task.objective
        )
        return Training(head, *pairs)

    def judge(self) -> Judged:
        """What the head does to held-out images, and the pseudo-labels of those trained on."""
        head, rows, centroids = self.head, self.test, self.clustering.centroids
        hr = head.scale(self.train.hr)
        found = [diagnose(hr, head.scale(lr), centroids) for lr in self.train.lr]
        if self.labelled or not len(rows.hr):
            return Judged([], found)
        hr_after = head.transfer(rows.hr_given)
        reports = [
            report_pairs(rows.hr, before, head.transfer(given), hr_after, centroids)
            for before, given in zip(rows.lr, rows.given, strict=False)
        ]
        return Judged(reports, found)


class PooledStage(HeadStage):
    """A head on features of whole images.

    Args:
        task: of the fit.
        site: of the head.
        after: blocks that have been trained before, whose features it gets; none for plain ones.
    """

    def __init__(self, task: Task, site: Site, after: MapsStage | None = None) -> None:
        super().__init__(task, site)
        self.after = after
        asked = task.options.precision
        self.details = {"precision": "fp32" if asked == "auto" else asked}
        if after is not None:
            names = [block.name for block in after.sites]
            self.details = {"precision": after.suffix.precision, "after": names}

    @property
    def described(self) -> list[Any]:
        """The sizes of what is attached, precision and what it is trained behind."""
        config = None if self.attached is None else self.attached.config
        return [config, self.details, None if self.after is None else self.after.key()]

    def rows(self) -> tuple[HeadRows, HeadRows]:
        """Plain features from the cache, or those through the blocks."""
        return self._plain() if self.after is None else self._through(self.after)

    def _plain(self) -> tuple[HeadRows, HeadRows]:
        """Of the images that could be read in all views."""
        task, options = self.task, self.task.options
        backbone = backbone_at(task.host, task.model, self.site, task.preprocessing)
        features = [
            extract_features(
                backbone,
                task.images,
                view,  # type: ignore[arg-type]
                task.cache / "features",
                precision=self.details["precision"],
                on_error=options.on_error,
                batch_size=options.batch_size or 64,
            )
            for view in task.views
        ]
        self.skipped = {n: reason for part in features for n, reason in part.skipped.items()}
        check_readable("images", self.skipped, len(task.images), options.on_error)
        features = [part.without(self.skipped) for part in features]
        hr, lr = features[0].hr, [part.lr for part in features]
        split = task.split(len(hr))
        self.images = len(split[0])
        parts = [(hr[rows], [part[rows] for part in lr]) for rows in split]
        train, test = (HeadRows(high, low, high, low, high) for high, low in parts)
        return train, test

    def _through(self, after: MapsStage) -> tuple[HeadRows, HeadRows]:
        """Of images and mirror images that come through the blocks; to judge by, of images."""
        name, self.skipped, self.images = self.site.name, after.skipped, after.images
        hr, lr = [part[name] for part in after.hr[:WHOLE]], [part[name] for part in after.lr]
        views = [[part[name] for part in view] for view in [*after.lr_through, after.hr_through]]
        train, test = after.train, after.test
        given = [torch.cat([part[train] for part in view]) for view in views]
        judged = [view[0][test] for view in views]
        return (
            HeadRows(
                hr[0][train],
                [part[train] for part in lr],
                torch.cat([part[train] for part in hr]),
                given,
                given[-1],
            ),
            HeadRows(hr[0][test], [p[test] for p in lr], hr[0][test], judged, judged[-1]),
        )
