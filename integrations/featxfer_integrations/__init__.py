"""Hosts that featxfer plugs into: which models there are, their weights, where features are."""

from featxfer_integrations.backbones import BackboneError, load_backbone

__all__ = ["BackboneError", "load_backbone"]
