"""One image file, decoded to uint8 RGB by Pillow, which is imported when the first one is."""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
}
"""Pillow's readers that may be used, whatever a file's ending says, and their usual endings."""

_NEEDS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
"""What Pillow may be built without."""

_EOI, _BLOCK = b"\xff\xd9", 16
"""JPEG's end of image, and the side of what it mostly encodes at once."""

_SOC, _EOC = b"\xff\x4f\xff\x51", b"\xff\xd9"
"""The start of JPEG 2000's codestream and its end, which does not occur within."""

MAX_PIXELS = 2**27
"""Larger images are refused before they are decoded: a small file may say that it is huge."""


class ImageError(ValueError):
    """An image could not be read; the message names it."""


@cache
def suffixes() -> tuple[str, ...]:
    """Files with these endings, in any case, are taken from folders: those that Pillow reads."""
    from PIL import features

    there = features.get_supported()
    return tuple(
        suffix
        for name, endings in FORMATS.items()
        if name not in _NEEDS or _NEEDS[name] in there
        for suffix in endings
    )


def read_image(path: str | Path, depth: int | None = None) -> Tensor:
    """Decodes one file to uint8 RGB `(3, h, w)`, as `to_pixels` says; the first frame of several.

    A JPEG file that lacks its last bytes is read as far as it goes, with a warning that names it.
    Raises `ImageError`, which names the file, for anything else that does not decode whole, is
    of none of `FORMATS`, has more than `MAX_PIXELS` or is no ordinary file.
    """
    try:
        if not Path(path).is_file():  # to open a named pipe would wait for ever
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            try:
                return _decode(file, depth)
            except OSError:
                file.seek(0)
                pixels = _decode_cut(file.read(), depth)
                if pixels is None:
                    raise
    except Exception as error:  # Pillow's readers raise all kinds for damaged files
        reason = str(error) or type(error).__name__
        raise ImageError(f"image {path} cannot be read: {reason}") from error
    warnings.warn(f"image {path} lacks its last bytes: it is read as far as it goes", stacklevel=2)
    return pixels


def to_pixels(image: Image.Image, depth: int | None = None) -> Tensor:
    """A PIL image as uint8 RGB `(3, h, w)`, turned as its EXIF orientation says.

    What is transparent is laid on white. Greyscale of over 8 bits is read by `depth`, see
    `open_images`; of colour of 16 bits Pillow keeps the upper 8.

    Raises:
        ValueError: greyscale with values beyond `depth` or not finite; 16-bit colour of which the
            upper bits are empty, or with a depth other than 16.
    """
    from PIL import Image, ImageOps

    is_deep_colour = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_scale(np.asarray(image).astype(np.float64), depth))
    elif is_deep_colour and depth != 16:
        _check_deep_colour(image, depth)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open(file: IO[bytes]) -> Image.Image:
    """As `Image.open`, which other packages put their own function in the place of."""
    from PIL import Image

    Image.init()
    start = file.read(16)
    for name in FORMATS:
        opener, accept = Image.OPEN.get(name, (None, None))
        accepted = opener is not None and accept is not None and accept(start)
        if isinstance(accepted, str):  # why this Pillow cannot
            raise ValueError(accepted)
        if opener is not None and accepted:
            file.seek(0)
            if name == "JPEG2000" and _EOC not in file.read().partition(_SOC)[2]:
                raise ValueError("it lacks its last bytes")  # of which its decoder may say nothing
            file.seek(0)
            return opener(file, "")
    raise ValueError(f"its content is none of {', '.join(FORMATS)}")


def _decode(file: IO[bytes], depth: int | None) -> Tensor:
    image = _open(file)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, at most {MAX_PIXELS:,} are read")
    return to_pixels(image, depth)


def _decode_cut(data: bytes, depth: int | None) -> Tensor | None:
    """What there is of a JPEG file without its end; None if it is no such file or shows nothing.

    The block that it ends in is noise, and what would follow is even.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    for part in (data, data[: data.rfind(b"\xff")]):  # it may end within a marker
        try:
            pixels = _decode(io.BytesIO(part + _EOI), depth)
        except OSError:
            continue
        is_even = (pixels == pixels[:, -1:, -1:]).all(0)
        return None if bool(is_even[_BLOCK:].all() and is_even[:, _BLOCK:].all()) else pixels
    return None


def _scale(values: npt.NDArray[np.float64], depth: int | None) -> npt.NDArray[np.uint8]:
    """Deep greyscale `(h, w)` as uint8, as `open_images` says."""
    least, most = float(values.min()), float(values.max())
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    if depth is not None:
        white = 2**depth - 1
        if least < 0 or most > white:
            raise ValueError(
                f"it has values from {least:g} to {most:g}, wanted 0 to {white} (depth={depth})"
            )
        least, most = 0.0, float(white)
    elif least == most:
        return np.full(values.shape, 128, dtype=np.uint8)
    return ((values - least) * 255 / (most - least)).round().astype(np.uint8)


def _check_deep_colour(image: Image.Image, depth: int | None) -> None:
    bands: Any = image.getextrema()
    most = max(high for _, high in bands[: 1 if image.mode == "LA" else 3])
    if depth is not None or most < 16:
        raise ValueError(
            f"it is 16-bit colour, read by its upper 8 bits, which go to {most} of 255; wanted "
            "depth=16 if that is right, or greyscale"
        )
