"""What the heads of torchvision's detectors see: maps of the pyramid, features of boxes.

R-CNNs: the detector's own proposals on the HR image, pooled from the maps of every view. Detectors
without proposals: positions of their pyramid. No labels are looked at: half of what is drawn is
balanced by the classes that the detector itself predicts on the HR image, the other half is drawn
by chance, so that background stays as common as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList

from featxfer import Preprocessing
from featxfer_integrations.hosts.batch import Batch, Sample, Sampler, half_balanced
from featxfer_integrations.hosts.pyramids import PyramidHost
from featxfer_integrations.mechanism.attach import host_parameter, is_attached, transfer_disabled
from featxfer_integrations.mechanism.capture import captured
from featxfer_integrations.mechanism.shown import Shown
from featxfer_integrations.mechanism.site import AttachError, Site

OBJECT = 0.05
"""Scores from here on are of objects; below, a position is background."""

TOWERS = {"boxes_class": "classification_head", "boxes_regression": "regression_head"}
"""Modules of detectors without proposals by the beginning of their sites' names."""


class DetectorHost(PyramidHost):
    """How torchvision's detectors are run for what their heads see; a subclass says the sites."""

    def batch(self, model: Any, images: Sequence[Tensor], preprocessing: Preprocessing) -> Batch:
        """Images as the detector's own transform gives them to its backbone."""
        like = host_parameter(model)
        assert like is not None
        pixels = [image.to(like.device, like.dtype) / 255 for image in images]
        batch, _ = model.transform(pixels)
        return Batch(batch.tensors, batch.image_sizes)

    def show(self, model: Any, batch: Batch) -> Shown:
        """The pyramid's maps, and the features of the batch's boxes, if there are any."""
        levels = levels_of(model, batch.images)
        if not sum(map(len, batch.boxes)):
            return Shown(levels, {})
        with torch.autocast(batch.images.device.type, enabled=False):
            pooled = model.roi_heads.box_roi_pool(levels, list(batch.boxes), list(batch.sizes))
            return Shown(levels, {"boxes": model.roi_heads.box_head(pooled).flatten(1)})

    def proposes(self, model: Any) -> bool:
        """R-CNNs do."""
        return isinstance(model, GeneralizedRCNN)

    def propose(
        self, model: Any, batch: Batch, shown: Shown, count: int, chance: torch.Generator
    ) -> Tensor:
        """Boxes of those that an R-CNN proposes, half of them balanced by their classes."""
        images = ImageList(batch.images, list(batch.sizes))
        proposed, _ = model.rpn(images, dict(shown.maps))
        boxes: Tensor = proposed[0]
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
        if not len(boxes):
            return boxes
        logits = _logits(model, shown.maps, [boxes], batch.sizes)
        scores, labels = logits.softmax(1).max(1)
        chosen = half_balanced(labels.cpu(), scores.cpu(), count, chance)
        return boxes[chosen.to(boxes.device)]

    def sampler(self, model: Any, sites: Sequence[Site], per_image: int) -> Sampler:
        """Boxes of R-CNNs, positions of others; where the branch has levels, so many of each."""
        sample = self._boxes if self.proposes(model) else self._positions
        return partial(sample, model, list(sites), per_image)

    @torch.no_grad()
    def _boxes(
        self,
        model: Any,
        sites: Sequence[Site],
        per_image: int,
        views: Sequence[Tensor],
        chance: torch.Generator,
    ) -> dict[str, Sample]:
        """The first view is HR, seen without blocks, and tells the boxes."""
        count, batch = len(views), self.batch(model, views, self.preprocessing(model))
        levels = levels_of_views(model, batch.images)
        first = Shown({name: level[:1] for name, level in levels.items()}, {})
        boxes = self.propose(model, batch.part(slice(1)), first, per_image, chance)
        if not len(boxes):
            nothing = torch.empty(0, dtype=torch.int64, device="cpu")
            return {site.name: Sample([torch.empty(0, 0)] * count, nothing) for site in sites}
        with captured(model, sites) as taken:
            logits = _logits(model, levels, [boxes] * count, batch.sizes)
        labels = logits[: len(boxes)].argmax(1).cpu()
        found = {}
        for site in sites:
            (rows,) = taken[site.name][:1] or [logits[:0, :0]]
            if len(taken[site.name]) != 1 or rows.ndim != 2 or len(rows) != len(logits):
                raise AttachError(f"site: {site.name!r} has no vector for each box")
            found[site.name] = Sample([part.cpu() for part in rows.chunk(count)], labels)
        return found

    @torch.no_grad()
    def _positions(
        self,
        model: Any,
        sites: Sequence[Site],
        per_image: int,
        views: Sequence[Tensor],
        chance: torch.Generator,
    ) -> dict[str, Sample]:
        """The first view is HR and tells the positions."""
        towers = self.sites(model, "boxes")
        batch = self.batch(model, views, self.preprocessing(model))
        levels = levels_of_views(model, batch.images)
        wanted = {site.name: site for site in [*towers, *sites]}
        with captured(model, list(wanted.values())) as taken:
            logits = model.head(list(levels.values()))["cls_logits"]
        likely = _likely(model, towers, logits[0], taken)
        samples: dict[str, Sample] = {}
        drawn: dict[str, Tensor] = {}
        for site in sites:
            level = next((site.name.removeprefix(t) for t in TOWERS if site.name.startswith(t)), "")
            level = level if level in likely else ""
            nothing = torch.empty(0, device="cpu")
            labels, scores = likely.get(level, (nothing, nothing))
            seen = taken[site.name]
            count = sum(part[0, 0].numel() for part in seen if part.ndim == 4)
            if not count or count != len(labels):
                raise AttachError(f"site: {site.name!r} has no vector for each position")
            rows = torch.cat([part.flatten(2) for part in seen], 2).mT
            if level not in drawn:
                drawn[level] = half_balanced(labels, scores, per_image, chance.clone_state())
            chosen = drawn[level]
            rows = rows[:, chosen.to(rows.device)].cpu()
            samples[site.name] = Sample(list(rows), labels[chosen])
        return samples


def levels_of(model: Any, images: Tensor) -> dict[str, Tensor]:
    """The maps of the backbone with its pyramid, by name, float32."""
    maps = model.backbone(images)
    named = {"0": maps} if isinstance(maps, Tensor) else maps
    return {name: level.float() for name, level in named.items()}


def levels_of_views(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Maps of several views; the first is seen without blocks, others with those there are."""
    if not is_attached(model):
        return levels_of(model, images)
    with transfer_disabled(model):
        first = levels_of(model, images[:1])
    others = levels_of(model, images[1:])
    return {name: torch.cat([level, others[name]]) for name, level in first.items()}


def _logits(
    model: Any,
    levels: Mapping[str, Tensor],
    boxes: list[Tensor],
    sizes: Sequence[tuple[int, int]],
) -> Tensor:
    """Class scores of boxes, of all images one after the other."""
    heads = model.roi_heads
    pooled = heads.box_roi_pool(dict(levels), boxes, list(sizes))
    found = heads.box_predictor(heads.box_head(pooled))
    logits: Tensor = found[0] if isinstance(found, tuple) else found
    return logits


def _likely(
    model: Any, towers: Sequence[Site], logits: Tensor, taken: Mapping[str, list[Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By level: of each position the likeliest class, 0 for background, and its score."""
    if hasattr(model.head.classification_head, "module_list"):
        likely = logits.softmax(1)[:, 1:]
    else:
        likely = logits.sigmoid()
    scores, labels = (part.cpu() for part in likely.max(1))
    start, found = 0, {}
    for site in towers:
        anchors = model.get_submodule(site.modules[0]).out_channels // logits.shape[1]
        positions = sum(part.shape[2] * part.shape[3] for part in taken[site.name])
        part = slice(start, start + anchors * positions)
        best, anchor = scores[part].reshape(positions, anchors).max(1)
        kinds = labels[part].reshape(positions, anchors).gather(1, anchor[:, None])[:, 0]
        level = site.name.removeprefix("boxes_class")
        found[level] = torch.where(best < OBJECT, 0, kinds + 1), best
        start += anchors * positions
    return found
