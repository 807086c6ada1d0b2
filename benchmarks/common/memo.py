"""Finished pieces of a benchmark, kept on disk by what they were computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.versions import versions
from featxfer.files import write_atomic


def hash_key(key: Mapping[str, Any]) -> str:
    """32 hex digits that stand for a JSON-shaped key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


class Memo:
    """A folder of JSON values by key: a value that is there is read, not computed again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The value of `key` under the installed versions of packages.

        Computed the first time, and then written whole or not at all.
        """
        key = {**key, "versions": versions()}
        path = self.folder / f"{hash_key(key)}.json"
        if not path.is_file():
            text = json.dumps({"key": key, "value": compute()}, indent=1) + "\n"
            write_atomic(path, text.encode())
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["value"]
        return value
