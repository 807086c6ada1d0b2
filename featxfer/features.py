"""A frozen backbone and images in, HR and LR features out, through a FeatureStore."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from featxfer._checks import ArrayLike, as_features, check_choice, check_integer
from featxfer.backbone import Backbone, frozen
from featxfer.degrade import BaseDegradation, Degradation
from featxfer.images import ImageError, Images
from featxfer.store import FeatureStore, Manifest, Rows, align

SCALINGS = ("none", "l2")


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
    on_error: str = "raise",
) -> Features:
    """Features of both views of all images; what the cache has is read, the rest computed.

    Each image is decoded once and both views are made from the same uint8 pixels. The backbone is
    in eval mode without gradients meanwhile, and gets its modes back. Progress is shown on stderr
    when that is a terminal. May be interrupted: finished parts stay, the next call goes on.

    Args:
        backbone: the frozen backbone; runs on the device of its parameters.
        images: see `featxfer.images.open_images` and `featxfer.voc.VOCDevkit.images`.
        degradation: how HR and LR views are made.
        cache: folder of the feature stores.
        batch_size: images a forward pass.
        part_rows: images a part of the store, the most that an interruption can lose.
        precision: "fp32", or "bf16" for autocast.
        on_error: "raise" at an image that cannot be read, or "skip" it and list it.

    Raises:
        ImageError: an image cannot be read and `on_error` is "raise".
        ValueError: bad arguments, no readable image at all, features that are not `(n, d)` or
            not finite (the image is named), an input size that the backbone does not take.
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
        on_error=on_error,
    )
    rows = {view: store.read() for view, store in stores.items()}
    skipped = {**rows["hr"].skipped, **rows["lr"].skipped}
    if skipped and on_error == "raise":
        raise ImageError(next(iter(skipped.values())))
    hr, lr = (_without(part, skipped) for part in rows.values())
    align([hr, lr])
    if not hr.ids:
        reason = next(iter(skipped.values()))
        raise ValueError(f"images: none of {len(images)} could be read: {reason}")
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
        on_error: "raise" or "skip".
        views: "hr" and "lr", or one of them.
        rank: of this process, in [0, world_size).
        world_size: number of processes.
    """
    check_integer("batch_size", batch_size, at_least=1)
    check_integer("part_rows", part_rows, at_least=1)
    check_choice("precision", precision, ("fp32", "bf16"))
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
    manifest = _manifest(backbone, images, precision, part_rows)
    stores = {
        view: FeatureStore(
            cache, dataclasses.replace(manifest, view=degradation.describe_view(view))
        )
        for view in views
    }
    parts = range(rank, manifest.part_count, world_size)
    for store in stores.values():
        _forget_readable(store, images, parts)
    _fill(stores, parts, backbone, images, degradation, batch_size, precision, on_error)
    return stores


def scale_features(features: ArrayLike, scaling: str) -> Tensor:
    """Rows as they come ("none") or divided by their L2 norm ("l2"): float32 `(n, d)`.

    The paper does not state any scaling before k-means and the network. Raises `ValueError` for
    another `scaling`, NaN or infinity, and under "l2" for a row of zeros.
    """
    check_choice("scaling", scaling, SCALINGS)
    rows = as_features("features", features)
    if scaling == "none":
        return rows
    norms = rows.norm(dim=1, keepdim=True)
    if not norms.all():
        raise ValueError(f"features: row {int(norms.argmin())} is zero, wanted an L2 norm above 0")
    scaled: Tensor = rows / norms
    return scaled


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


def _forget_readable(store: FeatureStore, images: Images, parts: range) -> None:
    """Drops those parts that skipped an image which can be read now, so that they are computed."""
    for index in set(parts) - set(store.missing_parts()):
        for name in store.read_part(index).skipped:
            try:
                images.read(images.ids.index(name))
            except ImageError:
                continue
            store.drop_part(index)
            break


def _without(rows: Rows, skipped: Mapping[str, str]) -> Rows:
    kept = [name not in skipped for name in rows.ids]
    ids = tuple(name for name, keep in zip(rows.ids, kept, strict=True) if keep)
    return Rows(ids, rows.features[torch.tensor(kept, dtype=torch.bool)], skipped)


def _fill(
    stores: dict[str, FeatureStore],
    wanted: range,
    backbone: Backbone,
    images: Images,
    degradation: Degradation,
    batch_size: int,
    precision: str,
    on_error: str,
) -> None:
    """Computes those of the wanted parts that are missing, of each view just what it lacks."""
    missing = {
        view: set(wanted).intersection(store.missing_parts()) for view, store in stores.items()
    }
    parts = sorted(set().union(*missing.values()))
    part_rows = next(iter(stores.values())).manifest.part_rows
    ranges = {p: range(p * part_rows, min((p + 1) * part_rows, len(images))) for p in parts}
    total = sum(len(ranges[part]) for parts_of_view in missing.values() for part in parts_of_view)
    with tqdm(total=total, unit="img", desc=f"features of {backbone.name}", disable=None) as bar:
        for part, indices in ranges.items():
            makers = {view: getattr(degradation, view) for view in stores if part in missing[view]}
            views, ids, skipped = _read_views(images, indices, makers, on_error)
            for view, pixels in views.items():
                features = _run(backbone, pixels, batch_size, precision, bar.update)
                _check_finite(features, ids, view)
                stores[view].write_part(part, Rows(ids, features, skipped))
            bar.update(len(skipped) * len(makers))


def _read_views(
    images: Images,
    indices: Sequence[int],
    makers: dict[str, Callable[[Tensor], Tensor]],
    on_error: str,
) -> tuple[dict[str, list[Tensor]], tuple[str, ...], dict[str, str]]:
    """Decodes each image once and makes the wanted views of it."""
    views: dict[str, list[Tensor]] = {view: [] for view in makers}
    ids: list[str] = []
    skipped: dict[str, str] = {}
    for index in indices:
        try:
            image = images.read(index)
        except ImageError as error:
            if on_error == "raise":
                raise
            skipped[images.ids[index]] = str(error)
            continue
        ids.append(images.ids[index])
        for view, make in makers.items():
            views[view].append(make(image))
    return views, tuple(ids), skipped


def _run(
    backbone: Backbone,
    pixels: list[Tensor],
    batch_size: int,
    precision: str,
    advance: Callable[[int], object],
) -> Tensor:
    if not pixels:
        return torch.empty(0, 0)
    device = next((p.device for p in backbone.module.parameters()), torch.device("cpu"))
    autocast: AbstractContextManager[object] = (
        torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
    )
    kept = torch.bfloat16 if precision == "bf16" else torch.float32
    rows = []
    with frozen(backbone.module), autocast:
        for start in range(0, len(pixels), batch_size):
            batch = torch.stack(pixels[start : start + batch_size]).to(device)
            output = backbone.module(backbone.preprocessing(batch))
            rows.append(_as_rows(backbone, output, len(batch), kept))
            advance(len(batch))
    return torch.cat(rows)


def _as_rows(backbone: Backbone, output: object, count: int, dtype: torch.dtype) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != count:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"backbone {backbone.name}: got output {got}, wanted ({count}, d)")
    return output.to("cpu", dtype)


def _check_finite(features: Tensor, ids: tuple[str, ...], view: str) -> None:
    bad = ~torch.isfinite(features).all(dim=1) if ids else torch.zeros(0)
    if bad.any():
        name = ids[int(bad.nonzero()[0])]
        raise ValueError(f"{view} features of image {name} are NaN or infinite, wanted finite ones")
