"""Small detectors around EfficientNet-Lite0, and their training on HR images, with labels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from benchmarks.common.memo import hash_key
from benchmarks.common.versions import versions
from featxfer import BLOCK_RECIPE, EpochLog, Images, PseudoLabelTrainer, Recipe
from featxfer.evaluation.voc import ObjectBoxes
from featxfer.features.forward import bf16_is_fast
from featxfer.files import write_atomic
from featxfer_integrations import load_model

KINDS = ("faster-rcnn", "retinanet")
BACKBONE = "tf_efficientnet_lite0"
STAGES = (("blocks.2", 40), ("blocks.4", 112), ("blocks.6", 320))
"""The backbone's stages of 1/8, 1/16 and 1/32 of the image, and their channels."""

CHANNELS = 64
SHORT_SIDE = 240
"""Of the image as the detector sees it, pixels: half of what BCCD's photographs have."""

ANCHORS = ((16, 24), (32, 48), (64, 96))

TRAINING = replace(BLOCK_RECIPE, epochs=16, batch_size=4, learning_rate=4e-4)


class LitePyramid(nn.Module):
    """The stages of EfficientNet-Lite0 and a pyramid of `CHANNELS` on three of them."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        body: Any = load_model(BACKBONE, weights)
        self.stem = nn.Sequential(body.conv_stem, body.bn1)
        self.blocks = body.blocks
        self.neck = FeaturePyramidNetwork([channels for _, channels in STAGES], CHANNELS)
        self.out_channels = CHANNELS

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps by level."""
        maps, kept = self.stem(images), OrderedDict[str, Tensor]()
        for index, stage in enumerate(self.blocks):
            maps = stage(maps)
            if f"blocks.{index}" in dict(STAGES):
                kept[str(len(kept))] = maps
        levels: OrderedDict[str, Tensor] = self.neck(kept)
        return levels


def build(kind: str, classes: int, weights: str = "demo") -> nn.Module:
    """A detector of `classes` classes, in eval mode; new layers are as torch's seed has them."""
    pyramid = LitePyramid(weights)
    anchors = AnchorGenerator(ANCHORS, ((0.5, 1.0, 2.0),) * len(ANCHORS))
    options: dict[str, Any] = {
        "min_size": SHORT_SIDE,
        "max_size": 2 * SHORT_SIDE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    if kind == "retinanet":
        dense: nn.Module = RetinaNet(
            pyramid, classes + 1, anchor_generator=anchors, detections_per_img=100, **options
        )
        return dense.eval()
    model: nn.Module = FasterRCNN(
        pyramid,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
        box_head=TwoMLPHead(CHANNELS * 49, 256),
        box_predictor=FastRCNNPredictor(256, classes + 1),
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=250,
        rpn_post_nms_top_n_test=300,
        box_batch_size_per_image=128,
        **options,
    )
    return model.eval()


@dataclass(frozen=True)
class Batch:
    """HR images in [0, 1] and what is on them."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        targets = [{key: value.to(device) for key, value in part.items()} for part in self.targets]
        return Batch([image.to(device) for image in self.images], targets)


class _Losses(nn.Module):
    """A detector as a module from batches to the sum of its losses; batch norm stays as it is."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def train(self, mode: bool = True) -> _Losses:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, batch: Batch) -> Tensor:
        device = batch.images[0].device
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16_is_fast(device)):
            losses: dict[str, Tensor] = self.detector(batch.images, batch.targets)
        return torch.stack([loss.float() for loss in losses.values()]).sum()


class _AsItIs:
    """The loss is what the module gives."""

    def __call__(self, outputs: Tensor, targets: Batch) -> tuple[Tensor, Tensor]:
        return outputs, torch.zeros(())

    def check(self, outputs: Tensor, targets: Batch, rows: int) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class _Photographs:
    """Rows of a trainer: every image once an epoch, mirrored by chance, both ways."""

    images: Images
    objects: Sequence[ObjectBoxes]

    def order(self, generator: torch.Generator) -> Tensor:
        # a detector draws its anchors from torch's global generator
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        rows = torch.randperm(len(self.images), generator=generator)
        return 4 * rows + torch.randint(4, rows.shape, generator=generator)

    def take(self, indices: Tensor) -> tuple[Batch, Batch]:
        images, targets = [], []
        for row in indices.tolist():
            pixels = self.images.read(row // 4).float() / 255
            known = self.objects[row // 4]
            boxes = torch.from_numpy(known.boxes)
            height, width = pixels.shape[1:]
            if row % 2:
                pixels = pixels.flip(-1)
                boxes = torch.stack(
                    [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1
                )
            if row % 4 > 1:
                pixels = pixels.flip(-2)
                boxes = torch.stack(
                    [boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], 1
                )
            images.append(pixels)
            targets.append({"boxes": boxes, "labels": torch.from_numpy(known.labels) + 1})
        batch = Batch(images, targets)
        return batch, batch


def trained(
    kind: str,
    images: Images,
    objects: Sequence[ObjectBoxes],
    classes: Sequence[str],
    cache: Path,
    *,
    weights: str = "demo",
    recipe: Recipe = TRAINING,
    callback: Callable[[EpochLog], object] | None = None,
) -> nn.Module:
    """A detector trained on HR images, from the cache if it is there; goes on where it stopped.

    Args:
        kind: a name of `KINDS`.
        images: HR.
        objects: of each image; those that are difficult, or crowds, are not trained on.
        classes: their names.
        cache: folder of weights and checkpoints.
        weights: of the backbone, as `load_model` takes them.
        recipe: of the training.
        callback: called after each epoch.
    """
    torch.manual_seed(0)
    model = build(kind, len(classes), weights)
    objects = [_easy(part) for part in objects]
    known = [[part.boxes.tolist(), part.labels.tolist()] for part in objects]
    shape = [STAGES, CHANNELS, SHORT_SIDE, ANCHORS]
    said = [kind, images.fingerprint, known, list(classes), weights, shape, recipe.to_dict()]
    name = hash_key({"trained": said, "versions": versions()})
    path = cache / "detectors" / f"{kind}-{name}.safetensors"
    if not path.is_file():
        trainer = PseudoLabelTrainer(_Losses(model), recipe, objective=_AsItIs())
        checkpoint = path.with_suffix(".checkpoint")
        trainer.fit_rows(_Photographs(images, objects), checkpoint=checkpoint, callback=callback)
        write_atomic(path, safetensors.torch.save(dict(model.state_dict())))
        checkpoint.unlink()
    model.load_state_dict(safetensors.torch.load(path.read_bytes()))
    return model.eval()


def _easy(known: ObjectBoxes) -> ObjectBoxes:
    easy = ~known.difficult
    return ObjectBoxes(known.boxes[easy], known.labels[easy], known.difficult[easy])
