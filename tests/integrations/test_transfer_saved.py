"""Modules that were saved, attached again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from featxfer import (
    ArtifactError,
    Card,
    Degradation,
    FeatureTransferHead,
    load_head,
)
from featxfer.features.backbone import weights_sha256
from featxfer_integrations import (
    AttachError,
    attach_transfer,
    backbone_of,
    detach_transfer,
)
from tests.integrations.models import make, randomise, run, untouched

SEEN = Degradation(lr_size=16)


def save_for(model: nn.Module, classifier: str, folder: Path, head: Any) -> Path:
    """A head with a card for that model."""
    sha256 = weights_sha256(model, leave_out=(f"{classifier}.", "feature_transfer."))
    head.card = Card(type(model).__name__, sha256, (SEEN,), {"seed": 3})
    head.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/resnet18"])
def test_saved_heads_round_trip(name: str, tmp_path: Path) -> None:
    trained, model = make(name), make(name)
    plain = run(model)[0]
    head = randomise(attach_transfer(trained, hidden_features=16))
    folder = save_for(trained, "fc", tmp_path / "head", head)
    for given in (folder, str(folder), load_head(folder)[0]):
        attach_transfer(model, given, degradation=SEEN)
        assert torch.equal(run(model)[0], run(trained)[0])
        assert model.feature_transfer["head"].card == head.card
        assert torch.equal(run(detach_transfer(model))[0], plain)


def test_saved_blocks_round_trip(tmp_path: Path) -> None:
    trained, model = make("timm/test_resnet"), make("timm/test_resnet")
    block = randomise(attach_transfer(trained, site="stage1", hidden_features=16), "layer1")
    sha256 = backbone_of(model).weights_sha256
    block.card = Card("timm/test_resnet", sha256, (SEEN,))
    block.save_pretrained(tmp_path)
    attach_transfer(model, tmp_path, site="stage1")
    assert torch.equal(run(model)[0], run(trained)[0])
    other = make("timm/test_resnet")
    other.reset_classifier(3)
    attach_transfer(other, tmp_path, site="stage1")
    with torch.no_grad():
        next(model.parameters()).add_(1)
    detach_transfer(model)
    with pytest.raises(ArtifactError, match="wanted weights"):
        attach_transfer(model, tmp_path, site="stage1")
    with pytest.raises(AttachError, match=rf"{tmp_path}: got a block, wanted a head"):
        attach_transfer(make("timm/test_resnet"), tmp_path)


def test_the_classifier_does_not_count_for_the_backbone(tmp_path: Path) -> None:
    """A head serves the model with other classes, and headless."""
    head = FeatureTransferHead(96, hidden_features=16)
    folder = save_for(make("timm/test_resnet"), "fc", tmp_path / "timm", head)
    for classes in (0, 7):
        model = make("timm/test_resnet")
        model.reset_classifier(classes)
        assert "feature_transfer" in dict(attach_transfer(model, folder).named_children())
    head = FeatureTransferHead(512, hidden_features=16)
    folder = save_for(make("torchvision/resnet18"), "fc", tmp_path / "tv", head)
    model = make("torchvision/resnet18")
    model.fc = nn.Identity()
    assert "feature_transfer" in dict(attach_transfer(model, folder).named_children())


def test_a_head_for_another_backbone_is_refused(tmp_path: Path) -> None:
    model = make("timm/test_resnet")
    folder = save_for(model, "fc", tmp_path, FeatureTransferHead(96))
    with torch.no_grad():
        model.conv1[0].weight[0, 0, 0, 0] += 1
    for given in (folder, load_head(folder)[0]):
        with (
            untouched(model),
            pytest.raises(ArtifactError, match=r"ResNet with weights \w+ in float32, wanted"),
        ):
            attach_transfer(model, given)


def test_another_degradation_is_warned_of(tmp_path: Path) -> None:
    model = make("timm/test_resnet")
    folder = save_for(model, "fc", tmp_path, FeatureTransferHead(96))
    with pytest.warns(UserWarning, match=r'trained on \{.*"lr_size": 16.*"lr_size": 32') as caught:
        attach_transfer(model, folder, degradation=Degradation(lr_size=32))
    assert [warning.filename for warning in caught] == [__file__]
    detach_transfer(model)
    attach_transfer(model, folder)  # nothing is said of the images, nothing is warned of


def test_damaged_or_missing_heads_leave_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = make("timm/test_resnet")
    folder = save_for(model, "fc", tmp_path / "head", FeatureTransferHead(96))
    weights = folder / "head.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with untouched(model), pytest.raises(ArtifactError, match="are not those that card"):
        attach_transfer(model, folder)
    (folder / "card.json").write_text("{")
    with untouched(model), pytest.raises(ArtifactError, match="no valid JSON"):
        attach_transfer(model, folder)
    for name in (tmp_path / "nowhere", "nobody/nothing"):
        with untouched(model), pytest.raises(FileNotFoundError, match="is no folder, and the"):
            attach_transfer(model, name)
