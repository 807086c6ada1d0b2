from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers as hf

from featxfer import Images, ScaledDegradation, open_images
from featxfer_integrations import (
    AttachError,
    FitOptions,
    attach_transfer,
    attached_runs,
    detach_transfer,
    fit_transfer,
    host_of,
)
from tests.integrations.fitting import assert_untouched, state_of
from tests.integrations.hosts import transformers_detectors as tiny

VIEW = ScaledDegradation(4)


def unread(folder: Path) -> Images:
    """Images that nobody may look at yet."""

    def read(_: int) -> Tensor:
        raise AssertionError("an image was read")

    return dataclasses.replace(open_images(folder), read=read)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (None, r"no image processor is saved .* \(config._name_or_path is '.*none'\), wanted"),
        ("head", "DetrForObjectDetection is a detector and has no pooled feature"),
        ("boxes", "site: no module 'boxes'; candidates"),
        ("stage7", "has no stage7; it has stage0 = model.backbone.model"),
        ("model.encoder", "trained through the backbone, and 'model.encoder' is not in"),
    ],
)
def test_what_cannot_be_trained_is_told_before_an_image_is_read(
    asked: str | None, message: str, discs: Path, tmp_path: Path
) -> None:
    folder = tiny.save_processor("Detr", tmp_path) if asked else tmp_path / "none"
    model = tiny.beside("Detr", folder)
    state = state_of(model)
    with pytest.raises(AttachError, match=message):
        fit_transfer(
            model,
            unread(discs),
            degradation=VIEW,
            options=FitOptions(on_error="skip"),
            cache=tmp_path,
            site=asked,
        )
    assert_untouched(model, state)


def test_blocks_go_into_a_backbone_of_timm_and_heads_are_not_trained_there(
    discs: Path, tmp_path: Path
) -> None:
    own = hf.TimmBackboneConfig(backbone="test_efficientnet", out_indices=[2, 3, 4])
    folder = tiny.save_processor("Detr", tmp_path)
    model = tiny.beside("Detr", folder, backbone_config=own, use_timm_backbone=True)
    pixels = torch.rand(1, 3, 64, 64)
    attach_transfer(model)
    assert attached_runs(model, pixels) == {f"model_backbone_model_blocks_{i}": True for i in "234"}
    detach_transfer(model)
    for name, value in model.named_buffers():
        if name.endswith(".bias"):  # of a black image all maps would be zero, whatever a gate says
            value.fill_(0.1)
    squeezed = "model.backbone.model.blocks.3.0.se.conv_reduce"
    wanted = f"got '{squeezed}', where a head goes, which of a DetrForObject.*wanted blocks in its"
    with pytest.raises(AttachError, match=wanted):
        fit_transfer(model, unread(discs), site=["backbone", squeezed], cache=tmp_path)


@torch.no_grad()
def test_a_detector_of_one_channel_takes_blocks_and_no_images_in_colour(
    discs: Path, tmp_path: Path
) -> None:
    grey = tiny.resnet(num_channels=1)
    folder = tiny.save_processor("Detr", tmp_path)
    model = tiny.beside("Detr", folder, num_channels=1, backbone_config=grey)
    pixels = torch.rand(1, 1, 64, 64)
    plain = model(pixels).logits
    assert torch.equal(attach_transfer(model)(pixels).logits, plain)
    with pytest.raises(AttachError, match="model: it takes images of 1 channels, wanted 3"):
        fit_transfer(model, unread(discs), degradation=VIEW, cache=tmp_path)


def test_text_detectors_are_not_taken_for_detectors_of_objects() -> None:
    model = hf.PPOCRV5MobileDetForObjectDetection(hf.PPOCRV5MobileDetConfig()).eval()
    assert not host_of(model).detects
