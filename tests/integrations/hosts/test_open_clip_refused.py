"""open_clip: what does not fit is refused, or an error when the model runs, and never silent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from featxfer import FeatureTransferHead, Preprocessing
from featxfer_integrations import (
    AttachError,
    FitOptions,
    attach_transfer,
    attached_runs,
    fit_transfer,
    host_of,
    transfers_of,
)
from featxfer_integrations.mechanism.attach import attached_sites
from featxfer_integrations.mechanism.fingerprint import backbone_sha256
from tests.integrations.fitting import assert_untouched, state_of
from tests.integrations.hosts.test_open_clip import TEXT, VIT, make, open_clip
from tests.integrations.models import randomise_all


def test_patch_dropout_while_training_is_an_error_where_a_square_of_patches_is_left() -> None:
    """Of 64 patches 16 are left, which would pass for a grid."""
    tower = {**VIT, "image_size": 64, "patch_dropout": 0.75}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=tower, text_cfg=TEXT)
    attach_transfer(model, site="blocks", hidden_features=8)
    images = torch.randn(2, 3, 64, 64)
    assert model.eval().encode_image(images).shape == (2, 24)
    with pytest.raises(ValueError, match=r"wanted tokens \(n, 1 \+ 8 \* 8, 32\)"):
        model.train().encode_image(images)


def test_tokens_with_images_second_are_refused() -> None:
    model = make("vit")
    model.visual.transformer = open_clip.transformer.Transformer(32, 6, 4, batch_first=False)
    images = torch.randn(2, 3, 32, 32)
    plain, state = model.encode_image(images), state_of(model)
    with pytest.raises(AttachError, match="tokens that are no grid of the"):
        attach_transfer(model, site="blocks")
    assert_untouched(model, state)
    attach_transfer(model, site="visual.transformer", hidden_features=8)  # which turns them back
    assert torch.equal(model.encode_image(images), plain)
    assert attached_runs(model, images) == {"visual_transformer": True}


def test_queries_of_a_pool_are_no_grid_but_a_head_may_follow_them() -> None:
    model = make("coca")
    with pytest.raises(AttachError, match=r"visual\.attn_pool gives tokens that are no grid"):
        attach_transfer(model, site="visual.attn_pool")
    attach_transfer(model, site="visual.attn_pool", output="features", hidden_features=8)
    assert isinstance(transfers_of(model)["visual_attn_pool"], FeatureTransferHead)
    assert attached_runs(model, torch.ones(1, 3, 32, 32)) == {"visual_attn_pool": True}


def test_a_tower_that_gives_all_tokens_has_no_pooled_feature(drawings: Path) -> None:
    tower = {**VIT, "pool_type": "none"}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=tower, text_cfg=TEXT).eval()
    options = FitOptions(preprocessing=Preprocessing())
    with pytest.raises(AttachError, match="targets: wanted what LR images have to match, mod"):
        fit_transfer(model, drawings, options=options)


def test_intermediate_features_pass_blocks_and_a_head_is_not_passed_by() -> None:
    model, images = make("vit"), torch.randn(1, 3, 32, 32)
    attach_transfer(model, site="blocks", hidden_features=8)
    randomise_all(model)
    found = model.forward_intermediates(images, normalize=False)["image_features"]
    assert torch.equal(found, model.encode_image(images))
    attach_transfer(model)
    with pytest.raises(AttachError, match="its image features do not pass the attached head"):
        model.forward_intermediates(images)
    assert "image_features" not in model.forward_intermediates(images, intermediates_only=True)


@torch.no_grad()
def test_images_that_are_not_square() -> None:
    tower = {**VIT, "image_size": (32, 64)}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=tower, text_cfg=TEXT).eval()
    images = torch.randn(2, 3, 32, 64)
    plain = model.encode_image(images)
    attach_transfer(model, site="blocks", hidden_features=8)
    assert torch.equal(model.encode_image(images), plain)
    for name in transfers_of(model):
        assert transfers_of(model)[name].config["grid"] == [4, 8]
    with pytest.raises(AttachError, match=r"they make 8 x 4 patches, wanted .* 4 : 8 of the"):
        model.encode_image(images.mT)


class Scaled(nn.Module):
    """A user's own module around a tower, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.visual = nn.Parameter(torch.ones(1)), make("vit").visual

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.visual(images * self.scale)
        return found


def test_parameters_of_ones_own_around_a_tower_count() -> None:
    model = attach_transfer(Scaled().eval(), site="blocks")
    host, site = host_of(model), attached_sites(model)[0]
    before = backbone_sha256(host, model, site)
    with torch.no_grad():
        model.scale.mul_(5)
    assert backbone_sha256(host, model, site) != before
    attach_transfer(model)
    assert "forward_intermediates" not in vars(model)
