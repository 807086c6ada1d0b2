from __future__ import annotations

import functools
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets.voc import DATASET_YEAR_DICT

from benchmarks.voc2007 import fetch
from benchmarks.voc2007.fetch import FetchError


def tar_bytes(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(self.path)  # type: ignore[attr-defined]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    """A local stand-in for VOC's host, at the addresses that torchvision is told of."""
    served = tmp_path / "served"
    served.mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(served))
    )
    server.requests = []  # type: ignore[attr-defined]
    for year in fetch.YEARS:
        data = tar_bytes({f"VOCdevkit/VOC2007/JPEGImages/{year}.jpg": year.encode()})
        entry = dict(DATASET_YEAR_DICT[year])
        (served / entry["filename"]).write_bytes(data)
        entry["url"] = f"http://127.0.0.1:{server.server_port}/{entry['filename']}"
        entry["md5"] = hashlib.md5(data).hexdigest()
        monkeypatch.setitem(DATASET_YEAR_DICT, year, entry)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_both_archives_are_downloaded_checked_and_unpacked(
    host: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fetch.download(tmp_path / "voc")
    images = folder / "VOCdevkit" / "VOC2007" / "JPEGImages"
    assert sorted(p.name for p in images.iterdir()) == ["2007-test.jpg", "2007.jpg"]
    assert len(host.requests) >= 2
    before = len(host.requests)
    fetch.download(tmp_path / "voc")
    assert len(host.requests) == before, "what is there is not downloaded again"


def test_another_md5_is_refused(host: Any, tmp_path: Path) -> None:
    entry = DATASET_YEAR_DICT["2007"]
    (tmp_path / "served" / entry["filename"]).write_bytes(tar_bytes({"VOCdevkit/x": b"changed"}))
    with pytest.raises(
        FetchError, match=r"download: http://127.*or an unpacked devkit with --root"
    ):
        fetch.download(tmp_path / "voc")
    assert not (tmp_path / "voc" / "VOCdevkit").exists()


def test_an_unreachable_host_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {**DATASET_YEAR_DICT["2007"], "url": "http://127.0.0.1:9/voc.tar"}
    monkeypatch.setitem(DATASET_YEAR_DICT, "2007", entry)
    with pytest.raises(FetchError, match=r"get VOCtrainval_06-Nov-2007\.tar elsewhere and pass"):
        fetch.download(tmp_path / "voc")


def test_local_archives_are_unpacked_once(tmp_path: Path) -> None:
    archive = tmp_path / "voc.tar"
    archive.write_bytes(tar_bytes({"VOCdevkit/a.txt": b"a"}))
    folder = fetch.unpack([archive], tmp_path / "out")
    assert (folder / "VOCdevkit" / "a.txt").read_bytes() == b"a"
    (folder / "VOCdevkit" / "a.txt").unlink()
    fetch.unpack([archive], tmp_path / "out")
    assert not (folder / "VOCdevkit" / "a.txt").exists()


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/featxfer-evil.txt", "a/../../evil.txt"])
def test_members_that_would_land_outside_are_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "hostile.tar"
    archive.write_bytes(tar_bytes({name: b"evil"}))
    try:
        fetch.unpack([archive], tmp_path / "out")
    except FetchError as error:
        assert "cannot be unpacked" in str(error)  # noqa: PT017 - absolute names are made relative
    outside = [p for p in tmp_path.rglob("*evil*") if (tmp_path / "out") not in p.parents]
    assert outside == []
    assert not Path("/tmp/featxfer-evil.txt").exists()


@pytest.mark.parametrize("data", [b"", b"no tar at all", tar_bytes({"a": b"x" * 5000})[:2000]])
def test_archives_that_are_cut_short_are_named(tmp_path: Path, data: bytes) -> None:
    archive = tmp_path / "short.tar"
    archive.write_bytes(data)
    with pytest.raises(FetchError, match=r"tar: .*short\.tar cannot be unpacked"):
        fetch.unpack([archive], tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*unpacked"))


def test_other_archives_have_another_folder(tmp_path: Path) -> None:
    archive = tmp_path / "voc.tar"
    archive.write_bytes(tar_bytes({"VOCdevkit/a.txt": b"a"}))
    first = fetch.archives_folder([archive], tmp_path)
    assert fetch.archives_folder([archive], tmp_path) == first
    archive.write_bytes(tar_bytes({"VOCdevkit/a.txt": b"b" * 9999}))
    assert fetch.archives_folder([archive], tmp_path) != first
    with pytest.raises(FetchError, match=r"tar: .*none\.tar is not a file"):
        fetch.archives_folder([tmp_path / "none.tar"], tmp_path)


def test_a_missing_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"tar: .*none\.tar cannot be unpacked"):
        fetch.unpack([tmp_path / "none.tar"], tmp_path / "out")
