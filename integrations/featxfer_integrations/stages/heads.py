"""Heads on features in memory: plain ones of whole images, or those that come through blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
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
from featxfer.evaluation.pairs import HeldOutPairs, report_pairs
from featxfer.features.extract import check_readable
from featxfer.training.heads import features_task, labels_task
from featxfer.training.pseudo_labels import LabelDiagnostics
from featxfer_integrations.mechanism.attach import attached_at, gives_clusters
from featxfer_integrations.mechanism.fingerprint import backbone_at
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.stages.base import Stage, Task, Training
from featxfer_integrations.stages.maps import WHOLE, MapsStage


@dataclass(frozen=True)
class HeadRows:
    """Features `(n, d)` that a head is trained on, or judged by.

    Args:
        hr: plain, of HR views.
        lr: plain, of each LR view.
        wanted: HR features that the head is trained towards.
        given: what it gets, of each LR view; and of HR views, where something acts before it.
    """

    hr: Tensor
    lr: Sequence[Tensor]
    wanted: Tensor
    given: Sequence[Tensor]

    @property
    def hr_given(self) -> Tensor:
        """What it gets of HR views."""
        return self.given[-1] if len(self.given) > len(self.lr) else self.hr


class HeadStage(Stage):
    """A head towards the HR features of the same images, or on the paper's pseudo-labels."""

    what = "the head"

    def __init__(self, task: Task, site: Site, usual: Recipe) -> None:
        super().__init__(task, [site])
        self.site, attached = site, attached_at(task.model, site)
        self.config = None if attached is None else attached.config
        self.labelled = gives_clusters(attached)
        self.recipe = task.options.recipe or (Recipe() if self.labelled else usual)

    @abstractmethod
    def rows(self) -> tuple[HeadRows, HeadRows]:
        """Features to train on, and those to judge by."""

    def training(self) -> Training:
        """Takes features and clusters them; the head gets its statistics and centroids."""
        task = self.task
        self.train, self.test = self.rows()
        rows = self.train
        sizes = {} if self.labelled else {"clusters": task.options.k(len(rows.hr))}
        head = task.new(self.site, {}, in_features=rows.hr.shape[1], **sizes)
        assert isinstance(head, FeatureTransferHead)
        self.head = self.modules[self.site.name] = head
        scaled = head.scale(rows.hr) if self.labelled else F.normalize(rows.hr, dim=1)
        clusters = kmeans(scaled, head.config["clusters"], seed=task.seed)
        self.centroids = clusters.centroids
        if self.labelled:
            lr, hr = torch.cat(list(rows.given)), rows.hr.repeat(len(rows.given), 1)
            head.set_input_statistics(lr)
            return Training(head, *labels_task(head, hr, lr, clusters))
        goal = task.objective
        return Training(
            head, *features_task(head, rows.wanted, rows.given, clusters, objective=goal)
        )

    def judge(self) -> tuple[list[HeldOutPairs], list[LabelDiagnostics]]:
        """What the head does to held-out images, and the pseudo-labels of those trained on."""
        head, rows, centroids = self.head, self.test, self.centroids
        hr = head.scale(self.train.hr)
        found = [diagnose(hr, head.scale(lr), centroids) for lr in self.train.lr]
        if self.labelled or not len(rows.hr):
            return [], found
        hr_after = head.transfer(rows.hr_given)
        reports = [
            report_pairs(rows.hr, before, head.transfer(given), hr_after, centroids)
            for before, given in zip(rows.lr, rows.given, strict=False)
        ]
        return reports, found


class PooledStage(HeadStage):
    """A head on features of whole images, as they come through the blocks of `after`, if any."""

    def __init__(self, task: Task, site: Site, after: MapsStage | None = None) -> None:
        super().__init__(task, site, FEATURES_RECIPE)
        self.after = after
        asked = task.options.precision
        self.details = {"precision": "fp32" if asked == "auto" else asked}
        if after is not None:
            names = [block.name for block in after.sites]
            self.details = {"precision": after.network.precision, "after": names}

    @property
    def described(self) -> list[Any]:
        """The sizes of what is attached, precision and what it is trained behind."""
        return [self.config, self.details, None if self.after is None else self.after.key()]

    def rows(self) -> tuple[HeadRows, HeadRows]:
        """Plain features from the cache; or those through the blocks, of mirror images too."""
        after = self.after
        if after is None:
            return self._plain()
        self.skipped, self.images = after.skipped, after.images
        return self._through(after, after.train, WHOLE), self._through(after, after.test, 1)

    def _plain(self) -> tuple[HeadRows, HeadRows]:
        """Of the images that could be read in all views."""
        task = self.task
        backbone = backbone_at(task.host, task.model, self.site, task.preprocessing)
        options: dict[str, Any] = {"precision": self.details["precision"], **task.reading}
        features = [
            extract_features(backbone, task.images, view, task.cache / "features", **options)  # type: ignore[arg-type]
            for view in task.views
        ]
        self.skipped = {n: reason for part in features for n, reason in part.skipped.items()}
        check_readable("images", self.skipped, len(task.images), task.options.on_error)
        features = [part.without(self.skipped) for part in features]
        split = task.split(len(features[0].hr))
        self.images = len(split[0])
        parts = [(features[0].hr[rows], [part.lr[rows] for part in features]) for rows in split]
        train, test = (HeadRows(hr, lr, hr, lr) for hr, lr in parts)
        return train, test

    def _through(self, after: MapsStage, images: Tensor, variants: int) -> HeadRows:
        """Of some images and so many variants of each."""

        def rows(shown: Sequence[Any], count: int) -> Tensor:
            return torch.cat([part[self.site.name][images] for part in shown[:count]])

        lr = [rows([shown], 1) for shown in after.lr]
        given = [rows(view, variants) for view in after.through]
        return HeadRows(rows(after.hr, 1), lr, rows(after.hr, variants), given)
