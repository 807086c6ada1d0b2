"""Hugging Face's image models: classifiers, backbones, and the image towers of CLIP and SigLIP."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor

from featxfer import BaseDegradation, Preprocessing
from featxfer.features.backbone import frozen
from featxfer_integrations.hosts import base
from featxfer_integrations.hosts.images import INPUT_SIZE, square_side, usual_degradation
from featxfer_integrations.hosts.resolutions import block_places, reductions
from featxfer_integrations.mechanism import capture
from featxfer_integrations.mechanism.site import AttachError, Lens, Site, no_site


class Transformers(base.Host):
    """Models of transformers that take images."""

    name = "transformers"
    tested = "transformers 5."

    def owns(self, model: nn.Module) -> bool:
        """Whether it is a whole model of transformers."""
        return base.is_of(model, "transformers") and hasattr(model, "main_input_name")

    def model_name(self, model: Any) -> str:
        """Where it was loaded from; a model made by hand goes by its class."""
        return f"transformers/{model.config._name_or_path or type(model).__name__}"

    def preprocessing(self, model: Any) -> Preprocessing:
        """Of the image processor saved beside the model; without one ImageNet's, with a warning."""
        try:
            return preprocessing_of(processor_of(model), self.input_size(model))[0]
        except AttachError as error:
            warnings.warn(
                f"{error}; ImageNet's mean and std are taken, "
                "FitOptions(preprocessing=Preprocessing(mean, std)) says others",
                stacklevel=2,
            )
            return Preprocessing()

    def input_size(self, model: Any) -> int:
        """What the configuration says; 224 where it says none."""
        return square_side(getattr(_config(model), "image_size", None) or INPUT_SIZE)

    def own_degradation(self, model: Any, preprocessing: Preprocessing) -> BaseDegradation:
        """Of the size that the image processor makes; without one, of what `input_size` says."""
        size = self.input_size(model)
        with suppress(AttachError):
            size = preprocessing_of(processor_of(model), size)[1]
        return usual_degradation(size)

    def answers(self, model: Any, batch: Any) -> Any:
        """What the model says of images, of one that reads texts too the images' features."""
        if isinstance(batch, Mapping):
            return model(**batch)
        return _image_features(model, batch) if _reads_texts(model) else model(batch)

    def head(self, model: Any) -> Site:
        """Before the classifier; else the projected feature, or `pooler_output`."""
        run = _image_features if _reads_texts(model) else None
        classifiers = _classifiers(model)
        if classifiers:
            width = base.input_width(model.get_submodule(classifiers[0]))
            return Site("head", classifiers, "input", width, kind="head")
        if isinstance(getattr(model, "visual_projection", None), nn.Module):
            return Site("head", ("visual_projection",), kind="head", run=run)
        if run is not None and isinstance(getattr(model, "vision_model", None), nn.Module):
            lens = Lens(("pooler_output",))
            return Site("head", ("vision_model",), kind="head", lens=lens, run=run)
        if self._says(model).get("pooler_output") is None:
            raise no_site(model, f"site: {type(model).__name__} gives no pooler_output")
        return Site("head", ("",), kind="head", lens=Lens(("pooler_output",)))

    def targets(self, model: Any) -> list[Site]:
        """The pooled feature; without one all maps that it gives, or its last tokens."""
        said = self._says(model)
        paths: list[tuple[str | int, ...]] = [
            ("feature_maps", i) for i, _ in enumerate(said.get("feature_maps", ()))
        ]
        if not paths and said.get("pooler_output") is None and "logits" not in said:
            paths = [("last_hidden_state",)]
        if not paths:
            return [self.head(model)]
        return [
            Site(f"shown{i}", ("",), kind="block", lens=Lens(path)) for i, path in enumerate(paths)
        ]

    def stages(self, model: Any) -> list[str]:
        """Stages, or layers where all have one resolution."""
        return list(self._reductions(model))

    def blocks(self, model: Any) -> list[str]:
        """Where `block_places` says."""
        return block_places(self._reductions(model))

    def measured(self, model: Any, site: Site, image: Tensor | None = None) -> Site:
        """As `Host.measured`; of a grid of as many tokens as there are patches, where they stay.

        Others, class and register tokens, come before it.
        """
        image = self.image(model) if image is None else image
        found, config = super().measured(model, site, image), _config(model)
        patch = None if hasattr(config, "depths") else getattr(config, "patch_size", None)
        if found.layout != "tokens" or found.extent is None or not isinstance(patch, int):
            return found
        extent = (image.shape[2] // patch, image.shape[3] // patch)
        prefix = found.prefix + math.prod(found.extent) - math.prod(extent)
        return found if prefix < 0 else replace(found, extent=extent, prefix=prefix)

    def after(self, model: Any, name: str, kind: str | None = None) -> Site:
        """The site after a module; of a model that reads texts too, in its images' part."""
        run = _image_features if _reads_texts(model) else None
        return replace(super().after(model, name, kind), run=run)

    def behind(self, model: Any, site: Site) -> tuple[str, ...]:
        """The classifiers; of a model that reads texts too all but what runs before the site."""
        if not _reads_texts(model):
            return base.classifiers_behind(self, model, site)
        own = (name for name, _ in model.named_parameters(recurse=False))
        return (*super().behind(model, site), *own)

    def _says(self, model: Any) -> Any:
        """What it returns for a black image."""
        image = self.image(model)
        try:
            with frozen(model), capture.plain(model):
                said = self.answers(model, image)
        except Exception as error:  # whatever a foreign model raises
            raise base.does_not_run(image, error, "what it gives is not known") from error
        if not isinstance(said, Mapping):
            raise AttachError(f"model: it gives a {type(said).__name__}, wanted return_dict=True")
        return said

    def _reductions(self, model: Any) -> dict[str, int]:
        return reductions(self, model, _layers(model))


HOST = Transformers()


def processor_of(model: Any) -> Any:
    """The image processor that is saved beside a model; `AttachError` where there is none.

    Nothing is downloaded.
    """
    path = model.config._name_or_path
    try:
        return AutoImageProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise AttachError(
            f"model: no image processor is saved where this {type(model).__name__} is from "
            f"(config._name_or_path is {path!r}), wanted the one that its images go through: save "
            "model and processor in one folder, and load the model from there"
        ) from error


def preprocessing_of(processor: Any, side: int) -> tuple[Preprocessing, int]:
    """What an image processor does to images of one colour, and the side of what it makes.

    They are squares of `side` pixels, which a processor that does not resize leaves as they are.
    """
    colours = ("black", "white", "red")
    images = [Image.new("RGB", (side, side), colour) for colour in colours]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"].double()
    black, white, red = pixels[:, :, pixels.shape[2] // 2, pixels.shape[3] // 2]
    bgr = bool((red - black)[0].abs() < (red - black)[-1].abs())
    if bgr:
        black, white = black.flip(0), white.flip(0)
    std = 1 / (white - black)
    mean = -black * std
    return Preprocessing(_rounded(mean), _rounded(std), bgr=bgr), int(pixels.shape[2])


def _rounded(values: Tensor) -> tuple[float, float, float]:
    red, green, blue = (round(value, 6) + 0.0 for value in values.tolist())
    return red, green, blue


def _config(model: Any) -> Any:
    """What is said of images: by the configuration, or by its part for them."""
    return getattr(model.config, "vision_config", model.config)


def _reads_texts(model: Any) -> bool:
    """Whether images are only a part of what it takes, as of CLIP."""
    return model.main_input_name != "pixel_values" and hasattr(model, "get_image_features")


def _image_features(model: Any, images: Tensor) -> Any:
    return model.get_image_features(pixel_values=images)


def _layers(model: Any) -> list[str]:
    """Names of the items of the outermost lists of layers in the part that images pass."""
    body = model.base_model_prefix
    inside = f"{body}." if isinstance(getattr(model, body, None), nn.Module) else ""
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.startswith(inside)
        if not name.startswith("text_model.")
    ]
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    return [f"{n}.{item}" for n in outermost for item, _ in model.get_submodule(n).named_children()]


def _classifiers(model: Any) -> tuple[str, ...]:
    """Names of the layers behind the body that give the classes' scores, or stand in for them."""
    body = {name.partition(".")[0] for name in _layers(model)} | {model.base_model_prefix}
    others = ("head", "fc") if type(model).__name__.endswith("ForImageClassification") else ()
    found = []
    for name, child in model.named_children():
        if name not in body and ("classifier" in name or name in others):
            layers = [n for n, m in child.named_modules(prefix=name) if not list(m.children())]
            found.append(layers[-1])
    return tuple(found)
