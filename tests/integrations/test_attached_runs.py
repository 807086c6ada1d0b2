"""What is attached runs, or it is said that it does not."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from featxfer import Card, Degradation
from featxfer_integrations import (
    AttachError,
    attach_transfer,
    attached_runs,
    detach_transfer,
    load_transfers,
    save_transfers,
    train_transfer_only,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations.attach import (
    backbone_sha256,
    find_place,
    probe_image,
    prove,
    weights_details,
)

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Tiny(nn.Module):
    """A stem, a branch that leads nowhere, and a classifier."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.aside = nn.Linear(8, 4)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.pool(self.norm(self.conv(images)))
        self.aside(pooled)
        logits: Tensor = self.fc(pooled)
        return logits


class Fusing(Tiny):
    """As detectors have it: the batch norm goes into the convolution before it."""

    def fuse(self) -> None:
        self.conv = nn.utils.fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()  # type: ignore[assignment]


def make(kind: type[nn.Module] = Tiny, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(**options).eval()


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for value in transfers_of(model).parameters():
            value.normal_(std=0.1, generator=torch.Generator().manual_seed(1))


def test_what_is_attached_acts_on_the_result_though_it_is_the_identity() -> None:
    model = attach_transfer(attach_transfer(make(), where="pool"), at="norm", hidden_features=16)
    plain = model(IMAGES)
    assert attached_runs(model, IMAGES) == {"pool": True, "norm": True}
    assert torch.equal(model(IMAGES), plain)
    assert attached_runs(nn.Sequential(model), IMAGES) == {"pool": True, "norm": True}


def test_a_branch_that_leads_nowhere_and_a_module_that_is_gone() -> None:
    model = attach_transfer(make(), where="aside")
    assert attached_runs(model, IMAGES) == {"aside": False}
    model = attach_transfer(make(), where="pool")
    stale = copy.deepcopy(detach_transfer(copy.deepcopy(model)))  # as a predictor has its own copy
    assert attached_runs(model, IMAGES, run=stale) == {"pool": False}


def test_results_that_tell_nothing() -> None:
    model = attach_transfer(make(), where="pool")
    with pytest.raises(ValueError, match="batch: the model's result for it has no numbers"):
        attached_runs(model, IMAGES, run=lambda batch: [model(batch)[:0], None])
    with pytest.raises(ValueError, match="batch: the model gives another result for it each"):
        attached_runs(model, IMAGES, run=lambda batch: model(torch.randn_like(batch)))
    with pytest.raises(AttachError, match="nothing is attached to this Tiny"):
        attached_runs(make(), IMAGES)


@pytest.mark.parametrize("where", ["pool", "aside"])
def test_proof_before_a_fit_leaves_the_model_as_it_was(where: str) -> None:
    model = attach_transfer(make(), at="norm", hidden_features=16)
    keys, hooks = list(model.state_dict()), len(model.pool[-1]._forward_hooks)
    places = [find_place(model, where=where), find_place(model, at="norm")]
    if where == "pool":
        prove(model, places, IMAGES)
    else:
        with pytest.raises(AttachError, match="attached at 'aside' changes nothing that Tiny"):
            prove(model, places, IMAGES)
    assert list(model.state_dict()) == keys
    assert len(model.pool[-1]._forward_hooks) == hooks
    assert list(transfers_of(model)) == list(transfers_of(model).places) == ["norm"]


@pytest.mark.parametrize("where", ["pool", "norm"])
def test_proof_sees_through_a_classifier_of_zeros(where: str) -> None:
    model = make()
    nn.init.zeros_(model.fc.weight)
    prove(model, [find_place(model, where=where)], IMAGES)
    with pytest.raises(AttachError, match="attached at 'aside' changes nothing"):
        prove(model, [find_place(model, where="aside")], IMAGES)


class Result:
    """As predictors return them."""

    def __init__(self, logits: Tensor) -> None:
        self.scores, self.names, self.parent = logits.numpy(), {0: "dog"}, self


def test_results_may_be_objects_of_arrays() -> None:
    model = attach_transfer(make(), where="pool")
    assert attached_runs(model, IMAGES, run=lambda batch: [Result(model(batch))]) == {"pool": True}
    plain = make()
    stale = attached_runs(model, IMAGES, run=lambda batch: [Result(plain(batch))])
    assert stale == {"pool": False}


def test_proof_in_detectors_does_not_hang_on_scores(
    by_hand: Callable[[str, str], nn.Module],
) -> None:
    for kind in ("faster r-cnn", "retinanet"):
        detector: Any = by_hand(kind, "test_resnet")
        holder = detector.roi_heads if kind == "faster r-cnn" else detector
        holder.score_thresh = 2.0  # nothing is found
        attach_transfer(attach_transfer(detector, where="backbone"), where="boxes")
        prove(detector, list(transfers_of(detector).places.values()), probe_image(detector))
        images = list(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        assert all(attached_runs(detector, images).values())


# Compilers


def test_a_model_that_was_compiled_before_meets_what_is_attached_later() -> None:
    model = make()
    compiled: Any = torch.compile(model, backend="eager")
    plain = compiled(IMAGES)
    attach_transfer(model, where="pool")
    assert attached_runs(compiled, IMAGES) == {"pool": True}
    assert attached_runs(model, IMAGES, run=compiled) == {"pool": True}
    randomise(model)
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
    assert not torch.allclose(compiled(IMAGES), plain)
    detach_transfer(model)
    torch.testing.assert_close(compiled(IMAGES), plain)


class Around(nn.Module):
    """A pipeline around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return 2 * logits


@pytest.mark.parametrize("kind", ["module", "function"])
def test_what_was_compiled_around_a_model_meets_what_is_attached_and_detached(kind: str) -> None:
    model = make()
    around = Around(model).eval()
    run = around if kind == "module" else lambda images: around(images)
    compiled: Any = torch.compile(run, backend="eager")
    plain = compiled(IMAGES)
    attach_transfer(model, where="pool")
    assert attached_runs(model, IMAGES, run=compiled) == {"pool": True}
    randomise(model)
    torch.testing.assert_close(compiled(IMAGES), around(IMAGES))
    assert not torch.allclose(compiled(IMAGES), plain)
    detach_transfer(model)
    torch.testing.assert_close(compiled(IMAGES), plain)


def test_a_part_that_was_compiled_meets_what_is_attached_in_it() -> None:
    model: Any = make()
    model.pool = torch.compile(model.pool, backend="eager")
    with torch.no_grad():
        model(IMAGES)
    attach_transfer(model, where="pool._orig_mod.0")
    assert attached_runs(model, IMAGES) == {"pool__orig_mod_0": True}


@pytest.mark.parametrize("name", ["", "pool"])
def test_a_model_that_was_compiled_in_place_is_refused(name: str) -> None:
    model = make()
    model.get_submodule(name).compile(backend="eager")
    with pytest.raises(AttachError, match=r"(it|module 'pool') was compiled in place, which ign"):
        attach_transfer(model, where="pool")
    assert not hasattr(model, "feature_transfer")


# What hosts and other libraries do to it


def test_a_batch_norm_that_the_host_fuses_is_no_place() -> None:
    model = make(Fusing)
    with pytest.raises(
        AttachError, match=r"'norm' is a batch norm, which fuse\(\) of Fusing takes"
    ):
        attach_transfer(model, at="norm")
    attach_transfer(model, at="conv", hidden_features=16)
    model.fuse()
    with pytest.raises(AttachError, match="module 'conv', to which 'conv' was attached, was taken"):
        model(IMAGES)


class Saved(Tiny, PyTorchModelHubMixin):
    """A host that saves itself, as those of the model hub do."""


def test_what_a_host_saves_of_itself_lacks_what_is_attached(tmp_path: Path) -> None:
    model = attach_transfer(make(Saved), where="pool")
    randomise(model)
    with pytest.warns(UserWarning, match="gives the model without what is attached; save that by"):
        model.save_pretrained(tmp_path / "host")
    transfers_of(model)["pool"].card = Card(
        "Saved", backbone_sha256(model, find_place(model, where="pool")), (Degradation(),),
        {"where": "pool"},
    )  # fmt: skip
    save_transfers(model, tmp_path / "transfer")
    plain = detach_transfer(copy.deepcopy(model))
    plain.save_pretrained(tmp_path / "host")  # nothing is lost, nothing is said
    loaded = load_transfers(Saved.from_pretrained(tmp_path / "host"), tmp_path / "transfer")
    assert torch.equal(loaded.eval()(IMAGES), model(IMAGES))


def test_a_wrapper_that_freezes_is_refused_and_what_is_in_a_wrapper_is_named() -> None:
    layer = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model = make()
    model.fc = layer(8, 5)
    with pytest.raises(AttachError, match="module 'fc' is peft's Linear, which freezes what is"):
        attach_transfer(model, where="pool")
    wrapper = nn.Sequential(attach_transfer(make(), where="pool"))
    with pytest.raises(AttachError, match="this Sequential, something is to its module '0': pass"):
        train_transfer_only(wrapper)
    wrapper.requires_grad_(False)
    assert all(p.requires_grad for p in train_transfer_only(wrapper[0]))


# Threads


def test_disabling_is_the_callers_own() -> None:
    """A server's other threads go on with what is attached."""
    model = attach_transfer(make(), where="pool")
    plain = model(IMAGES)
    randomise(model)
    transferred = model(IMAGES)
    results: dict[str, Tensor] = {}

    def serve() -> None:
        results["enabled"] = model(IMAGES)
        with transfer_disabled(model):
            results["disabled"] = model(IMAGES)

    with transfer_disabled(model):
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
        assert torch.equal(model(IMAGES), plain)
        assert torch.equal(copy.deepcopy(model)(IMAGES), transferred)  # a copy is another model
    assert torch.equal(results["enabled"], transferred)
    assert torch.equal(results["disabled"], plain)
    assert torch.equal(model(IMAGES), transferred)


# Images as the model takes them


def test_models_of_one_channel_and_small_ones_are_probed_as_they_say() -> None:
    attach_transfer(make(channels=1), at="norm")
    small = torchvision.models.VisionTransformer(64, 16, 1, 2, 32, 32, num_classes=3).eval()
    attach_transfer(small, at="conv_proj", hidden_features=16)
    assert small(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    named = make()
    named.image_size = 2  # under the kernel's three
    with pytest.raises(AttachError, match="does not run on an image of 3 x 2 x 2"):
        attach_transfer(named, at="norm")
    named.image_size = (64, 32)
    attach_transfer(named, where="pool")


@pytest.mark.parametrize(
    ("name", "options", "size", "fixed"),
    [
        ("test_vit", {"img_size": 64, "dynamic_img_size": False}, 64, 64),
        ("test_vit", {"img_size": 64}, 64, None),
        ("test_resnet", {}, 160, None),
        ("swin_tiny_patch4_window7_224", {"img_size": 56}, 56, 56),
    ],
)
def test_timm_models_are_asked_for_their_size(
    name: str, options: dict[str, Any], size: int, fixed: int | None
) -> None:
    from featxfer_integrations import timm as host

    model = timm.create_model(name, **options)
    assert host.input_size(model) == size
    assert host.preprocessing(model).input_size == fixed


def test_timm_models_of_two_sides_are_refused_by_square_views() -> None:
    from featxfer_integrations import timm as host

    model = timm.create_model("test_vit", img_size=(64, 96))
    attach_transfer(model)
    with pytest.raises(AttachError, match=r"model: it takes images of \(64, 96\), wanted square"):
        host.input_size(model)


def test_torchvision_models_are_asked_for_their_size() -> None:
    from featxfer_integrations import torchvision as host

    model = torchvision.models.efficientnet_b1()
    assert host.input_size(model) == 240
    attach_transfer(model)
    model.classifier[1] = nn.Linear(1280, 3)
    assert host.input_size(model) == 240
    assert host.input_size(torchvision.models.resnet18()) == 224


# What a saved transfer is for


def test_a_new_classifier_or_box_predictor_does_not_count_for_blocks(
    by_hand: Callable[[str, str], nn.Module],
) -> None:
    detector: Any = by_hand("faster r-cnn", "test_resnet")
    place = find_place(detector, at="backbone.stages.layer3")
    before = backbone_sha256(detector, place)
    detector.roi_heads.box_predictor = nn.Linear(48, 9)
    assert backbone_sha256(detector, place) == before
    with torch.no_grad():
        detector.backbone.neck.inner_blocks[0][0].weight.add_(1)
    assert backbone_sha256(detector, place) != before
    for model, at in ((torchvision.models.resnet18(), "layer3"), (make(), "norm")):
        place = find_place(model, at=at)
        before = backbone_sha256(model, place)
        attach_transfer(model, at=at, hidden_features=16)
        assert backbone_sha256(model, place) == before
        detach_transfer(model).fc = nn.Linear(3, 2)
        assert backbone_sha256(model, place) == before


def test_what_runs_behind_a_head_in_a_detector_does_not_count(
    by_hand: Callable[[str, str], nn.Module],
) -> None:
    for kind, behind, before in (
        ("faster r-cnn", "roi_heads.box_predictor.bbox_pred", "roi_heads.box_head.fc7"),
        ("retinanet", "head.regression_head.bbox_reg", "head.classification_head.conv.0.0"),
    ):
        detector: Any = by_hand(kind, "test_resnet")
        attach_transfer(detector, where="boxes")
        (place,) = transfers_of(detector).places.values()
        sha256 = backbone_sha256(detector, place)
        with torch.no_grad():
            detector.get_submodule(behind).weight.add_(1)
            assert backbone_sha256(detector, place) == sha256
            detector.get_submodule(before).weight.add_(1)
            assert backbone_sha256(detector, place) != sha256


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("trained", DTYPES)
@pytest.mark.parametrize("deployed", DTYPES)
def test_the_dtype_of_weights_is_apart_from_their_hash(
    trained: torch.dtype, deployed: torch.dtype, tmp_path: Path
) -> None:
    model = attach_transfer(make().to(trained), where="pool")
    place = find_place(model, where="pool")
    card = Card(
        "Tiny", backbone_sha256(model, place), (Degradation(),),
        {"where": "pool", **weights_details(model, place)},
    )  # fmt: skip
    transfers_of(model)["pool"].card = card
    save_transfers(model, tmp_path)
    other = make().to(deployed)
    if {trained, deployed} == {torch.float16, torch.bfloat16}:  # neither is a rounding of the other
        with pytest.raises(ValueError, match=r"with weights \w+ in \w+ alone"):
            load_transfers(other, tmp_path)
        return
    head = transfers_of(load_transfers(other, tmp_path))["pool"]
    assert {value.dtype for value in head.parameters()} == {deployed}
    wrong = make().to(deployed)
    with torch.no_grad():
        wrong.conv.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"with weights \w+ in \w+, wanted weights \w+ in"):
        load_transfers(wrong, tmp_path)
