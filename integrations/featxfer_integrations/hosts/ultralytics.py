"""Ultralytics' detectors, YOLOv3 to the newest: what is in a `YOLO`, and what its head sees.

A detector is a list of layers, `model.model`, of which the first `len(model.yaml["backbone"])` are
its backbone and the last one is its head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.data.augment import LetterBox
from ultralytics.engine.model import Model
from ultralytics.nn.tasks import BaseModel, ClassificationModel, DepthModel, RTDETRDetectionModel

from featxfer import Preprocessing, ScaledDegradation
from featxfer_integrations.hosts.base import Host
from featxfer_integrations.hosts.batch import Batch
from featxfer_integrations.hosts.images import black_image
from featxfer_integrations.hosts.pyramids import REDUCTIONS
from featxfer_integrations.hosts.resolutions import ends, reductions
from featxfer_integrations.mechanism.attach import host_device, is_attached
from featxfer_integrations.mechanism.capture import in_dtype, watched
from featxfer_integrations.mechanism.shown import Shown
from featxfer_integrations.mechanism.site import AttachError, Site

TRIED_SIZE = 128
"""Side of the image that a model is tried on, in pixels: all of them take it."""

LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue in the greyscale that a model of one channel is given."""


class Ultralytics(Host):
    """What holds of all of them; a subclass says where the head is and what LR has to match."""

    tested = "ultralytics 8.4."
    usual_size = 640
    """Side of images, pixels, where a model does not keep its arguments."""

    reductions: tuple[int, ...] = REDUCTIONS
    """Blocks go where the backbone's last maps of so many times less than the image's size end."""

    def unwrapped(self, model: Any) -> nn.Module:
        """The model in a `YOLO`, whose predictor is renewed: it runs a copy of the model.

        `YOLO.train` builds another model; it raises `AttachError` while something is attached.
        """
        if not isinstance(model, Model):
            return super().unwrapped(model)
        if not isinstance(model.model, nn.Module):
            raise AttachError(
                f"model: got a {type(model).__name__} of {str(model.model)!r}, wanted one of a "
                "PyTorch model (.pt or .yaml)"
            )
        model.predictor, model.train = None, partial(_train, model)
        return model.model

    def model_name(self, model: Any) -> str:
        """The name of the file that it was made from."""
        file = model.yaml.get("yaml_file", type(model).__name__)
        return f"ultralytics/{Path(file).stem}"

    def preprocessing(self, model: Any) -> Preprocessing:
        """None but values from 0 to 1."""
        return Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), None)

    def input_size(self, model: Any) -> int:
        """The size that the model was trained at, a multiple of its stride."""
        said = dict(getattr(model, "args", ())).get("imgsz") or self.usual_size
        side, stride = said if isinstance(said, int) else max(said), _stride(model)
        return math.ceil(side / stride) * stride

    def image(self, model: Any) -> Tensor:
        """A black image."""
        return black_image(model, TRIED_SIZE, TRIED_SIZE)

    def after(self, model: Any, name: str, kind: str | None = None) -> Site:
        """After a module; `AttachError` in one that `fuse`, as predictors call it, makes anew."""
        modules, parts = dict(model.named_modules()), name.split(".")
        for count in range(1, len(parts)):
            around = ".".join(parts[:count])
            if hasattr(modules.get(around), "forward_fuse"):
                raise AttachError(
                    f"site: {name!r} is in {around!r}, of which fuse() of {type(model).__name__} "
                    f"makes another module; wanted {around!r}"
                )
        return super().after(model, name, kind)

    def stages(self, model: Any) -> list[str]:
        """The backbone's last layer of each resolution, from the highest one."""
        return list(self._ends(model).values())

    def blocks(self, model: Any) -> list[str]:
        """The backbone's last layers of the `reductions`."""
        last = self._ends(model)
        return [last[reduction] for reduction in self.reductions if reduction in last]

    def _ends(self, model: Any) -> dict[int, str]:
        layers = [f"model.{index}" for index in range(len(model.yaml["backbone"]))]
        found = reductions(self, model, layers)  # a layer that pads is no resolution of its own
        return ends({name: times for name, times in found.items() if TRIED_SIZE % times == 0})


class UltralyticsDetection(Ultralytics):
    """Those whose head sees maps: boxes, masks, key points, oriented boxes, depth."""

    name = "ultralytics"
    site = "backbone"
    degradation = ScaledDegradation
    detects = True

    def owns(self, model: nn.Module) -> bool:
        """Whether it is one of them, or a `YOLO` around any model."""
        return isinstance(model, Model | BaseModel) and not isinstance(model, ClassificationModel)

    def preprocessing(self, model: Any) -> Preprocessing:
        """None but values from 0 to 1; `AttachError` for other than RGB or greyscale images."""
        channels = model.yaml.get("channels", 3)
        if channels not in (1, 3):
            raise AttachError(f"model: it takes images of {channels} channels, wanted 1 or 3")
        return super().preprocessing(model)

    def after(self, model: Any, name: str, kind: str | None = None) -> Site:
        """After a module, always a block; what is before the head is found without running that."""
        run = None if _in_head(model, name) else head_input
        return replace(super().after(model, name, kind="block"), run=run)

    def behind(self, model: Any, site: Site) -> tuple[str, ...]:
        """The head, for what is before it."""
        if any(_in_head(model, name) for name in site.modules):
            return super().behind(model, site)
        return (_head_name(model),)

    def batch(self, model: Any, images: Sequence[Tensor], preprocessing: Preprocessing) -> Batch:
        """Images as a `YOLO` resizes and pads them."""
        fill = isinstance(model, RTDETRDetectionModel | DepthModel)
        alike = len({image.shape for image in images}) == 1
        fit = LetterBox(
            self.input_size(model),
            auto=alike and not fill,
            scale_fill=fill,
            stride=_stride(model),
        )
        arrays = [fit(image=image.movedim(0, -1).cpu().numpy()) for image in images]
        pixels = torch.stack([torch.from_numpy(array).movedim(-1, 0) for array in arrays])
        batch = preprocessing(pixels.to(host_device(model)))
        if model.yaml.get("channels") == 1:
            batch = (batch * batch.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        return Batch(in_dtype(model, batch))

    def show(self, model: Any, batch: Batch) -> Shown:
        """The maps that come to the head."""
        found = head_input(model, batch.images)
        return Shown({str(level): maps.float() for level, maps in enumerate(found)}, {})


HOST = UltralyticsDetection()


class _HeadReached(Exception):  # noqa: N818
    """The head would run now."""


def head_input(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps that come to the head, `(n, c, h, w)` each; the model runs no further."""
    found: list[Tensor] = []

    def stop(_: str, args: Any) -> None:
        found.extend(part for part in args[0] if part.ndim == 4)  # YOLOE adds what is asked for
        raise _HeadReached

    with watched(model, [_head_name(model)], before=stop), suppress(_HeadReached):
        model(images)
    return found


def _head_name(model: Any) -> str:
    return f"model.{len(model.model) - 1}"


def _in_head(model: Any, name: str) -> bool:
    return f"{name}.".startswith(f"{_head_name(model)}.")


def _stride(model: Any) -> int:
    """What sides of images are multiples of."""
    return max(int(model.stride.max()), 32)


def _train(yolo: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the `train` of a `YOLO` to whose model something was attached."""
    if is_attached(yolo.model):
        raise AttachError(
            f"train: {type(yolo).__name__}.train builds another model, without what is attached; "
            "detach_transfer first; what is attached is trained by fit_transfer"
        )
    return type(yolo).train(yolo, *args, **kwargs)
