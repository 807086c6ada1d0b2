from __future__ import annotations

import torch

from featxfer_integrations.hosts.batch import balanced, half_balanced


def test_boxes_are_balanced_by_label() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.2, 0.3, 0.1])
    assert balanced(labels, scores, 4).tolist() == [0, 5, 6, 1]
    assert balanced(labels, scores, 99).tolist() == [0, 5, 6, 1, 4, 2, 3]
    assert balanced(labels[:0], scores[:0], 4).tolist() == []


def test_half_of_what_is_drawn_is_balanced_over_objects_and_half_by_chance() -> None:
    labels = torch.tensor([0] * 80 + [1] * 10 + [2] * 2)
    scores = torch.linspace(0, 1, len(labels))
    draws = [
        half_balanced(labels, scores, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    for drawn in draws:
        assert len(drawn.unique()) == 16
        assert sorted(labels[drawn[:8]].tolist()) == [1] * 6 + [2] * 2
        assert drawn[:8].sort().values.tolist() == [84, 85, 86, 87, 88, 89, 90, 91]
        assert (labels[drawn[8:]] == 0).sum() >= 6
    everything = half_balanced(labels, scores, 999, torch.Generator())
    assert everything.sort().values.equal(torch.arange(len(labels)))
    assert half_balanced(labels[:0], scores[:0], 4, torch.Generator()).tolist() == []


def test_what_is_drawn_is_the_same_whatever_the_default_device_is() -> None:
    labels, scores, found = torch.tensor([0] * 30 + [1] * 5), torch.linspace(0, 1, 35), []
    for device in ("cpu", "meta"):
        with torch.device(device):
            found.append(half_balanced(labels, scores, 16, torch.Generator().manual_seed(0)))
    assert torch.equal(*found)
