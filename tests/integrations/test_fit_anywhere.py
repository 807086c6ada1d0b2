from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from featxfer import (
    Degradation,
    FeatureTransferBlock,
    FeatureTransferHead,
    Preprocessing,
    Recipe,
    open_images,
)
from featxfer_integrations import (
    AttachError,
    attach_transfer,
    backbone_of,
    detach_transfer,
    fit_transfer,
    load_transfers,
    save_transfers,
    transfers_of,
)
from tests.integrations.fitting import (
    BLOCKS,
    LR,
    arguments,
    assert_untouched,
    fit_head,
    state_of,
)

GENTLE = dataclasses.replace(BLOCKS, epochs=10, learning_rate=1e-3)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.BatchNorm2d(12), nn.ReLU())
        self.classifier = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.body(images).mean((2, 3)))
        return result


@pytest.mark.filterwarnings("ignore:the head does not help")
def test_a_head_of_ones_own_module_at_a_map(drawings: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Custom().eval(), torch.randn(2, 3, 32, 32)
    plain = model(images)
    with pytest.raises(AttachError, match=r"candidates in Custom: body, body\.0"):
        fit_head(model, drawings, tmp_path, site=None)
    attach_transfer(model, site="body", output="features")
    fit_head(model, drawings, tmp_path, site="body")
    fit_head(model, drawings, tmp_path, site=None)
    assert list(transfers_of(model)) == ["body"]
    assert not torch.equal(model(images), plain)
    save_transfers(model, tmp_path / "saved")
    changed = model(images)
    load_transfers(detach_transfer(model), tmp_path / "saved")
    assert list(transfers_of(model)) == ["body"]
    assert torch.equal(model(images), changed)
    transfers_of(model)["body"].card = None
    with pytest.raises(ValueError, match="attached at 'body' has no card; train it first"):
        save_transfers(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 12), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.body(images.movedim(1, -1)).mean((1, 2))
        return result


@pytest.mark.filterwarnings("ignore:the head does not help")
def test_maps_with_channels_last_are_averaged_over_their_plane(
    drawings: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, images = ChannelsLast().eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone_of(model, site="body").module(images), model(images))
    attach_transfer(model, site="body", output="features")
    fit_head(model, drawings, tmp_path, site="body")
    assert transfers_of(model)["body"].in_features == 12
    assert model(images).shape == (2, 12)


@pytest.mark.parametrize("shape", [(24, 40), (12, 30), (12, 12), (1, 1)])
def test_channels_last_are_found_in_images_of_any_shape(shape: tuple[int, int]) -> None:
    """Also where a side has as many pixels as there are channels, twelve."""
    torch.manual_seed(0)
    model, images = ChannelsLast().eval(), torch.randn(2, 3, *shape)
    feature = backbone_of(model, site="body").module(images)
    torch.testing.assert_close(feature, model(images))


@pytest.mark.parametrize("shape", [(25, 41), (25, 61), (25, 25)])
def test_channels_first_are_found_in_images_of_any_shape(shape: tuple[int, int]) -> None:
    """These images have maps with twelve rows, as many as there are channels."""
    torch.manual_seed(0)
    model, images = Custom().eval(), torch.randn(2, 3, *shape)
    wanted = model.body(images).mean((2, 3))
    assert torch.equal(backbone_of(model, site="body").module(images), wanted)


def test_maps_that_do_not_tell_where_channels_are_and_heads_on_tokens_are_refused(
    drawings: Path, tmp_path: Path
) -> None:
    class Fixed(ChannelsLast):
        def forward(self, images: Tensor) -> Tensor:
            assert images.shape[1:] == (3, 12, 12)
            return super().forward(images)

    view = Degradation(hr_size=12, lr_size=4)
    with pytest.raises(AttachError, match=r"gives \(1, 12, 12, 12\) of a square image, which does"):
        fit_head(Fixed(), drawings, tmp_path, site="body", degradation=view)
    view = Degradation(hr_size=160, lr_size=32)
    tokens = timm.create_model("test_vit")
    attach_transfer(tokens, FeatureTransferHead(64), site="norm")
    with pytest.raises(AttachError, match="site: norm gives tokens, wanted a block"):
        fit_head(tokens, drawings, tmp_path, site="norm", degradation=view)
    assert not (tmp_path / "cache").exists()


class Grey(nn.Module):
    """A model of one channel, of RGB images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.model(images.mean(1, keepdim=True))
        return result


@pytest.mark.filterwarnings("ignore:the head does not help")
def test_a_model_of_one_channel_needs_a_module_around_it(drawings: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=0)
    message = r"degradation: .* not run on an image of 3 x 32 x 32 \(RuntimeError"
    with pytest.raises(AttachError, match=message):
        fit_head(model, drawings, tmp_path)
    assert not (tmp_path / "cache").exists()
    assert fit_head(Grey(model), drawings, tmp_path, site="model").images == 54


@pytest.mark.filterwarnings("ignore:the head does not help", "ignore:LR features are the HR")
def test_views_have_the_size_that_the_model_is_made_for(drawings: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8
    )
    few = sorted(drawings.iterdir())[:12]
    for model, site, view in (
        (timm.create_model("test_resnet"), "head", Degradation(hr_size=160, lr_size=32)),
        (small, "head", Degradation(hr_size=16, lr_size=4)),
        (Custom(), "body", Degradation(hr_size=224, lr_size=32)),
    ):
        if site == "body":
            attach_transfer(model, site=site, output="features")
        fit_head(model, few, tmp_path, site=site, degradation=None, recipe=Recipe(epochs=1))
        (head,) = transfers_of(model).values()
        assert isinstance(head, FeatureTransferHead)
        assert head.card is not None
        assert head.card.degradations == (view,)


class Skipping(nn.Module):
    """Of no known host: tensors in dicts, and a skip past `body` that nothing behind it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.neck = nn.Conv2d(16, 12, 1)

    def feature(self, images: Tensor) -> Tensor:
        early = self.stem(images)
        maps: Tensor = self.neck(torch.cat([early, self.body(early)], 1))
        return maps

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.feature(images)
        return {"maps": maps, "scores": maps.amax((2, 3))}


@pytest.fixture
def skipping(drawings: Path) -> Skipping:
    torch.manual_seed(0)
    model, images = Skipping(), open_images(drawings)
    pixels = torch.stack([LR.hr(images.read(index)) for index in range(len(images))])
    with torch.no_grad():
        for _ in range(30):
            model.train()(Preprocessing()(pixels))
    return model.eval()


def scores_of(model: Any, images: Tensor) -> Tensor:
    return model.feature(images).mean((2, 3))  # type: ignore[no-any-return]


def fit_anywhere(model: nn.Module, images: Any, cache: Path, **given: Any) -> Any:
    usual = {
        "degradation": LR,
        "cache": cache,
        "held_out": 0.25,
        "block_recipe": GENTLE,
        "precision": "fp32",
    }
    return fit_transfer(model, images, **arguments(**{**usual, **given}))


@pytest.mark.parametrize(
    "targets",
    [["neck"], "neck", ["neck", "body"], scores_of, lambda model, images: model(images)],
    ids=["name", "one name", "names", "vectors", "tensors by name"],
)
@pytest.mark.parametrize("site", ["stem", "body"])
def test_any_module_is_fitted_where_it_is_said_and_towards_what_is_said(
    skipping: Skipping,
    drawings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    site: str,
    targets: Any,
) -> None:
    """After the stem on kept maps; after the body, which a skip passes by, on images as read."""
    images, plain = torch.randn(4, 3, 32, 32), copy.deepcopy(skipping)
    fitted = fit_anywhere(skipping, drawings, tmp_path, site=site, targets=targets)
    told = capsys.readouterr().err
    assert ("images are read anew each time" in told) == (site == "body")
    assert (tmp_path / "maps").exists() == (site == "stem")
    assert (fitted.log, len(fitted.blocks_log), fitted.images) == ([], 10, 45)
    (pairs,) = fitted.held_out
    assert pairs.after.cosine > pairs.before.cosine
    block = transfers_of(skipping)[site]
    assert isinstance(block, FeatureTransferBlock)
    assert block.card is not None
    assert block.card.details["site"] == site
    changed = skipping(images)["maps"]
    assert not torch.equal(changed, plain(images)["maps"])
    saved = save_transfers(skipping, tmp_path / "saved")
    again = load_transfers(plain, saved)(images)["maps"]
    torch.testing.assert_close(again, changed, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "training").exists() or not list((tmp_path / "training").iterdir())


@pytest.mark.filterwarnings("ignore:.* not help")
@pytest.mark.parametrize("options", [{"crops": 1}, {"batch_size": 8}], ids=str)
def test_options_of_kept_maps_are_refused_where_images_are_read_anew(
    skipping: Skipping, drawings: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: got .*: images are read anew each time"):
        fit_anywhere(skipping, drawings, tmp_path, site="body", targets=["neck"], **options)
    fit_anywhere(skipping, drawings, tmp_path, site="stem", targets=["neck"], **options)


class Sized(nn.Module):
    """Takes images of 32 pixels alone, and its modules' names are those of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("body/conv", nn.Conv2d(3, 12, 3, 4, 1))
        self.fc = nn.Linear(12 * 64, 8)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.fc(self.get_submodule("body/conv")(images).relu().flatten(1))
        return found


def test_a_model_of_one_size_and_of_any_names_is_saved_and_loaded(
    drawings: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, images = Sized().eval(), torch.randn(2, 3, 32, 32)
    plain = copy.deepcopy(model)
    fit_anywhere(model, drawings, tmp_path, site="body/conv", targets=["fc"])
    saved = save_transfers(model, tmp_path / "saved")
    assert [path.name for path in saved.iterdir()] == ["body_conv"]
    with pytest.raises(AttachError, match="it does not run on an image of 3 x 224 x 224"):
        attach_transfer(plain, site="body/conv")
    assert torch.equal(load_transfers(plain, saved)(images), model(images))


def test_a_head_is_fitted_towards_what_is_said(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    """What comes out of the classifier, by a head before it."""
    fitted = fit_anywhere(model, drawings, tmp_path, site="head", targets=["fc"])
    assert list(transfers_of(model)) == ["head"]
    assert isinstance(transfers_of(model)["head"], FeatureTransferHead)
    (pairs,) = fitted.held_out
    assert pairs.after.cosine > pairs.before.cosine


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"site": "body"}, AttachError, "targets: wanted what LR images have to match"),
        ({"site": "nowhere", "targets": ["neck"]}, AttachError, "site: no module 'nowhere'"),
        (
            {"site": "body", "targets": ["necks"]},
            AttachError,
            "targets: no module 'necks', nearest: neck",
        ),
        (
            {"site": "neck", "targets": ["body"]},
            AttachError,
            r"at 'neck' changes nothing that Skip",
        ),
        ({"site": "body", "targets": []}, TypeError, r"targets: got \[\], wanted names"),
        ({"site": "body", "targets": [3]}, TypeError, r"targets: got \[3\], wanted names"),
        ({"site": "body", "targets": 3}, TypeError, "targets: got 3, wanted names"),
        (
            {"site": "body", "targets": lambda model, images: "nothing"},
            TypeError,
            "targets: the function gives other than tensors",
        ),
        (
            {"site": "body", "targets": lambda model, images: images.new_ones(len(images), 2)},
            ValueError,
            "targets: got '0', the same of an image and of its LR view, wanted what low resolution",
        ),
        (
            {
                "site": "body",
                "targets": lambda model, images: scores_of(model, images).mean(0)[None],
            },
            ValueError,
            "targets: '0' of an image hangs on the other images of its batch, wanted an entry for",
        ),
        (
            {
                "site": "stem",
                "targets": lambda model, images: scores_of(model, images - images.mean(0)),
            },
            ValueError,
            "targets: '0' of an image hangs on the other images of its batch",
        ),
        ({"targets": ["neck"]}, AttachError, "site: wanted the name of a module"),
    ],
)
def test_what_cannot_be_fitted_leaves_the_model_as_it_was(
    skipping: Skipping,
    drawings: Path,
    tmp_path: Path,
    given: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    state = state_of(skipping)
    with pytest.raises(error, match=message):
        fit_anywhere(skipping, drawings, tmp_path, **given)
    assert_untouched(skipping, state)
