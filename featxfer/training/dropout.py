"""Which generator dropout draws from while a module is trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from featxfer.modules.head import FeatureTransferHead


@contextmanager
def dropout_from(module: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Dropout of heads draws from `generator` inside."""
    heads = [part for part in module.modules() if isinstance(part, FeatureTransferHead)]
    former = [head.generator for head in heads]
    for head in heads:
        head.generator = generator
    try:
        yield
    finally:
        for head, own in zip(heads, former, strict=True):
            head.generator = own


def warn_of_dropout(module: nn.Module) -> None:
    """Warns of layers in training mode that draw from torch's global generator."""
    for name, part in module.named_modules():
        if isinstance(part, _DropoutNd) and part.training and part.p > 0:
            warnings.warn(
                f"head: {name or type(part).__name__} draws from torch's global generator, so the "
                "same seed does not give the same weights, nor does a checkpoint; seed it in "
                "`order` of your `PairSource`, or drop by a FeatureTransferHead",
                stacklevel=3,
            )
            return
