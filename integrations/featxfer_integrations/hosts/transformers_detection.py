"""transformers' detectors: DETR and its kin, of which blocks in the backbone are trained.

What LR images have to match are the maps that enter the encoder, behind the projections that make
them of one width: a projection keeps of the backbone's channels what the encoder looks at, and
gives all levels one scale. Detectors without such projections show what their backbone returns,
YOLOS its last tokens. Queries of the decoder are not matched besides.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING, PreTrainedModel
from transformers.utils import ModelOutput

from featxfer import Preprocessing
from featxfer_integrations.hosts.batch import Batch
from featxfer_integrations.hosts.images import input_channels
from featxfer_integrations.hosts.pyramids import PyramidHost
from featxfer_integrations.hosts.transformers import preprocessing_of, processor_of
from featxfer_integrations.mechanism.attach import host_device
from featxfer_integrations.mechanism.capture import in_dtype
from featxfer_integrations.mechanism.shown import Shown
from featxfer_integrations.mechanism.site import AttachError, Site

BACKBONES = ("backbone", "conv_encoder")
"""Last part of the name of the module that makes maps of images."""

PROJECTIONS = ("input_projection", "input_proj", "encoder_input_proj")
"""Names, beside the backbone, of what makes its maps the encoder's."""

INPUT_SIZE = 256
"""Side of the image that a model is tried on, in pixels, where its backbone says none."""


@dataclass(frozen=True)
class Processed(Preprocessing):
    """With all that the image processor does, as JSON: sizes are told by nothing else."""

    processor: str = ""


def backbone_path(model: Any) -> str:
    """Name of the part that makes maps of images, "" without one.

    Of YOLOS it is the whole transformer, whose tokens are detections. A text detector's backbone is
    none: it is transformers' own, which says its `out_features`, and no boxes come of its maps.
    """
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules()
    for name, module in modules:
        if name.rpartition(".")[2] in BACKBONES and not hasattr(module, "out_features"):
            return name
    whole: str = model.base_model_prefix
    return whole if hasattr(model.config, "num_detection_tokens") and hasattr(model, whole) else ""


def run_backbone(model: Any, images: Tensor) -> list[Tensor]:
    """The maps that the backbone returns of images `(n, c, h, w)`, from the highest resolution."""
    backbone = model.get_submodule(backbone_path(model))
    masks = {}
    if "pixel_mask" in inspect.signature(backbone.forward).parameters:
        masks["pixel_mask"] = torch.ones_like(images[:, 0])
    return _maps(backbone(images, **masks))


def _maps(found: Any) -> list[Tensor]:
    """Maps among what a backbone returns: with a mask each, or with their positions besides."""
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, ModelOutput):
        found = [found.last_hidden_state]
    levels = found[:1] if isinstance(found, tuple) else found
    return [maps for level in levels for maps in _maps(level)]


class TransformersDetection(PyramidHost):
    """Models whose configuration transformers maps to an object detector, with a backbone."""

    name = "transformers detection"
    tested = "transformers 5."
    run_backbone = staticmethod(run_backbone)

    def owns(self, model: nn.Module) -> bool:
        """Whether its configuration is a detector's, and a part of it makes maps of images."""
        return (
            isinstance(model, PreTrainedModel)
            and type(model.config) in MODEL_FOR_OBJECT_DETECTION_MAPPING
            and bool(backbone_path(model))
        )

    def backbone(self, model: Any) -> str:
        """See `backbone_path`."""
        return backbone_path(model)

    def model_name(self, model: Any) -> str:
        """The model's class."""
        return f"transformers/{type(model).__name__}"

    def preprocessing(self, model: Any) -> Preprocessing:
        """Of the image processor saved beside the model; `AttachError` without, or not of RGB."""
        processor, channels = processor_of(model), input_channels(model)
        if channels != 3:
            raise AttachError(f"model: it takes images of {channels} channels, wanted 3")
        done, _ = preprocessing_of(processor, INPUT_SIZE)
        return Processed(**asdict(done), processor=processor.to_json_string())

    def input_size(self, model: Any) -> int:
        """Side of the images that the model is tried on, in pixels."""
        said = getattr(getattr(model.config, "backbone_config", None), "image_size", None)
        return said if isinstance(said, int) else INPUT_SIZE

    def behind(self, model: Any, site: Site) -> tuple[str, ...]:
        """All but the backbone for what is in it."""
        path = f"{self.backbone(model)}."
        if not all(name.startswith(path) for name in site.modules):
            return super().behind(model, site)
        parents = {"", *(path[:end] for end, sign in enumerate(path) if sign == ".")}
        names = (name for name, _ in model.named_modules() if name and name not in parents)
        beside = (name for name in names if name.rpartition(".")[0] in parents)
        return tuple(name for name in beside if not name.startswith(path))

    def answers(self, model: Any, batch: Any) -> Any:
        """Logits and boxes of all queries; `batch` is pixels, or what a processor gives."""
        return model(**batch) if isinstance(batch, Mapping) else model(batch)

    def batch(self, model: Any, images: Sequence[Tensor], preprocessing: Preprocessing) -> Batch:
        """Images as the processor resizes and pads them; the backbone looks at no mask."""
        given = processor_of(model)(images=list(images), return_tensors="pt")
        return Batch(in_dtype(model, given["pixel_values"].to(host_device(model))))

    def show(self, model: Any, batch: Batch) -> Shown:
        """The maps that enter the encoder."""
        levels = run_backbone(model, batch.images)
        around = model.get_submodule(backbone_path(model).rpartition(".")[0])
        projection = next((p for n, p in around.named_children() if n in PROJECTIONS), None)
        if projection is not None:  # of the last levels, or with others besides, made of the last
            layers = projection if isinstance(projection, nn.ModuleList) else [projection]
            own = zip(layers, levels[-len(layers) :], strict=False)
            levels = [layer(level) for layer, level in own]
        return Shown({str(i): level.float() for i, level in enumerate(levels)}, {})


HOST = TransformersDetection()
