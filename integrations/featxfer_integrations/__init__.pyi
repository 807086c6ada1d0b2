"""Hosts that featxfer plugs into: which models there are, their weights, where features are."""

from featxfer_integrations._attach import AttachError, transfers_of
from featxfer_integrations._fitting import HeldOutPairs, TransferFit
from featxfer_integrations.attach import (
    attach_transfer,
    attached_runs,
    detach_transfer,
    load_transfers,
    save_transfers,
    train_transfer_only,
    transfer_disabled,
)
from featxfer_integrations.backbones import BackboneError, load_backbone, load_model
from featxfer_integrations.corruptions import CorruptedDegradation
from featxfer_integrations.fit import backbone_of, fit_transfer

__all__ = [
    "AttachError",
    "BackboneError",
    "CorruptedDegradation",
    "HeldOutPairs",
    "TransferFit",
    "attach_transfer",
    "attached_runs",
    "backbone_of",
    "detach_transfer",
    "fit_transfer",
    "load_backbone",
    "load_model",
    "load_transfers",
    "save_transfers",
    "train_transfer_only",
    "transfer_disabled",
    "transfers_of",
]
