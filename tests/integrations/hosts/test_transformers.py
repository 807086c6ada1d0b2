"""Hugging Face's image models: small ones of many families, with random weights."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featxfer import Degradation, Preprocessing
from featxfer_integrations import (
    AttachError,
    attach_transfer,
    backbone_of,
    fit_transfer,
    host_of,
    save_transfers,
    transfers_of,
)
from featxfer_integrations.hosts.base import find_sites
from featxfer_integrations.hosts.transformers import preprocessing_of
from featxfer_integrations.mechanism.fingerprint import backbone_sha256
from tests.integrations.fitting import BLOCKS, arguments
from tests.integrations.hosts.fitted_contract import (
    Case,
    check_attached,
    check_fitted,
    draw_textures,
)
from tests.integrations.models import randomise_all

transformers: Any = pytest.importorskip("transformers")

VIEW = Degradation(hr_size=64, lr_size=16)
HALF = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
DINO = {**TOWER, "mlp_ratio": 2}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
WINDOWS = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2]}
STAGES = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1], "image_size": 64}
RESNET = {**STAGES, "embedding_size": 8}

# Class, configuration's class and arguments; whether it takes images of other sizes as well.
MODELS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "beit": ("BeitForImageClassification", "BeitConfig", TOWER, False),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"vision_config": TOWER, "text_config": TEXT, "projection_dim": 16},
        False,
    ),
    "clip classifier": (
        "CLIPForImageClassification",
        "CLIPConfig",
        {"vision_config": TOWER},
        False,
    ),
    "clip tower": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", TOWER, False),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", STAGES, True),
    "deit": ("DeiTForImageClassification", "DeiTConfig", TOWER, False),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", DINO, False),
    "dinov2 backbone": ("Dinov2Backbone", "Dinov2Config", {**DINO, "out_indices": [2, 4]}, False),
    "dinov2 registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, False),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**TOWER, "num_register_tokens": 4}, False),
    "dinov3 convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", STAGES, True),
    "mobilevit": (
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            "hidden_sizes": [16, 20, 24],
            "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 64],
            "image_size": 64,
        },
        True,
    ),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET, True),
    "resnet backbone": (
        "ResNetBackbone",
        "ResNetConfig",
        {**RESNET, "out_features": ["stage3", "stage4"]},
        True,
    ),
    "resnet body": ("ResNetModel", "ResNetConfig", RESNET, True),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"vision_config": TOWER, "text_config": TEXT},
        False,
    ),
    "siglip tower": ("SiglipVisionModel", "SiglipVisionConfig", TOWER, False),
    "swin": ("SwinForImageClassification", "SwinConfig", {**WINDOWS, "window_size": 2}, False),
    "swin v2": (
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {**WINDOWS, "window_size": 2},
        False,
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", TOWER, False),
    "vit body": ("ViTModel", "ViTConfig", TOWER, False),
}


def make(name: str, **changed: Any) -> nn.Module:
    """In eval mode, with weights that are the same each time."""
    kind, config, sizes, _ = MODELS[name]
    torch.manual_seed(0)
    model: Any = getattr(transformers, kind)(getattr(transformers, config)(**sizes, **changed))
    for value in model.parameters():  # some scales start so small that nothing would be seen
        if value.ndim < 2 and 0 < float(value.detach().abs().max()) < 0.1:
            nn.init.ones_(value)
    for module in model.modules():  # so do convolutions, whose maps would die out
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model.eval()  # type: ignore[no-any-return]


def run(model: Any, images: Tensor) -> Any:
    """As users of the model run it: CLIP's images apart from its texts."""
    both = model.main_input_name != "pixel_values"
    return model.get_image_features(pixel_values=images) if both else model(images)


def case(name: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 3, 64, 64), (1, 3, 64, 64), (1, 3, 64, 96), (1, 3, 97, 65)]
    batches = [torch.randn(s, generator=generator) for s in sizes[: 4 if MODELS[name][3] else 2]]
    return Case(lambda: make(name), run, batches, VIEW, HALF)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_the_identity_until_trained_and_leave_no_trace(name: str) -> None:
    check_attached(case(name))


FITTED = ["beit", "clip", "convnext", "dinov2 backbone", "dinov3", "mobilevit", "resnet body"]
FITTED += ["siglip tower", "swin", "vit"]


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_brings_low_resolution_nearer_and_is_loaded_whole(name: str, tmp_path: Path) -> None:
    # behind MobileViT's transformers, of random weights, little is left to learn
    site = "stage1" if name == "mobilevit" else "blocks"
    check_fitted(dataclasses.replace(case(name), site=site), tmp_path)


def test_maps_that_a_backbone_records_are_those_that_blocks_give() -> None:
    """It registers its own hooks when it first runs, which may be before anything is attached."""
    model, images = make("dinov2 backbone"), case("dinov2 backbone").batches[0]
    model(images)
    attach_transfer(model, site="encoder.layer.1")
    randomise_all(model)
    seen: list[Tensor] = []
    model.get_submodule("encoder.layer.2").register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        first = model(images).feature_maps[0]
        norm: Any = model.get_submodule("layernorm")
        wanted = norm(seen[0])[:, 1:].mT.reshape(first.shape)
    torch.testing.assert_close(first, wanted)


def test_blocks_of_a_model_without_a_pooled_feature_are_trained_on_its_tokens() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TOWER)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    (target,) = host_of(model).targets(model)
    site = host_of(model).measured(model, target)
    assert (site.lens.path, site.prefix, site.is_block) == (("last_hidden_state",), 1, True)
    with pytest.raises(AttachError, match="site: ViTModel gives no pooler_output; candidates in"):
        attach_transfer(model)


def test_a_head_acts_on_the_projected_feature_of_images_alone() -> None:
    model, images = make("clip"), case("clip").batches[0]
    texts = {"input_ids": torch.ones(2, 4, dtype=torch.long)}
    plain = model.get_text_features(**texts).pooler_output  # type: ignore[operator]
    attach_transfer(model)
    before = run(model, images).pooler_output
    randomise_all(model)
    after = run(model, images).pooler_output
    torch.testing.assert_close(after, transfers_of(model)["head"](before))
    assert not torch.equal(after, before)
    assert torch.equal(model.get_text_features(**texts).pooler_output, plain)  # type: ignore[operator]
    assert torch.equal(backbone_of(model, preprocessing=HALF).module(images), before)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_texts_that_were_trained_since_do_not_count(name: str) -> None:
    model = make(name)
    host = host_of(model)
    for asked, counts in (("blocks", "vision_model.embeddings"), ("head", "vision_model.encoder")):
        site = find_sites(host, model, asked)[0]
        before = backbone_sha256(host, model, site)
        with torch.no_grad():
            for value in (model.logit_scale, *model.get_submodule("text_model").parameters()):
                value.add_(1)  # type: ignore[operator]
        assert backbone_sha256(host, model, site) == before
        with torch.no_grad():
            for value in model.get_submodule(counts).parameters():
                value.add_(1)
        assert backbone_sha256(host, model, site) != before


def test_a_model_of_one_channel_finds_its_sites() -> None:
    model = make("vit", num_channels=1)
    images = torch.randn(2, 1, 64, 64)
    plain = model(images).logits
    attach_transfer(model, site="blocks")
    assert torch.equal(model(images).logits, plain)


PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {},
    "EfficientNetImageProcessor": {},
    "EfficientNetImageProcessor with an offset": {"rescale_offset": True},
    "MobileViTImageProcessor": {},
    "PPLCNetImageProcessor": {},
    "ViTImageProcessor": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3},
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_image_processor_is_the_preprocessing(name: str) -> None:
    """Mean, std and order of channels are what it does, whatever it calls them."""
    processor = getattr(transformers, name.split()[0])(**PROCESSORS[name])
    done, side = preprocessing_of(processor, 64)
    pixels = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    wanted = processor(pixels, do_resize=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(done(pixels), wanted, atol=1e-4, rtol=1e-4)
    assert side == wanted.shape[2]
    assert done.bgr == (name in ("MobileViTImageProcessor", "PPLCNetImageProcessor"))


def test_it_is_read_from_where_the_model_is(tmp_path: Path) -> None:
    make("mobilevit").save_pretrained(tmp_path)  # type: ignore[operator]
    transformers.MobileViTImageProcessor().save_pretrained(tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    found = host_of(model).preprocessing(model)
    assert found == Preprocessing((0.0,) * 3, (1.0,) * 3, bgr=True)


def test_views_are_of_the_size_that_the_image_processor_makes(tmp_path: Path) -> None:
    """DINOv2 was trained at 518 pixels and is used at 224."""
    model = make("dinov2")
    own = host_of(model).own_degradation
    assert own(model, HALF) == Degradation(hr_size=64, lr_size=32)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    crop = {"height": 48, "width": 48}
    transformers.BitImageProcessor(size={"shortest_edge": 56}, crop_size=crop).save_pretrained(
        tmp_path
    )
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert own(loaded, HALF) == Degradation(hr_size=48, lr_size=32)


def test_a_model_without_an_image_processor_is_warned_of(tmp_path: Path) -> None:
    model = make("vit")
    with pytest.warns(UserWarning, match=r"name_or_path is ''.*ImageNet's mean and std are taken"):
        assert host_of(model).preprocessing(model) == Preprocessing()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no image processor is saved where this ViTForImage"):
        host_of(model).preprocessing(model)


LOAD = """
import sys, torch, transformers
from featxfer_integrations import load_transfers
folder = sys.argv[1]
model = transformers.AutoModelForImageClassification.from_pretrained(f"{folder}/model").eval()
load_transfers(model, f"{folder}/transfer")
torch.save(model(torch.load(f"{folder}/images.pt")).logits, f"{folder}/logits.pt")
"""


def test_a_model_and_what_is_attached_are_saved_side_by_side(tmp_path: Path) -> None:
    images = case("vit").batches[0]
    make("vit").save_pretrained(tmp_path / "model")  # type: ignore[operator]
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    (tmp_path / "images").mkdir()
    fit_transfer(
        model,
        draw_textures(tmp_path / "images"),
        degradation=VIEW,
        cache=tmp_path / "cache",
        **arguments(preprocessing=HALF, block_recipe=BLOCKS, precision="fp32", crops=0),
    )
    with pytest.warns(UserWarning, match="save that by save_transfers besides"):
        model.save_pretrained(tmp_path / "model")
    save_transfers(model, tmp_path / "transfer")
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(images).logits)


@pytest.mark.parametrize("name", ["convnext", "dinov2", "vit"])
def test_an_exported_model_gives_what_it_gives_with_what_is_attached(
    name: str, tmp_path: Path
) -> None:
    model, images = make(name), case(name).batches[0]
    plain = model(images).logits
    attach_transfer(model, site="blocks", hidden_features=16)
    randomise_all(model)
    wanted = model(images).logits
    assert not torch.allclose(wanted, plain, atol=1e-2)
    exported = torch.export.export(model, (images,), strict=False).module()
    torch.testing.assert_close(exported(images).logits, wanted, atol=1e-3, rtol=1e-3)
    if name == "vit":
        torch.onnx.export(model, (images,), tmp_path / "vit.onnx", dynamo=True, verbose=False)
        session: Any = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "vit.onnx")
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), wanted, atol=1e-3, rtol=1e-3)


def test_what_a_model_gives_in_a_tuple_is_told() -> None:
    model, images = make("vit body"), case("vit body").batches[0]
    attach_transfer(model)
    with pytest.raises(AttachError, match=r"wanted its 'pooler_output' by name \(return_dict=True"):
        model(images, return_dict=False)
    torch.manual_seed(0)
    tuples = transformers.ViTModel(transformers.ViTConfig(**TOWER, return_dict=False)).eval()
    with pytest.raises(AttachError, match="model: it gives a tuple, wanted return_dict=True"):
        attach_transfer(tuples)


def test_a_segmenter_takes_blocks_in_its_body() -> None:
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 32, 64], depths=[1] * 4, decoder_hidden_size=16, image_size=64
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    assert all(name.startswith("segformer.") for name in host_of(model).blocks(model))
    with pytest.raises(AttachError, match="gives no pooler_output; candidates"):
        attach_transfer(model)
