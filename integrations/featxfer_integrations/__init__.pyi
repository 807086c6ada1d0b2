"""Hosts that featxfer plugs into: attach, fit, save; which models there are, and their weights."""

from featxfer_integrations.corruptions import CorruptedDegradation
from featxfer_integrations.fit import TransferFit, backbone_of, fit_key, fit_transfer
from featxfer_integrations.hosts import host_of, register_host
from featxfer_integrations.hosts.base import Host
from featxfer_integrations.hosts.load import BackboneError, load_backbone, load_model
from featxfer_integrations.mechanism.attach import transfer_disabled, transfers_of
from featxfer_integrations.mechanism.proof import attached_runs
from featxfer_integrations.mechanism.site import AttachError, Site
from featxfer_integrations.options import FitOptions
from featxfer_integrations.transfer import (
    attach_transfer,
    detach_transfer,
    load_transfers,
    save_transfers,
    train_transfer_only,
)

__all__ = [
    "AttachError",
    "BackboneError",
    "CorruptedDegradation",
    "FitOptions",
    "Host",
    "Site",
    "TransferFit",
    "attach_transfer",
    "attached_runs",
    "backbone_of",
    "detach_transfer",
    "fit_key",
    "fit_transfer",
    "host_of",
    "load_backbone",
    "load_model",
    "load_transfers",
    "register_host",
    "save_transfers",
    "train_transfer_only",
    "transfer_disabled",
    "transfers_of",
]
