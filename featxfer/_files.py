"""Writing a file so that a reader sees all of it or nothing, whatever happens to the writer."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path


class DiskError(OSError):
    """A file could not be written; what was there before is unharmed."""


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path` through a temporary file beside it, fsync and `os.replace`.

    Raises `DiskError` with the bytes needed and the bytes free. An older `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise DiskError(error.errno or errno.EIO, _explain(path, len(data), error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(path: Path, size: int, error: OSError) -> str:
    existing = next(p for p in path.absolute().parents if p.exists())
    free = shutil.disk_usage(existing).free
    return (
        f"could not write {path}: {error.strerror or error}; "
        f"{size:,} bytes needed, {free:,} free there. Files written before it are intact"
    )
