"""A frozen feature extractor with the preprocessing of its weights, and how it is run."""

from __future__ import annotations

import dis
import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Preprocessing:
    """What belongs to the weights: `(pixels / 255 - mean) / std`, and the input size if fixed.

    Args:
        mean: per RGB channel, of pixels in [0, 1].
        std: per RGB channel, > 0.
        input_size: the only side, in pixels, that the backbone takes; None if it takes any.
        bgr: whether it takes blue first; `mean` and `std` are per RGB channel in any case.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    input_size: int | None = None
    bgr: bool = False

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 `(n, 3, h, w)` -> float32, channels last, normalised."""
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=pixels.device).view(3, 1, 1)
            for v in (self.mean, self.std)
        )
        images = (pixels.to(torch.float32) / 255 - mean) / std
        images = images.flip(1) if self.bgr else images
        return images.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen feature extractor with the preprocessing of its weights.

    Args:
        module: images `(n, 3, hr_size, hr_size)` -> pooled features `(n, d)`. It is not changed.
        preprocessing: of its weights.
        name: for cache keys and cards.
        weights: where the weights are from, in words.
        host: the library, with its version, whose code the module is.
        image_size: side of the images that the weights were made for, in pixels.
    """

    module: nn.Module
    preprocessing: Preprocessing = Preprocessing()
    name: str = "custom"
    weights: str = "custom"
    host: str = "custom"
    image_size: int = 224

    @property
    def weights_sha256(self) -> str:
        """Hash of the module's state dict as it is now."""
        return weights_sha256(self.module)

    @property
    def architecture_sha256(self) -> str:
        """Hash of the module's layers and settings (`describe_module`)."""
        return sha256_of(describe_module(self.module))


def weights_sha256(
    module: nn.Module, *, leave_out: tuple[str, ...] = (), dtype: torch.dtype | None = None
) -> str:
    """SHA-256 over the names, shapes and values of a module's state dict, whatever their dtypes.

    Args:
        module: its floating-point values count as float32, or as float64 where they are.
        leave_out: names that begin with one of these do not count.
        dtype: what floating-point values are rounded to first; by default they are as they are.
    """
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        if name.startswith(leave_out):
            continue
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value if dtype is None else value.to(dtype)
            value = value if value.dtype == torch.float64 else value.float()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def describe_module(module: nn.Module, *, leave_out: str | None = None) -> dict[str, Any]:
    """Layers of a module as they print, dtypes, and the settings of all its submodules, as JSON.

    Settings are attributes that hold numbers, texts, or lists and dicts of these, and those of the
    host's own objects. What a run assigns is none, so the description is the same before and after
    a run, and in every process: attributes that `forward`, `train` or a method that they use sets.

    Args:
        module: any.
        leave_out: a child that does not count.
    """
    children = [child for child in module.named_children() if child[0] != leave_out]
    inside = [("", module)] + [
        (f"{name}.{below}".rstrip("."), part)
        for name, child in children
        for below, part in child.named_modules()
    ]
    kinds = {type(part) for _, part in inside}
    helpers = {type(value) for _, part in inside for value in vars(part).values()}
    packages = {_package(kind) for kind in kinds}
    changing = _assigned_by_runs(kinds | {kind for kind in helpers if _package(kind) in packages})
    settings = {name: _settings_of(part, _package(type(part)), changing) for name, part in inside}
    layers = [f"{name} {child!r}" for name, child in children]
    dtypes = {
        f"{name}.{own}": str(value.dtype)
        for name, part in inside
        for own, value in [
            *part.named_parameters(recurse=False),
            *part.named_buffers(recurse=False),
        ]
    }
    return {
        "class": type(module).__qualname__,
        "layers": [module.extra_repr(), *layers],
        "dtypes": sha256_of(dtypes),
        "settings": {name: kept for name, kept in settings.items() if kept},
    }


def sha256_of(described: Any) -> str:
    """Hash of JSON types, whatever the order of keys."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


_RUN = ("forward", "train", "eval")
"""Methods by which a module is run."""

_DEEPEST = 8
"""How far settings hold one another: further, they may go round in a circle."""

_BY_NAME = {"setattr", "register_buffer", "register_parameter", "add_module", "__dict__"}
"""What assigns attributes whose names are texts."""


def _assigned_by_runs(classes: set[type]) -> set[str]:
    """Names of attributes that methods of these classes may assign while a module runs."""
    methods: dict[str, list[CodeType]] = {}
    bases = {base for kind in classes for base in kind.__mro__} - set(nn.Module.__mro__)
    for base in bases:
        for name, member in vars(base).items():
            for code in _codes(member):
                methods.setdefault(name, []).append(code)
    waiting, seen = list(_RUN), set(_RUN)
    assigned = {n for b in bases for n, m in vars(b).items() if isinstance(m, cached_property)}
    while waiting:
        for code in methods.get(waiting.pop(), []):
            assigned.update(
                i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"
            )
            if _BY_NAME.intersection(code.co_names):
                assigned.update(text for text in code.co_consts if isinstance(text, str))
            used = set(code.co_names) - seen
            waiting += used
            seen |= used
    return assigned


def _codes(member: object) -> Iterator[CodeType]:
    """Bytecode of a method, a property or what they are wrapped in, and of functions inside."""
    if isinstance(member, cached_property):
        yield from _codes(member.func)
    if isinstance(member, property):
        for function in (member.fget, member.fset):
            yield from _codes(function)
    member = getattr(member, "__func__", member)
    member = inspect.unwrap(member) if isinstance(member, FunctionType) else member
    waiting = [member.__code__] if isinstance(member, FunctionType) else []
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [inner for inner in code.co_consts if isinstance(inner, CodeType)]


def _settings_of(
    holder: object, package: str, changing: set[str], depth: int = 0
) -> dict[str, Any]:
    """Settings among an object's attributes; what is empty may be a cache, so it is none."""
    left_out = changing | set(vars(nn.Module()))
    found = {
        name: _setting(value, package, changing, depth)
        for name, value in vars(holder).items()
        if name not in left_out
    }
    return {name: setting for name, setting in found.items() if setting not in (None, [], {})}


def _setting(value: Any, package: str, changing: set[str], depth: int) -> Any:
    """A setting as JSON has it; None for what is none, or holds something that is none."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if depth == _DEEPEST:
        return None
    if isinstance(value, list | tuple):
        parts = [_setting(part, package, changing, depth + 1) for part in value]
        return None if None in parts else parts
    if isinstance(value, dict):
        named = {
            str(key): _setting(part, package, changing, depth + 1) for key, part in value.items()
        }
        return None if None in named.values() else named
    own = _package(type(value)) == package and hasattr(value, "__dict__")
    if own and not isinstance(value, nn.Module | Tensor):
        return [type(value).__name__, _settings_of(value, package, changing, depth + 1)]
    return None


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each submodule's own mode restored after, always.

    Modes are set by the modules' own `train`, and where all are in eval mode, not at all. Raises
    `ValueError` for a submodule whose own `eval` leaves it in training mode.
    """
    with modes_kept(module), torch.no_grad():
        if any(child.training for child in module.modules()):
            module.eval()
            for child in module.modules():
                if child.training:
                    kind = type(child).__name__
                    raise ValueError(f"module: {kind} stays in training mode after eval()")
        yield


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Each submodule's own mode restored after, by its own `train`, parents before children."""
    modes = {child: child.training for child in module.modules()}
    try:
        yield
    finally:
        for child, mode in modes.items():
            if child.training != mode:
                child.train(mode)
        for child, mode in modes.items():  # where a module's own train does something else
            child.training = mode
