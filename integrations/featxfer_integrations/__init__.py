"""Hosts that featxfer plugs into: which models there are, their weights, where features are."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featxfer_integrations._api import *  # noqa: F403
else:
    from featxfer._lazy import lazily

    __getattr__, __dir__ = lazily(__name__)
