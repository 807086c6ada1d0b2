"""A fit that a benchmark asks for: what it hangs on, and then what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from featxfer import FeatureTransferHead, Images
from featxfer_integrations import TransferFit, fit_key, fit_transfer, transfers_of


@dataclass(frozen=True)
class Fit:
    """A call of `fit_transfer`.

    Args:
        model: of the caller's own; it is trained in place.
        images: HR images.
        cache: folder.
        arguments: the others, by name.
    """

    model: nn.Module
    images: Images
    cache: Path
    arguments: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Of all that it hangs on."""
        return fit_key(self.model, self.images, **self.arguments)

    def run(self) -> TransferFit:
        """Trains, and leaves what is trained attached."""
        return fit_transfer(self.model, self.images, cache=self.cache, **self.arguments)


def head_of(model: nn.Module) -> FeatureTransferHead:
    """The one head that is attached."""
    modules = transfers_of(model).values()
    (head,) = (module for module in modules if isinstance(module, FeatureTransferHead))
    return head
