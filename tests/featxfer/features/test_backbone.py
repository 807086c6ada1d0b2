from __future__ import annotations

import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featxfer import Backbone, Preprocessing
from featxfer.features.backbone import describe_module, frozen, sha256_of, weights_sha256


def test_modes_are_restored_after_an_error(backbone: Backbone) -> None:
    backbone.module.train()

    def fail_inside() -> None:
        with frozen(backbone.module):
            assert not any(child.training for child in backbone.module.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert all(child.training for child in backbone.module.modules())


class Stubborn(nn.Dropout):
    def train(self, mode: bool = True) -> Stubborn:
        self.training = True
        return self


def test_a_module_that_refuses_eval_mode_is_named() -> None:
    module = nn.Sequential(Stubborn(), nn.ReLU()).train()
    with pytest.raises(ValueError, match="module: Stubborn stays in training mode"), frozen(module):
        raise AssertionError
    assert all(child.training for child in module.modules())


class Told(nn.Module):
    """Notes the modes that its own `train` is called with."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.told: list[bool] = []

    def train(self, mode: bool = True) -> Told:
        self.told.append(mode)
        super().train(mode)
        return self


def test_modes_are_restored_by_the_modules_own_train() -> None:
    inner = Told()
    outer = Told(inner).train()
    outer.told.clear()
    inner.told.clear()
    with frozen(outer):
        assert (outer.told, inner.told) == ([False], [False])
    assert (outer.told, inner.told) == ([False, True], [False, True])


def test_mixed_modes_are_exactly_what_they_were() -> None:
    class KeepsNorms(nn.Sequential):
        def train(self, mode: bool = True) -> KeepsNorms:
            super().train(mode)
            self[1].eval()
            return self

    class Stays(nn.Dropout):
        def train(self, mode: bool = True) -> Stays:
            self.training = False
            return self

    deep = nn.Sequential(nn.Dropout(), Told(nn.Dropout()))
    module = nn.Sequential(KeepsNorms(nn.ReLU(), nn.BatchNorm2d(1)), deep, Stays())
    for number in range(2 ** len(list(module.modules()))):
        modes = [bool(number >> bit & 1) for bit in range(len(list(module.modules())))]
        for child, mode in zip(module.modules(), modes, strict=True):
            child.training = mode
        with frozen(module):
            assert not any(child.training for child in module.modules())
        assert [child.training for child in module.modules()] == modes


def test_modules_in_eval_mode_are_not_touched() -> None:
    module = Told(Told()).eval()
    module.told.clear()
    with frozen(module):
        pass
    assert module.told == []


class CachesPositions(nn.Module):
    """A host that keeps what it has computed of its own parameters for the next run."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.ones(4))
        self.kept: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = images.new_ones(4).cumsum(0)
        return images.mean((2, 3)).sum(1, keepdim=True) * self.positions * self.kept


def test_a_host_that_keeps_tensors_of_a_frozen_run_trains_after_it() -> None:
    module, images = CachesPositions(), torch.ones(2, 3, 4, 4)
    with frozen(module):
        module(images)
    assert module.kept is not None
    module(images).sum().backward()
    assert module.positions.grad is not None
    assert module.positions.grad.tolist() == [6.0, 12.0, 18.0, 24.0]


class Helper:
    def __init__(self, margin: float) -> None:
        self.margin = margin
        self.images = 0

    def widen(self, features: Tensor) -> Tensor:
        self.images += len(features)
        return features + self.margin


class Host(nn.Module):
    """Settings of all kinds, and what a run leaves behind in all ways."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.name, self.flag = 2.0, "host", True
        self.sizes: Any = [1, (2, 3)]
        self.options: Any = {"eps": 1e-3, "dtype": torch.float32}
        self.helper = Helper(0.5)
        self.inner = nn.Conv2d(3, 4, 1)
        self.calls, self.by_name = 0, 0
        self.last: tuple[int, ...] | None = None
        self.cached: dict[int, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        self._note(images)
        with torch.no_grad():
            return self.helper.widen(self.inner(images).mean((2, 3))) * self.scale / self.width

    @cached_property
    def width(self) -> int:
        return self.inner.out_channels

    @torch.no_grad()
    def _note(self, images: Tensor) -> None:
        self.calls += 1
        self.last, size = images.shape, len(images)
        self.cached[size] = images
        setattr(self, "by_name", size)  # noqa: B010

    def set_scale(self, scale: float) -> None:
        self.scale = scale


def seeded_host() -> Host:
    torch.manual_seed(0)
    return Host()


def architecture(module: nn.Module) -> str:
    return Backbone(module).architecture_sha256


def test_every_setting_is_part_of_the_architecture() -> None:
    host = seeded_host()
    keys = [architecture(host)]
    host.set_scale(3.0)
    keys.append(architecture(host))
    host.flag = False
    keys.append(architecture(host))
    host.name = "other"
    keys.append(architecture(host))
    host.sizes = [1, (2, 4)]
    keys.append(architecture(host))
    host.options["dtype"] = torch.float64
    keys.append(architecture(host))
    host.helper.margin = 0.25
    keys.append(architecture(host))
    host.inner.some_number = 1  # type: ignore[assignment]
    keys.append(architecture(host))
    keys.append(architecture(nn.Sequential(host)))
    assert len(set(keys)) == len(keys)


def test_what_a_run_leaves_behind_is_no_setting_in_any_process() -> None:
    host = seeded_host()
    before = architecture(host)
    host(torch.ones(2, 3, 4, 4))
    assert (host.calls, host.by_name, host.helper.images) == (1, 2, 2)
    assert architecture(host) == before
    found = describe_module(host)["settings"][""]
    assert set(found) == {"scale", "name", "flag", "sizes", "options", "helper"}
    script = "from test_backbone import *\nprint(architecture(seeded_host()))"
    paths = [str(Path(__file__).parent), *sys.path]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{script}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == before


def test_tensors_and_modules_are_no_settings() -> None:
    module = nn.Linear(2, 2)
    before = architecture(module)
    module.kept = torch.ones(2)
    object.__setattr__(module, "other", nn.ReLU())
    assert architecture(module) == before


def test_a_child_that_is_left_out_does_not_count() -> None:
    module = nn.Sequential()
    module.add_module("trunk", seeded_host())
    alone = describe_module(module, leave_out="extra")
    module.add_module("extra", nn.Linear(1, 2))
    assert describe_module(module, leave_out="extra") == alone
    assert sha256_of(describe_module(module)) != sha256_of(alone)


def test_objects_that_hold_one_another_are_described() -> None:
    host = seeded_host()
    host.helper.other = Helper(1.0)  # type: ignore[attr-defined]
    host.helper.other.other = host.helper  # type: ignore[attr-defined]
    before = architecture(host)
    assert architecture(host) == before
    host.helper.other.margin = 2.0  # type: ignore[attr-defined]
    assert architecture(host) != before


def test_preprocessing_keeps_to_the_pixels_device_and_to_float32() -> None:
    pixels = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            images = Preprocessing()(pixels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (images.device.type, images.dtype) == ("cpu", torch.float32)


def test_preprocessing_by_hand() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    images = Preprocessing((0.5, 0.25, 0.0), (0.5, 1.0, 2.0))(pixels)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([-1.0, -0.25, 0.0]))
    torch.testing.assert_close(images[0, :, 0, 1], torch.tensor([1.0, 0.75, 0.5]))


def test_blue_comes_first_where_the_backbone_takes_it_so() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.1)
    red_first = Preprocessing(mean, std)(pixels)
    blue_first = Preprocessing(mean, std, bgr=True)(pixels)
    assert torch.equal(blue_first, red_first[:, [2, 1, 0]])
    assert not torch.equal(blue_first, red_first)


def test_the_weights_hash_follows_every_value_name_and_dtype(backbone: Backbone) -> None:
    module = backbone.module
    before = weights_sha256(module)
    assert weights_sha256(module) == before
    assert weights_sha256(nn.ModuleDict({"0": module})) != before
    assert weights_sha256(module.double()) != before
    module.float()
    assert weights_sha256(module) == before
    with torch.no_grad():
        next(module.buffers())[0] += 1e-6
    assert weights_sha256(module) != before


def test_what_is_empty_counts_by_its_name_whatever_its_strides(backbone: Backbone) -> None:
    """As converters of ONNX files leave it."""
    plain, hashes = backbone.weights_sha256, set()
    for empty in (torch.empty(0), torch.empty(0).as_strided((0,), (0,))):
        backbone.module.register_buffer("empty", empty)
        hashes.add(backbone.weights_sha256)
    assert len(hashes) == 1
    assert plain not in hashes
