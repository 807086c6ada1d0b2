from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from featxfer import (
    Degradation,
    DivergenceError,
    FeatureTransferHead,
    ImageError,
    Recipe,
    diagnose,
    extract_features,
    load_head,
    open_images,
)
from featxfer.modules.scaling import scale_features
from featxfer_integrations import (
    AttachError,
    attach_transfer,
    backbone_of,
    detach_transfer,
    fit_transfer,
    load_backbone,
    load_transfers,
    save_transfers,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations._attach import is_attached
from featxfer_integrations._fitting import split
from tests.integrations.conftest import failing

LR = Degradation(hr_size=32, lr_size=8)
QUICK = Recipe(epochs=20, learning_rate=1e-3, optimizer="adamw", schedule="one-cycle")


def fit(model: nn.Module, images: Any, tmp_path: Path, **options: Any) -> Any:
    """A head alone; blocks are in test_deep."""
    cache = tmp_path / "cache"
    arguments = {"degradation": LR, "recipe": QUICK, "depth": "pooled", "cache": cache, **options}
    return fit_transfer(model, images, **arguments)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    assert not is_attached(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_it_leaves_a_trained_head_attached_and_nothing_else_changed(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    before, images = state_of(model), torch.randn(2, 3, 32, 32)
    plain, model.training = model(images), True
    fitted = fit(model, drawings, tmp_path)
    assert model.training
    model.eval()
    assert [entry.epoch for entry in fitted.log] == list(range(20))
    assert fitted.log[-1].loss < fitted.log[0].loss
    assert (fitted.images, fitted.skipped) == (54, {})
    assert not torch.equal(model(images), plain)
    with transfer_disabled(model):
        assert torch.equal(model(images), plain)
    assert_untouched(detach_transfer(model), before)


def test_lr_features_come_nearer_and_hr_features_stay(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    (pairs,) = fit(model, drawings, tmp_path, held_out=0.25).held_out
    assert pairs.pairs == 15
    assert pairs.after.cosine > pairs.before.cosine
    assert 0 < pairs.cosine_gap_recovered < 1
    assert pairs.hr_cosine > 0.95


def test_the_card_says_what_it_was_made_of(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    fitted = fit(model, drawings, tmp_path, seed=3)
    head = transfers_of(model)["pooled"]
    assert isinstance(head, FeatureTransferHead)
    head.save_pretrained(tmp_path / "head")
    card = load_head(tmp_path / "head")[1]
    assert card.backbone == "timm/test_resnet"
    assert card.degradations == (LR,)
    assert card.details["images"] == 54
    assert card.details["seed"] == 3
    assert card.details["recipe"]["epochs"] == 20
    assert card.details["diagnostics"][0]["agreement"] == fitted.diagnostics[0].agreement
    assert card.details["held_out"][0]["after"]["cosine"] == fitted.held_out[0].after.cosine


def test_the_head_fits_the_same_weights_with_or_without_a_classifier(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    headless = copy.deepcopy(model)
    headless.reset_classifier(0)  # type: ignore[operator]
    other = timm.create_model("test_resnet", num_classes=7)
    fit(model, drawings, tmp_path)
    transfers_of(model)["pooled"].save_pretrained(tmp_path / "head")
    attach_transfer(headless, head=tmp_path / "head")
    images = torch.randn(2, 3, 32, 32)
    feature = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    assert torch.equal(headless(images), feature)
    state = state_of(other)
    with pytest.raises(ValueError, match="head for backbone timm/test_resnet with weights"):
        attach_transfer(other, head=tmp_path / "head")
    assert_untouched(other, state)


def test_features_are_those_of_load_backbone(drawings: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaded = load_backbone("timm/test_resnet", "random")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    backbone = backbone_of(model)
    assert backbone.weights_sha256 == loaded.weights_sha256
    assert backbone.preprocessing == loaded.preprocessing
    images = open_images(drawings)
    one, two = (
        extract_features(b, images, LR, tmp_path / str(i)) for i, b in enumerate((backbone, loaded))
    )
    assert torch.equal(one.lr, two.lr)


def test_the_cache_serves_a_second_fit_and_one_with_a_head_attached(
    model: nn.Module, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(model, drawings, tmp_path)
    monkeypatch.setattr(
        "featxfer.features.store.FeatureStore.write_part", lambda *_: pytest.fail("computed again")
    )
    second = fit(model, drawings, tmp_path)
    assert [entry.loss for entry in second.log] == [entry.loss for entry in first.log]


def test_the_seed_decides_all(model: nn.Module, drawings: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    heads = []
    for seed in (1, 1, 2):
        fit(model, drawings, tmp_path, seed=seed)
        heads.append(state_of(transfers_of(model)["pooled"]))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not torch.equal(heads[0]["fc2.weight"], heads[2]["fc2.weight"])


def test_one_head_for_several_degradations(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    views = (LR, Degradation(hr_size=32, lr_size=4))
    fitted = fit(model, drawings, tmp_path, degradation=views)
    assert len(fitted.diagnostics) == len(fitted.held_out) == 2
    head = transfers_of(model)["pooled"]
    assert isinstance(head, FeatureTransferHead)
    assert head.card is not None
    assert head.card.degradations == views


def test_an_attached_head_is_trained_in_its_sizes(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    head = FeatureTransferHead(96, hidden_features=9)
    attach_transfer(model, head)
    parameters = list(head.parameters())
    fit(model, drawings, tmp_path)
    assert transfers_of(model)["pooled"] is head
    assert head.config["hidden_features"] == 9
    assert [id(p) for p in head.parameters()] == [id(p) for p in parameters]
    assert head.fc2.weight.any()
    assert head.centroids.shape == (5, 96)
    assert head.card is not None


def test_a_clusters_head_learns_the_papers_labels(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    attach_transfer(model, FeatureTransferHead(96, 4, 32, output="clusters"))
    with pytest.raises(ValueError, match="clusters: got 5, the attached head gives 4 logits"):
        fit(model, drawings, tmp_path, clusters=5)
    fitted = fit(model, drawings, tmp_path, recipe=Recipe(epochs=20))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    assert fitted.held_out == []
    assert fitted.log[-1].label_accuracy > fitted.log[0].label_accuracy


def test_a_clusters_head_that_scales_is_trained_on_scaled_features(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    head = FeatureTransferHead(96, 12, 32, output="clusters", scaling="l2")
    attach_transfer(model, head)
    fitted = fit(model, drawings, tmp_path, recipe=Recipe(epochs=3), held_out=0.0)
    assert head.scaling == "l2"
    features = extract_features(backbone_of(model), open_images(drawings), LR, tmp_path / "again")
    hr, lr = scale_features(features.hr, "l2"), scale_features(features.lr, "l2")
    wanted = diagnose(hr, lr, head.centroids)
    assert fitted.diagnostics == [wanted]
    assert min(wanted.hr_sizes) > 0
    assert wanted != diagnose(features.hr, features.lr, head.centroids)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.BatchNorm2d(12), nn.ReLU())
        self.classifier = nn.Linear(12, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.classifier(self.body(images).mean((2, 3)))
        return result


@pytest.mark.filterwarnings("ignore:the head does not help")
def test_a_module_of_ones_own_at_a_map(drawings: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Custom().eval(), torch.randn(2, 3, 32, 32)
    plain = model(images)
    with pytest.raises(AttachError, match=r"candidates in Custom: body, body\.0"):
        fit(model, drawings, tmp_path)
    fit(model, drawings, tmp_path, where="body")
    fit(model, drawings, tmp_path)
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

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.body(images.movedim(1, -1)).mean((1, 2))
        return result


@pytest.mark.filterwarnings("ignore:the head does not help")
def test_maps_with_channels_last_are_averaged_over_their_plane(
    drawings: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, images = ChannelsLast().eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone_of(model, where="body").module(images), model(images))
    fit(model, drawings, tmp_path, where="body")
    assert transfers_of(model)["body"].in_features == 12
    assert model(images).shape == (2, 12)


@pytest.mark.parametrize("shape", [(24, 40), (12, 30), (12, 12), (1, 1)])
def test_channels_last_are_found_in_images_of_any_shape(shape: tuple[int, int]) -> None:
    """Also where a side has as many pixels as there are channels, twelve."""
    torch.manual_seed(0)
    model, images = ChannelsLast().eval(), torch.randn(2, 3, *shape)
    feature = backbone_of(model, where="body").module(images)
    torch.testing.assert_close(feature, model(images))


@pytest.mark.parametrize("shape", [(25, 41), (25, 61), (25, 25)])
def test_channels_first_are_found_in_images_of_any_shape(shape: tuple[int, int]) -> None:
    """These images have maps with twelve rows, as many as there are channels."""
    torch.manual_seed(0)
    model, images = Custom().eval(), torch.randn(2, 3, *shape)
    wanted = model.body(images).mean((2, 3))
    assert torch.equal(backbone_of(model, where="body").module(images), wanted)


def test_maps_that_do_not_tell_where_channels_are_and_tokens_are_refused(
    drawings: Path, tmp_path: Path
) -> None:
    class Fixed(ChannelsLast):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert images.shape[1:] == (3, 12, 12)
            return super().forward(images)

    view = Degradation(hr_size=12, lr_size=4)
    with pytest.raises(AttachError, match=r"gives \(1, 12, 12, 12\) of a square image, which does"):
        fit(Fixed(), drawings, tmp_path, where="body", degradation=view)
    view = Degradation(hr_size=160, lr_size=32)
    tokens = timm.create_model("test_vit")
    with pytest.raises(AttachError, match=r"where: blocks.0 gives \(1, 101, 64\), wanted vectors"):
        fit(tokens, drawings, tmp_path, where="blocks.0", degradation=view)
    assert not (tmp_path / "cache").exists()


class Grey(nn.Module):
    """A model of one channel, of RGB images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model(images.mean(1, keepdim=True))
        return result


@pytest.mark.filterwarnings("ignore:the head does not help")
def test_a_model_of_one_channel_needs_a_module_around_it(drawings: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=0)
    message = r"degradation: the model does not run on an RGB image of 32 x 32 \(RuntimeError"
    with pytest.raises(AttachError, match=message):
        fit(model, drawings, tmp_path)
    assert not (tmp_path / "cache").exists()
    assert fit(Grey(model), drawings, tmp_path, where="model").images == 54


@pytest.mark.filterwarnings("ignore:the head does not help", "ignore:LR features are the HR")
def test_views_have_the_size_that_the_model_is_made_for(drawings: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8
    )
    few = sorted(drawings.iterdir())[:12]
    for model, where, view in (
        (timm.create_model("test_resnet"), None, Degradation(hr_size=160, lr_size=32)),
        (small, None, Degradation(hr_size=16, lr_size=16)),
        (Custom(), "body", Degradation(hr_size=224, lr_size=32)),
    ):
        one = Recipe(epochs=1)
        fit(model, few, tmp_path, where=where, degradation=None, recipe=one)
        (head,) = transfers_of(model).values()
        assert isinstance(head, FeatureTransferHead)
        assert head.card is not None
        assert head.card.degradations == (view,)


def test_half_precision_hosts_are_followed(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    fit(model.to(torch.bfloat16), drawings, tmp_path)
    assert {p.dtype for p in transfers_of(model).parameters()} == {torch.bfloat16}
    assert model(torch.randn(1, 3, 32, 32).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"degradation": []}, ValueError, "degradation: got none"),
        (
            {"degradation": [LR, Degradation(hr_size=64, lr_size=8)]},
            ValueError,
            r"degradation: got hr_size \[32, 64\], wanted one for all",
        ),
        ({"held_out": 1.0}, ValueError, r"held_out: got 1\.0, wanted a share in \[0, 1\)"),
        ({"clusters": 100}, ValueError, "k: got 100 clusters for 54 features"),
        ({"clusters": 0}, ValueError, "clusters: got 0, wanted an int >= 1"),
        ({"clusters": []}, ValueError, "clusters: got none, wanted at least one number"),
        ({"clusters": -1}, ValueError, "clusters: got -1, wanted an int >= 1"),
        ({"precision": "int8"}, ValueError, "precision: got 'int8'"),
        ({"where": "nowhere"}, AttachError, "no module 'nowhere'"),
        (
            {"recipe": Recipe(epochs=3, learning_rate=1e30)},
            DivergenceError,
            "loss or weights are not finite",
        ),
    ],
)
def test_bad_arguments_leave_the_model_untouched(
    model: nn.Module,
    drawings: Path,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    state = state_of(model)
    with pytest.raises(error, match=message):
        fit(model, drawings, tmp_path, **options)
    assert_untouched(model, state)


def test_images_that_cannot_be_read(model: nn.Module, drawings: Path, tmp_path: Path) -> None:
    files = [*sorted(drawings.iterdir()), tmp_path / "broken.png"]
    files[-1].write_bytes(b"no image")
    state = state_of(model)
    with pytest.raises(ImageError, match=r"broken\.png"):
        fit(model, files, tmp_path)
    assert_untouched(model, state)
    assert list(fit(model, files, tmp_path, on_error="skip").skipped) == [str(files[-1])]


@pytest.mark.filterwarnings("ignore:the head does not help")
def test_an_image_that_fails_once_is_left_out_of_all_views(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    """Image 1 fails in the first degradation's views, 2 in the second's: rows still pair up."""
    files = sorted(drawings.iterdir())[:24]
    images, rest = open_images(files), open_images([files[0], *files[3:]])
    views = (LR, Degradation(hr_size=32, lr_size=4))
    options = {"degradation": views, "held_out": 0.5, "on_error": "skip"}
    fitted = fit(model, failing(images, {1: 1, 2: 2}), tmp_path, **options)
    assert set(fitted.skipped) == {str(files[1]), str(files[2])}
    wanted = fit(model, rest, tmp_path / "rest", **options)
    assert (fitted.images, wanted.skipped) == (wanted.images, {})
    for mine, other in zip(fitted.held_out, wanted.held_out, strict=True):
        assert mine.before.cosine == pytest.approx(other.before.cosine, abs=1e-5)
        assert mine.before.retrieval == pytest.approx(other.before.retrieval)


def test_what_was_skipped_before_is_an_error_where_none_may_be(
    model: nn.Module, drawings: Path, small_photographs: Path, tmp_path: Path
) -> None:
    """Though the cache, where it was skipped, is finished."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    files = [*sorted(small_photographs.iterdir()), broken]
    options = {"lr_images": files, "unpaired": "moments"}
    fitted = fit(model, drawings, tmp_path, on_error="skip", **options)
    assert list(fitted.skipped) == [str(broken)]
    detach_transfer(model)
    with pytest.raises(ImageError, match=r"broken\.png"):
        fit(model, drawings, tmp_path, **options)
    options["lr_images"] = [broken]
    with pytest.raises(ValueError, match=r"lr_images: none of 1 could be read: .*broken\.png"):
        fit(model, drawings, tmp_path, on_error="skip", **options)
    assert not is_attached(model)


@pytest.mark.parametrize("depth", ["pooled", "deep"])
def test_equal_images_have_nothing_to_cluster(
    model: nn.Module, drawings: Path, tmp_path: Path, depth: str
) -> None:
    folder = tmp_path / "equal"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.png").write_bytes((drawings / "00.png").read_bytes())
    state = state_of(model)
    with pytest.raises(ValueError, match="hr: got 3 equal rows, wanted features that vary"):
        fit(model, folder, tmp_path, depth=depth, recipe=QUICK if depth == "pooled" else None)
    assert_untouched(model, state)


def test_an_interruption_leaves_the_model_untouched(
    model: nn.Module, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    state = state_of(model)
    monkeypatch.setattr("featxfer_integrations.fit.fit_features_head", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(model, drawings, tmp_path)
    assert_untouched(model, state)


def test_a_block_is_not_trained_here(model: nn.Module, drawings: Path, tmp_path: Path) -> None:
    attach_transfer(model, at="layer2", hidden_features=16)
    with pytest.raises(AttachError, match="a block is attached at 'layer2', wanted a head"):
        fit(model, drawings, tmp_path, where="layer2")


def test_a_head_that_does_not_help_is_warned_of(
    model: nn.Module, drawings: Path, tmp_path: Path
) -> None:
    idle = Recipe(epochs=1, learning_rate=1e-30)
    with pytest.warns(UserWarning, match="the head does not help: held-out cosine"):
        fit(model, drawings, tmp_path, recipe=idle)


@pytest.fixture
def small_photographs(drawings: Path, tmp_path: Path) -> Path:
    """Half of the drawings as LR files, of 8 x 8 pixels."""
    folder = tmp_path / "small"
    folder.mkdir()
    for path in sorted(drawings.iterdir())[:30]:
        Image.open(path).resize((8, 8), Image.Resampling.BICUBIC).save(folder / path.name)
    return folder


@pytest.mark.parametrize("unpaired", ["moments", "transport"])
def test_lr_photographs_without_pairs(
    model: nn.Module, drawings: Path, small_photographs: Path, tmp_path: Path, unpaired: str
) -> None:
    others = sorted(drawings.iterdir())[30:]
    options = {"lr_images": small_photographs, "unpaired": unpaired, "depth": "auto"}
    fitted = fit(model, others, tmp_path, **options)
    assert (fitted.images, fitted.depth, fitted.held_out) == (30, "pooled", [])
    head = transfers_of(model)["pooled"]
    assert head.card is not None
    assert head.card.degradations == ()
    assert head.card.details["unpaired"] == unpaired
    head.save_pretrained(tmp_path / "head")
    assert load_head(tmp_path / "head")[1].details["objective"] == "prototypes"
    features = torch.randn(4, head.in_features)
    assert not torch.equal(head.eval()(features), features)
    detach_transfer(model)
    attach_transfer(model, head=tmp_path / "head", degradation=LR)


def test_without_pot_nothing_is_begun(
    model: nn.Module, small_photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    cache = tmp_path / "cache"
    with pytest.raises(ImportError, match="unpaired: 'transport' needs POT"):
        fit(model, small_photographs, cache, lr_images=small_photographs)
    assert not cache.exists()


def test_without_pairs_there_is_no_deep_and_no_clusters_head(
    model: nn.Module, drawings: Path, small_photographs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="lr_images: got some with depth='deep'"):
        fit(model, drawings, tmp_path, lr_images=small_photographs, depth="deep")
    with pytest.raises(ValueError, match="unpaired: got 'gan'"):
        fit(model, drawings, tmp_path, lr_images=small_photographs, unpaired="gan")
    assert not is_attached(model)
    attach_transfer(model, output="clusters")
    with pytest.raises(AttachError, match='lr_images: a head with output "clusters"'):
        fit(model, drawings, tmp_path, lr_images=small_photographs)
    one = sorted(small_photographs.iterdir())[:1]
    detach_transfer(model)
    with pytest.raises(ValueError, match="lr: got 1 features, wanted at least 2"):
        fit(model, drawings, tmp_path, lr_images=one)
    assert not is_attached(model)


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "regression"},
        {"objective": "contrast"},
        {"objective": "labels"},
        {"clusters": [5, 3]},
        {"warm_start": True},
    ],
    ids=str,
)
def test_objectives_by_name(
    model: nn.Module, drawings: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    (pairs,) = fit(model, drawings, tmp_path, held_out=0.25, **options).held_out
    assert pairs.after.cosine > pairs.before.cosine


def test_an_unknown_objective(model: nn.Module, drawings: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="objective: got 'mse', wanted one of"):
        fit(model, drawings, tmp_path, objective="mse")
    assert not is_attached(model)


def test_no_gap_is_told(model: nn.Module, drawings: Path, tmp_path: Path) -> None:
    same = Degradation(hr_size=32, lr_size=32)
    with pytest.warns(UserWarning, match="there is no gap to recover"):
        (pairs,) = fit(model, drawings, tmp_path, degradation=same).held_out
    assert pairs.cosine_gap_recovered == 0


PAIRLESS = {"lr_images": "lr/", "depth": "auto"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 5}, "minutes: got 5, .* depth='auto', not 'pooled'"),
        ({"crops": 2}, "crops: got 2, .* a head alone is trained here"),
        ({"block_recipe": QUICK}, "block_recipe: got a Recipe, .* a head alone is trained here"),
        ({"unpaired": "moments"}, "unpaired: got 'moments', .* lr_images, of which there are none"),
        ({**PAIRLESS, "minutes": 5}, "minutes: got 5, .* lr_images train a head alone"),
        ({**PAIRLESS, "held_out": 0.2}, "held_out: got 0.2, .* without pairs"),
        ({**PAIRLESS, "at": "layer1"}, "at: got 'layer1', .* lr_images"),
        ({**PAIRLESS, "crops": 1}, "crops: got 1, .* lr_images"),
        (
            {**PAIRLESS, "degradation": [LR, Degradation(hr_size=32, lr_size=16)]},
            "degradation: got 2 with lr_images",
        ),
        (
            {"depth": "auto", "where": "layer4", "at": "layer1"},
            "at: got 'layer1', .* where= with depth='auto' trains a head alone",
        ),
        ({"depth": "auto", "where": "layer4", "minutes": 9}, "minutes: got 9, .* head alone"),
        ({"depth": "auto", "where": "layer4", "crops": 1}, "crops: got 1, .* head alone"),
        (
            {"clusters": [5, 3], "objective": "regression"},
            "clusters: got 5, 3 with objective='regression'",
        ),
        ({"depth": "deep"}, "recipe: got a Recipe, .* no head is attached"),
        (
            {"depth": "deep", "recipe": None, "warm_start": True},
            "warm_start: got True, .* no head is attached",
        ),
    ],
    ids=str,
)
def test_arguments_without_effect_are_refused_before_anything_runs(
    model: nn.Module,
    drawings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    opened = "featxfer_integrations.fit.open_images"
    monkeypatch.setattr(opened, lambda *_: pytest.fail("images were opened"))
    with pytest.raises(ValueError, match=message):
        fit(model, drawings, tmp_path, **options)
    assert not is_attached(model)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "prototypes"}, "objective: got 'prototypes', .* trained on pseudo-labels"),
        ({"warm_start": True}, "warm_start: got True, .* trained on pseudo-labels"),
        ({"clusters": [4, 3]}, "clusters: got 4, 3, the attached head gives 4 logits"),
        ({"depth": "auto", "crops": 1}, "crops: got 1, .* a head alone is trained here"),
        ({"depth": "auto", "at": "layer1"}, "at: got 'layer1', .* a head alone is trained here"),
    ],
    ids=str,
)
def test_a_clusters_head_takes_no_arguments_of_others(
    model: nn.Module, drawings: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    attach_transfer(model, FeatureTransferHead(96, 4, 32, output="clusters"))
    with pytest.raises(ValueError, match=message):
        fit(model, drawings, tmp_path, **options)
    assert not (tmp_path / "cache").exists()


def test_a_split_is_the_same_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        parts = split(20, 0.3, 1)
    assert all(torch.equal(*pair) for pair in zip(parts, split(20, 0.3, 1), strict=True))
