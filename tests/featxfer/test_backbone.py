from __future__ import annotations

import pytest
import torch
from torch import nn

from featxfer import Backbone, Preprocessing
from featxfer.backbone import frozen, weights_sha256


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


def test_preprocessing_by_hand() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    images = Preprocessing((0.5, 0.25, 0.0), (0.5, 1.0, 2.0))(pixels)
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([-1.0, -0.25, 0.0]))
    torch.testing.assert_close(images[0, :, 0, 1], torch.tensor([1.0, 0.75, 0.5]))


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
