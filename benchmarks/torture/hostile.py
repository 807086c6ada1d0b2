"""Archives that would write outside of their folder."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.torture.outcome import Outcome
from benchmarks.voc2007.fetch import FetchError, unpack

Member = tuple[tarfile.TarInfo, bytes]


def _file(name: str, data: bytes = b"hostile") -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def _special(name: str, kind: bytes, target: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def _run_by_all(name: str) -> Member:
    info, data = _file(name)
    info.mode = 0o6777
    return info, data


def hostile_tars(outside: Path) -> Mapping[str, list[Member]]:
    """Members by what they try, where `outside` is a folder that nothing may be written to."""
    return {
        "a path upwards": [_file("../escaped")],
        "a path down and upwards": [_file("VOCdevkit/../../escaped")],
        "an absolute path": [_file(f"{outside}/escaped")],
        "an absolute path behind slashes": [_file(f"//{outside}/escaped")],
        "a link to a folder outside, and a file through it": [
            _special("door", tarfile.SYMTYPE, str(outside)),
            _file("door/escaped"),
        ],
        "a relative link outside, and a file through it": [
            _special("door", tarfile.SYMTYPE, f"../{outside.name}"),
            _file("door/escaped"),
        ],
        "links one after the other": [
            _special("a", tarfile.SYMTYPE, "."),
            _special("a/b", tarfile.SYMTYPE, ".."),
            _file(f"a/b/{outside.name}/escaped"),
        ],
        "a hard link to a file outside, written to": [
            _special("door", tarfile.LNKTYPE, str(outside / "known")),
            _file("door"),
        ],
        "a relative hard link outside": [
            _special("door", tarfile.LNKTYPE, f"../{outside.name}/known"),
        ],
        "a device": [_special("device", tarfile.CHRTYPE)],
        "a named pipe": [_special("pipe", tarfile.FIFOTYPE)],
        "a program that runs as its owner": [_run_by_all("program")],
    }


def run_archives(folder: Path) -> Outcome:
    """Unpacks each: nothing is written, changed or linked to outside, and no special file made."""
    faults, refused = [], 0
    outside = folder / "outside"
    outside.mkdir(parents=True)
    (outside / "known").write_bytes(b"known")
    tars = hostile_tars(outside)
    for number, (name, members) in enumerate(tars.items()):
        place = folder / f"case{number}"
        archive = folder / f"case{number}.tar"
        with tarfile.open(archive, "w") as tar:
            for info, data in members:
                tar.addfile(info, io.BytesIO(data))
        before = _tree(folder, without=place)
        try:
            unpack([archive], place)
        except FetchError:
            refused += 1
        if _tree(folder, without=place) != before:
            faults.append(f"{name}: something outside was written")
        for path in place.rglob("*"):
            inside = path.resolve().is_relative_to(place.resolve())
            if not inside or not (path.is_file() or path.is_dir()) or path.stat().st_mode & 0o6000:
                faults.append(f"{name}: {path.name} was made")
            if path.is_file() and path.stat().st_nlink > 1:
                faults.append(f"{name}: {path.name} has another name elsewhere")
    return Outcome(len(tars), faults, {"refused": refused})


def _tree(folder: Path, *, without: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and without not in path.parents)
    return {str(path): path.read_bytes() for path in files}
