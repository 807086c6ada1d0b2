"""What is said to people while something runs: on stderr, beside bars of progress."""

from __future__ import annotations

import sys

from tqdm import tqdm


def tell(message: str) -> None:
    """One line on stderr."""
    tqdm.write(f"featxfer: {message}", file=sys.stderr)
