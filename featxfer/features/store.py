"""FeatureStore: the feature rows of one view of a set of images, on disk, part by part."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from featxfer.files import write_atomic

FORMAT = 1
"""Of the parts; another format is another key."""

_ROWS = "rows"
"""The only metadata of a part: safetensors writes several in no fixed order."""

_NO_ROWS = torch.empty(0, 0, device="cpu")


class StoreError(RuntimeError):
    """A store that cannot be read: of another config, incomplete or damaged; the file is named."""


@dataclass(frozen=True)
class Manifest:
    """Everything that a row depends on; its hash is the store's key.

    Args:
        view: which view of the image, and how its pixels are made
            (`Degradation.describe_view`).
        backbone: the backbone's name.
        host: the library, with its version, whose code the backbone is.
        architecture_sha256: hash of the backbone's layers.
        weights_sha256: hash of the backbone's weights (`weights_sha256`).
        preprocessing: mean, std and what else belongs to the weights.
        precision: of the backbone's arithmetic (`Arithmetic.name`).
        images_fingerprint: `Images.fingerprint`.
        image_count: number of images, skipped ones too.
        part_rows: images a part.
        software: versions of what decodes, resizes and computes.
    """

    view: Mapping[str, Any]
    backbone: str
    host: str
    architecture_sha256: str
    weights_sha256: str
    preprocessing: Mapping[str, Any]
    precision: str
    images_fingerprint: str
    image_count: int
    part_rows: int
    software: Mapping[str, str]

    def to_json(self) -> str:
        """The format and all fields as indented JSON, in one order."""
        fields = {"format": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    @property
    def part_count(self) -> int:
        """Number of parts of the finished store."""
        return -(-self.image_count // self.part_rows)

    @property
    def key(self) -> str:
        """32 hex digits of the SHA-256 of `to_json`."""
        return _digest(self.to_json().encode())

    @property
    def name(self) -> str:
        """Of the store's folder."""
        return f"{self.view['view']}-{self.key}"


@dataclass(frozen=True)
class FeatureRows:
    """Rows of a store or of one part of it.

    Args:
        ids: image names, in the images' order, without the skipped ones.
        features: `(len(ids), d)`, float32, or bfloat16 where the arithmetic was.
        skipped: image name -> why it could not be read.
    """

    ids: tuple[str, ...]
    features: Tensor
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def without(self, names: Collection[str]) -> FeatureRows:
        """The rows of the other images."""
        kept = [row for row, name in enumerate(self.ids) if name not in names]
        if len(kept) == len(self.ids):
            return self
        ids = tuple(self.ids[row] for row in kept)
        return dataclasses.replace(self, ids=ids, features=self.features[kept])


class FeatureStore:
    """Rows on disk in `root/<view>-<key>/`, written part by part, each part once.

    A part is one safetensors file whose name holds the hash of its bytes. It appears whole or not
    at all (`os.replace` of a synced temporary file), so an interrupted run loses at most the part
    it was at, and any number of processes may write to one store.

    Args:
        root: folder of the cache.
        manifest: what the rows depend on. Another manifest is another folder.

    Raises:
        StoreError: the folder exists with another manifest.
        DiskError: the manifest cannot be written.
    """

    def __init__(self, root: str | Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self.directory = Path(root) / manifest.name
        path = self.directory / "manifest.json"
        if not path.exists():
            write_atomic(path, manifest.to_json().encode())
        elif path.read_text(encoding="utf-8") != manifest.to_json():
            raise StoreError(f"{path} is a cache from another config, wanted\n{manifest.to_json()}")

    @classmethod
    def open(cls, directory: str | Path) -> FeatureStore:
        """The store in `directory`, as its own manifest describes it.

        Raises `FileNotFoundError` where there is no manifest, `StoreError` for one that is damaged
        or of another format.
        """
        path = Path(directory) / "manifest.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields.pop("format") != FORMAT:
                raise ValueError(f"not of format {FORMAT}")
            manifest = Manifest(**fields)
            name = manifest.name
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{path} is no manifest of a feature store: {error}") from error
        if path.parent.name != name:
            raise StoreError(f"{path} does not have the key that its folder is named for")
        return cls(path.parent.parent, manifest)

    @property
    def part_count(self) -> int:
        """Number of parts of the finished store."""
        return self.manifest.part_count

    def missing_parts(self) -> list[int]:
        """Indices of the parts that are not on disk yet."""
        found = self.parts()
        return [index for index in range(self.part_count) if index not in found]

    def write_part(self, index: int, rows: FeatureRows) -> None:
        """Writes part `index` unless it is there already; `DiskError` where the disk refuses."""
        if index in self.parts():
            return
        data = safetensors.torch.save(
            {"features": rows.features.contiguous()},
            {_ROWS: json.dumps({"ids": rows.ids, "skipped": dict(rows.skipped)})},
        )
        name = f"part-{index:06d}.{_digest(data)}.safetensors"
        write_atomic(self.directory / name, data)

    def drop_part(self, index: int) -> None:
        """Removes part `index`, so that it is missing."""
        for path in self.directory.glob(f"part-{index:06d}.*.safetensors"):
            path.unlink(missing_ok=True)

    def read(self) -> FeatureRows:
        """Reads all rows; `StoreError` if a part is missing or damaged."""
        parts = [read_rows(path) for path in self._all_parts()]
        return FeatureRows(
            tuple(name for part in parts for name in part.ids),
            torch.cat([part.features for part in parts if part.ids] or [_NO_ROWS]),
            {name: reason for part in parts for name, reason in part.skipped.items()},
        )

    def open_rows(self) -> MappedRows:
        """All rows, left on disk until they are taken; errors as `read`."""
        described = [(_describe(_whole(path)), path) for path in self._all_parts()]
        return MappedRows(
            tuple(name for part, _ in described for name in part["ids"]),
            [_mapped(path) for part, path in described if part["ids"]],
            {n: reason for part, _ in described for n, reason in part["skipped"].items()},
        )

    def _all_parts(self) -> list[Path]:
        """The file of each part; `StoreError` where there is none."""
        found = self.parts()
        for part in range(self.part_count):
            if part not in found:
                raise StoreError(f"{self.directory}: part {part} of {self.part_count} is missing")
        return [found[part] for part in range(self.part_count)]

    def parts(self) -> dict[int, Path]:
        """The file of each part that is there, by its index, by one look at the folder.

        The first by name, should two processes have rounded differently.
        """
        found = sorted(self.directory.glob("part-*.safetensors"), reverse=True)
        return {int(path.name.split(".")[0].removeprefix("part-")): path for path in found}


@dataclass(frozen=True)
class MappedRows:
    """Rows of a finished store, mapped into memory: the system reads them as they are taken.

    Args:
        ids: image names, in the images' order, without the skipped ones.
        parts: the rows of each part, `(rows, d)`.
        skipped: image name -> why it could not be read.
    """

    ids: tuple[str, ...]
    parts: Sequence[Tensor]
    skipped: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.ids)

    def without(self, names: Collection[str]) -> MappedRows:
        """The rows of the other images; parts that lose none stay on disk."""
        parts, start = [], 0
        for part in self.parts:
            ids = self.ids[start : start + len(part)]
            kept = [row for row, name in enumerate(ids) if name not in names]
            parts.append(part if len(kept) == len(ids) else part[kept])
            start += len(part)
        left = tuple(name for name in self.ids if name not in names)
        return dataclasses.replace(self, ids=left, parts=[part for part in parts if len(part)])

    def take(self, indices: Tensor) -> Tensor:
        """Rows by index, `(len(indices), d)`, in the dtype that they were written in."""
        ends = torch.tensor([len(part) for part in self.parts], device="cpu").cumsum(0)
        starts = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
        owners = torch.searchsorted(ends, indices.contiguous(), right=True)
        rows = (indices - starts[owners]).tolist()
        found = [self.parts[part][row] for part, row in zip(owners.tolist(), rows, strict=True)]
        return torch.stack(found) if found else self.parts[0][:0]


def _mapped(path: Path) -> Tensor:
    with safetensors.safe_open(path, framework="pt") as file:
        rows: Tensor = file.get_tensor("features")
    return rows


def damaged_parts(directory: Path) -> list[Path]:
    """Finished parts in `directory` whose bytes do not have the hash in their name."""
    return [
        path
        for path in sorted(directory.glob("part-*.safetensors"))
        if not _is_whole(path, path.read_bytes())
    ]


def read_rows(path: Path) -> FeatureRows:
    """Rows of a finished part's file; `StoreError` if its bytes are not those written."""
    data = _whole(path)
    described = _describe(data)
    features = safetensors.torch.load(data)["features"]
    return FeatureRows(tuple(described["ids"]), features, described["skipped"])


def read_skipped(path: Path) -> dict[str, str]:
    """What a finished part skipped, and why, from the head of its file; errors as `read_rows`."""
    with path.open("rb") as file:
        size = file.read(8)
        head = size + file.read(min(int.from_bytes(size, "little"), path.stat().st_size))
    try:
        skipped: dict[str, str] = _describe(head)["skipped"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error
    return skipped


def _whole(path: Path) -> bytes:
    data = path.read_bytes()
    if not _is_whole(path, data):
        raise _damaged(path)
    return data


def _damaged(path: Path) -> StoreError:
    return StoreError(f"{path} is damaged; delete it and run again to compute it anew")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _is_whole(path: Path, data: bytes) -> bool:
    """Whether a part's bytes are those that its name was made of."""
    return path.name.split(".")[1] == _digest(data)


def _describe(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    described: dict[str, Any] = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_ROWS])
    return described


def align(stores: Sequence[FeatureRows | MappedRows]) -> None:
    """Raises `StoreError` unless all hold the same images in the same order."""
    first = stores[0]
    for other in stores[1:]:
        if other.ids != first.ids:
            raise StoreError(
                f"views of different images: {len(first.ids)} and {len(other.ids)} rows, "
                f"first difference {sorted(set(first.ids) ^ set(other.ids))[:1] or 'in order'}"
            )
