"""Graphs of torch.fx, as onnx2torch makes them of ONNX files, are fitted as any module is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx2torch
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.fx import GraphModule

from featxfer import Degradation
from tests.integrations.hosts.fitted_contract import Case, check_attached, check_fitted

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
VIEW = Degradation(hr_size=32, lr_size=8)
WIDTHS = {"early": (3, 8), "late": (8, 12), "deep": (12, 12), "scores": (20, 5)}


def make() -> nn.Module:
    """Two levels of maps, a small pyramid on them; Resize has an empty input, its region."""
    rng = np.random.default_rng(0)
    values = {"region": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
    for name, (inputs, outputs) in WIDTHS.items():
        spread = 1.5 / np.sqrt(9 * inputs)
        values[f"{name}.w"] = rng.normal(0, spread, (outputs, inputs, 3, 3)).astype(np.float32)

    def convolution(source: str, name: str, stride: int = 1) -> Any:
        sides: dict[str, Any] = {"strides": [stride] * 2, "pads": [1] * 4}
        return helper.make_node("Conv", [source, f"{name}.w"], [name], name, **sides)

    def of(kind: str, *sources: str, name: str, **options: Any) -> Any:
        return helper.make_node(kind, sources, [name], name, **options)

    nearest = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes = [
        convolution("images", "early", 2),
        of("Relu", "early", name="early_relu"),
        convolution("early_relu", "late", 2),
        of("Relu", "late", name="late_relu"),
        convolution("late_relu", "deep"),
        of("Resize", "deep", "region", "scales", name="up", **nearest),
        of("Concat", "up", "early_relu", name="both", axis=1),
        convolution("both", "scores"),
    ]
    graph = helper.make_graph(
        nodes,
        "pyramid",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    opset = helper.make_opsetid("", 11)
    model = onnx2torch.convert(helper.make_model(graph, opset_imports=[opset])).eval()
    assert isinstance(model, GraphModule)
    return model


def case(site: str) -> Case:
    batches = [IMAGES, IMAGES[:1], torch.cat([IMAGES, IMAGES.flip(2)], 2)]
    return Case(
        make, lambda model, batch: model(batch), batches, VIEW, site=site, targets=["scores"]
    )


@pytest.mark.parametrize("site", ["early_relu", "late"])
def test_what_is_attached_to_a_graph_acts_and_leaves_no_trace(site: str) -> None:
    check_attached(case(site))


@pytest.mark.parametrize("site", ["early_relu", "late"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graph_is_fitted_on_kept_maps_and_on_images(site: str, tmp_path: Path) -> None:
    """Behind "late" the pyramid hangs on more than its maps, and images are read anew."""
    keeps_maps = site == "early_relu"
    check_fitted(case(site), tmp_path, crops=0 if keeps_maps else None)
    assert (tmp_path / "cache" / "maps").exists() == keeps_maps
