"""Writing a file so that a reader sees all of it or nothing, whatever happens to the writer."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path


class DiskError(OSError):
    """A file could not be written; what was there before is unharmed."""


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path` through a temporary file beside it, fsync and `os.replace`.

    Raises `DiskError` with the bytes needed and the bytes free. An older `path` is then as it was.
    """
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Writes several files of one folder: all are on the disk before the first is put in place.

    A full disk leaves every older file as it was; errors as `write_atomic`.
    """
    temporaries = {
        path: path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        for path in files
    }
    path = next(iter(files))
    try:
        for path, temporary in temporaries.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_synced(temporary, files[path])
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        size = sum(map(len, files.values()))
        raise DiskError(error.errno or errno.EIO, _explain(path, size, error)) from error
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
