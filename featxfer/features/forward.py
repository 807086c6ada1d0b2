"""How a backbone is run over many images: arithmetic, compilation, batches of one shape."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featxfer.checks import check_choice
from featxfer.features.backbone import Backbone, frozen

PRECISIONS = ("auto", "fp32", "bf16")
COMPILE = ("auto", "on", "off")

COMPILE_FROM = 50_000
"""Images from which on "auto" compiles: below, that takes longer than it saves (ours)."""


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    fast: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return fast


def rounding_of(device: torch.device) -> str:
    """Which float32 operations torch may round on a device: "" or such as "matmul tf32, conv tf32".

    As `torch.backends` is set now, by whichever of its interfaces.
    """
    of: Any = {"cuda": torch.backends.cudnn, "cpu": torch.backends.mkldnn}.get(device.type)
    if of is None:
        return ""
    matmul: Any = torch.backends.cuda.matmul if device.type == "cuda" else of.matmul
    found = {"matmul": matmul, "conv": of.conv, "rnn": of.rnn}
    precisions = {name: kind.fp32_precision for name, kind in found.items()}
    return ", ".join(f"{n} {p}" for n, p in precisions.items() if p not in ("none", "ieee"))


@dataclass(frozen=True)
class Arithmetic:
    """How features are computed; other bits than another one's.

    Args:
        bf16: autocast to bfloat16, which the rows are kept in; else float32.
        compiled: by `torch.compile`, with the weights as constants, so that batch norms become
            part of the convolutions before them.
        rounding: of float32 operations to shorter numbers, by torch's settings (`rounding_of`).
    """

    bf16: bool = False
    compiled: bool = False
    rounding: str = ""

    @classmethod
    def choose(cls, precision: str, compile_: str, device: torch.device, images: int) -> Arithmetic:
        """What "auto" comes to on this machine, for so many images.

        Raises `ValueError` for what is not in `PRECISIONS` or `COMPILE`, and for "on" where no
        compiler is found.
        """
        check_choice("precision", precision, PRECISIONS)
        check_choice("compile", compile_, COMPILE)
        can = device.type == "cuda" or any(map(shutil.which, ("g++", "clang++", "c++")))
        if compile_ == "on" and not can:
            raise ValueError("compile: got 'on', and no C++ compiler is found, wanted 'off'")
        fast = precision == "bf16" or (precision == "auto" and bf16_is_fast(device))
        compiled = compile_ == "on" or (compile_ == "auto" and can and images >= COMPILE_FROM)
        return cls(fast, compiled, rounding_of(device))

    @property
    def name(self) -> str:
        """For keys: "fp32" or "bf16", and "compiled" and the rounding behind it."""
        words = ["bf16" if self.bf16 else "fp32", "compiled" * self.compiled, self.rounding]
        return " ".join(filter(None, words))

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that are kept."""
        return torch.bfloat16 if self.bf16 else torch.float32


class Forward:
    """A backbone as a function from images to rows, in batches of one shape.

    Args:
        backbone: runs on the device of its parameters, in eval mode without gradients, and gets its
            modes back after each call.
        arithmetic: see there.
        batch_size: images a forward pass; the last batch is filled up and cut again.
    """

    def __init__(self, backbone: Backbone, arithmetic: Arithmetic, batch_size: int) -> None:
        self.backbone, self.arithmetic, self.batch_size = backbone, arithmetic, batch_size
        self.device = device_of(backbone)
        self._module: Callable[[Tensor], object] = backbone.module
        if arithmetic.compiled:
            self._module = torch.compile(backbone.module, dynamic=False, options={"freezing": True})

    def __call__(self, pixels: Sequence[Tensor], advance: Callable[[int], object]) -> Tensor:
        """Rows `(n, d)` on the CPU of uint8 images `(3, h, w)` of one size.

        Args:
            pixels: images, or none.
            advance: called with the number of images after each batch.

        Raises:
            ValueError: an output that is not `(n, d)`.
        """
        if not pixels:
            return torch.empty(0, 0, device="cpu")
        rows = []
        with frozen(self.backbone.module), self._autocast():
            for start in range(0, len(pixels), self.batch_size):
                batch = list(pixels[start : start + self.batch_size])
                count = len(batch)
                if self.arithmetic.compiled:  # each shape is another compilation
                    batch += [batch[-1]] * (self.batch_size - count)
                images = torch.stack(batch).to(self.device, non_blocking=True)
                output = self._module(self.backbone.preprocessing(images))
                rows.append(self._rows(output, len(batch))[:count])
                advance(count)
        return torch.cat(rows)

    @property
    def is_short(self) -> bool:
        """Whether numbers shorter than float32 are in use, of weights too."""
        weights = {parameter.dtype for parameter in self.backbone.module.parameters()}
        half = not weights.isdisjoint({torch.float16, torch.bfloat16})
        return half or self.arithmetic.bf16 or bool(self.arithmetic.rounding)

    def _autocast(self) -> AbstractContextManager[object]:
        if not self.arithmetic.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _rows(self, output: object, count: int) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != count:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"backbone {self.backbone.name}: got output {got}, wanted ({count}, d)"
            )
        return output.to("cpu", self.arithmetic.dtype)


def device_of(backbone: Backbone) -> torch.device:
    """Where its parameters are; the CPU where it has none."""
    parameter = next(backbone.module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
