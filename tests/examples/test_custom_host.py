from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.custom_host import Tiny, TinyNet, main
from featxfer import BLOCK_RECIPE
from featxfer_integrations import attach_transfer, attached_runs, host_of, hosts, transfers_of


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts that are registered here are not known to other tests."""
    monkeypatch.setattr(hosts, "_REGISTERED", [])


def test_lr_logits_come_nearer_to_those_of_hr(
    figures: Callable[..., dict[str, list[float]]],
    train_photos: Path,
    test_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_images = replace(BLOCK_RECIPE, batch_size=16)
    monkeypatch.setattr("featxfer_integrations.stages.maps.BLOCK_RECIPE", few_images)
    printed = figures(main, train_photos, test_photos, "--cache", tmp_path)
    assert list(printed) == ["LR, before", "LR, after", "HR, after"]
    (before,), (after,), (hr,) = printed.values()
    assert before < after <= 1
    assert before < hr <= 1


def test_the_library_is_known_once_its_host_is_registered() -> None:
    model = TinyNet().eval()
    assert host_of(model).name == "torch"
    hosts.register_host(Tiny())
    assert host_of(model).name == "tiny"
    attach_transfer(attach_transfer(model, site="blocks"))
    assert list(transfers_of(model)) == ["1", "head"]
    assert all(attached_runs(model, torch.rand(2, 3, 64, 64)).values())
