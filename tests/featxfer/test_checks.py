"""Rows come from any device and are on the CPU from then on, whatever torch's default device is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from featxfer import (
    PROTOCOLS,
    FeatureTransferBlock,
    FeatureTransferHead,
    compare_pairs,
    diagnose,
    kmeans,
    pseudo_labels,
    train_svms,
)
from featxfer.checks import as_features
from featxfer.evaluation.svm import SVMClassifier
from featxfer.modules.scaling import scale_features
from featxfer.training.objectives import PrototypeDistillation
from featxfer.training.pseudo_labels import assign, centroid_scores

GENERATOR = torch.Generator().manual_seed(0)
HR = torch.randn(30, 6, generator=GENERATOR) + 1
LR = HR / 2 + torch.randn(30, 6, generator=GENERATOR) / 4
CENTROIDS = HR[:4].clone()
LABELS = np.where(HR.numpy()[:, :2] > 1, 1, -1)


class Elsewhere(Tensor):
    """A tensor that says it is on a GPU, and can do nothing but be copied to the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=torch.device("cuda")
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Tensor:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        if func is torch.ops.aten._to_copy.default and kwargs["device"] == torch.device("cpu"):
            copied: Tensor = func(args[0].held, **kwargs)
            return copied
        raise AssertionError(f"{func} of rows on another device")


def statistics(features: Any) -> Any:
    head = FeatureTransferHead(6, 4, 8, output="clusters", scaling="l2")
    with torch.device("cpu"):
        head.set_input_statistics(features)
        head.set_centroids(F.normalize(CENTROIDS, dim=1))
        return head.transfer(features), head.input_mean


def distilled(centroids: Any) -> Any:
    with torch.device("cpu"):
        return PrototypeDistillation(centroids, 1.0)(LR, HR)


USES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "as_features": lambda hr, lr, centroids: as_features("hr", hr),
    "kmeans": lambda hr, lr, centroids: kmeans(hr, 3, seed=0).centroids,
    "kmeans, sklearn": lambda hr, lr, centroids: kmeans(hr, 3, seed=0, backend="sklearn").centroids,
    "assign": lambda hr, lr, centroids: assign(hr, centroids),
    "centroid_scores": lambda hr, lr, centroids: centroid_scores(lr, centroids),
    "pseudo_labels": lambda hr, lr, centroids: pseudo_labels(hr, lr, centroids, "nearest"),
    "diagnose": lambda hr, lr, centroids: diagnose(hr, lr, centroids).agreement,
    "compare_pairs": lambda hr, lr, centroids: compare_pairs(hr, lr, centroids).cosine,
    "scale_features": lambda hr, lr, centroids: scale_features(hr, "l2"),
    "head": lambda hr, lr, centroids: statistics(lr),
    "objective": lambda hr, lr, centroids: distilled(centroids),
    "svms": lambda hr, lr, centroids: train_svms(hr, LABELS, PROTOCOLS["plain"]).decisions(lr),
    "svms, batched": lambda hr, lr, centroids: train_svms(
        hr, LABELS, PROTOCOLS["virtex"], solver="batched"
    ).decisions(lr),
    "svms, one cost": lambda hr, lr, centroids: train_svms(
        hr, LABELS, PROTOCOLS["plain"], solver="batched"
    ).as_module()(HR),
}


@pytest.mark.parametrize("name", USES)
def test_rows_of_another_device_are_taken_to_the_cpu(name: str) -> None:
    use = USES[name]
    elsewhere = [Elsewhere(rows) for rows in (HR, LR, CENTROIDS)]
    wanted = use(HR, LR, CENTROIDS)
    torch.testing.assert_close(use(*elsewhere), wanted, rtol=0, atol=0)
    torch.testing.assert_close(use(elsewhere[0], LR, elsewhere[2]), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in USES if name != "head"])
def test_the_default_device_does_not_matter(name: str) -> None:
    wanted = USES[name](HR, LR, CENTROIDS)
    with torch.device("meta"):
        got = USES[name](HR, LR, CENTROIDS)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("make", [FeatureTransferHead, FeatureTransferBlock])
def test_modules_begin_on_the_default_device(make: Any) -> None:
    with torch.device("meta"):
        assert {value.device.type for value in make(6, 4).state_dict().values()} == {"meta"}


def test_weights_are_drawn_on_the_cpu_for_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator on the CPU cannot fill a tensor that is elsewhere; fake tensors would let it."""
    draw, drawn = nn.init.kaiming_normal_, []

    def on_one_device(tensor: Tensor, *, generator: torch.Generator, **options: Any) -> Tensor:
        assert tensor.device == generator.device
        drawn.append(tensor)
        return draw(tensor, generator=generator, **options)

    monkeypatch.setattr(nn.init, "kaiming_normal_", on_one_device)
    head, block = FeatureTransferHead(6, 4), FeatureTransferBlock(6, 4)
    assert len(drawn) == 2 + 2 * 3
    for module in (head, block):
        with FakeTensorMode():
            for layer in module.modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    layer.weight = nn.Parameter(torch.empty(layer.weight.shape, device="cuda"))
                    assert layer.bias is not None
                    layer.bias = nn.Parameter(torch.empty(layer.bias.shape, device="cuda"))
            module.reset_parameters(1)
    assert len(drawn) == 2 * (2 + 2 * 3)


def test_a_classifier_begins_on_the_default_device() -> None:
    with torch.device("meta"):
        assert SVMClassifier(6, 2).linear.weight.is_meta
