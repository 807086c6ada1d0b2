"""How modules are attached to a host, switched off and taken away; knows torch only."""

from __future__ import annotations

import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from featxfer import FeatureTransferBlock
from featxfer.modules.base import TransferModule
from featxfer_integrations.mechanism.site import CHILD, AttachError, Site

T = TypeVar("T")

_DISABLED: ContextVar[frozenset[int | str]] = ContextVar("_DISABLED", default=frozenset())
"""`key` of each `Transfers` that is disabled, in this thread (or task) and in no other."""

_DISTURBED: ContextVar[frozenset[tuple[int | str, str]]] = ContextVar(
    "_DISTURBED", default=frozenset()
)
"""`key` of a `Transfers` and site where features are disturbed, in this thread."""


class Transfers(nn.ModuleDict):
    """What is attached to one host, by site; the host's only new child.

    It is a child of the host and not of the hooked modules, since these may be replaced
    (`reset_classifier`), may be several that share one head, or run their children (`Sequential`).
    A host that is a `Sequential` runs this module last: it returns what it gets.

    Attributes:
        sites: where it acts, by name.
        origin: where the host is run as copies of it, by a predictor say, what these share.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Site] = {}
        self.origin = ""

    def share(self) -> None:
        """From now on copies are disabled with it; those that were made before are not."""
        self.origin = uuid.uuid4().hex

    @property
    def key(self) -> int | str:
        """By which it is disabled: its own, or that of its copies too."""
        return self.origin or id(self)

    @property
    def enabled(self) -> bool:
        """Whether it acts in this thread, see `transfer_disabled`."""
        return self.key not in _DISABLED.get()

    def __getitem__(self, key: str) -> TransferModule:
        """What is attached at a site."""
        module = super().__getitem__(key)
        assert isinstance(module, TransferModule)
        return module

    def forward(self, value: Any) -> Any:
        """The value itself."""
        return value

    def transfer(self, site: str, value: Any) -> Any:
        """What passes at `site` through what is attached there, or as it is while disabled."""
        if not self.enabled:
            return value
        lens = self.sites[site].lens
        features = lens.get(value)
        if (self.key, site) in _DISTURBED.get():
            features = _disturb(features)
        return lens.put(value, self[site](features))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A checkpoint of the plain host, without any of these tensors, leaves them as they are."""
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def transfers_of(host: nn.Module) -> Transfers:
    """What is attached to `host`, by site: "head", or the stage's or module's name without dots.

    The same is `host.feature_transfer`. Raises `AttachError` if nothing is attached.
    """
    found = getattr(host, CHILD, None)  # what wraps a host may pass its attributes on
    if not isinstance(found, Transfers):
        inner = [name for name, module in host.named_modules() if CHILD in module._modules]
        told = f", something is to its module {inner[0]!r}: pass that" if inner else ""
        raise AttachError(f"model: nothing is attached to this {type(host).__name__}{told}")
    return found


def is_attached(host: nn.Module) -> bool:
    """Whether something is attached to `host` itself."""
    return isinstance(getattr(host, CHILD, None), Transfers)


def attached_at(host: nn.Module, site: Site) -> TransferModule | None:
    """What is attached to `host` at `site`, if something is."""
    if is_attached(host) and site.name in transfers_of(host):
        return transfers_of(host)[site.name]
    return None


def attached_sites(host: nn.Module) -> list[Site]:
    """Where something is attached to `host`, in the order that it was."""
    return list(transfers_of(host).sites.values()) if is_attached(host) else []


def install(
    host: nn.Module, site: Site, module: TransferModule, dtype: torch.dtype | None = None
) -> None:
    """Makes a checked `module` act at `site`, on the host's device and in its dtype, or `dtype`."""
    like = host_parameter(host)
    if like is not None:
        module.to(like.device, dtype or like.dtype)
    elif dtype is not None:
        module.to(dtype)
    module.train(host.training)
    if not is_attached(host):
        host.add_module(CHILD, Transfers())
        host.register_forward_pre_hook(partial(_check_hooks, transfers_of(host)))
    transfers_of(host)[site.name] = module
    hook_modules(host, site)
    for method, function in replaced_methods(host, [site]).items():
        setattr(host, method, partial(function, host))


def replaced_methods(host: nn.Module, sites: Sequence[Site]) -> dict[str, Callable[..., Any]]:
    """Methods of the host that are replaced while something is attached at these sites."""
    found = {name: function for site in sites for name, function in site.methods.items()}
    if sites and hasattr(host, "save_pretrained"):
        found["save_pretrained"] = _save_pretrained
    return found


def hook_modules(host: nn.Module, site: Site) -> None:
    """Registers the hooks of `site`; cluster logits pass the classifiers by."""
    transfers = transfers_of(host)
    transfers.sites[site.name] = site
    for name in site.modules:
        module = host.get_submodule(name)
        if site.side == "output":
            hook = partial(_transfer_output, transfers, site.name)
            module.register_forward_hook(hook, prepend=True)  # what others record is transferred
        elif gives_clusters(transfers[site.name]):
            module.forward = partial(_pass_by, transfers, site.name, module)
        else:
            before = partial(_transfer_input, transfers, site.name)
            module.register_forward_pre_hook(before, prepend=True)
    if site.layout == "tokens" and (patches := patch_layer(host)) is not None:
        patches.register_forward_hook(partial(_check_grid, transfers, site.name))
    _forget_compiled()


def patch_layer(host: nn.Module) -> nn.Conv2d | None:
    """The host's first convolution, which makes patches of images where tokens pass."""
    named = (m for name, m in host.named_modules() if name.partition(".")[0] != CHILD)
    return next((module for module in named if isinstance(module, nn.Conv2d)), None)


def unhook_modules(host: nn.Module, site: str | None = None) -> None:
    """Removes the hooks of one site, or of all, wherever in the host they are."""
    for module in host.modules():
        for holder, key in _hooks_of(module, transfers_of(host), site):
            del holder[key]
    _forget_compiled()


def _hooks_of(
    module: nn.Module, transfers: Transfers, site: str | None
) -> list[tuple[dict[Any, Any], Any]]:
    """What holds the hooks of one site, or all of ours, on a module, with their keys there."""
    return [
        (holder, key)
        for holder in (module._forward_pre_hooks, module._forward_hooks, vars(module))
        for key, hook in holder.items()
        if isinstance(hook, partial) and hook.args and hook.args[0] is transfers
        if site in (None, *hook.args[1:2])
    ]


def uninstall(host: nn.Module, site: Site | None = None) -> None:
    """Takes away what is attached at one site, or all; `AttachError` if nothing is attached."""
    transfers, attached = transfers_of(host), attached_sites(host)
    kept = [other for other in attached if site is not None and other.name != site.name]
    unhook_modules(host, site.name if site is not None and kept else None)
    for method in replaced_methods(host, attached).keys() - replaced_methods(host, kept).keys():
        delattr(host, method)
    if site is not None and kept:
        del transfers[site.name], transfers.sites[site.name]
    else:
        delattr(host, CHILD)


def _forget_compiled() -> None:
    """Lets whatever `torch.compile` has made of the host meet the hooks that are there now.

    Compiled code does not look whether hooks have changed since, and may be of a function or module
    around the host, which nothing tells: all that is compiled is compiled anew.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def gives_clusters(module: object) -> bool:
    """Whether a head's output is no feature of the backbone but k cluster logits."""
    return getattr(module, "output", None) == "clusters"


@contextmanager
def transfer_disabled(host: nn.Module) -> Iterator[None]:
    """Inside, the host gives its plain features, in this thread alone (or in this task).

    Raises `AttachError` if nothing is attached.
    """
    with _within(_DISABLED, transfers_of(host).key):
        yield


@contextmanager
def disturbed(transfers: Transfers, site: str) -> Iterator[None]:
    """Inside, what arrives at `site` is changed a lot, so that whatever hangs on it changes."""
    with _within(_DISTURBED, (transfers.key, site)):
        yield


@contextmanager
def _within(variable: ContextVar[frozenset[T]], value: T) -> Iterator[None]:
    """Inside, the value is one of those of the variable."""
    token = variable.set(variable.get() | {value})
    try:
        yield
    finally:
        variable.reset(token)


def _disturb(features: Tensor) -> Tensor:
    """Another value for each number, which no norm behind it takes away."""
    steps = torch.arange(features.numel(), dtype=torch.float32, device=features.device)
    wave = steps.sin().view(features.shape).to(features.dtype)
    return features + (features.abs().amax() + 1) * wave


def host_parameter(host: nn.Module) -> Tensor | None:
    """The weight of the host's last convolution or linear layer: its device and dtype are followed.

    In mixed precision others have another dtype. Of a host without such a layer it is the last
    floating-point parameter.
    """
    last = weight = None
    for name, module in host.named_modules():
        if name.partition(".")[0] == CHILD:
            continue
        for value in module.parameters(recurse=False):
            if value.is_floating_point():
                last = value
                weight = value if isinstance(module, nn.Linear | _ConvNd) else weight
    return last if weight is None else weight


def host_device(host: nn.Module) -> torch.device:
    """Of the host's parameters; in `with`, new tensors are made there, whatever torch's default."""
    like = host_parameter(host)
    return torch.device("cpu") if like is None else like.device


def _check_hooks(transfers: Transfers, host: nn.Module, args: object) -> None:
    """Before the host runs: raises `AttachError` where a module has come that has no hook."""
    if torch.compiler.is_compiling() or not transfers.enabled:
        return
    for site in transfers.sites.values():
        for name in site.modules:
            found = False
            with suppress(AttributeError):  # there is no such module any more
                found = bool(_hooks_of(host.get_submodule(name), transfers, site.name))
            if not found:
                raise AttachError(
                    f"model: module {name!r}, to which {site.name!r} was attached, was taken away "
                    "or replaced since; detach_transfer and attach again"
                )


def _check_grid(
    transfers: Transfers, site: str, patches: nn.Module, args: object, output: Tensor
) -> None:
    """After what makes patches: raises `AttachError` for a grid that a block takes for another."""
    block, (rows, columns) = transfers[site], output.shape[-2:]
    if not isinstance(block, FeatureTransferBlock) or not transfers.enabled:
        return
    high, wide = block.grid or (1, 1)
    if rows * wide != columns * high:
        raise AttachError(
            f"images: they make {rows} x {columns} patches, wanted them in the proportion "
            f"{high} : {wide} of the images that the block at {site!r} was made for"
        )


def _transfer_input(
    transfers: Transfers, site: str, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    return (transfers.transfer(site, args[0]), *args[1:])


def _pass_by(transfers: Transfers, site: str, classifier: nn.Module, features: Tensor) -> Any:
    """In place of a classifier's `forward`: cluster logits; its own result while disabled."""
    if transfers.enabled:
        return transfers.transfer(site, features)
    return type(classifier).forward(classifier, features)


def _transfer_output(
    transfers: Transfers, site: str, module: nn.Module, args: tuple[Any, ...], output: Any
) -> Any:
    return transfers.transfer(site, output)


def _save_pretrained(host: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the host's own, whose `from_pretrained` would not attach anything."""
    warnings.warn(
        f"save_pretrained: from_pretrained of {type(host).__name__} gives the model without what "
        "is attached; save that by save_transfers besides, and attach it by load_transfers",
        stacklevel=2,
    )
    return type(host).save_pretrained(host, *args, **kwargs)
