"""VOC2007's archives: downloaded with torchvision's addresses and md5 sums, or taken from disk."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets.utils import download_url
from torchvision.datasets.voc import DATASET_YEAR_DICT

YEARS = ("2007", "2007-test")


class FetchError(RuntimeError):
    """An archive could not be had or unpacked; the message names it."""


def download(folder: Path) -> Path:
    """Downloads VOC2007's two archives into `folder`, checks their md5 and unpacks them there.

    What is there already, whole, is not downloaded or unpacked again. Returns `folder`. Raises
    `FetchError` where an archive cannot be downloaded or does not have its md5 sum.
    """
    archives = []
    for year in YEARS:
        entry = DATASET_YEAR_DICT[year]
        try:
            download_url(entry["url"], str(folder), entry["filename"], entry["md5"])
        except (OSError, RuntimeError) as error:
            raise FetchError(
                f"download: {entry['url']}: {error}; get {entry['filename']} elsewhere and pass "
                "it with --tar, or an unpacked devkit with --root"
            ) from error
        archives.append(folder / entry["filename"])
    return unpack(archives, folder)


def archives_folder(archives: Sequence[Path], parent: Path) -> Path:
    """A folder for these archives alone: other ones, or changed ones, have another."""
    digest = hashlib.sha256()
    for archive in archives:
        if not archive.is_file():
            raise FetchError(f"tar: {archive} is not a file")
        status = archive.stat()
        digest.update(f"{archive.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return parent / f"tar-{digest.hexdigest()[:16]}"


def unpack(archives: Sequence[Path], folder: Path) -> Path:
    """Unpacks tar archives into `folder`, each once; members that would land outside are refused.

    Returns `folder`. Raises `FetchError` for a file that is missing, no tar, cut short or hostile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        done = folder / f".{archive.name}.unpacked"
        if done.exists():
            continue
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        except (OSError, EOFError, tarfile.TarError) as error:
            raise FetchError(f"tar: {archive} cannot be unpacked: {error}") from error
        done.touch()
    return folder
