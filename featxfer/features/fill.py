"""Rows of images into stores: only what is missing, and nothing that is not what is computed now.

For features of whole images, of boxes, and whatever else is a row an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from featxfer.checks import check_choice
from featxfer.console import tell
from featxfer.features.readers import read_ahead
from featxfer.features.store import FeatureRows, FeatureStore, StoreError, read_rows, read_skipped
from featxfer.views.decode import ImageError
from featxfer.views.images import Images

_ROUNDING, _SHORT_ROUNDING = 1e-3, 5e-2
"""How far rows may be apart, of their largest number: in float32, and with shorter numbers."""

P = TypeVar("P")
Compute: TypeAlias = Callable[
    [Sequence[int], Sequence[P], Sequence[str], Callable[[int], object]],
    Iterable[tuple[str, Tensor]],
]


def fill_rows(
    stores: Mapping[str, FeatureStore],
    images: Images,
    prepare: Callable[[Tensor, Sequence[str]], P],
    compute: Compute[P],
    *,
    recompute: Compute[P] | None = None,
    short: bool = False,
    on_error: str = "raise",
    parts: range | None = None,
    ahead: int = 16,
    desc: str | None = None,
) -> None:
    """Fills stores with a row of each image; what is there already is kept.

    Of a store that has rows, the first one whose image can be read is computed again: where it is
    another one, because code was edited that no key knows of, stderr says so and all rows of the
    store are computed anew. Parts that skipped an image which can be read now are too.

    Args:
        stores: by name, of the same images and rows a part.
        images: that are read, each once, by threads.
        prepare: of an image and the names of the stores that lack its row; runs in these threads.
        compute: names of stores and rows `(n, d)` of some images on the CPU, which are written as
            they come; of their indices, what was
            prepared of each, the names of the stores that lack them, and a function to be called
            with the number of rows that are done.
        recompute: of the one row that is compared; by default `compute`.
        short: whether numbers shorter than float32 are in use, of which rounding shows.
        on_error: "raise" at an image that cannot be read, or "skip" it.
        parts: those that are filled; by default all.
        ahead: how many images are prepared before they are asked for.
        desc: of the bar of progress.

    Raises:
        ImageError: an image cannot be read and `on_error` is "raise".
        ValueError: rows that are not finite, or other ones each time; the image is named.
        StoreError: the stores are damaged, or of other images.
        DiskError: they cannot be written.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    if parts is None:
        parts = range(next(iter(stores.values())).part_count)
    once = dataclasses.replace(images, read=lru_cache(1)(images.read))
    for name, store in stores.items():
        _forget_changed(name, store, once, prepare, recompute or compute, short)
    for store in stores.values():
        _forget_readable(store, images, parts, on_error)
    _fill_missing(stores, images, prepare, compute, on_error, parts, ahead, desc)


def _fill_missing(
    stores: Mapping[str, FeatureStore],
    images: Images,
    prepare: Callable[[Tensor, Sequence[str]], P],
    compute: Compute[P],
    on_error: str,
    parts: range,
    ahead: int,
    desc: str | None,
) -> None:
    """Computes those of the parts that are missing, of each store just what it lacks."""
    manifest = next(iter(stores.values())).manifest
    missing = {name: set(store.missing_parts()) for name, store in stores.items()}
    wanted = {part: [name for name in stores if part in missing[name]] for part in parts}
    wanted = {part: names for part, names in wanted.items() if names}
    size = manifest.part_rows
    ranges = {p: range(p * size, min((p + 1) * size, len(images))) for p in wanted}
    items = ((index, wanted[part]) for part, indices in ranges.items() for index in indices)
    total = sum(len(ranges[part]) * len(names) for part, names in wanted.items())
    desc = f"features of {manifest.backbone}" if desc is None else desc

    def make(item: tuple[int, Sequence[str]]) -> P | ImageError:
        try:
            image = images.read(item[0])
        except ImageError as error:
            return error
        return prepare(image, item[1])

    with (
        closing(read_ahead(make, items, ahead)) as read,
        tqdm(total=total, unit="img", desc=desc, disable=None) as bar,
    ):
        for part, names in wanted.items():
            made: dict[int, P] = {}
            skipped: dict[str, str] = {}
            for index, found in zip(ranges[part], read, strict=False):
                if not isinstance(found, ImageError):
                    made[index] = found
                elif on_error == "raise":
                    raise found
                else:
                    skipped[images.ids[index]] = str(found)
            rows: Iterable[tuple[str, Tensor]]
            rows = [(name, torch.empty(0, 0, device="cpu")) for name in names]
            if made:
                rows = compute(list(made), list(made.values()), names, bar.update)
            ids = tuple(images.ids[index] for index in made)
            for name, found_rows in rows:
                _check_finite(found_rows, ids, name)
                stores[name].write_part(part, FeatureRows(ids, found_rows, skipped))
            bar.update(len(skipped) * len(names))


def _check_finite(rows: Tensor, ids: Sequence[str], name: str) -> None:
    bad = ~torch.isfinite(rows).all(dim=1)
    if ids and bad.any():
        image = ids[int(bad.nonzero()[0])]
        raise ValueError(
            f"{name} features of image {image} are NaN or infinite, wanted finite ones"
        )


def _forget_changed(
    name: str,
    store: FeatureStore,
    images: Images,
    prepare: Callable[[Tensor, Sequence[str]], P],
    compute: Compute[P],
    short: bool,
) -> None:
    """Drops the parts of a store whose first row is not what is computed now, and says so.

    A key knows no code: an edited `forward`, degradation or reader gives other rows under the same.
    What other processes write meanwhile is not dropped.
    """
    files = store.parts()
    for index, kept, image in _kept_rows(store, files, images):

        def computed(index: int = index, image: Tensor = image) -> Tensor:
            rows = compute([index], [prepare(image, [name])], [name], lambda _: None)
            return dict(rows)[name][0].float()

        row = computed()
        if _agree(row, kept, short):
            return
        again = computed()
        if torch.isfinite(row).all() and not _agree(row, again, short):
            raise ValueError(
                f"backbone {store.manifest.backbone}: got other features of image "
                f"{images.ids[index]} each time, wanted the same"
            )
        tell(
            f"{store.directory} has other {name} features of image {images.ids[index]} than are "
            f"computed now; its {len(files)} finished parts are computed anew"
        )
        for path in files.values():
            path.unlink(missing_ok=True)
        return


def _kept_rows(
    store: FeatureStore, files: Mapping[int, Path], images: Images
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Indices, rows and pixels of a store's images, of those that can be read now."""
    for part in sorted(files):
        try:
            rows = read_rows(files[part])
        except FileNotFoundError:  # another process dropped it
            continue
        for name, row in zip(rows.ids, rows.features, strict=True):
            index = _position(store, part, images, name)
            try:
                image = images.read(index)
            except ImageError:
                continue
            yield index, row.float(), image


def _agree(row: Tensor, other: Tensor, short: bool) -> bool:
    """Whether rows differ by rounding alone, of other batch sizes, compilers or machines."""
    if row.shape != other.shape:
        return False
    largest = (_SHORT_ROUNDING if short else _ROUNDING) * other.abs().max()
    return bool((row - other).abs().max() <= largest)


def _forget_readable(store: FeatureStore, images: Images, parts: range, on_error: str) -> None:
    """Drops those parts that skipped an image which can be read now, so that they are computed.

    Where `on_error` is "raise", one that still cannot be read ends all before anything is computed.
    """
    for part, skipped in list(skipped_of(store, parts)):
        for name in skipped:
            try:
                images.read(_position(store, part, images, name))
            except ImageError:
                if on_error == "raise":
                    raise
                continue
            store.drop_part(part)
            break


def skipped_of(store: FeatureStore, parts: range) -> Iterator[tuple[int, dict[str, str]]]:
    """Of each of these parts that is finished, its index and what it skipped."""
    for part, path in sorted(store.parts().items()):
        if part in parts:
            try:
                skipped = read_skipped(path)
            except FileNotFoundError:  # another process dropped it
                continue
            yield part, skipped


def _position(store: FeatureStore, part: int, images: Images, name: str) -> int:
    """Index of an image of a part; `StoreError` where it is none of these images."""
    try:
        return images.ids.index(name, part * store.manifest.part_rows)
    except ValueError as error:
        raise StoreError(
            f"{store.directory}: part {part} is of image {name!r}, which is none of these; "
            "delete it and run again to compute it anew"
        ) from error
