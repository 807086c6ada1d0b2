"""The files that a benchmark leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from featxfer.files import write_atomic


def write_files(out: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes files into a folder by name, each whole or not at all."""
    for name, data in files.items():
        write_atomic(out / name, data.encode() if isinstance(data, str) else data)


def to_json(results: Mapping[str, Any]) -> str:
    """As `results.json` has it."""
    return json.dumps(results, indent=1) + "\n"


def write_results(
    out: Path,
    results: Mapping[str, Any],
    summary: str,
    pictures: Mapping[str, bytes] | None = None,
) -> None:
    """Writes `results.json`, `summary.md` and pictures by name, and prints the summary."""
    files = {"results.json": to_json(results), "summary.md": summary}
    write_files(out, files)
    write_files(out, pictures or {})
    click.echo(f"{summary}\nWrote {', '.join([*files, *(pictures or {})])} to {out}")
