"""Hosts that featxfer plugs into: which models there are, their weights, where features are."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featxfer_integrations._api import *  # noqa: F403
else:

    def __getattr__(name):
        """A public name, imported when it is first asked for, so that `featxfer --help` is fast."""
        from importlib import import_module

        api = import_module("featxfer_integrations._api")
        if name == "__all__" or name in api.__all__:
            return getattr(api, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
