"""What a saved transfer is for: the weights before its site, in any dtype."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision.models
from torch import Tensor, nn

from featxfer import Card, Degradation
from featxfer_integrations import (
    attach_transfer,
    detach_transfer,
    fit_key,
    host_of,
    load_transfers,
    save_transfers,
    transfers_of,
)
from featxfer_integrations.mechanism.fingerprint import (
    backbone_sha256,
    model_sha256,
    weights_details,
)
from tests.integrations.fitting import detect
from tests.integrations.models import find_site, make_branched


def test_a_new_classifier_or_box_predictor_does_not_count_for_blocks(
    by_hand: Callable[[str, str], nn.Module],
) -> None:
    detector: Any = by_hand("faster r-cnn", "test_resnet")
    site = find_site(detector, "backbone.stages.layer3")
    before = backbone_sha256(host_of(detector), detector, site)
    detector.roi_heads.box_predictor = nn.Linear(48, 9)
    assert backbone_sha256(host_of(detector), detector, site) == before
    with torch.no_grad():
        detector.backbone.neck.inner_blocks[0][0].weight.add_(1)
    assert backbone_sha256(host_of(detector), detector, site) != before
    for model, name in ((torchvision.models.resnet18(), "layer3"), (make_branched(), "norm")):
        site = find_site(model, name)
        before = backbone_sha256(host_of(model), model, site)
        attach_transfer(model, site=name, hidden_features=16)
        assert backbone_sha256(host_of(model), model, site) == before
        detach_transfer(model).fc = nn.Linear(3, 2)
        assert backbone_sha256(host_of(model), model, site) == before


def test_what_runs_behind_a_head_in_a_detector_does_not_count(
    by_hand: Callable[[str, str], nn.Module],
) -> None:
    for kind, behind, before in (
        ("faster r-cnn", "roi_heads.box_predictor.bbox_pred", "roi_heads.box_head.fc7"),
        ("retinanet", "head.regression_head.bbox_reg", "head.classification_head.conv.0.0"),
    ):
        detector: Any = by_hand(kind, "test_resnet")
        attach_transfer(detector, site="boxes")
        (site,) = transfers_of(detector).sites.values()
        sha256 = backbone_sha256(host_of(detector), detector, site)
        with torch.no_grad():
            detector.get_submodule(behind).weight.add_(1)
            assert backbone_sha256(host_of(detector), detector, site) == sha256
            detector.get_submodule(before).weight.add_(1)
            assert backbone_sha256(host_of(detector), detector, site) != sha256


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_dtype(dtype: torch.dtype, *, mixed: bool) -> Any:
    """A model in a dtype, but for its norm where it is mixed; no half holds the norm's weights."""
    model = make_branched()
    nn.init.constant_(model.norm.weight, 1 / 3)
    norm = copy.deepcopy(model.norm)
    model.to(dtype)
    if mixed:
        model.norm = norm
    return model


@pytest.mark.parametrize("trained", DTYPES)
@pytest.mark.parametrize("deployed", DTYPES)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_dtype_of_weights_is_apart_from_their_hash(
    trained: torch.dtype, deployed: torch.dtype, mixed: bool, tmp_path: Path
) -> None:
    """Also in mixed precision, where norms stay in float32."""
    model, other, wrong = (in_dtype(dtype, mixed=mixed) for dtype in (trained, deployed, deployed))
    attach_transfer(model, site="pool")
    site = find_site(model, "pool")
    card = Card(
        "Tiny", backbone_sha256(host_of(model), model, site), (Degradation(),),
        {"site": "pool", **weights_details(host_of(model), model, site)},
    )  # fmt: skip
    transfers_of(model)["pool"].card = card
    save_transfers(model, tmp_path)
    if {trained, deployed} == {torch.float16, torch.bfloat16}:  # neither is a rounding of the other
        with pytest.raises(ValueError, match=r"with weights \w+ in \w+ alone"):
            load_transfers(other, tmp_path)
        return
    head = transfers_of(load_transfers(other, tmp_path))["pool"]
    assert {value.dtype for value in head.parameters()} == {deployed}
    with torch.no_grad():
        wrong.conv.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"with weights \w+ in \w+, wanted weights \w+ in"):
        load_transfers(wrong, tmp_path)


def test_a_key_is_the_same_before_and_after_a_run_and_in_another_process(
    detector: nn.Module, discs: Path
) -> None:
    attach_transfer(detector, site="backbone", hidden_features=8)
    script = (
        "import sys, torch\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from tests.integrations.conftest import make_detector\n"
        "from featxfer_integrations import FitOptions, attach_transfer, fit_key\n"
        "from featxfer_integrations.mechanism.fingerprint import model_sha256\n"
        "from safetensors.torch import load_file\n"
        "model = make_detector(sys.argv[1])\n"
        "attach_transfer(model, site='backbone', hidden_features=8)\n"
        "model.load_state_dict(load_file(sys.argv[2]))\n"
        "print(model_sha256(model), fit_key(model, sys.argv[3]))\n"
    )
    kind = {"FasterRCNN": "faster r-cnn", "RetinaNet": "retinanet"}[type(detector).__name__]
    weights = discs.parent / f"{kind}.safetensors"
    safetensors.torch.save_file(detector.state_dict(), weights)
    keys = [model_sha256(detector), fit_key(detector, discs)]
    detect(detector, discs)
    assert [model_sha256(detector), fit_key(detector, discs)] == keys
    run = subprocess.run(
        [sys.executable, "-c", script, kind, str(weights), str(discs)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert run.stdout.split() == keys


def test_a_key_hangs_on_settings_layers_blocks_and_weights(by_hand: Any) -> None:
    model = by_hand("faster r-cnn")
    keys = [model_sha256(model)]
    model.roi_heads.score_thresh = 0.123
    keys.append(model_sha256(model))
    model.rpn.box_coder.weights = (2.0, 2.0, 1.0, 1.0)
    keys.append(model_sha256(model))
    model.transform.min_size = (99,)
    keys.append(model_sha256(model))
    attach_transfer(model, site="fpn0", hidden_features=8)
    keys.append(model_sha256(model))
    assert model_sha256(model, keep=()) == keys[-2]
    nn.init.ones_(next(iter(transfers_of(model).parameters())))
    keys.append(model_sha256(model))
    assert model_sha256(model, keep=[*transfers_of(model).sites.values()]) == keys[-1]
    nn.init.ones_(model.rpn.head.cls_logits.bias)
    keys.append(model_sha256(model))
    assert len(set(keys)) == len(keys)


class Layered(nn.Module):
    """Layers in a list, which is not called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.fc = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = layer(images)
        found: Tensor = self.fc(images.mean((2, 3)))
        return found


def test_layers_of_a_list_count_as_far_as_the_site() -> None:
    model = Layered().eval()
    host, site = host_of(model), find_site(model, "layers.2")
    assert host.behind(model, site) == ("layers.3", "fc")
    before = backbone_sha256(host, model, site)
    for name, counts in (("layers.3", False), ("layers.0", True)):
        with torch.no_grad():
            model.get_submodule(name).weight.add_(1)  # type: ignore[operator]
        assert (backbone_sha256(host, model, site) != before) == counts
