"""Public names of a package that are imported when one is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazily(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names are those of its module `_api`.

    Its modules must have other names than what is public: an import would hide that.
    """

    def get(name: str) -> Any:
        """A public name; kept in the package, so that this runs once for it."""
        api = import_module(f"{package}._api")
        if name != "__all__" and name not in api.__all__:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(api, name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *get("__all__")})

    return get, names
