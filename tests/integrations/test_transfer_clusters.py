"""Heads with output "clusters" take the place of classifiers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from featxfer_integrations import (
    AttachError,
    attach_transfer,
    detach_transfer,
    transfer_disabled,
)
from tests.integrations.models import IMAGES, hooks, make, run, untouched


@pytest.mark.parametrize(
    ("name", "classifier"),
    [
        ("timm/test_resnet", "fc"),
        ("timm/test_vit", "head"),
        ("timm/test_convnext", "head.fc"),
        ("torchvision/resnet18", "fc"),
        ("torchvision/mobilenet_v3_small", "classifier.3"),
    ],
)
def test_clusters_pass_the_classifier_by(name: str, classifier: str) -> None:
    model = make(name)
    images = torch.randn(2, 3, 160, 160) if name == "timm/test_vit" else IMAGES
    state = copy.deepcopy(model.state_dict())
    attributes = sorted(vars(model.get_submodule(classifier)))
    feature: list[Tensor] = []
    handle = model.get_submodule(classifier).register_forward_pre_hook(
        lambda _, args: feature.append(args[0])
    )
    plain = run(model, images=images)[0]
    handle.remove()
    attach_transfer(model, output="clusters", hidden_features=16)
    head = model.feature_transfer["head"]
    assert torch.equal(run(model, images=images)[0], head(feature[0]))
    assert run(model, images=images)[0].shape == (2, 100)
    assert [key for key in model.state_dict() if "feature_transfer" not in key] == list(state)
    with transfer_disabled(model):
        assert torch.equal(run(model, images=images)[0], plain)
    model.load_state_dict(state, strict=True)
    detach_transfer(model)
    assert torch.equal(run(model, images=images)[0], plain)
    assert sorted(vars(model.get_submodule(classifier))) == attributes
    assert hooks(model) == 0


def test_clusters_are_timms_pre_logits_too() -> None:
    model = make("timm/test_resnet")
    with torch.no_grad():
        maps = model.forward_features(IMAGES)
        feature = model.forward_head(maps, pre_logits=True)
        attach_transfer(model, output="clusters", hidden_features=16)
        clusters = model.feature_transfer["head"](feature)
        assert torch.equal(model.forward_head(maps, pre_logits=True), clusters)
        assert torch.equal(model.forward_head(maps), clusters)


def test_a_new_classifier_on_cluster_logits() -> None:
    """timm's own cannot be made for them; none is fine."""
    model = make("timm/test_resnet")
    attach_transfer(model, output="clusters", hidden_features=16)
    clusters = run(model)[0]
    with (
        untouched(model),
        pytest.raises(AttachError, match=r"take 96 features, the attached head gives 100 clu"),
    ):
        model.reset_classifier(7)
    model.reset_classifier(0)
    assert torch.equal(run(model)[0], clusters)
    assert hooks(detach_transfer(model)) == 0
    assert run(model)[0].shape == (2, 96)


def test_a_new_classifier_of_another_width_is_refused() -> None:
    """Average and maximum side by side: twice the features."""
    model = attach_transfer(make("timm/test_resnet"))
    with pytest.raises(AttachError, match="192"):
        model.reset_classifier(7, "catavgmax")
    assert run(model)[0].shape == (2, 96)


def test_cluster_logits_that_would_be_cut_off_at_zero_are_refused() -> None:
    model = make("torchvision/squeezenet1_1")
    with untouched(model), pytest.raises(ValueError, match="a ReLU of SqueezeNet behind 'class"):
        attach_transfer(model, output="clusters", hidden_features=16)
