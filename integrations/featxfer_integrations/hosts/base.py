"""Host: what is known of a library's models, and what holds of any model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from featxfer import BaseDegradation, Degradation, Preprocessing
from featxfer.features.backbone import frozen
from featxfer_integrations.hosts.batch import Batch, Sampler
from featxfer_integrations.mechanism.attach import host_parameter
from featxfer_integrations.mechanism.capture import (
    in_dtype,
    no_tensor,
    passed,
    plain,
    take_feature,
    watched,
)
from featxfer_integrations.mechanism.shown import Shown
from featxfer_integrations.mechanism.site import AttachError, Lens, Site, module_site, no_site

INPUT_SIZE = 224
"""Side of an image where a model does not say its own, in pixels."""

LR_SIZE = 32
"""Side of the small image by default, pixels; less where the model's own images are smaller."""


class ProbeError(AttachError):
    """The model does not run on an image of the shape that it seems to take."""


class Host:
    """What is known of the models of one library; each method here is what holds of any model.

    A subclass says `name`, `owns` and whatever the library's models tell of themselves: `head` and
    `stages` mostly. It is made known by `register_host(MyHost())`.
    """

    name = "torch"
    """In the names of models on cards and in caches."""

    site = "head"
    """Where `attach_transfer` attaches unless told."""

    degradation: type[BaseDegradation] = Degradation
    """How views are made: `Degradation` of squares, `ScaledDegradation` where sizes differ."""

    detects = False
    """Whether its models are detectors, of which LR images match what heads of boxes see."""

    def owns(self, model: nn.Module) -> bool:
        """Whether the model is of this library."""
        return False

    def model_name(self, model: Any) -> str:
        """As `load_backbone` takes it where it can; for cards and caches."""
        return type(model).__name__

    def preprocessing(self, model: Any) -> Preprocessing:
        """Of the model's weights; by default ImageNet's mean and std."""
        return Preprocessing()

    def input_size(self, model: Any) -> int:
        """Side of the images that the model is made for, in pixels."""
        return said_side(model) or INPUT_SIZE

    def head(self, model: Any) -> Site:
        """After pool5: where the classifier's input is. Raises `AttachError` where it has none."""
        raise no_site(model, "site: wanted the name of a module whose output is the feature")

    def stages(self, model: Any) -> list[str]:
        """Names of the modules that end a stage of maps, from the highest resolution."""
        return []

    def blocks(self, model: Any) -> list[str]:
        """Names of the modules that blocks follow unless told; none for a head alone."""
        return []

    def prefix_tokens(self, model: Any) -> int:
        """Tokens before the grid; 0 where there are none or their number tells."""
        return 0

    def sites(self, model: Any, name: str, branch: str = "class") -> list[Site]:
        """What a name stands for: "head", "blocks", "stage2", or a module.

        Raises `AttachError` for another name, `ValueError` for a branch that is not "class".
        """
        if branch != "class":
            raise ValueError(f"branch: got {branch!r}, which is for site='boxes' of a detector")
        if name == "head":
            return [self.head(model)]
        if name == "blocks":
            names = self.blocks(model)
            if not names:
                raise no_site(model, f"site: {type(model).__name__} names no stage of maps")
            return [self.after(model, inner, kind="block") for inner in names]
        number = name.removeprefix("stage")
        stages = self.stages(model) if number != name and number.isdecimal() else []
        if stages and name not in dict(model.named_modules()):
            if int(number) >= len(stages):
                known = ", ".join(f"stage{i} = {module}" for i, module in enumerate(stages))
                raise AttachError(
                    f"site: {type(model).__name__} has no {name}; it has {known or 'none'}"
                )
            name = stages[int(number)]
        return [self.after(model, name)]

    def after(self, model: Any, name: str, kind: str | None = None) -> Site:
        """The site after a module."""
        return module_site(model, name, kind=kind, prefix=self.prefix_tokens(model))

    def behind(self, model: Any, site: Site) -> tuple[str, ...]:
        """Names of the modules that what is trained at a site does not hang on."""
        return runs_behind(self, model, site)

    def answers(self, model: Any, batch: Any) -> Any:
        """What the model says of a batch, by which it is told whether a module acts."""
        return model(batch)

    def batch(self, model: Any, images: Sequence[Tensor], preprocessing: Preprocessing) -> Batch:
        """Images, uint8 `(3, h, w)`, as the model takes them."""
        like = host_parameter(model)
        pixels = torch.stack(list(images)).to("cpu" if like is None else like.device)
        return Batch(in_dtype(model, preprocessing(pixels)))

    def show(self, model: Any, batch: Batch) -> Shown:
        """Of a detector: what its heads see of a batch, the maps and the features of boxes."""
        raise NotImplementedError

    def proposes(self, model: Any) -> bool:
        """Whether the model is a detector that proposes boxes."""
        return False

    def propose(
        self, model: Any, batch: Batch, shown: Shown, count: int, chance: torch.Generator
    ) -> Tensor:
        """Of one that proposes: `count` boxes `(b, 4)` of those on the one image of a batch."""
        raise NotImplementedError

    def sampler(self, model: Any, sites: Sequence[Site], per_image: int) -> Sampler:
        """Of a detector: what draws boxes of an image, and gives their features at sites."""
        raise NotImplementedError

    def own_degradation(self, model: Any, preprocessing: Preprocessing) -> BaseDegradation:
        """Of the size that the model is made for."""
        size = preprocessing.input_size or self.input_size(model)
        return Degradation(hr_size=size, lr_size=min(LR_SIZE, size))

    def image(self, model: Any) -> Tensor:
        """A black image `(1, c, h, w)` as the model says that it takes them."""
        sides = said_sides(model) or (self.input_size(model),) * 2
        return black_image(model, *sides)

    def measured(self, model: Any, site: Site, image: Tensor | None = None) -> Site:
        """The site with its lens, width, layout and extent, from a run on a square image.

        Where that does not tell where channels are, a run on an image twice as large does.

        Raises:
            ProbeError: the model does not run on the image.
            AttachError: no feature passes there, or neither run tells its layout.
        """
        image = self.image(model) if image is None else image
        try:
            with frozen(model), plain(model):
                value = passed(model, site, image)
            inside = Lens.found(value)
            if inside is None:
                raise no_tensor(site)
            shape = tuple(inside.get(value).shape)
            site = replace(site, lens=Lens((*site.lens.path, *inside.path)))
        except AttachError:
            raise
        except Exception as error:  # whatever a foreign model raises
            raise does_not_run(image, error, f"what passes {site.where} is not known") from error
        height, width = image.shape[2:]
        found = site.shaped(shape, sides=(height, width))
        if found is None:
            try:
                with frozen(model):
                    larger = tuple(take_feature(model, site, image.repeat(1, 1, 2, 2)).shape)
            except Exception:  # whatever a foreign model raises at a size that is not its own
                larger = shape
            found = site.shaped(shape, larger)
        if found is None:
            raise AttachError(
                f"site: {site.where} gives {shape} of a square image, which does not tell where "
                "channels are; name another module, or put one behind it that pools the maps"
            )
        return found


def does_not_run(image: Tensor, error: Exception, so: str) -> ProbeError:
    """The error of a model that does not run on an image, and what follows."""
    shape = " x ".join(map(str, image.shape[1:]))
    return ProbeError(
        f"model: it does not run on an image of {shape} ({type(error).__name__}: {error}), so "
        f"{so}; a size that it takes is told by its image_size, or by input_size of a host"
    )


def input_channels(model: nn.Module) -> int:
    """Channels of the images that the model takes: what it says, what its first convolution takes.

    Some fold pixels into channels first, so that a multiple of 3 stands for 3; so does no layer.
    """
    said = getattr(model, "in_chans", None)
    if type(said) is int:
        return said
    layers = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    channels = next((layer.in_channels for layer in layers), 3)
    return channels if channels % 3 else 3


def black_image(model: nn.Module, height: int, width: int) -> Tensor:
    """An image `(1, c, height, width)` of zeros, on the model's device and in its dtype."""
    image = torch.zeros(1, input_channels(model), height, width, device="cpu")
    like = host_parameter(model)
    return image if like is None else image.to(like.device, like.dtype)


def said_sides(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images that the model, or a part of it, says that it takes."""
    for module in model.modules():
        for name in ("image_size", "img_size"):
            said = getattr(module, name, None)
            sides = tuple(said) if isinstance(said, list | tuple) else (said, said)
            if len(sides) == 2 and all(type(side) is int for side in sides):
                return sides
    return None


def said_side(model: nn.Module) -> int | None:
    """The one side of `said_sides`; `AttachError` where there are two."""
    sides = said_sides(model)
    if sides is not None and sides[0] != sides[1]:
        raise AttachError(f"model: it takes images of {sides}, wanted square ones")
    return None if sides is None else sides[0]


def classifiers_behind(host: Host, model: nn.Module, site: Site) -> tuple[str, ...]:
    """The classifiers of a model that has a head's site, or none; what `Host.behind` may be."""
    if site.side != "input":
        with suppress(AttachError):
            return host.head(model).modules
    return site.modules if site.side == "input" else ()


def runs_behind(host: Host, model: nn.Module, site: Site) -> tuple[str, ...]:
    """Names of modules of any model that run once the site has been reached.

    The inputs alone where the model does not run that far on a black image. Weights of a module
    that is not called itself count as those of the module around it.
    """
    begun: set[str] = set()
    running: set[str] = set()
    reached: set[str] | None = None

    def begin(name: str, _: object) -> None:
        nonlocal reached
        if reached is None and site.side == "input" and name in site.modules:
            reached = set(running)
        if reached is None:
            begun.add(name)
            running.add(name)

    def end(name: str, _: object) -> None:
        nonlocal reached
        if reached is None:
            running.discard(name)
            if site.side == "output" and name in site.modules:
                reached = set(running)

    names = [name for name, _ in model.named_modules()]
    image = host.image(model)
    try:
        with watched(model, names, before=begin, after=end), frozen(model):
            take_feature(model, site, image)
    except Exception:  # whatever a foreign model raises
        if reached is None:
            return site.modules if site.side == "input" else ()
    around = running if reached is None else reached
    return tuple(
        name for name in names if name and name not in begun and name.rpartition(".")[0] in around
    )
