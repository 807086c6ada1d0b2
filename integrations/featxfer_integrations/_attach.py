"""How a head or block is attached to a model, switched off and taken away; knows torch only."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from featxfer import FeatureTransferBlock, FeatureTransferHead
from featxfer.features.backbone import frozen
from featxfer.modules.hub import TransferModule

DEEP_REDUCTIONS = (16, 32)
"""Blocks go where a stage ends whose maps are so many times smaller than the image."""

CHILD = "feature_transfer"
"""Name of the host's child that holds what is attached."""

_DISABLED: ContextVar[frozenset[int]] = ContextVar("_DISABLED", default=frozenset())
"""`id` of each `Transfers` that is disabled, in this thread (or task) and in no other."""

_DISTURBED: ContextVar[frozenset[tuple[int, str]]] = ContextVar("_DISTURBED", default=frozenset())
"""`id` of a `Transfers` and place where features are disturbed, in this thread."""


class AttachError(ValueError):
    """Nothing could be attached, or nothing is; the model is as it was."""


class Transfers(nn.ModuleDict):
    """What is attached to one host, by place; the host's only new child.

    It is a child of the host and not of the hooked modules, since these may be replaced
    (`reset_classifier`), may be several that share one head, or run their children (`Sequential`).
    A host that is a `Sequential` runs this module last: it returns what it gets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, Place] = {}

    @property
    def enabled(self) -> bool:
        """Whether it acts in this thread, see `transfer_disabled`."""
        return id(self) not in _DISABLED.get()

    def __getitem__(self, key: str) -> TransferModule:
        """What is attached at a place."""
        module = super().__getitem__(key)
        assert isinstance(module, TransferModule)
        return module

    def forward(self, value: Any) -> Any:
        """The value itself."""
        return value

    def transfer(self, place: str, features: Tensor) -> Tensor:
        """`features` through what is attached at `place`, or as they are while disabled."""
        if not self.enabled:
            return features
        if (id(self), place) in _DISTURBED.get():
            features = _disturb(features)
        transferred: Tensor = self[place](features)
        return transferred

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A checkpoint of the plain host, without any of these tensors, leaves them as they are."""
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@dataclass(frozen=True)
class Place:
    """Where in a host something is attached.

    Args:
        name: key in `Transfers`: "pooled", or the stage's or module's name without dots.
        width: features or channels there; None if the host does not say.
        inputs: names of modules whose input is transferred; classifiers.
        outputs: names of modules whose output is transferred.
        level: of modules that return a dict of maps by level: whose entry is transferred.
        methods: method name -> function (host, *args) that replaces it on the host.
        feature: (host, images) -> the plain feature at the place; by default what arrives there.
        run: (host, images) runs the part of the host that the place is in; by default all of it.
        block: whether a block goes there, and not a head.
        module: the name of the module as the caller gave it, if it was by name.
        repeats: whether it may run several times for an image, at each level of a pyramid, say.
        branch: of a detector's predictor, see `attach_transfer`.
        layout: of the maps there, "nchw" or "nhwc"; None for vectors, and until it is known
            (`with_layout`).
    """

    name: str
    width: int | None
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    level: str | None = None
    methods: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    feature: Callable[[nn.Module, Tensor], Tensor] | None = None
    run: Callable[[nn.Module, Tensor], object] | None = None
    block: bool = False
    module: str | None = None
    repeats: bool = False
    branch: str = "class"
    layout: str | None = None

    @property
    def described(self) -> dict[str, str]:
        """The arguments of `attach_transfer` that name it; none for the model's own place."""
        if self.module is not None:
            return {"at" if self.block else "where": self.module}
        if self.name == "pooled":
            return {}
        return {"where": self.name, "branch": self.branch}

    @property
    def kind(self) -> type[FeatureTransferBlock] | type[FeatureTransferHead]:
        """What goes there."""
        return FeatureTransferBlock if self.block else FeatureTransferHead


def transfers_of(host: nn.Module) -> Transfers:
    """What is attached to `host`, by place: "pooled", or the stage's or module's name without dots.

    The same is `host.feature_transfer`. Raises `AttachError` if nothing is attached.
    """
    found = host._modules.get(CHILD)
    if not isinstance(found, Transfers):
        inner = [name for name, module in host.named_modules() if CHILD in module._modules]
        told = f", something is to its module {inner[0]!r}: pass that" if inner else ""
        raise AttachError(f"model: nothing is attached to this {type(host).__name__}{told}")
    return found


def is_attached(host: nn.Module) -> bool:
    """Whether something is attached to `host` itself."""
    return isinstance(host._modules.get(CHILD), Transfers)


def attached_at(host: nn.Module, place: Place) -> TransferModule | None:
    """What is attached to `host` at `place`, if something is."""
    if is_attached(host) and place.name in transfers_of(host):
        return transfers_of(host)[place.name]
    return None


def install(
    host: nn.Module, place: Place, module: TransferModule, dtype: torch.dtype | None = None
) -> None:
    """Makes `module` act at `place`, on the host's device and in its dtype, or in `dtype`.

    Everything has been checked before.
    """
    like = host_parameter(host)
    if like is not None:
        module.to(like.device, dtype or like.dtype)
    elif dtype is not None:
        module.to(dtype)
    module.train(host.training)
    if not is_attached(host):
        host.add_module(CHILD, Transfers())
        host.register_forward_pre_hook(partial(_check_hooks, transfers_of(host)))
    transfers_of(host)[place.name] = module
    hook_modules(host, place)
    for method, function in _methods(host, place).items():
        setattr(host, method, partial(function, host))


def _methods(host: nn.Module, place: Place) -> dict[str, Callable[..., Any]]:
    """Methods of the host that are replaced while something is attached at `place`."""
    saves = {"save_pretrained": _save_pretrained} if hasattr(host, "save_pretrained") else {}
    return {**place.methods, **saves}


def hook_modules(host: nn.Module, place: Place) -> None:
    """Registers the hooks of `place`; cluster logits pass the classifiers by."""
    transfers = transfers_of(host)
    transfers.places[place.name] = place
    for name in place.inputs:
        classifier = host.get_submodule(name)
        if gives_clusters(transfers[place.name]):
            classifier.forward = partial(_pass_by, transfers, place.name, classifier)
        else:
            before = partial(_transfer_input, transfers, place.name)
            classifier.register_forward_pre_hook(before)
    for name in place.outputs:
        after = partial(_transfer_output, transfers, place.name)
        host.get_submodule(name).register_forward_hook(after)
    _forget_compiled()


def unhook_modules(host: nn.Module, place: str | None = None) -> None:
    """Removes the hooks of one place, or of all, wherever in the host they are."""
    transfers = transfers_of(host)
    for module in host.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook, transfers, place)]:
                del hooks[key]
        if _is_ours(vars(module).get("forward"), transfers, place):
            del module.forward
    _forget_compiled()


def _is_ours(hook: object, transfers: Transfers, place: str | None) -> bool:
    """Whether a hook is that of one place, or of any."""
    if not isinstance(hook, partial) or hook.args[:1] != (transfers,):
        return False
    if hook.func is _check_hooks:
        return place is None
    acts = hook.func in (_transfer_input, _transfer_output, _pass_by)
    return acts and place in (None, hook.args[1])


def uninstall(host: nn.Module, place: Place) -> None:
    """Takes away what is attached at one place."""
    transfers = transfers_of(host)
    if len(transfers) == 1:
        remove_all(host)
        return
    unhook_modules(host, place.name)
    del transfers[place.name], transfers.places[place.name]
    kept = {name for other in transfers.places.values() for name in _methods(host, other)}
    for method in _methods(host, place).keys() - kept:
        delattr(host, method)


def remove_all(host: nn.Module) -> None:
    """Takes everything away that `install` did; raises `AttachError` if nothing is attached."""
    unhook_modules(host)
    replaced = {name for p in transfers_of(host).places.values() for name in _methods(host, p)}
    for method in replaced:
        delattr(host, method)
    delattr(host, CHILD)


def _forget_compiled() -> None:
    """Lets whatever `torch.compile` has made of the host meet the hooks that are there now.

    Compiled code does not look whether hooks have changed since, and may be of a function or module
    around the host, which nothing tells: all that is compiled is compiled anew.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def gives_clusters(module: nn.Module) -> bool:
    """Whether a head's output is no feature of the backbone but k cluster logits."""
    return getattr(module, "output", None) == "clusters"


@contextmanager
def disabled(host: nn.Module) -> Iterator[None]:
    """Inside, the host gives its plain features; raises `AttachError` if nothing is attached."""
    token = _DISABLED.set(_DISABLED.get() | {id(transfers_of(host))})
    try:
        yield
    finally:
        _DISABLED.reset(token)


@contextmanager
def disturbed(transfers: Transfers, place: str) -> Iterator[None]:
    """Inside, what arrives at `place` is changed a lot, so that whatever hangs on it changes."""
    token = _DISTURBED.set(_DISTURBED.get() | {(id(transfers), place)})
    try:
        yield
    finally:
        _DISTURBED.reset(token)


def _disturb(features: Tensor) -> Tensor:
    """Another value for each number, which no norm behind it takes away."""
    steps = torch.arange(features.numel(), dtype=torch.float32, device=features.device)
    wave = steps.sin().view(features.shape).to(features.dtype)
    return features + (features.abs().amax() + 1) * wave


def check_host(host: nn.Module) -> None:
    """Raises `TypeError` or `AttachError` for what no head can be attached to."""
    if not isinstance(host, nn.Module):
        raise TypeError(f"model: got {type(host).__name__}, wanted a torch.nn.Module")
    if isinstance(host, torch.jit.ScriptModule):
        raise AttachError("model: got a TorchScript module, wanted the model before scripting")
    if hasattr(host, "_orig_mod"):
        raise AttachError("model: got a compiled module, attach first and compile after")
    if isinstance(host, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise AttachError(f"model: got a {type(host).__name__}, wanted the model in it, .module")
    for name, module in host.named_modules():
        kind = type(module)
        if ".quantized" in kind.__module__:
            raise AttachError(
                f"model: module {name!r} is quantised ({kind.__name__}), "
                "wanted a model in floating point"
            )
        if module._compiled_call_impl is not None:
            what = f"module {name!r}" if name else "it"
            raise AttachError(
                f"model: {what} was compiled in place, which ignores what is attached later; "
                "attach first and compile after"
            )
        if kind.__module__.partition(".")[0] == "peft":
            raise AttachError(
                f"model: module {name!r} is peft's {kind.__name__}, which freezes what is "
                "attached; wanted the model without it (attach first, then train_transfer_only)"
            )


def host_parameter(host: nn.Module) -> Tensor | None:
    """The host's last floating-point parameter: its device and dtype are followed."""
    tensors = [
        value
        for name, value in host.named_parameters()
        if value.is_floating_point() and not name.startswith(f"{CHILD}.")
    ]
    return tensors[-1] if tensors else None


def host_device(host: nn.Module) -> torch.device:
    """Of the host's parameters; in `with`, new tensors are made there, whatever torch's default."""
    like = host_parameter(host)
    return torch.device("cpu") if like is None else like.device


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
    image, like = (
        torch.zeros(1, input_channels(model), height, width, device="cpu"),
        host_parameter(model),
    )
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


def channel_axis(shape: tuple[int, ...]) -> int:
    """The axis of channels of 4-D maps of a square image, which are square: 1, or 3 (NHWC)."""
    return 3 if shape[1] == shape[2] != shape[3] else 1


def take_feature(host: nn.Module, place: Place, images: Tensor) -> Tensor:
    """The plain feature at `place`: `(n, d)` or `(n, d, h, w)`; what is attached is left out."""
    if is_attached(host):
        with disabled(host):
            return take_enabled_feature(host, place, images)
    return take_enabled_feature(host, place, images)


def take_enabled_feature(host: nn.Module, place: Place, images: Tensor) -> Tensor:
    """As `take_feature`, with what is attached before the place in use."""
    if place.feature is not None:
        return place.feature(host, images)
    taken: list[Tensor] = []

    def note(_: nn.Module, __: object, output: Any) -> None:
        taken.append(output if place.level is None else output[place.level])

    handles = [
        host.get_submodule(name).register_forward_pre_hook(lambda _, args: taken.append(args[0]))
        for name in place.inputs
    ] + [host.get_submodule(name).register_forward_hook(note) for name in place.outputs]
    try:
        run_host(host, place, images)
    finally:
        for handle in handles:
            handle.remove()
    if not taken or not isinstance(taken[0], Tensor):
        names = ", ".join((*place.inputs, *place.outputs))
        raise AttachError(f"where: no tensor passes {names} when the model runs")
    if place.module is not None and len(taken) > 1 and not place.repeats:
        raise AttachError(
            f"where, at: {place.module!r} runs {len(taken)} times for an image, wanted a module "
            "that runs once"
        )
    return taken[0]


def run_host(host: nn.Module, place: Place, images: Tensor) -> object:
    """Runs as much of the host as the place needs."""
    return host(images) if place.run is None else place.run(host, images)


def module_place(model: nn.Module, name: str) -> Place:
    """After a module by name. Of a `Sequential` its last module is hooked, also when run alone."""
    modules = dict(model.named_modules())
    if not name or name not in modules or name.startswith(f"{CHILD}."):
        raise no_place(model, f"where, at: no module {name!r}")
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    leaf = name
    while _runs_its_last_child(model.get_submodule(leaf)):
        last, child = list(model.get_submodule(leaf)._modules.items())[-1]
        if names[id(child)] > 1:  # what is shared runs for others too
            break
        leaf = f"{leaf}.{last}"
    if isinstance(model.get_submodule(leaf), _BatchNorm) and hasattr(model, "fuse"):
        raise no_place(
            model,
            f"where, at: {leaf!r} is a batch norm, which fuse() of {type(model).__name__} takes "
            "away with what is attached to it",
        )
    key = name.replace(".", "_")
    key = f"{key}_" if hasattr(Transfers(), key) else key
    return Place(key, None, outputs=(leaf,), module=name)


def _runs_its_last_child(module: nn.Module) -> bool:
    """Whether a module's result is that of its last child: a `Sequential` as torch has it."""
    return type(module).forward is nn.Sequential.forward and len(module._modules) > 0


def no_place(model: nn.Module, message: str) -> AttachError:
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


def _find(host: nn.Module, name: str) -> nn.Module | None:
    """The module of that name, if there is one."""
    module: nn.Module | None = host
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    return module


def _check_hooks(transfers: Transfers, host: nn.Module, args: object) -> None:
    """Before the host runs: raises `AttachError` where a module has come that has no hook."""
    if torch.compiler.is_compiling() or not transfers.enabled:
        return
    for place in transfers.places.values():
        for name in (*place.inputs, *place.outputs):
            module = _find(host, name)
            hooks = (
                ()
                if module is None
                else (
                    *module._forward_pre_hooks.values(),
                    *module._forward_hooks.values(),
                    vars(module).get("forward"),
                )
            )
            if not any(_is_ours(hook, transfers, place.name) for hook in hooks):
                raise AttachError(
                    f"model: module {name!r}, to which {place.name!r} was attached, was taken away "
                    "or replaced since; detach_transfer and attach again"
                )


def _transfer_input(
    transfers: Transfers, place: str, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    return (transfers.transfer(place, args[0]), *args[1:])


def _pass_by(transfers: Transfers, place: str, classifier: nn.Module, features: Tensor) -> Any:
    """In place of a classifier's `forward`: cluster logits; its own result while disabled."""
    if transfers.enabled:
        return transfers.transfer(place, features)
    return type(classifier).forward(classifier, features)


def _transfer_output(
    transfers: Transfers, place: str, module: nn.Module, args: tuple[Any, ...], output: Any
) -> Any:
    level = transfers.places[place].level
    if level is None:
        return transfers.transfer(place, output)
    changed = {level: transfers.transfer(place, output[level])}
    return type(output)((name, changed.get(name, maps)) for name, maps in output.items())


def _save_pretrained(host: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the host's own, whose `from_pretrained` would not attach anything."""
    warnings.warn(
        f"save_pretrained: from_pretrained of {type(host).__name__} gives the model without what "
        "is attached; save that by save_transfers besides, and attach it by load_transfers",
        stacklevel=2,
    )
    return type(host).save_pretrained(host, *args, **kwargs)


PLANES = {"nchw": (2, 3), "nhwc": (1, 2)}
"""Axes of the plane of maps, by layout."""


def pooled_feature(feature: Tensor, place: Place) -> Tensor:
    """What a place gives as vectors `(n, d)`: vectors as they are, maps averaged over their plane.

    Raises `AttachError` for what is neither, such as tokens `(n, t, d)`, and for maps at a place
    whose layout is not known (`with_layout`).
    """
    if feature.ndim == 2:
        return feature
    if feature.ndim == 4 and place.layout is not None:
        return feature.mean(PLANES[place.layout])
    raise _no_feature(place, tuple(feature.shape))


def with_layout(host: nn.Module, place: Place, image: Tensor) -> Place:
    """The place with the layout of its maps; as it is where it gives vectors, or has one already.

    Maps of a square image are square. Where all three sides are equal, or none, a run on the image
    twice as large tells: it changes the plane, and not the channels.

    Args:
        host: what the place is in.
        place: any.
        image: one square image `(1, c, s, s)` in the host's dtype, on its device.

    Raises:
        AttachError: what is neither vectors nor maps; maps of which neither run tells where
            channels are.
    """
    if place.layout is not None:
        return place
    with frozen(host):
        shape = tuple(take_feature(host, place, image).shape)
        if len(shape) == 2:
            return place
        if len(shape) != 4:
            raise _no_feature(place, shape)
        found = [name for name, (row, column) in PLANES.items() if shape[row] == shape[column]]
        if len(found) != 1:
            try:
                larger = tuple(take_feature(host, place, image.repeat(1, 1, 2, 2)).shape)
            except Exception:  # whatever a foreign model raises at a size that is not its own
                larger = shape
            moved = tuple(axis for axis in (1, 2, 3) if larger[axis] != shape[axis])
            found = [name for name, plane in PLANES.items() if plane == moved]
    if len(found) != 1:
        raise AttachError(
            f"where: {_names(place)} gives {shape} of a square image, which does not tell where "
            "channels are; name another module, or put one behind it that pools the maps"
        )
    return replace(place, layout=found[0])


def _no_feature(place: Place, shape: tuple[int, ...]) -> AttachError:
    return AttachError(
        f"where: {_names(place)} gives {shape}, wanted vectors (n, d), or maps (n, d, h, w) or "
        "(n, h, w, d)"
    )


def _names(place: Place) -> str:
    """The modules of a place, for messages."""
    return ", ".join((*place.inputs, *place.outputs)) or place.name
