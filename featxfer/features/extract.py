"""A frozen backbone and images in, HR and LR features out, through a FeatureStore."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from featxfer.checks import check_choice, check_integer
from featxfer.console import tell
from featxfer.features.backbone import Backbone
from featxfer.features.fill import fill_rows, skipped_of
from featxfer.features.forward import Arithmetic, Forward, device_of
from featxfer.features.store import FeatureStore, Manifest, align
from featxfer.files import write_atomic
from featxfer.views.decode import ImageError
from featxfer.views.degradation import BaseDegradation, Degradation
from featxfer.views.images import Images

SKIPPED = "skipped.json"
"""The list of images that could not be read, in the folder of the first view's store."""


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

    def without(self, names: Collection[str]) -> Features:
        """The features of the other images."""
        kept = [row for row, name in enumerate(self.ids) if name not in names]
        ids = tuple(self.ids[row] for row in kept)
        return dataclasses.replace(self, ids=ids, hr=self.hr[kept], lr=self.lr[kept])


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
    when that is a terminal. May be interrupted: finished parts stay, the next call goes on. Kept
    rows are compared as `fill_rows` does it. The bits of a row do not hang on the number of
    processes or of threads that read images; on the batch size, torch's own number of threads and
    the machine only as rounding does.

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
        StoreError, DiskError: the cache is damaged, or cannot be written.
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
    hr, lr = (part.without(skipped) for part in rows.values())
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

    `views` are "hr" and "lr", or one of them; `images` and `cache` are the same for all processes;
    rows are kept in float32, or in bfloat16 where that is the precision.
    """
    check_integer("batch_size", batch_size, at_least=1)
    check_integer("part_rows", part_rows, at_least=1)
    check_choice("on_error", on_error, ("raise", "skip"))
    check_integer("world_size", world_size, at_least=1)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: got {rank!r}, wanted one of {world_size} processes, from 0")
    arithmetic = Arithmetic.choose(precision, compile, device_of(backbone), len(images))
    manifest = _manifest(backbone, images, arithmetic.name, part_rows)
    stores = _open_stores(Path(cache), manifest, degradation, views, backbone)
    parts = range(rank, manifest.part_count, world_size)
    plain = Forward(backbone, dataclasses.replace(arithmetic, compiled=False), 1)
    fill_rows(
        stores,
        images,
        lambda image, names: {view: getattr(degradation, view)(image) for view in names},
        partial(_rows_of_views, Forward(backbone, arithmetic, batch_size)),
        recompute=partial(_rows_of_views, plain),
        short=plain.is_short,
        on_error=on_error,
        parts=parts,
        ahead=2 * batch_size,
    )
    _list_skipped(list(stores.values()), parts)
    return stores


def _open_stores(
    cache: Path,
    manifest: Manifest,
    degradation: Degradation,
    views: Sequence[str],
    backbone: Backbone,
) -> dict[str, FeatureStore]:
    """A store a view; `ValueError` for views of a size that the backbone does not take."""
    fixed = backbone.preprocessing.input_size
    if fixed not in (None, degradation.hr_size):
        raise ValueError(
            f"degradation: got hr_size={degradation.hr_size}, "
            f"backbone {backbone.name} wants {fixed}"
        )
    described = {view: degradation.describe_view(view) for view in views}
    return {
        name: FeatureStore(cache, dataclasses.replace(manifest, view=view))
        for name, view in described.items()
    }


def _rows_of_views(
    forward: Forward,
    indices: Sequence[int],
    prepared: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    advance: Callable[[int], object],
) -> Iterator[tuple[str, Tensor]]:
    for view in names:
        yield view, forward([views[view] for views in prepared], advance)


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
    import PIL

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


def check_readable(name: str, skipped: Mapping[str, str], total: int, on_error: str) -> None:
    """Raises `ImageError` for images that could not be read, or `ValueError` if all may be skipped.

    `name` is the argument that the `total` images are of; `skipped` says why, by image.
    """
    if skipped and on_error == "raise":
        raise ImageError(next(iter(skipped.values())))
    if len(skipped) == total:
        reason = next(iter(skipped.values()))
        raise ValueError(f"{name}: none of {total} could be read: {reason}")


def write_skipped(path: Path, skipped: Mapping[str, str], count: int) -> None:
    """Lists in a JSON file why images were skipped, of `count`, and says on stderr where.

    Without any, an older list is removed. Raises `DiskError` where the file cannot be written.
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
    if not path.exists() and not any(part for s in stores for _, part in skipped_of(s, parts)):
        return
    every = range(stores[0].part_count)
    skipped = [part for store in stores for _, part in skipped_of(store, every)]
    found = {name: reason for part in skipped for name, reason in part.items()}
    write_skipped(path, found, stores[0].manifest.image_count)
