"""What tests of fits share: small views, short recipes, and calls with both."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featxfer import Degradation, EpochLog, Recipe, ScaledDegradation, open_images
from featxfer_integrations import (
    FitOptions,
    TransferFit,
    detach_transfer,
    fit_transfer,
    load_transfers,
    save_transfers,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations.mechanism.attach import is_attached

LR = Degradation(hr_size=32, lr_size=8)
SCALED = ScaledDegradation(3)
QUICK = Recipe(epochs=20, learning_rate=1e-3, optimizer="adamw", schedule="one-cycle")
BLOCKS = dataclasses.replace(QUICK, epochs=6, batch_size=16, learning_rate=2e-3)
WHOLE = dataclasses.replace(QUICK, epochs=4, batch_size=4, learning_rate=2e-3)
"""Through the whole model."""

HEADS = {"FasterRCNN": "boxes", "RetinaNet": "boxes_class"}


def arguments(**given: Any) -> dict[str, Any]:
    """Arguments of `fit_transfer`, of those that are its own and those of `FitOptions`."""
    names = {field.name for field in dataclasses.fields(FitOptions)}
    options = {name: given.pop(name) for name in names & given.keys()}
    return {**given, "options": FitOptions(**options)}


def fit_head(model: nn.Module, images: Any, folder: Path, **given: Any) -> TransferFit:
    """A head alone."""
    usual = {"degradation": LR, "site": "head", "recipe": QUICK, "cache": folder / "cache"}
    return fit_transfer(model, images, **arguments(**{**usual, **given}))


def fit_blocks(model: nn.Module, images: Any, cache: Path, **given: Any) -> TransferFit:
    """A block after layer1, and then the head, if one is attached."""
    with_head = is_attached(model) and "head" in transfers_of(model)
    usual = {
        "degradation": LR,
        "site": ["layer1", "head"] if with_head else "layer1",
        "recipe": QUICK if with_head else None,
        "block_recipe": BLOCKS,
        "cache": cache,
        "precision": "fp32",
        "held_out": 0.25,
        "crops": 1,
    }
    return fit_transfer(model, images, **arguments(**{**usual, **given}))


def fit_detector(
    model: nn.Module, images: Any, cache: Path, trains: str = "blocks and heads", **given: Any
) -> TransferFit:
    """With the recipes of what is trained."""
    usual = {
        "degradation": SCALED,
        "recipe": QUICK if "heads" in trains else None,
        "block_recipe": WHOLE if "blocks" in trains else None,
        "cache": cache,
        "precision": "fp32",
        "held_out": 0.25,
    }
    return fit_transfer(model, images, **arguments(**{**usual, **given}))


@torch.no_grad()
def detect(model: nn.Module, folder: Path) -> list[dict[str, Tensor]]:
    """What a detector finds in LR views of the first images."""
    images = open_images(folder)
    found: list[dict[str, Tensor]] = model([SCALED.lr(images.read(row)) / 255 for row in range(3)])
    return found


def same(some: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> bool:
    """Whether two runs found the same, bit for bit."""
    pairs = [(a[key], b[key]) for a, b in zip(some, others, strict=True) for key in a]
    return all(torch.equal(a, b) for a, b in pairs)


def assert_trained_and_saved(
    detector: nn.Module, plain: nn.Module, discs: Path, folder: Path
) -> None:
    """What is attached acts, is saved and loaded whole, and is all that the detector has more."""
    found = detect(plain, discs)
    assert not same(detect(detector, discs), found)
    with transfer_disabled(detector):
        assert same(detect(detector, discs), found)
    before = state_of(plain)
    load_transfers(plain, save_transfers(detector, folder), degradation=SCALED)
    assert same(detect(plain, discs), detect(detector, discs))
    for module in transfers_of(detector).values():
        card: Any = module.card
        assert card.degradations == (SCALED,)
        assert card.details["images"] == 12
    assert_untouched(detach_transfer(detector), before)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What a model holds, kept."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The model holds that and nothing else."""
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def assert_untouched(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Nothing is attached to the model, and it holds that and nothing else."""
    assert not is_attached(model)
    assert_holds(model, state)


@contextmanager
def told_of_epochs(tell: Callable[[str, int], None]) -> Iterator[None]:
    """Inside, `tell` is called after each epoch of a fit: what is trained, and which epoch."""

    @contextmanager
    def epochs(_: Recipe, what: str) -> Iterator[Callable[[EpochLog], None]]:
        yield lambda entry: tell(what.removeprefix("training "), entry.epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featxfer_integrations.stages.base.epochs", epochs)
        yield


@contextmanager
def interrupted_after(what: str, epoch: int) -> Iterator[None]:
    """Inside, a fit is interrupted, as it is meant to be, after an epoch of what it trains."""

    def interrupt(trained: str, now: int) -> None:
        if (trained, now) == (what, epoch):
            raise KeyboardInterrupt

    with told_of_epochs(interrupt), pytest.raises(KeyboardInterrupt):
        yield


def assert_half_precision_is_trained_in_full(
    detector: nn.Module, images: Path, cache: Path, trains: str, site: str
) -> None:
    """What a detector in bfloat16 gets is what one in float32 gets, rounded."""
    whole = copy.deepcopy(detector.bfloat16())
    fit_detector(detector, images, cache, trains, site=site)
    for module in transfers_of(detector).values():
        assert {value.dtype for value in module.parameters()} == {torch.bfloat16}
    float_host = whole.float()
    fit_detector(float_host, images, cache, trains, site=site)
    for mine, wanted in zip(
        transfers_of(detector).parameters(), transfers_of(float_host).parameters(), strict=True
    ):
        assert torch.equal(mine, wanted.bfloat16())
