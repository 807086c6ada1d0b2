from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featxfer.features.store import (
    FeatureRows,
    FeatureStore,
    Manifest,
    StoreError,
    align,
    damaged_parts,
    read_skipped,
)
from featxfer.files import DiskError

MANIFEST = Manifest(
    view={"view": "hr"},
    backbone="tiny",
    host="host 1.0",
    architecture_sha256="12" * 32,
    weights_sha256="ab" * 32,
    preprocessing={"mean": [0.5]},
    precision="fp32",
    images_fingerprint="cd" * 32,
    image_count=10,
    part_rows=4,
    software={"torch": "2"},
)


def part(index: int) -> FeatureRows:
    """Part `index` of ten rows, four a part; image 5 cannot be read."""
    numbers = [n for n in range(index * 4, min(index * 4 + 4, 10)) if n != 5]
    features = torch.tensor(numbers, dtype=torch.float32)[:, None] * torch.ones(3)
    return FeatureRows(tuple(map(str, numbers)), features, {"5": "cut short"} if index == 1 else {})


def fill(store: FeatureStore) -> None:
    for index in store.missing_parts():
        store.write_part(index, part(index))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MANIFEST)
    assert store.missing_parts() == [0, 1, 2]
    for index in (2, 0, 1):
        store.write_part(index, part(index))
    rows = FeatureStore(tmp_path, MANIFEST).read()
    assert rows.ids == tuple("012346789")
    assert rows.features[:, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert rows.skipped == {"5": "cut short"}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Manifest)])
def test_any_changed_field_is_another_store(tmp_path: Path, field: str) -> None:
    changed: Any = {
        "view": {"view": "hr", "size": 1},
        "preprocessing": {},
        "software": {},
        "image_count": 11,
        "part_rows": 5,
    }
    other = dataclasses.replace(MANIFEST, **{field: changed.get(field, "other")})
    fill(FeatureStore(tmp_path, MANIFEST))
    assert 0 in FeatureStore(tmp_path, other).missing_parts()


def test_a_manifest_of_another_config_is_refused(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MANIFEST)
    path = store.directory / "manifest.json"
    path.write_text(path.read_text().replace("tiny", "huge"))
    with pytest.raises(StoreError, match="is a cache from another config"):
        FeatureStore(tmp_path, MANIFEST)


def test_a_finished_part_is_never_rewritten(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MANIFEST)
    fill(store)
    before = contents(tmp_path)
    store.write_part(0, part(1))
    assert contents(tmp_path) == before


def test_rows_are_taken_from_the_disk_by_index(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MANIFEST)
    fill(store)
    stored, rows = store.open_rows(), store.read()
    assert stored.ids == rows.ids
    for chosen in ([7, 0, 3, 3], [8], []):
        indices = torch.tensor(chosen, dtype=torch.int64)
        assert torch.equal(stored.take(indices), rows.features[indices])


@pytest.mark.parametrize("names", [(), {"0"}, {"1": "why", "6": "why"}, set("0123"), {"8", "9"}])
def test_rows_of_some_images_are_taken_out_in_memory_and_on_disk_alike(
    tmp_path: Path, names: Any
) -> None:
    store = FeatureStore(tmp_path, MANIFEST)
    fill(store)
    rows, stored = store.read().without(names), store.open_rows().without(names)
    wanted = [name for name in "012346789" if name not in names]
    assert rows.ids == stored.ids == tuple(wanted)
    assert rows.features[:, 0].tolist() == [float(name) for name in wanted]
    assert torch.equal(stored.take(torch.arange(len(stored))), rows.features)
    assert rows.skipped == stored.skipped == {"5": "cut short"}


def test_an_incomplete_store_says_which_part(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MANIFEST)
    store.write_part(0, part(0))
    with pytest.raises(StoreError, match="part 1 of 3 is missing"):
        store.read()


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MANIFEST)
    fill(store)
    path = sorted(store.directory.glob("part-*"))[1]
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert damaged_parts(store.directory) == [path]
        with pytest.raises(StoreError, match="is damaged; delete it"):
            store.read()
    path.write_bytes(data)
    assert damaged_parts(store.directory) == []


def test_what_a_part_skipped_is_read_from_the_head_of_its_file(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MANIFEST)
    fill(store)
    files = store.parts()
    assert [read_skipped(files[part]) for part in range(3)] == [{}, {"5": "cut short"}, {}]
    data = files[1].read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    files[1].write_bytes(data[:head] + bytes(len(data) - head))
    assert read_skipped(files[1]) == {"5": "cut short"}
    for cut in (0, 4, 20, head - 1):
        files[1].write_bytes(data[:cut])
        with pytest.raises(StoreError, match="is damaged; delete it"):
            read_skipped(files[1])


def test_rows_are_read_whatever_the_default_device(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MANIFEST)
    with torch.device("meta"):
        nothing = dataclasses.replace(MANIFEST, image_count=0)
        assert FeatureStore(tmp_path, nothing).read().features.device.type == "cpu"
    fill(store)
    indices = torch.tensor([8, 2])
    with torch.device("meta"):
        rows, taken = store.read(), store.open_rows().take(indices)
    assert torch.equal(taken, rows.features[indices])


def test_views_of_different_images_do_not_align() -> None:
    with pytest.raises(StoreError, match="views of different images: 4 and 3 rows"):
        align([part(0), part(1)])


class Faults:
    """Raises at the `at`-th call among all calls that are guarded."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == self.at:
                raise self.error
            return run(*args, **kwargs)

        return guarded


class FaultyFile(io.FileIO):
    """Writes half, then may fail, then writes the rest."""

    faults: Faults

    def write(self, data: Any) -> int:
        super().write(data[: len(data) // 2])
        self.faults(super().write)(data[len(data) // 2 :])
        return len(data)


def inject(faults: Faults, patch: pytest.MonkeyPatch) -> None:
    def faulty_open(path: Path, mode: str) -> FaultyFile:
        file = FaultyFile(path, mode.replace("b", ""))
        file.faults = faults
        return file

    patch.setattr("featxfer.files.open", faulty_open, raising=False)
    patch.setattr("featxfer.files.os.fsync", faults(os.fsync))
    patch.setattr("featxfer.files.os.replace", faults(os.replace))


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), DiskError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_interrupted_at_each_write_fsync_and_rename(
    tmp_path: Path, error: BaseException, raised: type[BaseException]
) -> None:
    fill(FeatureStore(tmp_path / "undisturbed", MANIFEST))
    wanted = contents(tmp_path / "undisturbed")
    calls = 4 * len(wanted)
    assert len(wanted) == 4, "a manifest and three parts: a write, two fsyncs and a rename each"
    for at in range(1, calls + 1):
        root = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            inject(Faults(at, error), patch)
            with pytest.raises(raised, match="bytes needed" if raised is DiskError else None):
                fill(FeatureStore(root, MANIFEST))
        assert set(contents(root).items()) <= set(wanted.items()), "a file that is there is whole"
        assert len(contents(root)) == at // 4, "and is there after its rename only"
        fill(FeatureStore(root, MANIFEST))
        assert contents(root) == wanted
    with pytest.MonkeyPatch.context() as patch:
        inject(Faults(calls + 1, error), patch)
        fill(FeatureStore(tmp_path / "no fault", MANIFEST))
    assert contents(tmp_path / "no fault") == wanted


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL while another process writes; what is there is whole, and the rest can be added."""
    wanted = FeatureStore(tmp_path / "undisturbed", MANIFEST)
    fill(wanted)
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    script = f"""
import sys; sys.path[:0] = {folders!r}
from test_store import *
print("ready", flush=True)
for n in range(10**6):
    fill(FeatureStore(Path({str(tmp_path)!r}) / f"store{{n}}", MANIFEST))
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.3)
    child.kill()
    child.wait()
    child.stdout.close()
    roots = sorted(tmp_path.glob("store*"))
    assert roots
    last = max(roots, key=lambda root: int(root.name.removeprefix("store")))
    fill(FeatureStore(last, MANIFEST))
    names = {p.name for p in wanted.directory.iterdir()}
    kept = {p.name for p in (last / wanted.directory.name).iterdir() if not p.name.endswith(".tmp")}
    assert kept == names
    assert FeatureStore(last, MANIFEST).read().ids == wanted.read().ids


def test_the_manifest_is_readable_json(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MANIFEST)
    read = json.loads((store.directory / "manifest.json").read_text())
    assert read == {"format": 1, **json.loads(json.dumps(dataclasses.asdict(MANIFEST)))}


def test_open_by_folder(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, MANIFEST)
    fill(store)
    assert FeatureStore.open(store.directory).read().ids == store.read().ids
    assert FeatureStore.open(store.directory).manifest == MANIFEST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no manifest of a feature store"),
        ("[]", "is no manifest of a feature store"),
        ('{"format": 2}', "not of format 1"),
        ('{"format": 1, "extra": 1}', "is no manifest of a feature store"),
        (dataclasses.replace(MANIFEST, view={}).to_json(), "is no manifest of a feature store"),
    ],
)
def test_open_refuses_other_manifests(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        FeatureStore.open(tmp_path)


def test_open_refuses_a_changed_manifest(tmp_path: Path) -> None:
    path = FeatureStore(tmp_path, MANIFEST).directory / "manifest.json"
    path.write_text(path.read_text().replace("tiny", "huge"))
    with pytest.raises(StoreError, match="does not have the key"):
        FeatureStore.open(path.parent)
