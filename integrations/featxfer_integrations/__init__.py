"""Hosts that featxfer plugs into: which models there are, their weights, where features are."""

from featxfer_integrations._attach import AttachError
from featxfer_integrations.attach import (
    attach_transfer,
    detach_transfer,
    train_transfer_only,
    transfer_disabled,
)
from featxfer_integrations.backbones import BackboneError, load_backbone

__all__ = [
    "AttachError",
    "BackboneError",
    "attach_transfer",
    "detach_transfer",
    "load_backbone",
    "train_transfer_only",
    "transfer_disabled",
]
