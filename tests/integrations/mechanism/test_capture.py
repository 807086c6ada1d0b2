from __future__ import annotations

import threading

import torch

from featxfer_integrations.mechanism.capture import watched
from tests.integrations.models import make_branched


def test_runs_in_other_threads_are_not_told() -> None:
    """A model that is planned for, or attached to, may be in use."""
    model, told = make_branched(), list[str]()
    images = torch.zeros(1, 3, 8, 8)
    with watched(model, ["conv", "fc"], after=lambda name, _: told.append(name)):
        other = threading.Thread(target=model, args=(images,))
        other.start()
        other.join()
        assert told == []
        model(images)
    assert told == ["conv", "fc"]
