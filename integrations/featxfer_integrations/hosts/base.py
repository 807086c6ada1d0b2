"""Host: what is known of a library's models, and what holds of any model; sites by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from featxfer import BaseDegradation, Degradation, Preprocessing
from featxfer.features.backbone import frozen
from featxfer_integrations.hosts.batch import Batch, Sampler
from featxfer_integrations.hosts.images import (
    INPUT_SIZE,
    black_image,
    said_side,
    said_sides,
    usual_degradation,
)
from featxfer_integrations.mechanism import attach, capture
from featxfer_integrations.mechanism.shown import Shown
from featxfer_integrations.mechanism.site import AttachError, Lens, Site, module_site, no_site


class ProbeError(AttachError):
    """The model does not run on an image of the shape that it seems to take."""


class Host:
    """What is known of the models of one library; each method here is what holds of any model.

    A subclass says `name`, `owns` and whatever the library's models tell of themselves: `head` and
    `stages` mostly. It is made known by `register_host(MyHost())`.
    """

    name = "torch"
    """In the names of models on cards and in caches."""

    tested = ""
    """A package, and how its versions begin that tests cover, `"transformers 5."`; others warn."""

    site = "head"
    """Where `attach_transfer` attaches unless told."""

    degradation: type[BaseDegradation] = Degradation
    """How views are made: `Degradation` of squares, `ScaledDegradation` where sizes differ."""

    detects = False
    """Whether its models are detectors, of which LR images match what heads of boxes see."""

    def owns(self, model: nn.Module) -> bool:
        """Whether the model is of this library."""
        return False

    def unwrapped(self, model: Any) -> nn.Module:
        """The module to attach to: the model, or the one that an object around it runs."""
        wanted: nn.Module = model
        return wanted

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

    def targets(self, model: Any) -> list[Site]:
        """What LR images have to match where blocks are trained: the pooled feature."""
        return [self.head(model)]

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
        """What a name stands for: "head", "blocks" (of detectors "backbone"), "stage2", a module.

        Raises `AttachError` for another name, `ValueError` for a branch that is not "class".
        """
        if branch != "class":
            raise ValueError(f"branch: got {branch!r}, which is for site='boxes' of a detector")
        if name == "head":
            return [self.head(model)]
        if name == "blocks" or (self.detects and name == "backbone"):
            names = self.blocks(model)
            if not names:
                raise no_site(model, f"site: {type(model).__name__} names no stage of maps")
            return [self.after(model, inner, kind="block") for inner in names]
        if re.fullmatch(r"stage\d+", name) and name not in dict(model.named_modules()):
            stages = {f"stage{i}": inner for i, inner in enumerate(self.stages(model))}
            if stages and name not in stages:
                known = ", ".join(f"{stage} = {inner}" for stage, inner in stages.items())
                raise AttachError(f"site: {type(model).__name__} has no {name}; it has {known}")
            name = stages.get(name, name)
        return [self.after(model, name)]

    def after(self, model: Any, name: str, kind: str | None = None) -> Site:
        """The site after a module."""
        return module_site(model, name, kind=kind, prefix=self.prefix_tokens(model))

    def behind(self, model: Any, site: Site) -> tuple[str, ...]:
        """Names of the modules, and parameters, that what is trained at a site does not hang on.

        Those that run once it has been reached; the inputs alone where the model does not run that
        far on a black image. A module that is not called itself goes with the one around it.
        """
        begun: set[str] = set()
        running = {""}  # though it is a method of the model that is run
        reached = False

        def begin(name: str, _: object) -> None:
            nonlocal reached
            reached = reached or (site.side == "input" and name in site.modules)
            if not reached:  # lists of layers are not called themselves
                lists = {name[:end] for end, sign in enumerate(name) if sign == "."} - begun
                begun.update({name, *lists})
                running.update({name, *lists})

        def end(name: str, _: object) -> None:
            nonlocal reached
            if not reached:
                running.discard(name)
                reached = site.side == "output" and name in site.modules

        names = [name for name, _ in model.named_modules()]
        image = self.image(model)
        try:
            with capture.watched(model, names, before=begin, after=end), frozen(model):
                capture.take_feature(model, site, image)
        except Exception:  # whatever a foreign model raises
            if not reached:
                return site.modules if site.side == "input" else ()
        behind = (name for name in names if name and name not in begun)
        return tuple(name for name in behind if name.rpartition(".")[0] in running)

    def answers(self, model: Any, batch: Any) -> Any:
        """What the model says of a batch, by which it is told whether a module acts."""
        return model(batch)

    def batch(self, model: Any, images: Sequence[Tensor], preprocessing: Preprocessing) -> Batch:
        """Images, uint8 `(3, h, w)`, as the model takes them."""
        pixels = torch.stack(list(images)).to(attach.host_device(model))
        return Batch(capture.in_dtype(model, preprocessing(pixels)))

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
        """Of the size that the model is made for; of a host whose images keep theirs the usual."""
        if self.degradation is not Degradation:
            return self.degradation()
        size = preprocessing.input_size or self.input_size(model)
        return usual_degradation(size)

    def image(self, model: Any) -> Tensor:
        """A black image `(1, c, h, w)` as the model says that it takes them."""
        sides = said_sides(model) or (self.input_size(model),) * 2
        return black_image(model, *sides)

    def measured(self, model: Any, site: Site, image: Tensor | None = None) -> Site:
        """The site with its lens, width, layout and extent, from a run on a square image.

        Where that does not tell where channels are, a run on an image twice as large does. Raises
        `ProbeError` where the model does not run on the image, `AttachError` where no feature
        passes, or neither run tells its layout.
        """
        image = self.image(model) if image is None else image
        try:
            with frozen(model), capture.plain(model):
                value = capture.passed(model, site, image)
            inside = Lens.found(value)
            if inside is None:
                raise capture.no_tensor(site)
            shape = tuple(inside.get(value).shape)
            site = replace(site, lens=Lens((*site.lens.path, *inside.path)))
        except AttachError:
            raise
        except Exception as error:  # whatever a foreign model raises
            raise does_not_run(image, error, f"what passes {site.where} is not known") from error
        height, width = image.shape[2:]
        found = site.shaped(shape, sides=(height, width))
        if found is None:
            double = image.repeat(1, 1, 2, 2)
            try:
                with frozen(model):
                    larger = tuple(capture.take_feature(model, site, double).shape)
            except Exception:  # whatever a foreign model raises at a size that is not its own
                larger = shape
            found = site.shaped(shape, larger)
        if found is None:
            raise AttachError(
                f"site: {site.where} gives {shape} of a square image, which does not tell where "
                "channels are; name another module, or put one behind it that pools the maps"
            )
        fixed = found.layout == "tokens" and attach.patch_layer(model) is None
        return replace(found, fixed=True) if fixed else found


def is_of(model: nn.Module, package: str) -> bool:
    """Whether a model's class, or a base of it, is of a package."""
    return any(cls.__module__.partition(".")[0] == package for cls in type(model).__mro__)


def does_not_run(image: Tensor, error: Exception, so: str) -> ProbeError:
    """The error of a model that does not run on an image, and what follows."""
    shape = " x ".join(map(str, image.shape[1:]))
    return ProbeError(
        f"model: it does not run on an image of {shape} ({type(error).__name__}: {error}), so "
        f"{so}; a size that it takes is told by its image_size, or by input_size of a host"
    )


def input_width(module: nn.Module) -> int | None:
    """Features that the first linear layer or convolution in a module takes; None without one."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
    return None


def classifiers_behind(host: Host, model: Any, site: Site) -> tuple[str, ...]:
    """The classifiers of a model that has a head's site, or none; what `Host.behind` may be."""
    if site.side == "input":
        return site.modules
    try:
        return host.head(model).modules
    except AttachError:
        return ()


def find_sites(
    host: Host,
    model: nn.Module,
    name: str | None = None,
    branch: str = "class",
    *,
    kind: str | None = None,
    width: int | None = None,
    image: Tensor | None = None,
) -> list[Site]:
    """The sites that a name stands for, with widths and layouts; errors as of `attach_transfer`.

    The model is run on `image`, by default a black one, where it does not say them. `kind` is
    "head" or "block", what is to be put there, by default by what passes; `width` the feature's,
    where that is known.
    """
    if not isinstance(name, str | None):
        raise TypeError(f"site: got {name!r}, wanted a name")
    found, known_modules = [], dict(model.named_modules())
    for site in host.sites(model, host.site if name is None else name, branch):
        missing = [module for module in site.modules if module not in known_modules]
        if missing:
            raise AttachError(
                f"site: host {host.name!r} has {site.name!r} at {missing[0]!r}, which is no module "
                f"of this {type(model).__name__}"
            )
        if attach.attached_at(model, site) is not None:
            site = attach.transfers_of(model).sites[site.name]
        is_told = site.width is not None and (site.layout is not None or site.kind == "head")
        if not is_told or (image is not None and not site.repeats):
            try:
                site = host.measured(model, site, image)
            except ProbeError:
                if width is None:
                    raise
                site = replace(site, width=width, kind=site.kind or "head")
        if width not in (None, site.width):
            raise ValueError(f"in_features: got {width}, the model says {site.width}")
        chosen = kind
        if kind is None or site.kind is not None or (kind == "block" and site.layout == "rows"):
            chosen = "block" if site.is_block else "head"
        found.append(replace(site, kind=chosen))
    return found
