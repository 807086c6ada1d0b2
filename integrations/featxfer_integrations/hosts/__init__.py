"""What is known of other libraries' models, a file each; the registry that finds them."""

from __future__ import annotations

import importlib
import itertools
import sys
import warnings
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from featxfer_integrations.hosts.base import Host
from featxfer_integrations.mechanism.site import AttachError

_BUILT_IN = {
    "torchvision_detection": "torchvision",
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers_detection": "transformers",
    "transformers": "transformers",
    "open_clip": "open_clip",
    "ultralytics": "ultralytics",
    "ultralytics_classification": "ultralytics",
}
"""Modules of this folder, in the order that they are asked, and the library that each is of."""

_REGISTERED: list[Host] = []


def register_host(host: Host) -> None:
    """Makes a host of one's own known: it is asked before those that are known already.

    Raises `TypeError` for what is no `Host`; one of the same name takes its place.
    """
    if not isinstance(host, Host):
        raise TypeError(f"host: got {type(host).__name__}, wanted a featxfer_integrations.Host")
    _REGISTERED[:] = [host, *(known for known in _REGISTERED if known.name != host.name)]


def host_named(module: str) -> Host:
    """The host in one of this folder's modules, imported now."""
    found: Host = importlib.import_module(f"featxfer_integrations.hosts.{module}").HOST
    return found


def host_of(model: nn.Module) -> Host:
    """The host that owns a model; `Host()`, which asks to be told more, where none does.

    A built-in host is imported where its library has been, as that of a model has. One of a version
    that is not tested is warned of, once.
    """
    modules = (module for module, library in _BUILT_IN.items() if library in sys.modules)
    hosts = itertools.chain(_REGISTERED, map(_host_or_none, modules))
    host = next((host for host in hosts if host is not None and host.owns(model)), Host())
    if host.tested:
        _warn_if_untested(host.tested)
    return host


def unwrapped(model: Any) -> Any:
    """The module in a library's object around a model, as its host says; else the model itself."""
    return host_of(model).unwrapped(model)


def checked(model: Any) -> Any:
    """The same; raises `TypeError` or `AttachError` for what no module can be attached to."""
    host: object = unwrapped(model)
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
    return host


@cache
def _host_or_none(module: str) -> Host | None:
    """The host in a module; none, with a warning, where its library lacks what that imports."""
    try:
        return host_named(module)
    except ImportError as error:
        warnings.warn(f"host {module!r}: {error}; its models are not known", stacklevel=3)
        return None


@cache
def _warn_if_untested(tested: str) -> None:
    package, covered = tested.split()
    with suppress(PackageNotFoundError):
        if version(package).startswith(covered):
            return
        warnings.warn(
            f"{package} {version(package)}: featxfer was tested with {covered}*, and what is known "
            "of its models may have changed; attached_runs says whether what is attached acts",
            stacklevel=3,
        )
