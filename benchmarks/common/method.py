"""A method of a table, and the fit that it hangs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def nothing(*_: Any, **__: Any) -> None:
    """A method hangs on no fit."""


@dataclass(frozen=True)
class Method(Generic[P, T]):
    """What makes a row of a table, or several.

    Args:
        labels: of the rows.
        run: makes what is judged.
        seeded: whether the seed changes it.
        choices: what it hangs on besides its labels and what `run` is given, as JSON types, from
            what `run` is given.
    """

    labels: tuple[str, ...]
    run: Callable[P, T]
    seeded: bool = True
    choices: Callable[P, Any] = nothing

    @property
    def label(self) -> str:
        """Of the first row."""
        return self.labels[0]

    def seeds(self, count: int) -> range:
        """The seeds that it is run with, of `count` seeds: 0 alone where none changes it."""
        return range(count if self.seeded else 1)
