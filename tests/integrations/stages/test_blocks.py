from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from featxfer_integrations import AttachError, host_of, load_transfers, save_transfers, transfers_of
from featxfer_integrations.hosts.base import find_sites
from featxfer_integrations.mechanism.site import Site
from featxfer_integrations.plan import plan
from featxfer_integrations.stages.blocks import block_width, new_modules
from tests.integrations.fitting import fit_blocks


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("tf_efficientnet_lite0", ["blocks.4", "blocks.6"]),
        ("resnet18", ["layer3", "layer4"]),
        ("mobilenetv3_small_100", ["blocks.3", "blocks.5"]),
    ],
)
def test_new_blocks_take_less_than_a_tenth_of_the_arithmetic(
    drawings: Path, name: str, after: list[str]
) -> None:
    model = timm.create_model(name).eval()
    sites = find_sites(host_of(model), model, "blocks")
    assert [site.asked for site in sites] == after
    (stage,) = plan(model, drawings, None, "blocks", None, None, None, 0)
    assert stage.sites == sites
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    whole, added = counter.get_total_flops(), 0
    blocks: dict[str, Any] = dict(new_modules(stage.task, sites))
    for site in sites:
        block, extent = blocks[site.name], site.extent
        assert extent is not None
        maps = torch.zeros(1, site.width or 0, *extent)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(maps)
        assert counter.get_total_flops() == 2 * block.macs(*extent)
        added += counter.get_total_flops()
    widths = {block.hidden_channels for block in blocks.values()}
    assert len(widths) == 1
    assert added <= 0.09 * whole or widths == {16}
    assert added > 0.08 * whole or widths == {256}


class OfOneSize(nn.Module):
    """Of no known host, and of no other size than it says."""

    image_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.fc = nn.Linear(6 * 8 * 8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.fc(self.conv(images).flatten(1))
        return features


def test_blocks_are_as_wide_as_the_arithmetic_of_the_models_own_images_allows() -> None:
    model = OfOneSize().eval()
    host = host_of(model)
    (site,) = find_sites(host, model, "conv")
    assert isinstance(site, Site)
    assert (site.width, site.extent, site.is_block) == (6, (8, 8), True)
    assert block_width(host, model, [site], 32) == 16, (
        "the narrowest: there is hardly any arithmetic"
    )


def test_arithmetic_is_counted_where_a_module_takes_a_view_of_a_parameter() -> None:
    """As attention pools do with their query; what asks for gradients is as it was."""

    class Pooled(OfOneSize):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.kept = nn.Parameter(torch.ones(1, 6)), nn.Linear(6, 5)
            self.kept.requires_grad_(False)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.kept(self.query.expand(len(images), -1))
            return features + super().forward(images)

    model = Pooled().eval()
    asking = [value.requires_grad for value in model.parameters()]
    host = host_of(model)
    (site,) = find_sites(host, model, "conv")
    assert block_width(host, model, [site], 16) == 16
    assert [value.requires_grad for value in model.parameters()] == asking


def test_a_model_of_another_size_that_says_none_gets_blocks() -> None:
    """Its arithmetic is that of an image of the views' size."""

    class OfItsSize(OfOneSize):
        image_size = None  # type: ignore[assignment]

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images)

    model = OfItsSize().eval()
    host = host_of(model)
    (site,) = find_sites(host, model, "conv", image=torch.zeros(1, 3, 16, 16))
    with pytest.raises(AttachError, match="a size that it takes is told by its image_size"):
        find_sites(host, model, "conv")
    assert block_width(host, model, [site], 16) == 16


def test_what_was_trained_is_in_memory_as_what_is_loaded(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    """Blocks are trained with channels last; other strides would give other bits once loaded."""
    other = copy.deepcopy(model)
    fit_blocks(model, drawings, tmp_path)
    load_transfers(other, save_transfers(model, tmp_path / "saved"))
    strides = [
        [parameter.stride() for parameter in transfers_of(host).parameters()]
        for host in (model, other)
    ]
    assert strides[0] == strides[1]
