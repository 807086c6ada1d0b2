"""timm's vision transformers of many families: small, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from featxfer import Degradation
from featxfer_integrations import attach_transfer, transfers_of
from tests.integrations.hosts.contract import fill_zeros
from tests.integrations.hosts.fitted_contract import Case, check_attached, check_fitted

VIEW = Degradation(hr_size=64, lr_size=16)
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 6, "num_heads": 2}
WINDOWS = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2)}

# Name, arguments that make it small, and how many tokens come before the grid; None: they are maps.
MODELS: dict[str, tuple[dict[str, Any], int | None]] = {
    "beit_base_patch16_224": (SMALL, 1),
    "cait_xxs24_224": ({**SMALL, "depth_token_only": 1}, 0),
    "convit_tiny": ({**SMALL, "local_up_to_layer": 5}, 0),
    "deit_tiny_distilled_patch16_224": (SMALL, 2),
    "eva02_tiny_patch14_224": ({**SMALL, "img_size": 56}, 1),
    "mobilevit_xxs": ({}, None),
    "mobilevitv2_050": ({}, None),
    "swin_tiny_patch4_window7_224": ({**WINDOWS, "window_size": 2}, None),
    "vit_small_patch14_reg4_dinov2": ({**SMALL, "img_size": 56}, 5),
    "vit_small_patch16_dinov3_qkvb": (SMALL, 5),
    "vit_tiny_r_s16_p8_224": ({**SMALL, "img_size": 128}, 1),
    "vit_tiny_patch16_224": (SMALL, 1),
    "xcit_nano_12_p16_224": (SMALL, 0),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = fill_zeros(timm.create_model(name, **MODELS[name][0])).eval()
    for value in model.parameters():  # layer scales start so small that nothing would be seen
        if value.ndim == 1 and 0 < float(value.detach().abs().max()) < 0.1:
            nn.init.ones_(value)
    return model


def case(name: str) -> Case:
    side = MODELS[name][0].get("img_size", 64)
    batches = [torch.randn(n, 3, side, side) for n in (2, 1)]
    view = Degradation(hr_size=side, lr_size=side // 4)
    return Case(lambda: make(name), lambda model, images: model(images), batches, view)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_the_identity_until_trained_and_leave_no_trace(name: str) -> None:
    model, prefix = make(name), MODELS[name][1]
    check_attached(case(name))
    attach_transfer(model, site="blocks")
    blocks: Any = transfers_of(model).values()
    assert [block.layout == "tokens" for block in blocks] == [prefix is not None] * 2
    assert [block.prefix_tokens for block in blocks] == [prefix or 0] * 2


FITTED = ["beit_base_patch16_224", "convit_tiny", "mobilevitv2_050"]
FITTED += ["deit_tiny_distilled_patch16_224"]
FITTED += ["swin_tiny_patch4_window7_224", "vit_small_patch14_reg4_dinov2"]
FITTED += ["vit_small_patch16_dinov3_qkvb", "vit_tiny_patch16_224"]


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_brings_low_resolution_nearer_and_is_loaded_whole(name: str, tmp_path: Path) -> None:
    check_fitted(case(name), tmp_path)
