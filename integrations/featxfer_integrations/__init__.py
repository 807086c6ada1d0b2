"""Hosts that featxfer plugs into: which models there are, their weights, where features are.

What is public is re-exported in `__init__.pyi`, on one screen.
"""

from featxfer.lazy import lazily

__getattr__, __dir__ = lazily(__name__)
