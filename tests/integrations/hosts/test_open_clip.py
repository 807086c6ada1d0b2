"""open_clip: each of its models and visual towers, small, with random weights."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featxfer import Card, Degradation, Preprocessing, open_images
from featxfer_integrations import (
    FitOptions,
    attach_transfer,
    attached_runs,
    backbone_of,
    fit_transfer,
    host_of,
    load_transfers,
    save_transfers,
    transfers_of,
)
from featxfer_integrations.hosts.images import said_sides
from featxfer_integrations.mechanism.fingerprint import backbone_sha256, weights_details
from tests.integrations.fitting import QUICK
from tests.integrations.hosts.fitted_contract import Case, check_attached, check_fitted
from tests.integrations.models import randomise_all

open_clip = pytest.importorskip("open_clip", reason="pip install 'featxfer[open-clip]'")

TEXT = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
VIT = {"layers": 6, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64}
TRUNK = {"image_size": 64, "timm_pool": "token"}
GENTLE = dataclasses.replace(QUICK, epochs=12, batch_size=8, learning_rate=4e-4)

# A name: the model's class, or "visual" for the tower alone, what the tower is made of, the side of
# images, and the other sizes that it takes.
MODELS: dict[str, tuple[str, dict[str, Any], int, list[tuple[int, int]]]] = {
    "vit": ("CLIP", VIT, 32, []),
    "vit of means": (
        "CLIP",
        {**VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        32,
        [],
    ),
    "vit of other blocks": (
        "CustomTextCLIP",
        {**VIT, "qk_norm": True, "scale_attn": True, "ls_init_value": 1.0, "patch_dropout": 0.5},
        32,
        [],
    ),
    "vit alone": ("visual", {**VIT, "output_tokens": True}, 32, []),
    "resnet": ("CLIP", RESNET, 64, []),
    "resnet alone": ("visual", RESNET, 64, []),
    "coca": (
        "CoCa",
        {
            **VIT, "attentional_pool": True, "attn_pooler_queries": 9, "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        32,
        [],
    ),
    "timm vit": ("CLIP", {**TRUNK, "timm_model_name": "test_vit"}, 64, []),
    "siglip": (
        "CustomTextCLIP",
        {**TRUNK, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        64,
        [],
    ),
    "timm resnet": (
        "CLIP",
        {**TRUNK, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "mlp"},
        64,
        [(70, 91)],
    ),
    "timm convnext alone": (
        "visual",
        {**TRUNK, "timm_model_name": "test_convnext", "timm_pool": "avg"},
        64,
        [(70, 91)],
    ),
}  # fmt: skip


def make(name: str, **options: Any) -> Any:
    """In eval mode, with weights that are the same each time."""
    kind, tower, _, _ = MODELS[name]
    torch.manual_seed(0)
    if kind == "CoCa":
        options["multimodal_cfg"] = TEXT
    whole = getattr(open_clip, "CLIP" if kind == "visual" else kind)
    model = whole(embed_dim=24, vision_cfg=tower, text_cfg=TEXT, **options)
    if "timm_model_name" in tower:
        model.visual.set_input_size(64)
    spread(model.visual)
    for value in model.parameters():  # CoCa leaves some as they come from memory
        if not (value.abs() < 1e3).all():
            nn.init.zeros_(value)
    open_clip.set_model_preprocess_cfg(model, {"mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3)})
    return (model.visual if kind == "visual" else model).eval()


@torch.no_grad()
def spread(tower: nn.Module) -> None:
    """Weights by which images differ: as they are made, nearly all that is said is the same."""
    for name, value in tower.named_parameters():
        if value.ndim > 1 and "pos" not in name:
            nn.init.normal_(value, std=2 * value[0].numel() ** -0.5)
        elif not value.any():
            nn.init.normal_(value, std=0.3)
    (side, _) = said_sides(tower) or (0, 0)
    for _ in range(20):  # batch norm
        tower.train()(torch.randn(16, 3, side, side) + torch.randn(16, 3, 1, 1))


def encode(model: Any, images: Tensor) -> Any:
    """All that a model says of images."""
    whole = [model.encode_image(images)] if hasattr(model, "encode_image") else []
    return [*whole, model(images)]


def case_of(name: str) -> Case:
    _, _, side, others = MODELS[name]
    chance = torch.Generator().manual_seed(0)
    sizes = [(2, side, side), (1, side, side), *((1, *sides) for sides in others)]
    batches = [torch.randn(n, 3, *sides, generator=chance) for n, *sides in sizes]
    return Case(lambda: make(name), encode, batches, Degradation(hr_size=side, lr_size=8))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_attached_is_the_identity_until_trained_and_acts_after(name: str) -> None:
    check_attached(case_of(name))


@pytest.mark.parametrize("name", MODELS)
def test_a_head_after_the_tower_keeps_the_same_promises(name: str) -> None:
    case = case_of(name)
    check_attached(Case(case.make, case.run, case.batches, case.view, site="head"))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet alone"])
def test_a_fit_brings_images_nearer_and_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    check_fitted(case_of(name), tmp_path)


@pytest.mark.filterwarnings("ignore:blocks do not help")
def test_tokens_that_captions_hang_on_may_be_matched_too(drawings: Path, tmp_path: Path) -> None:
    model, images = make("coca"), open_images(sorted(drawings.iterdir())[:24])
    options = FitOptions(block_recipe=GENTLE, held_out=0.25, precision="fp32")
    view = Degradation(hr_size=32, lr_size=8)
    fit = fit_transfer(
        model, images, degradation=view, targets=["visual.attn_pool"], options=options,
        cache=tmp_path,
    )  # fmt: skip
    assert list(transfers_of(model)) == [name.replace(".", "_") for name in SITES["coca"]]
    (part,) = fit.held_out
    assert part.pairs > 6, "tokens of six images that were held out"


SITES = {
    "vit": ["visual.transformer.resblocks.1", "visual.transformer.resblocks.3"],
    "vit alone": ["transformer.resblocks.1", "transformer.resblocks.3"],
    "resnet": ["visual.layer3", "visual.layer4"],
    "coca": ["visual.transformer.resblocks.1", "visual.transformer.resblocks.3"],
    "siglip": ["visual.trunk.blocks.1", "visual.trunk.blocks.3"],
    "timm resnet": ["visual.trunk.layer3", "visual.trunk.layer4"],
    "timm convnext alone": ["trunk.stages.2", "trunk.stages.3"],
}


@pytest.mark.parametrize("name", SITES)
def test_blocks_go_where_timms_go(name: str) -> None:
    model = make(name)
    assert host_of(model).name == "open_clip"
    assert host_of(model).blocks(model) == SITES[name]
    attach_transfer(model, site="blocks", hidden_features=8)
    configs = [transfers_of(model)[site.replace(".", "_")].config for site in SITES[name]]
    if "layer" in SITES[name][0] or "stages" in SITES[name][0]:
        assert [config["layout"] for config in configs] == ["nchw", "nchw"]
    else:
        assert [config["prefix_tokens"] for config in configs] == [1, 1]


def test_a_stage_is_a_layer() -> None:
    for name, layer in (("resnet", "visual.layer2"), ("timm resnet", "visual.trunk.layer1")):
        model = attach_transfer(make(name), site="stage1", hidden_features=8)
        assert list(transfers_of(model)) == [layer.replace(".", "_")]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_shallow_vit_has_a_place_too(depth: int) -> None:
    tower = {**VIT, "layers": depth}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=tower, text_cfg=TEXT)
    wanted = {1: [0], 2: [0], 3: [0, 1], 4: [0, 1]}[depth]
    names = [f"visual.transformer.resblocks.{index}" for index in wanted]
    assert host_of(model).blocks(model) == names


# Preprocessing


def test_preprocessing_is_what_the_tower_keeps() -> None:
    model = make("vit")
    wanted = Preprocessing((0.5, 0.5, 0.5), (0.3, 0.3, 0.3), 32)
    assert host_of(model).preprocessing(model) == wanted
    del model.visual.preprocess_cfg  # as older checkpoints of OpenAI's have it
    assert host_of(model).preprocessing(model) == wanted
    assert host_of(model.visual).preprocessing(model.visual) == wanted
    trunk = make("timm resnet")
    assert host_of(trunk).preprocessing(trunk).input_size is None


def test_where_it_keeps_none_openais_is_a_guess_and_said(drawings: Path, tmp_path: Path) -> None:
    model = open_clip.CLIP(embed_dim=24, vision_cfg=VIT, text_cfg=TEXT)
    with pytest.warns(UserWarning, match="CLIP does not say how its images are normalised, so Op"):
        backbone = backbone_of(model)
    assert backbone.preprocessing.mean == open_clip.OPENAI_DATASET_MEAN
    assert backbone.preprocessing.std == open_clip.OPENAI_DATASET_STD
    told = backbone_of(model, preprocessing=Preprocessing())
    assert told.preprocessing == Preprocessing()


# Mixed precision


def mixed(name: str, precision: str) -> Any:
    """As `create_model(precision=)` makes it: layers in half precision, norms in float32."""
    dtype = open_clip.get_cast_dtype(precision)
    model = make(name, cast_dtype=dtype)
    open_clip.model.convert_weights_to_lp(model, dtype=dtype)
    return model


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
@torch.no_grad()
def test_layers_in_half_precision_beside_norms_in_float32_are_followed(
    name: str, precision: str
) -> None:
    model = mixed(name, precision)
    dtype = open_clip.get_cast_dtype(precision)
    assert {value.dtype for value in model.visual.parameters()} == {dtype, torch.float32}
    images = case_of(name).batches[0].to(dtype)
    plain = model.encode_image(images)
    attach_transfer(model, site="blocks", hidden_features=8)
    assert {value.dtype for value in transfers_of(model).parameters()} == {dtype}
    assert torch.equal(model.encode_image(images), plain)
    assert all(attached_runs(model, images).values())
    randomise_all(model)
    assert not torch.equal(model.encode_image(images), plain)


@pytest.mark.parametrize("trained", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("deployed", ["fp32", "fp16", "bf16"])
def test_what_was_trained_in_one_precision_is_for_the_same_weights_in_another(
    trained: str, deployed: str, tmp_path: Path
) -> None:
    model, other = (
        make("vit") if precision == "fp32" else mixed("vit", precision)
        for precision in (trained, deployed)
    )
    attach_transfer(model, site="blocks", hidden_features=8)
    for site in transfers_of(model).sites.values():
        details = {**site.described, **weights_details(host_of(model), model, site)}
        sha256 = backbone_sha256(host_of(model), model, site)
        transfers_of(model)[site.name].card = Card("clip", sha256, (Degradation(),), details)
    save_transfers(model, tmp_path)
    if {trained, deployed} == {"fp16", "bf16"}:
        with pytest.raises(ValueError, match=r"with weights \w+ in \w+ alone"):
            load_transfers(other, tmp_path)
        return
    assert list(transfers_of(load_transfers(other, tmp_path))) == list(transfers_of(model))


def test_a_text_tower_that_was_trained_since_does_not_count() -> None:
    model = attach_transfer(make("vit"), site="blocks", hidden_features=8)
    (site, _) = transfers_of(model).sites.values()
    before = backbone_sha256(host_of(model), model, site)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.startswith(("visual.", "feature_transfer.")):
                value.add_(1)
        assert backbone_sha256(host_of(model), model, site) == before
        model.visual.class_embedding.add_(1)
        assert backbone_sha256(host_of(model), model, site) != before


# Elsewhere


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["vit", "resnet", "siglip"])
@torch.no_grad()
def test_an_exported_tower_gives_what_it_gives(name: str) -> None:
    model = make(name).visual
    attach_transfer(attach_transfer(model, site="blocks", hidden_features=8), hidden_features=8)
    randomise_all(model)
    images = case_of(name).batches[0]
    wanted = model(images)
    exported = torch.export.export(model, (images,)).module()
    assert torch.allclose(exported(images), wanted, atol=1e-3 * float(wanted.abs().max()))
    traced = torch.jit.trace(model, images, check_trace=False)
    assert torch.allclose(traced(images), wanted, atol=1e-3 * float(wanted.abs().max()))


def test_it_is_loaded_in_another_process(tmp_path: Path) -> None:
    model = attach_transfer(make("vit"), site="blocks", hidden_features=8)
    randomise_all(model)
    for site in transfers_of(model).sites.values():
        sha256 = backbone_sha256(host_of(model), model, site)
        card = Card("clip", sha256, (Degradation(),), site.described)
        transfers_of(model)[site.name].card = card
    save_transfers(model, tmp_path / "transfer")
    torch.save(model.encode_image(torch.ones(1, 3, 32, 32)), tmp_path / "wanted.pt")
    script = (
        "import sys, torch\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from featxfer_integrations import load_transfers\n"
        "from tests.integrations.hosts.test_open_clip import make\n"
        "model = load_transfers(make('vit'), sys.argv[1] + '/transfer')\n"
        "wanted = torch.load(sys.argv[1] + '/wanted.pt')\n"
        "print(torch.equal(model.encode_image(torch.ones(1, 3, 32, 32)), wanted))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert run.stdout.split() == ["True"]
