"""featxfer: label-free transfer of high-resolution features to low-resolution images."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featxfer._api import *  # noqa: F403
else:
    from featxfer._lazy import lazily

    __getattr__, __dir__ = lazily(__name__)

__version__ = "0.1.0"
