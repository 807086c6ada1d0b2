from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import detection
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from featxfer import FeatureTransferBlock, FeatureTransferHead
from featxfer_integrations import (
    attach_transfer,
    detach_transfer,
    host_of,
    train_transfer_only,
    transfer_disabled,
    transfers_of,
)

Found = list[dict[str, Tensor]]

BUILDERS = sorted(torchvision.models.list_models(module=detection))
SITES = (("boxes", "class"), ("boxes", "both"), ("backbone", "class"), ("fpn", "class"))
FEW = {"min_size": 64, "max_size": 96}
R_CNN = {
    **FEW,
    "rpn_post_nms_top_n_test": 20,
    "rpn_score_thresh": 0.0,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 5,
}
DENSE = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 20}


def build(name: str, **options: Any) -> nn.Module:
    """Random weights; every image has detections, and few."""
    torch.manual_seed(0)
    small = R_CNN if "rcnn" in name else DENSE if name.startswith("ssd") else {**FEW, **DENSE}
    model: nn.Module = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, **{**small, **options}
    )
    return model.eval()


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 60, 80, generator=generator), torch.rand(3, 50, 40, generator=generator)]


@torch.no_grad()
def detect(model: nn.Module, images: list[Tensor] | None = None) -> Found:
    found: Found = model(pictures() if images is None else images)
    return found


def same(some: Found, others: Found) -> bool:
    pairs = [(a[key], b[key]) for a, b in zip(some, others, strict=True) for key in a]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_takes_heads_and_blocks_that_change_nothing(name: str) -> None:
    """Boxes, labels and scores to the last bit, and the model as it was after."""
    model = build(name)
    plain, keys = detect(model), list(model.state_dict())
    assert all(len(found["boxes"]) for found in plain)
    for site, branch in SITES:
        attach_transfer(model, site=site, branch=branch)
        kind = FeatureTransferHead if site == "boxes" else FeatureTransferBlock
        assert all(isinstance(module, kind) for module in transfers_of(model).values())
        assert same(detect(model), plain)
        detach_transfer(model)
        assert list(model.state_dict()) == keys
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["ssd300_vgg16", "ssdlite320_mobilenet_v3_large"])
@torch.no_grad()
def test_blocks_of_ssd_act_on_the_returned_map_of_their_resolution(name: str) -> None:
    model: Any = attach_transfer(build(name), site="backbone")
    images = torch.rand(1, 3, *model.transform.fixed_size)
    plain, transfers = model.backbone(images), transfers_of(model)
    for name, block in transfers.items():
        assert isinstance(block, FeatureTransferBlock)
        for unit in block.units:
            unit.project.bias += 1.0  # type: ignore[operator, union-attr]
        changed = model.backbone(images)
        levels = [level for level in plain if not torch.equal(plain[level], changed[level])]
        maps: list[Tensor] = []
        handle = block.register_forward_hook(lambda _, args, __, maps=maps: maps.append(args[0]))
        model.backbone(images)
        handle.remove()
        of_its_size = [k for k in plain if plain[k].shape[2:] == maps[0].shape[2:]]
        assert levels[0] in of_its_size or not of_its_size, name
        for unit in block.units:
            unit.project.bias -= 1.0  # type: ignore[operator, union-attr]


def test_of_modules_that_return_the_same_maps_the_outermost_is_named() -> None:
    """Some change maps in place: which one is named may not hang on the order of a set."""
    model = build("ssdlite320_mobilenet_v3_large")
    wanted = ["backbone.features.0.6", "backbone.features.0", "backbone.features.1"]
    assert host_of(model).blocks(model) == wanted


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
@pytest.mark.parametrize(("site", "branch"), SITES)
def test_what_is_attached_acts_where_it_says(name: str, site: str, branch: str) -> None:
    """A head that shifts all features changes scores; of "class", boxes of one class stay."""
    model = build(name)
    plain = detect(model)
    attach_transfer(model, site=site, branch=branch)
    with torch.no_grad():
        for module in transfers_of(model).values():
            if isinstance(module, FeatureTransferHead):
                nn.init.normal_(module.fc2.weight, generator=torch.Generator().manual_seed(1))
            elif isinstance(module, FeatureTransferBlock):
                for unit in module.units:
                    unit.project.bias += 1.0  # type: ignore[operator, union-attr]
    assert not same(detect(model), plain)
    with transfer_disabled(model):
        assert same(detect(model), plain)
    copied = copy.deepcopy(model)
    changed = detect(model)
    assert same(detect(copied), changed)
    for parameter in transfers_of(model).parameters():
        nn.init.zeros_(parameter)
    assert same(detect(copied), changed)
    assert same(detect(model), plain)


def test_the_class_branch_leaves_box_regression_alone() -> None:
    model = build("fasterrcnn_resnet50_fpn")
    heads: Any = model.roi_heads
    features = torch.randn(3, 1024)
    scores, boxes = heads.box_predictor(features)
    attach_transfer(model)
    head = transfers_of(model)["boxes"]
    assert isinstance(head, FeatureTransferHead)
    nn.init.ones_(head.fc2.bias)
    moved, still = heads.box_predictor(features)
    assert not torch.equal(moved, scores)
    assert torch.equal(still, boxes)
    detach_transfer(model)
    pooled = torch.randn(2, 256, 7, 7)
    features = heads.box_head(pooled)
    attach_transfer(model, site="boxes", branch="both")
    nn.init.ones_(transfers_of(model)["boxes"].fc2.bias)  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(heads.box_head(pooled), features - 1)


OBJECTS = [{"boxes": torch.tensor([[5.0, 5.0, 35.0, 30.0]]), "labels": torch.tensor([1])}] * 2
"""On each of `pictures()`."""


def training(model: nn.Module) -> nn.Module:
    """In training mode, but for what would give other losses at each run."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            module.eval()
    return model


@pytest.mark.parametrize(
    "name",
    ["fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"],
)
@pytest.mark.parametrize("site", ["boxes", "backbone", "fpn"])
def test_losses_in_training_reach_what_is_attached(name: str, site: str) -> None:
    model = training(build(name).requires_grad_(False))

    def losses() -> dict[str, Tensor]:
        torch.manual_seed(0)
        found: dict[str, Tensor] = model(pictures(), OBJECTS)
        return found

    plain = losses()
    attach_transfer(model, site=site)
    with_heads = losses()
    transfers = transfers_of(model)
    assert transfers.training
    for key, value in plain.items():
        torch.testing.assert_close(with_heads[key], value)
    sum(with_heads.values(), torch.zeros(())).backward()
    last = [
        p.grad for n, p in transfers.named_parameters() if "fc2.bias" in n or "project.bias" in n
    ]
    assert all(grad is not None for grad in last)
    assert any(bool(grad.any()) for grad in last if grad is not None)


def test_a_detector_by_hand_around_timm(by_hand: Any) -> None:
    model = by_hand("faster r-cnn", "tf_efficientnet_lite0")
    plain = detect(model)
    attach_transfer(model, site="backbone")
    assert set(transfers_of(model)) == {f"backbone_stages_blocks_{i}" for i in (2, 4, 6)}
    attach_transfer(model)
    attach_transfer(model, site="fpn1")
    attach_transfer(model, site="backbone.stages.blocks.1", hidden_features=8)
    attach_transfer(model, site="stage0", hidden_features=8)
    assert same(detect(model), plain)
    detach_transfer(model)
    maps_alone = torchvision.models.mobilenet_v3_small(weights=None).features
    maps_alone.out_channels = 576
    torch.manual_seed(0)
    anchors = AnchorGenerator(((32, 64),), ((1.0,),))
    dense: nn.Module = RetinaNet(maps_alone, 3, anchor_generator=anchors, **FEW, **DENSE).eval()
    plain = detect(dense)
    for site in ("boxes", "backbone", "fpn"):
        attach_transfer(dense, site=site)
    blocks = {"fpn0", "backbone_3", "backbone_8", "backbone_12"}
    assert set(transfers_of(dense)) == {"boxes_class", *blocks}
    assert same(detect(dense), plain)


def trained_by_chance(model: nn.Module) -> nn.Module:
    """With heads and blocks that are no identities."""
    for site in ("boxes", "backbone", "fpn"):
        attach_transfer(model, site=site)
    for parameter in transfers_of(model).parameters():
        nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.filterwarnings("ignore:`create_unbacked_symint`:FutureWarning")
@pytest.mark.parametrize("name", ["faster r-cnn", "retinanet"])
def test_compiled_detectors_find_the_same(by_hand: Any, name: str) -> None:
    """Whole with torchvision's own graph breaks; the backbone, site blocks are, in one graph."""
    model = trained_by_chance(by_hand(name))
    eager = detect(model)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager")
    assert same(detect(compiled), eager)
    detach_transfer(model)
    plain = detect(model)
    assert not same(plain, eager)
    attach_transfer(model, site="backbone")
    assert same(detect(compiled), plain)
    images = torch.rand(2, 3, 64, 64)
    torch.compiler.reset()
    backbone: Any = model.backbone
    in_one_graph: Any = torch.compile(backbone, backend="eager", fullgraph=True)
    with torch.no_grad():
        pairs = zip(in_one_graph(images).values(), backbone(images).values(), strict=True)
        for level, wanted in pairs:
            assert torch.equal(level, wanted)


@pytest.mark.parametrize("name", ["faster r-cnn", "retinanet"])
def test_distributed_training_gives_the_gradients_of_training_alone(
    by_hand: Any, name: str, tmp_path: Path
) -> None:
    model = trained_by_chance(by_hand(name))
    parameters = train_transfer_only(model)
    training(model)

    def gradients(run: nn.Module) -> list[Tensor | None]:
        torch.manual_seed(0)  # of torchvision's samplers
        for attached in transfers_of(model).values():
            if isinstance(attached, FeatureTransferHead):
                attached.generator.manual_seed(0)
        run.zero_grad(set_to_none=True)
        sum(run(pictures(), OBJECTS).values(), torch.zeros(())).backward()
        return [None if p.grad is None else p.grad.clone() for p in parameters]

    alone = gradients(model)
    assert any(grad is not None and bool(grad.any()) for grad in alone)
    rendezvous = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        together = gradients(DistributedDataParallel(model, find_unused_parameters=True))
    finally:
        dist.destroy_process_group()
    for mine, wanted in zip(together, alone, strict=True):
        if wanted is not None:
            assert mine is not None
            torch.testing.assert_close(mine, wanted)


def test_small_images_boxes_at_the_edge_and_autocast(by_hand: Any) -> None:
    model = by_hand("faster r-cnn")
    tiny = [torch.rand(3, 5, 7), torch.rand(3, 1, 1), torch.rand(3, 200, 30)]
    plain = detect(model, tiny)
    heads: Any = model.roi_heads
    levels = model.backbone(torch.rand(1, 3, 64, 64))
    outside = torch.tensor([[-20.0, -20.0, 90.0, 90.0], [60.0, 60.0, 60.0, 60.0]])

    def scores() -> Tensor:
        pooled = heads.box_roi_pool(levels, [outside], [(64, 64)])
        logits: Tensor = heads.box_predictor(heads.box_head(pooled))[0]
        return logits

    wanted = scores()
    with torch.autocast("cpu", torch.bfloat16):
        plain_bf16 = detect(model)
    attach_transfer(model)
    attach_transfer(model, site="backbone")
    attach_transfer(model, site="fpn")
    assert same(detect(model, tiny), plain)
    assert torch.equal(scores(), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(detect(model), plain_bf16)


@pytest.mark.parametrize("threshold", [1.0, 0.0])
def test_images_without_any_box_and_with_one(threshold: float) -> None:
    options = {"box_score_thresh": threshold, "box_detections_per_img": 1}
    model = build("fasterrcnn_resnet50_fpn", **options)
    plain = detect(model)
    assert [len(found["boxes"]) for found in plain] == [int(threshold == 0)] * 2
    attach_transfer(model)
    assert same(detect(model), plain)
    options = {"rpn_score_thresh": 2.0}
    model = build("maskrcnn_resnet50_fpn", **options)
    for site in ("boxes", "backbone", "fpn"):
        attach_transfer(model, site=site)
    assert [len(found["boxes"]) for found in detect(model)] == [0, 0]
