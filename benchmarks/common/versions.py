"""Versions of what figures depend on, for keys and for results."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version

import torch

import featxfer

PACKAGES = ("torchvision", "timm", "numpy", "scipy", "pillow", "scikit-learn", "faiss-cpu")


@cache
def versions() -> dict[str, str]:
    """Version of Python and of every package that figures depend on, by name."""
    return {
        "python": platform.python_version(),
        "featxfer": featxfer.__version__,
        "torch": torch.__version__,
        **{name: version(name) for name in PACKAGES},
    }
