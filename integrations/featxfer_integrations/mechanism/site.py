"""Site: where in a model a module acts, and how its tensor is taken out of what passes there."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featxfer import FeatureTransferBlock, FeatureTransferHead

CHILD = "feature_transfer"
"""Name of the host's child that holds what is attached."""

RESERVED = ("head", "enabled", "sites", "transfer")
"""Keys in `Transfers` that are no module's: the classifiers' site, and its own attributes."""

PLANES = {"nchw": (2, 3), "nhwc": (1, 2)}
"""Axes of the plane of maps, by layout."""


class AttachError(ValueError):
    """Nothing could be attached, or nothing is; the model is as it was."""


@dataclass(frozen=True)
class Lens:
    """Takes the tensor out of what passes a module, and puts the changed one back.

    Args:
        path: keys of mappings, indices of tuples and names of attributes, from the outside to the
            inside; none where a tensor passes by itself.
    """

    path: tuple[str | int, ...] = ()

    @classmethod
    def found(cls, value: Any) -> Lens | None:
        """The lens to the one tensor in a value, or to the first one of a tuple; None without any.

        Raises `AttachError` for a mapping or an object that holds several maps.
        """
        if isinstance(value, Tensor):
            return cls()
        if isinstance(value, list | tuple):
            parts: list[tuple[Any, Any]] = list(enumerate(value))[:1]
        else:
            held = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
            parts = [(key, part) for key, part in held.items() if isinstance(part, Tensor)]
            maps = [key for key, part in parts if part.ndim > 2]
            if len(maps) > 1:
                raise AttachError(
                    f"site: several tensors pass there, {', '.join(map(str, maps))}; name a module "
                    "that gives one of them"
                )
            parts = [(key, part) for key, part in parts if key in maps] or parts
        inside = cls.found(parts[0][1]) if parts else None
        return None if inside is None else cls((parts[0][0], *inside.path))

    def get(self, value: Any) -> Any:
        """What is there, a tensor where all is well."""
        for key in self.path:
            value = _part(value, key)
        return value

    def put(self, value: Any, tensor: Any) -> Any:
        """A copy of the value with another tensor there."""
        if not self.path:
            return tensor
        key = self.path[0]
        changed = Lens(self.path[1:]).put(_part(value, key), tensor)
        if dataclasses.is_dataclass(value):
            return dataclasses.replace(value, **{str(key): changed})  # type: ignore[type-var]
        if isinstance(value, Mapping):
            items = ((name, changed if name == key else part) for name, part in value.items())
            return type(value)(items)  # type: ignore[call-arg]
        if isinstance(value, list | tuple):
            parts = [changed if i == key else part for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        found = copy.copy(value)
        setattr(found, str(key), changed)
        return found


def _part(value: Any, key: str | int) -> Any:
    """An entry of a mapping or a tuple, or an attribute."""
    if isinstance(value, tuple | list) and not isinstance(key, int):
        raise AttachError(f"model: it gives a tuple, wanted its {key!r} by name (return_dict=True)")
    is_indexed = isinstance(value, Mapping) or isinstance(key, int)
    return value[key] if is_indexed else getattr(value, str(key))


@dataclass(frozen=True)
class Site:
    """Where in a host a module acts.

    Args:
        name: key in `Transfers`: "head", or the stage's or module's name without dots.
        modules: names of the modules that are hooked.
        side: "input" or "output" of these modules.
        width: features or channels there; None until it is known.
        layout: of what passes: "rows" `(n, d)`, "nchw", "nhwc", or "tokens" `(n, t, d)`; None
            until it is known (`measured`).
        prefix: tokens that stand before the grid.
        extent: rows and columns of maps, or of the grid of tokens, of the image that was tried;
            None of tokens that are no grid.
        fixed: whether tokens are of that grid alone, since the host takes images of one size.
        kind: "head" or "block"; None: by what passes.
        lens: how the tensor is taken out of what passes.
        asked: as the caller names the site.
        branch: of a detector's predictor, see `attach_transfer`; None where there is none.
        repeats: whether it may run several times for an image, at each level of a pyramid, say.
        methods: method name -> function (host, *args) that replaces it on the host.
        feature: (host, images) -> the plain feature there; by default what passes.
        run: (host, images) runs the part of the host that the site is in; by default all of it.
    """

    name: str
    modules: tuple[str, ...]
    side: str = "output"
    width: int | None = None
    layout: str | None = None
    prefix: int = 0
    extent: tuple[int, int] | None = None
    fixed: bool = False
    kind: str | None = None
    lens: Lens = Lens()
    asked: str = "head"
    branch: str | None = None
    repeats: bool = False
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    feature: Callable[[Any, Any], Tensor] | None = None
    run: Callable[[Any, Any], object] | None = None

    def __post_init__(self) -> None:
        if self.side not in ("input", "output") or not isinstance(self.modules, tuple):
            raise ValueError(
                f"site: got side={self.side!r}, modules={self.modules!r}, wanted 'input' or "
                "'output', and a tuple of names"
            )

    @property
    def described(self) -> dict[str, str]:
        """For a card: the arguments of `attach_transfer` that name it."""
        branch = {} if self.branch is None else {"branch": self.branch}
        return {"site": self.asked, **branch}

    @property
    def is_block(self) -> bool:
        """Whether a block goes there: where it is said, or where more than one position passes."""
        if self.kind is not None:
            return self.kind == "block"
        return self.layout == "tokens" if self.extent is None else math.prod(self.extent) > 1

    @property
    def module_class(self) -> type[FeatureTransferBlock] | type[FeatureTransferHead]:
        """What goes there."""
        return FeatureTransferBlock if self.is_block else FeatureTransferHead

    @property
    def sizes(self) -> dict[str, Any]:
        """Arguments of a module that fits there; `AttachError` for a block on no grid of tokens."""
        if not self.is_block:
            return {"in_features": self.width}
        sizes: dict[str, Any] = {"channels": self.width, "layout": self.layout}
        if self.layout == "tokens":
            if self.extent is None:
                raise AttachError(
                    f"site: {self.where} gives tokens that are no grid of the image's behind "
                    f"{self.prefix} others, images first; wanted another module, or a head"
                )
            sizes["prefix_tokens"] = self.prefix
            if self.fixed or self.extent[0] != self.extent[1]:
                sizes["grid"] = self.extent
        return sizes

    @property
    def where(self) -> str:
        """The modules, for messages."""
        return ", ".join(self.modules) or self.name

    def pool(self, feature: Tensor) -> Tensor:
        """What passes as vectors `(n, d)`: vectors as they are, maps averaged over their plane.

        Raises `AttachError` for what is neither, such as tokens.
        """
        if feature.ndim == 2:
            return feature
        if feature.ndim == 4 and self.layout in PLANES:
            return feature.mean(PLANES[self.layout])
        raise self.refused(tuple(feature.shape))

    def shaped(
        self,
        shape: tuple[int, ...],
        larger: tuple[int, ...] | None = None,
        sides: tuple[int, int] = (1, 1),
    ) -> Site | None:
        """The site with width, layout and extent from the shape that a square image gives there.

        `larger` is the shape of an image with sides twice as long, where that is known; the grid of
        tokens is in the proportion of `sides`, the image's height and width. None where the shapes
        do not tell where channels are; `AttachError` for neither vectors nor maps nor tokens.
        """
        known = dataclasses.replace
        if len(shape) == 2:
            return known(self, layout="rows", width=shape[1])
        if len(shape) == 3:
            high, wide = (side // math.gcd(*sides) for side in sides)
            scale = math.isqrt(max(0, shape[1] - self.prefix) // (high * wide))
            extent = (high * scale, wide * scale)
            prefix = self.prefix or shape[1] - math.prod(extent)
            is_grid = prefix + math.prod(extent) == shape[1] > prefix
            is_grid = is_grid and (shape[0] == 1 or shape[1] > 1)  # images first, that is
            tokens = known(self, layout="tokens", width=shape[2], prefix=prefix)
            return known(tokens, extent=extent if is_grid else None)
        if len(shape) != 4:
            raise self.refused(shape)
        found = [name for name, (row, column) in PLANES.items() if shape[row] == shape[column]]
        if len(found) != 1 and larger is not None:
            moved = tuple(axis for axis in (1, 2, 3) if larger[axis] != shape[axis])
            found = [name for name, plane in PLANES.items() if plane == moved]
        if len(found) != 1:
            return None
        (layout,) = found
        row, column = PLANES[layout]
        extent = (shape[row], shape[column])
        return known(self, layout=layout, width=shape[6 - row - column], extent=extent)

    def refused(self, shape: tuple[int, ...]) -> AttachError:
        """The error for what is no feature."""
        return AttachError(
            f"site: {self.where} gives {shape}, wanted vectors (n, d), maps (n, d, h, w) or "
            "(n, h, w, d), or tokens (n, t, d)"
        )


def module_site(model: nn.Module, name: str, **known: Any) -> Site:
    """After a module by name. Of a `Sequential` its last module is hooked, also when run alone."""
    modules = dict(model.named_modules())
    if not name or name not in modules or name.startswith(f"{CHILD}."):
        near = difflib.get_close_matches(name, [*filter(None, modules)], n=3, cutoff=0.7)
        told = f", nearest: {', '.join(near)}" if near else ""
        raise no_site(model, f"site: no module {name!r}{told}")
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    leaf = name
    while _runs_its_last_child(model.get_submodule(leaf)):
        last, child = list(model.get_submodule(leaf)._modules.items())[-1]
        if names[id(child)] > 1:  # what is shared runs for others too
            break
        leaf = f"{leaf}.{last}"
    if isinstance(model.get_submodule(leaf), _BatchNorm) and hasattr(model, "fuse"):
        raise no_site(
            model,
            f"site: {leaf!r} is a batch norm, which fuse() of {type(model).__name__} takes away "
            "with what is attached to it",
        )
    key = re.sub(r"\W", "_", name)  # graphs have names with slashes, and keys name folders
    key = f"{key}_" if key in RESERVED or hasattr(nn.ModuleDict(), key) else key
    return Site(key, (leaf,), asked=name, **known)


def _runs_its_last_child(module: nn.Module) -> bool:
    """Whether a module's result is that of its last child: a `Sequential` as torch has it."""
    return type(module).forward is nn.Sequential.forward and len(module._modules) > 0


def no_site(model: nn.Module, message: str) -> AttachError:
    """The error with the names of modules that could be meant."""
    candidates = [
        name
        for name, module in model.named_modules()
        if name
        and name.partition(".")[0] != CHILD
        and (not list(module.children()) or isinstance(module, nn.Sequential))
    ]
    shown = ", ".join(candidates[-12:]) or "none"
    more = f" (the last 12 of {len(candidates)})" if len(candidates) > 12 else ""
    return AttachError(f"{message}; candidates in {type(model).__name__}{more}: {shown}")
