"""What a part of the torture found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """Cases, and those that went wrong.

    Args:
        cases: how many were run.
        faults: a line for each that went wrong.
        figures: measured besides.
    """

    cases: int
    faults: Sequence[str]
    figures: Mapping[str, Any] = field(default_factory=dict)
