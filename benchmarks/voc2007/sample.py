"""The synthetic sample: what its images show, and how they are painted.

Nothing here is a photograph and nothing comes from VOC: every image is drawn by this module.
The set is the default data of a benchmark that measures what image classification loses at a
low resolution (24 px) against 128 px, so that the benchmark runs where the real data is absent.
A class is a shape filled with a texture.  Both are plain to see in an image of 128 px; in one of
24 px the texture is blurred, not gone, as it is in small photographs; colour tells nothing.
Scores on this data say nothing about scores on VOC2007.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]

SHAPES = ("disc", "triangle", "star", "cross", "hoop")
TEXTURES = ("striped", "dotted", "checked", "ringed")
CLASSES: tuple[str, ...] = tuple(f"{texture}_{shape}" for shape in SHAPES for texture in TEXTURES)

COUNTS = (3, 1, 2, 2)  # clear objects of image i: COUNTS[i % 4]
EXTRA_CHANCE = 0.3  # share of images with one more object, a difficult one
OCCLUDED_CHANCE = 0.3  # share of clear objects with something drawn over a part of them
RADIUS = (0.36, 0.5)  # of a shape, in sides of its cell
PERIOD = (24 / 224, 40 / 224)  # of a texture, in sides of the image


@dataclass(frozen=True)
class Item:
    """One object to draw: the index of its class, and "clear", or the reason it is difficult."""

    label: int
    kind: str  # "clear", "small" or "hidden"


@dataclass(frozen=True)
class Drawn:
    """One object as drawn: its item, and its box xmin, ymin, xmax, ymax, 1-based and inclusive."""

    item: Item
    truncated: bool
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class _Patch:
    """The part of a canvas near a point, with pixel coordinates about that point."""

    where: tuple[slice, slice]
    u: Array
    v: Array

    def turned(self, angle: float) -> _Patch:
        """The same pixels with the coordinates turned by angle in radians."""
        cos, sin = math.cos(angle), math.sin(angle)
        return _Patch(self.where, self.u * cos + self.v * sin, self.v * cos - self.u * sin)


@dataclass
class _Canvas:
    """An image being painted, height x width x 3 in 0..1, and what is visible of each object."""

    pixels: Array
    visible: list[Array]

    def patch(self, x: float, y: float, reach: float, angle: float) -> _Patch:
        """The pixels within reach of (x, y) both ways, with coordinates turned by angle."""
        height, width = self.pixels.shape[:2]
        left, top = max(0, math.floor(x - reach)), max(0, math.floor(y - reach))
        right, bottom = min(width, math.ceil(x + reach) + 1), min(height, math.ceil(y + reach) + 1)
        u = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(x)
        v = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)
        return _Patch((slice(top, bottom), slice(left, right)), u, v).turned(angle)

    def paint(self, patch: _Patch, mask: Array, colour: Array) -> None:
        """Lay colour over the patch where mask (0..1) is set, and hide what lay below."""
        below = self.pixels[patch.where]
        below += mask[..., None] * (colour - below)
        for seen in self.visible:
            seen[patch.where] *= 1 - mask


def _star(x: Array, y: Array, points: int, inner: float) -> Array:
    """Distance outside a star of outer radius 1; a regular polygon at inner = cos(pi / points)."""
    half = math.pi / points
    turn = np.abs((np.arctan2(y, x) + half) % (2 * half) - half)
    radius = np.hypot(x, y)
    edge_x, edge_y = 1 - inner * math.cos(half), inner * math.sin(half)
    outside = (radius * np.cos(turn) - 1) * edge_y + radius * np.sin(turn) * edge_x
    return np.asarray(outside / math.hypot(edge_x, edge_y), np.float32)


def _cross(x: Array, y: Array) -> Array:
    """Distance outside a plus sign with arms of length 1."""
    x, y = np.abs(x), np.abs(y)
    bar, post = np.maximum(x - 1, y - 0.36), np.maximum(x - 0.36, y - 1)
    return np.asarray(np.minimum(bar, post), np.float32)


_SHAPE: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda x, y: np.asarray(np.hypot(x, y) - 0.9, np.float32),
    "triangle": lambda x, y: _star(x / 1.2, y / 1.2, 3, 0.5),
    "star": lambda x, y: _star(x / 1.2, y / 1.2, 5, 0.5),
    "cross": _cross,
    "hoop": lambda x, y: np.asarray(np.abs(np.hypot(x, y) - 0.72) - 0.28, np.float32),
}

# Each takes coordinates in radians, 2 pi a period, and gives a wave that crosses 0 at its edges.
_TEXTURE: dict[str, Callable[[Array, Array], Array]] = {
    "striped": lambda u, v: np.sin(u),
    "dotted": lambda u, v: np.asarray(np.cos(u) + np.cos(v) - 0.5, np.float32),
    "checked": lambda u, v: np.sin(u * 0.6) * np.sin(v * 0.6) * 1.5,
    "ringed": lambda u, v: np.sin(np.hypot(u, v)),
}


def _colour(rng: np.random.Generator) -> Array:
    return rng.uniform(0.05, 0.95, 3).astype(np.float32)


def _pair(rng: np.random.Generator) -> tuple[Array, Array]:
    """A dark and a light colour, in random order."""
    dark = rng.uniform(0, 0.35, 3).astype(np.float32)
    light = rng.uniform(0.65, 1, 3).astype(np.float32)
    return (dark, light) if rng.random() < 0.5 else (light, dark)


def _noise(rng: np.random.Generator, size: tuple[int, int], cells: int) -> Array:
    """Smooth noise in about -1..1 for an image of size (width, height), cells bumps a side."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Array:
    """Clouds of two colours under a finer grain, height x width x 3."""
    one, two = _colour(rng), _colour(rng)
    mix = 0.5 + 0.4 * _noise(rng, size, 5) + 0.2 * _noise(rng, size, 16)
    grain = 0.10 * _noise(rng, size, 60) + 0.05 * _noise(rng, size, 150)
    return np.asarray(one + mix[..., None] * (two - one) + grain[..., None], np.float32)


def _clutter(rng: np.random.Generator, canvas: _Canvas, count: int, largest: float) -> None:
    """Paint count plain distractors, boxes and blobs of up to largest pixels from the middle."""
    height, width = canvas.pixels.shape[:2]
    for _ in range(count):
        across, along = rng.uniform(0.25, 1, 2) * largest
        x, y, angle = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, math.pi)
        patch = canvas.patch(x, y, math.hypot(across, along), angle)
        power = rng.choice((2, 12))
        mask = np.abs(patch.u / across) ** power + np.abs(patch.v / along) ** power < 1
        canvas.paint(patch, mask.astype(np.float32), _colour(rng))


def _fill(rng: np.random.Generator, patch: _Patch, texture: str, period: float) -> Array:
    """Two colours in a texture of that period in pixels, at a random angle."""
    turned, step = patch.turned(rng.uniform(0, math.pi)), 2 * math.pi / period
    wave = _TEXTURE[texture](turned.u * step, turned.v * step)
    first, second = _pair(rng)
    mix = np.clip(0.5 + wave / step, 0, 1)[..., None]
    return np.asarray(first + mix * (second - first), np.float32)


def _occlude(
    rng: np.random.Generator, canvas: _Canvas, patch: _Patch, radius: float, share: float
) -> None:
    """Paint a box over that share of an object's width, from a random side."""
    turned = patch.turned(rng.uniform(0, 2 * math.pi))
    near, far = radius * (1 - 2 * share), radius * 1.1
    mask = (turned.u > near) & (turned.u < far) & (np.abs(turned.v) < far)
    canvas.paint(patch, mask.astype(np.float32), _colour(rng))


def _object(
    rng: np.random.Generator, canvas: _Canvas, item: Item, place: tuple[float, float, float]
) -> float:
    """Draw item at place (x, y, radius), maybe occluded; return its unhidden area in pixels."""
    x, y, radius = place
    radius *= 0.4 if item.kind == "small" else 1.0
    texture, shape = CLASSES[item.label].split("_")
    patch = canvas.patch(x, y, 1.6 * radius, rng.uniform(0, 2 * math.pi))
    mask = np.clip(0.5 - _SHAPE[shape](patch.u / radius, patch.v / radius) * radius, 0, 1)
    height, width = canvas.pixels.shape[:2]
    period = rng.uniform(*PERIOD) * math.sqrt(width * height)
    canvas.paint(patch, mask, _fill(rng, patch, texture, period))
    canvas.visible.append(np.zeros((height, width), np.float32))
    canvas.visible[-1][patch.where] = mask
    if item.kind == "hidden":
        _occlude(rng, canvas, patch, radius, rng.uniform(0.5, 0.65))
    elif rng.random() < OCCLUDED_CHANCE:
        _occlude(rng, canvas, patch, radius, rng.uniform(0.1, 0.3))
    return float(mask.sum())


def _places(
    rng: np.random.Generator, size: tuple[int, int], count: int
) -> list[tuple[float, float, float]]:
    """Where count objects go, as (x, y, radius), each in a cell of its own."""
    width, height = size
    across = 1 if count == 1 or (count == 2 and width < height) else 2
    down = 1 if count == 1 or (count == 2 and width >= height) else 2
    side = min(width / across, height / down)
    places = []
    for cell in rng.permutation(across * down)[:count]:
        radius = side * rng.uniform(*RADIUS) * (0.8 if count == 1 else 1.0)
        x = (cell % across + rng.uniform(0.38, 0.62)) * width / across
        y = (cell // across + rng.uniform(0.38, 0.62)) * height / down
        places.append((x, y, radius))
    return places


def deal_items(seed: int, split: int, index: int) -> list[Item]:
    """What image index of the split shows; its clear objects are dealt from shuffled decks."""
    rng = np.random.default_rng([seed, split, 0, index])
    slot = index // len(COUNTS) * sum(COUNTS) + sum(COUNTS[: index % len(COUNTS)])
    items = []
    for card in range(slot, slot + COUNTS[index % len(COUNTS)]):
        deck = np.random.default_rng([seed, split, 1, card // len(CLASSES)])
        items.append(Item(int(deck.permutation(len(CLASSES))[card % len(CLASSES)]), "clear"))
    if rng.random() < EXTRA_CHANCE:
        kind = "small" if rng.random() < 0.5 else "hidden"
        items.append(Item(int(rng.integers(len(CLASSES))), kind))
    return items


def draw(rng: np.random.Generator, items: list[Item]) -> tuple[Image.Image, list[Drawn]]:
    """Paint one image with these items, and say where they are in it."""
    width, height = (int(side) for side in rng.integers(300, 501, 2))
    canvas = _Canvas(_background(rng, (width, height)), [])
    _clutter(rng, canvas, int(rng.integers(4, 11)), 0.12 * min(width, height))
    places = _places(rng, (width, height), len(items))
    areas = [_object(rng, canvas, *pair) for pair in zip(items, places, strict=True)]
    _clutter(rng, canvas, int(rng.integers(0, 5)), 0.035 * min(width, height))
    light = rng.uniform(0.65, 1.15)
    pixels = np.clip(canvas.pixels * light * 255 + rng.normal(0, 4, canvas.pixels.shape), 0, 255)
    drawn = []
    for item, area, seen in zip(items, areas, canvas.visible, strict=True):
        rows, columns = np.nonzero(seen > 0.5)
        left, top, right, bottom = columns.min(), rows.min(), columns.max(), rows.max()
        cut = min(left, top) == 0 or right == width - 1 or bottom == height - 1
        cut = bool(cut or seen.sum() < 0.95 * area)
        box = (int(left) + 1, int(top) + 1, int(right) + 1, int(bottom) + 1)
        drawn.append(Drawn(item, cut, box))
    return Image.fromarray(pixels.astype(np.uint8)), drawn
