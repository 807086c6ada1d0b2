"""A frozen backbone and images in, HR and LR features out, through a FeatureStore."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from featxfer.checks import check_choice, check_integer
from featxfer.features.backbone import Backbone
from featxfer.features.forward import Arithmetic, Forward, device_of
from featxfer.features.store import (
    FeatureStore,
    Manifest,
    Rows,
    StoreError,
    align,
    read_rows,
    read_skipped,
)
from featxfer.files import write_atomic
from featxfer.views.degradation import BaseDegradation, Degradation
from featxfer.views.images import ImageError, Images

_MOST_READERS = 16
"""Threads that read images."""

_ROUNDING, _SHORT_ROUNDING = 1e-3, 5e-2
"""How far rows may be apart, of their largest number: in float32, and with shorter numbers."""

SKIPPED = "skipped.json"
"""The list of images that could not be read, in the folder of the first view's store."""

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Features:
    """HR and LR features of the same images.

    Args:
        ids: image names.
        hr: float32 `(n, d)`.
        lr: float32 `(n, d)`.
        skipped: image name -> why it could not be read.
        keys: the store's key of each view, which stand for all that the rows depend on.
    """

    ids: tuple[str, ...]
    hr: Tensor
    lr: Tensor
    skipped: dict[str, str]
    keys: dict[str, str]


def extract_features(
    backbone: Backbone,
    images: Images,
    degradation: Degradation,
    cache: str | Path,
    *,
    batch_size: int = 64,
    part_rows: int = 256,
    precision: str = "fp32",
    compile: str = "off",
    on_error: str = "raise",
) -> Features:
    """Features of both views of all images; what the cache has is read, the rest computed.

    Each image is decoded once and both views are made from the same uint8 pixels. The backbone is
    in eval mode without gradients meanwhile, and gets its modes back. Progress is shown on stderr
    when that is a terminal. May be interrupted: finished parts stay, the next call goes on.

    Of a store that has rows, one is computed again: where it is another one, because code was
    edited that no key knows of, stderr says so and all rows are computed anew. The bits of a row do
    not hang on the number of processes or of threads that read images; on the batch size, torch's
    own number of threads and the machine only as rounding does.

    Args:
        backbone: the frozen backbone; runs on the device of its parameters.
        images: see `open_images` and `VOCDevkit.images`.
        degradation: how HR and LR views are made.
        cache: folder of the feature stores.
        batch_size: images a forward pass.
        part_rows: images a part of the store, the most that an interruption can lose.
        precision: "fp32", for reproduction; "bf16", autocast; "auto", that where the hardware
            multiplies in it.
        compile: "on", by `torch.compile`; "off"; "auto", for `forward.COMPILE_FROM` images or more
            where a compiler is at hand.
        on_error: "raise" at an image that cannot be read, or "skip" it: what was skipped, and why,
            is in `skipped.json` beside the rows of the first view, and stderr says so.

    Raises:
        ImageError: an image cannot be read and `on_error` is "raise".
        ValueError: bad arguments, no readable image at all, features that are not `(n, d)` or
            not finite (the image is named) or other ones each time, an input size that the backbone
            does not take.
        StoreError: the cache is damaged.
        DiskError: the cache cannot be written.
    """
    stores = fill_stores(
        backbone,
        images,
        degradation,
        cache,
        batch_size=batch_size,
        part_rows=part_rows,
        precision=precision,
        compile=compile,
        on_error=on_error,
    )
    rows = {view: store.read() for view, store in stores.items()}
    skipped = {**rows["hr"].skipped, **rows["lr"].skipped}
    check_readable("images", skipped, len(images), on_error)
    hr, lr = (_without(part, skipped) for part in rows.values())
    align([hr, lr])
    keys = {view: store.manifest.key for view, store in stores.items()}
    return Features(hr.ids, hr.features.float(), lr.features.float(), skipped, keys)


def fill_stores(
    backbone: Backbone,
    images: Images,
    degradation: Degradation,
    cache: str | Path,
    *,
    batch_size: int = 64,
    part_rows: int = 256,
    precision: str = "fp32",
    compile: str = "off",
    on_error: str = "raise",
    views: Sequence[str] = ("hr", "lr"),
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, FeatureStore]:
    """The stores of these views; other arguments and errors as `extract_features`.

    Several processes, on any hosts that see the same files, may fill the same stores: each computes
    the parts whose index is its `rank` modulo `world_size`, if they are missing, and waits for
    nobody. One that died may be started again, also among another number of processes. A store is
    finished when it has no `missing_parts`; one process alone finishes it.

    Args:
        backbone: as `extract_features` has it, like all up to `on_error`.
        images: the same for all processes.
        degradation: of the views.
        cache: a folder that all processes see.
        batch_size: images a forward pass.
        part_rows: images a part.
        precision: of the arithmetic, and of the rows that are kept: float32, or bfloat16.
        compile: "auto", "on" or "off".
        on_error: "raise" or "skip".
        views: "hr" and "lr", or one of them.
        rank: of this process, in [0, world_size).
        world_size: number of processes.
    """
    check_integer("batch_size", batch_size, at_least=1)
    check_integer("part_rows", part_rows, at_least=1)
    check_choice("on_error", on_error, ("raise", "skip"))
    check_integer("world_size", world_size, at_least=1)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank!r}, wanted one of {world_size} processes, from 0")
    fixed = backbone.preprocessing.input_size
    if fixed not in (None, degradation.hr_size):
        raise ValueError(
            f"degradation: got hr_size={degradation.hr_size}, "
            f"backbone {backbone.name} wants {fixed}"
        )
    arithmetic = Arithmetic.choose(precision, compile, device_of(backbone), len(images))
    manifest = _manifest(backbone, images, arithmetic.name, part_rows)
    stores = {
        view: FeatureStore(
            cache, dataclasses.replace(manifest, view=degradation.describe_view(view))
        )
        for view in views
    }
    parts = range(rank, manifest.part_count, world_size)
    _forget_changed(stores, images, degradation, backbone, arithmetic)
    for store in stores.values():
        _forget_readable(store, images, parts, on_error)
    forward = Forward(backbone, arithmetic, batch_size)
    _fill(stores, parts, forward, images, degradation, on_error)
    _list_skipped(list(stores.values()), parts)
    return stores


def shared_degradation(hr: Manifest, lr: Manifest) -> BaseDegradation:
    """The degradation of an HR and an LR store that differ in their view alone.

    Raises `ValueError` for two stores of other views, or of different backbones, images or
    settings.
    """
    views = [manifest.view.get("view") for manifest in (hr, lr)]
    if views != ["hr", "lr"]:
        raise ValueError(f"hr, lr: got stores of views {views}, wanted ['hr', 'lr']")
    degradation = BaseDegradation.from_dict({k: v for k, v in lr.view.items() if k != "view"})
    wanted = dataclasses.replace(lr, view=degradation.describe_view("hr"))
    other = [
        f.name for f in dataclasses.fields(hr) if getattr(hr, f.name) != getattr(wanted, f.name)
    ]
    if other:
        raise ValueError(
            f"hr, lr: got stores that differ in {', '.join(other)}, wanted one setting"
        )
    return degradation


def default_cache() -> Path:
    """Where kept work goes unless told: `$FEATXFER_CACHE`, or `~/.cache/featxfer`."""
    return Path(os.environ.get("FEATXFER_CACHE") or Path.home() / ".cache" / "featxfer")


def software_versions() -> dict[str, str]:
    """Versions of what pixels and features depend on."""
    return {"torch": torch.__version__, "pillow": PIL.__version__, "numpy": np.__version__}


def _manifest(backbone: Backbone, images: Images, precision: str, part_rows: int) -> Manifest:
    """The manifest of both views, but for the view."""
    return Manifest(
        view={},
        backbone=backbone.name,
        host=backbone.host,
        architecture_sha256=backbone.architecture_sha256,
        weights_sha256=backbone.weights_sha256,
        preprocessing=dataclasses.asdict(backbone.preprocessing),
        precision=precision,
        images_fingerprint=images.fingerprint,
        image_count=len(images),
        part_rows=part_rows,
        software=software_versions(),
    )


def tell(message: str) -> None:
    """One line on stderr."""
    tqdm.write(f"featxfer: {message}", file=sys.stderr)


def check_readable(name: str, skipped: Mapping[str, str], total: int, on_error: str) -> None:
    """Raises `ImageError` for images that could not be read, or `ValueError` if all may be skipped.

    Args:
        name: of the argument that the images are of.
        skipped: why, by image.
        total: images.
        on_error: "raise" or "skip".
    """
    if skipped and on_error == "raise":
        raise ImageError(next(iter(skipped.values())))
    if len(skipped) == total:
        reason = next(iter(skipped.values()))
        raise ValueError(f"{name}: none of {total} could be read: {reason}")


def write_skipped(path: Path, skipped: Mapping[str, str], count: int) -> None:
    """Lists the images that were skipped, of `count`, in one file, and says on stderr where.

    Without any, an older list is removed. Raises `DiskError` where the file cannot be written.

    Args:
        path: JSON: image name -> why it could not be read.
        skipped: the same.
        count: number of images, skipped ones too.
    """
    if not skipped:
        path.unlink(missing_ok=True)
        return
    text = json.dumps(dict(skipped), indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode(errors="backslashreplace"))
    tell(f"{len(skipped)} of {count} images could not be read and are left out, see {path}")


def _list_skipped(stores: Sequence[FeatureStore], parts: range) -> None:
    """Lists what the stores' parts skipped, if any of these parts did or there is a list already.

    Of other processes' parts, those that are finished.
    """
    path = stores[0].directory / SKIPPED
    if not path.exists() and not any(part for s in stores for _, part in _skipped_of(s, parts)):
        return
    every = range(stores[0].part_count)
    skipped = [part for store in stores for _, part in _skipped_of(store, every)]
    found = {name: reason for part in skipped for name, reason in part.items()}
    write_skipped(path, found, stores[0].manifest.image_count)


def _skipped_of(store: FeatureStore, parts: range) -> Iterator[tuple[int, dict[str, str]]]:
    """Of each of these parts that is finished, its index and what it skipped."""
    for part, path in sorted(store.parts().items()):
        if part in parts:
            try:
                skipped = read_skipped(path)
            except FileNotFoundError:  # another process dropped it
                continue
            yield part, skipped


def _forget_changed(
    stores: Mapping[str, FeatureStore],
    images: Images,
    degradation: Degradation,
    backbone: Backbone,
    arithmetic: Arithmetic,
) -> None:
    """Drops the parts of a store whose first row is not what is computed now, and says so.

    A key knows no code: an edited `forward`, degradation or reader gives other rows under the same.
    What other processes write meanwhile is not dropped.
    """
    forward = Forward(backbone, dataclasses.replace(arithmetic, compiled=False), 1)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in backbone.module.parameters())
    short = half or arithmetic.bf16 or bool(arithmetic.rounding)
    once = dataclasses.replace(images, read=lru_cache(1)(images.read))

    def compute(view: str, image: Tensor) -> Tensor:
        return forward([getattr(degradation, view)(image)], lambda _: None)[0].float()

    for view, store in stores.items():
        files = store.parts()
        for name, kept, image in _kept_rows(store, files, once):
            row = compute(view, image)
            if agree(row, kept, short=short):
                break
            again = compute(view, image)
            if torch.isfinite(row).all() and not agree(row, again, short=short):
                raise ValueError(
                    f"backbone {backbone.name}: got other features of image {name} each time, "
                    "wanted the same"
                )
            tell(
                f"{store.directory} has other {view} features of image {name} than are computed "
                f"now; its {len(files)} finished parts are computed anew"
            )
            for path in files.values():
                path.unlink(missing_ok=True)
            break


def _kept_rows(
    store: FeatureStore, files: Mapping[int, Path], images: Images
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Names, rows and pixels of a store's images, of those that can be read now."""
    for part in sorted(files):
        try:
            rows = read_rows(files[part])
        except FileNotFoundError:  # another process dropped it
            continue
        for name, row in zip(rows.ids, rows.features, strict=True):
            try:
                image = images.read(_position(store, part, images, name))
            except ImageError:
                continue
            yield name, row.float(), image


def agree(row: Tensor, other: Tensor, *, short: bool = False) -> bool:
    """Whether rows differ by rounding alone, of other batch sizes, compilers or machines.

    Args:
        row: of features.
        other: the same, or what should be.
        short: whether numbers shorter than float32 are in use.
    """
    if row.shape != other.shape:
        return False
    largest = (_SHORT_ROUNDING if short else _ROUNDING) * other.abs().max()
    return bool((row - other).abs().max() <= largest)


def _forget_readable(store: FeatureStore, images: Images, parts: range, on_error: str) -> None:
    """Drops those parts that skipped an image which can be read now, so that they are computed.

    Where `on_error` is "raise", one that still cannot be read ends all before anything is computed.
    """
    for part, skipped in list(_skipped_of(store, parts)):
        for name in skipped:
            try:
                images.read(_position(store, part, images, name))
            except ImageError:
                if on_error == "raise":
                    raise
                continue
            store.drop_part(part)
            break


def _position(store: FeatureStore, part: int, images: Images, name: str) -> int:
    """Index of an image of a part; `StoreError` where it is none of these images."""
    try:
        return images.ids.index(name, part * store.manifest.part_rows)
    except ValueError as error:
        raise StoreError(
            f"{store.directory}: part {part} is of image {name!r}, which is none of these; "
            "delete it and run again to compute it anew"
        ) from error


def _without(rows: Rows, skipped: Mapping[str, str]) -> Rows:
    kept = [name not in skipped for name in rows.ids]
    ids = tuple(name for name, keep in zip(rows.ids, kept, strict=True) if keep)
    chosen = torch.tensor(kept, dtype=torch.bool, device=rows.features.device)
    return Rows(ids, rows.features[chosen], skipped)


def _fill(
    stores: dict[str, FeatureStore],
    wanted: range,
    forward: Forward,
    images: Images,
    degradation: Degradation,
    on_error: str,
) -> None:
    """Computes those of the wanted parts that are missing, of each view just what it lacks.

    The images of the next two batches are read meanwhile.
    """
    missing = {
        view: set(wanted).intersection(store.missing_parts()) for view, store in stores.items()
    }
    parts = sorted(set().union(*missing.values()))
    part_rows = next(iter(stores.values())).manifest.part_rows
    ranges = {p: range(p * part_rows, min((p + 1) * part_rows, len(images))) for p in parts}
    makers = {
        part: {view: getattr(degradation, view) for view in stores if part in missing[view]}
        for part in parts
    }
    items = ((index, makers[part]) for part, indices in ranges.items() for index in indices)
    ahead = 2 * forward.batch_size
    total = sum(len(ranges[part]) * len(makers[part]) for part in parts)
    name = forward.backbone.name
    with (
        closing(_ahead(lambda item: _read_views(images, *item), items, ahead)) as read,
        tqdm(total=total, unit="img", desc=f"features of {name}", disable=None) as bar,
    ):
        for part, indices in ranges.items():
            views: dict[str, list[Tensor]] = {view: [] for view in makers[part]}
            ids: list[str] = []
            skipped: dict[str, str] = {}
            for index, found in zip(indices, read, strict=False):
                if isinstance(found, ImageError):
                    if on_error == "raise":
                        raise found
                    skipped[images.ids[index]] = str(found)
                    continue
                ids.append(images.ids[index])
                for view, pixels in found.items():
                    views[view].append(pixels)
            for view, pixels_of in views.items():
                features = forward(pixels_of, bar.update)
                _check_finite(features, tuple(ids), view)
                stores[view].write_part(part, Rows(tuple(ids), features, skipped))
            bar.update(len(skipped) * len(views))


def _read_views(
    images: Images, index: int, makers: Mapping[str, Callable[[Tensor], Tensor]]
) -> dict[str, Tensor] | ImageError:
    """Decodes an image once and makes the wanted views of it; or why that cannot be."""
    try:
        image = images.read(index)
    except ImageError as error:
        return error
    return {view: make(image) for view, make in makers.items()}


def _ahead(run: Callable[[T], S], items: Iterable[T], count: int) -> Generator[S, None, None]:
    """What `run` gives for each item, in order, computed by threads `count` items ahead."""
    pool = ThreadPoolExecutor(_reader_count(), "featxfer-reader", _one_core)
    waiting: deque[Future[S]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(run, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _reader_count() -> int:
    """As many as this process has cores: its share of them where torchrun started several."""
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, min(_MOST_READERS, share))


def _one_core() -> None:
    """Makes torch's operations in this thread run in it alone: there are several such threads."""
    torch.get_num_threads()  # torch sets the number when it is first asked, so it is asked before
    threadpool_limits(1, user_api="openmp")


def _check_finite(features: Tensor, ids: tuple[str, ...], view: str) -> None:
    bad = ~torch.isfinite(features).all(dim=1)
    if ids and bad.any():
        name = ids[int(bad.nonzero()[0])]
        raise ValueError(f"{view} features of image {name} are NaN or infinite, wanted finite ones")
