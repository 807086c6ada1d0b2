"""How a high-resolution (HR) image becomes a low-resolution (LR) one, as a value to save."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from featxfer.checks import check_choice, check_integer

KERNELS = ("bicubic", "bilinear", "nearest")


class BaseDegradation(ABC):
    """The HR view and the LR view of one image, of the same size; a value that is saved.

    Subclasses are frozen dataclasses: `Degradation` for models of one input size,
    `ScaledDegradation` for images that keep theirs.
    """

    KINDS: ClassVar[dict[str, type[BaseDegradation]]] = {}
    """All of them, by the name of their class."""

    RESIZE: ClassVar[str] = "torch.nn.functional.interpolate(uint8)"
    """The one resize implementation, by name: other ones give other pixels."""

    kernel: str
    antialias: bool

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        BaseDegradation.KINDS[cls.__name__] = cls

    @abstractmethod
    def hr(self, image: Tensor) -> Tensor:
        """The HR view of `image`, uint8 RGB `(3, h, w)`: uint8."""

    @abstractmethod
    def lr(self, image: Tensor) -> Tensor:
        """The LR view of `image`, uint8 RGB `(3, h, w)`: uint8, of the HR view's size."""

    @abstractmethod
    def describe_view(self, view: str) -> dict[str, Any]:
        """What view "hr" or "lr" depends on, as JSON types."""

    def corrupt(self, small: Tensor) -> Tensor:
        """What else happens to the small image, uint8 `(3, h, w)`; here nothing."""
        return small

    def to_dict(self) -> dict[str, Any]:
        """All fields and the name of the resize implementation, as JSON types."""
        kind = {} if type(self) is Degradation else {"kind": type(self).__name__}
        values: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {**values, "resize": self.RESIZE, **kind}

    def to_json(self) -> str:
        """`to_dict` as one line of JSON; `from_json` gives an equal value back."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> BaseDegradation:
        """The inverse of `to_dict`, of any degradation whose module is imported.

        Raises `ValueError` for unknown or missing fields, for another resize implementation, and
        for a kind that is not known.
        """
        fields = dict(values)
        kind = fields.pop("kind", "Degradation")
        if kind not in BaseDegradation.KINDS:
            known = ", ".join(BaseDegradation.KINDS)
            raise ValueError(
                f"kind: got degradation {kind!r}, known are {known}; "
                "those of featxfer_integrations once it is imported"
            )
        cls = BaseDegradation.KINDS[kind]
        resize = fields.pop("resize", None)
        if resize != cls.RESIZE:
            raise ValueError(f"resize: got {resize!r}, wanted {cls.RESIZE!r}")
        wanted = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if set(fields) != wanted:
            raise ValueError(
                f"degradation: got fields {sorted(fields)}, wanted exactly {sorted(wanted)}"
            )
        return cls(**fields)

    @staticmethod
    def from_json(text: str) -> BaseDegradation:
        """The inverse of `to_json`; raises `ValueError` as `from_dict` does, and for other JSON."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"degradation: got {type(values).__name__}, wanted a JSON object")
        return BaseDegradation.from_dict(values)

    def _check_kernel(self) -> None:
        check_choice("kernel", self.kernel, KERNELS)
        if not isinstance(self.antialias, bool):
            raise ValueError(f"antialias: got {self.antialias!r}, wanted True or False")
        if self.antialias and self.kernel == "nearest":
            raise ValueError("antialias: got True with kernel 'nearest', wanted antialias=False")

    def _resize(self, image: Tensor, height: int, width: int) -> Tensor:
        size = (height, width)
        if size == (1, 1):  # one pixel is the mean, and what torch's kernel for uint8 refuses
            return image.double().mean((1, 2), keepdim=True).round().to(torch.uint8)
        if image.shape[1:] == (1, 1):
            return image.expand(-1, *size).contiguous()
        if self.kernel == "nearest":
            return F.interpolate(image[None], size=size, mode="nearest-exact")[0]
        return F.interpolate(image[None], size=size, mode=self.kernel, antialias=self.antialias)[0]


@dataclass(frozen=True)
class Degradation(BaseDegradation):
    """The HR view and the LR view of one image, both `hr_size` x `hr_size` pixels.

    The paper (section 4.1): HR is the original resized to 224 x 224, bicubic; LR is the original
    resized to 32 x 32 and from there to 224 x 224. It does not state whether the kernel is
    antialiased when it shrinks; we antialias by default.

    Args:
        hr_size: side of the backbone's input, in pixels, >= 1.
        lr_size: side of the small image, in pixels, 1 <= lr_size <= hr_size.
        kernel: "bicubic" (the paper), "bilinear" or "nearest".
        antialias: whether the kernel is widened when it shrinks; not defined for "nearest".
        order: "original" (the paper): original -> LR -> HR size; "hr": original -> HR size -> LR
            -> HR size, as one public note on the paper reads it.

    Raises:
        ValueError: for a value outside of these.
    """

    hr_size: int = 224
    lr_size: int = 32
    kernel: str = "bicubic"
    antialias: bool = True
    order: str = "original"

    def __post_init__(self) -> None:
        check_integer("hr_size", self.hr_size, at_least=1)
        check_integer("lr_size", self.lr_size, at_least=1)
        if self.lr_size > self.hr_size:
            raise ValueError(f"lr_size: got {self.lr_size}, wanted at most hr_size={self.hr_size}")
        check_choice("order", self.order, ("original", "hr"))
        self._check_kernel()

    def hr(self, image: Tensor) -> Tensor:
        """The HR view of `image`, uint8 RGB `(3, h, w)`: uint8 `(3, hr_size, hr_size)`."""
        return self._resize(_as_image(image), self.hr_size, self.hr_size)

    def lr(self, image: Tensor) -> Tensor:
        """The LR view of `image`, uint8 RGB `(3, h, w)`: uint8 `(3, hr_size, hr_size)`."""
        image = _as_image(image)
        if self.order == "hr":
            image = self._resize(image, self.hr_size, self.hr_size)
        small = self._resize(image, self.lr_size, self.lr_size)
        return self._resize(self.corrupt(small), self.hr_size, self.hr_size)

    def describe_view(self, view: str) -> dict[str, Any]:
        """What view "hr" or "lr" depends on: the HR view does not know `lr_size` and `order`."""
        check_choice("view", view, ("hr", "lr"))
        described = self.to_dict()
        if view == "hr":
            described = {name: described[name] for name in ("hr_size", *_OF_HR, "resize")}
        return {**described, "view": view}


@dataclass(frozen=True)
class ScaledDegradation(BaseDegradation):
    """Images that keep their size, for detectors: HR is the image, LR the image shrunk and back.

    Boxes of one view are boxes of the other.

    Args:
        factor: how many times smaller the small image is, on both sides, >= 1; it has at least
            one pixel.
        kernel: "bicubic", "bilinear" or "nearest".
        antialias: whether the kernel is widened when it shrinks; not defined for "nearest".

    Raises:
        ValueError: for a value outside of these.
    """

    factor: float = 4.0
    kernel: str = "bicubic"
    antialias: bool = True

    def __post_init__(self) -> None:
        is_number = isinstance(self.factor, int | float) and not isinstance(self.factor, bool)
        if not is_number or not 1 <= self.factor < float("inf"):
            raise ValueError(f"factor: got {self.factor!r}, wanted a finite number >= 1")
        object.__setattr__(self, "factor", float(self.factor))
        self._check_kernel()

    def hr(self, image: Tensor) -> Tensor:
        """`image` itself, uint8 RGB `(3, h, w)`."""
        return _as_image(image)

    def lr(self, image: Tensor) -> Tensor:
        """The LR view of `image`, uint8 RGB `(3, h, w)`: uint8 of the same shape."""
        height, width = _as_image(image).shape[1:]
        small = [max(1, round(side / self.factor)) for side in (height, width)]
        return self._resize(self.corrupt(self._resize(image, *small)), height, width)

    def describe_view(self, view: str) -> dict[str, Any]:
        """What view "hr" or "lr" depends on: the HR view on nothing."""
        check_choice("view", view, ("hr", "lr"))
        return {"view": view} if view == "hr" else {**self.to_dict(), "view": view}


_OF_HR = ("kernel", "antialias")
"""What the HR view depends on beside its size."""


def _as_image(image: Tensor) -> Tensor:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"image: got {str(image.dtype).removeprefix('torch.')} of shape {tuple(image.shape)}, "
            "wanted uint8 (3, h, w)"
        )
    return image
