"""featxfer: label-free transfer of high-resolution features to low-resolution images."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featxfer._api import *  # noqa: F403
else:

    def __getattr__(name):
        """A public name, imported when it is first asked for, so that `featxfer --help` is fast."""
        from importlib import import_module

        api = import_module("featxfer._api")
        if name == "__all__" or name in api.__all__:
            return getattr(api, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})


__version__ = "0.1.0"
