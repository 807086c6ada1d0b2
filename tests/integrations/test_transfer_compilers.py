"""Heads and blocks in models that are compiled, exported, or run by ONNX Runtime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision.models
from torch import Tensor, nn

from featxfer import FeatureTransferBlock, FeatureTransferHead
from featxfer_integrations import attach_transfer, transfer_disabled
from tests.integrations.models import Tiny


def make(name: str) -> tuple[Any, tuple[int, ...]]:
    """A model with something attached that changes its outputs, and the shape of its inputs."""
    torch.manual_seed(0)
    images = (3, 64, 64)
    if name == "head on vectors":
        return randomise(FeatureTransferHead(12, hidden_features=16)), (12,)
    if name == "head on maps":
        return randomise(FeatureTransferHead(12, hidden_features=16)), (12, 5, 5)
    if name == "head on tokens":
        return randomise(FeatureTransferHead(12, hidden_features=16)), (7, 12)
    if name == "block":
        return randomise(FeatureTransferBlock(12, 16)), (12, 5, 5)
    if name == "block, nhwc":
        return randomise(FeatureTransferBlock(12, 16, layout="nhwc")), (5, 6, 12)
    if name == "tiny":
        model: Any = attach_transfer(Tiny(), site="stem", hidden_features=16)
        attach_transfer(model, site="pool", hidden_features=16)
    elif name == "timm, clusters":
        model = timm.create_model("test_resnet")
        attach_transfer(model, output="clusters", hidden_features=16)
    elif name == "timm, headless":
        model = attach_transfer(timm.create_model("test_resnet", num_classes=0))
    elif name == "timm vit":
        model, images = attach_transfer(timm.create_model("test_vit")), (3, 160, 160)
    elif name == "timm":
        model = attach_transfer(timm.create_model("test_resnet"), hidden_features=16)
    else:
        model = attach_transfer(torchvision.models.get_model("resnet18", weights=None))
    randomise(model.feature_transfer)
    return model.eval(), images


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for value in module.parameters():
            value.normal_(std=0.1)
    return module.eval()


def inputs(shape: tuple[int, ...], count: int = 3) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


def assert_same(model: nn.Module, other: Any, shape: tuple[int, ...]) -> None:
    """For two batches of different sizes, neither of them the one that was exported."""
    with torch.no_grad():
        for count in (2, 5):
            images = inputs(shape, count)
            torch.testing.assert_close(other(images), model(images), atol=1e-4, rtol=1e-4)


MODELS = (
    *("head on vectors", "head on maps", "head on tokens", "block", "block, nhwc"),
    *("tiny", "timm", "timm vit", "timm, clusters", "timm, headless", "torchvision"),
)


@pytest.mark.parametrize("name", MODELS)
def test_compile(name: str) -> None:
    model, shape = make(name)
    backend = "eager" if name.startswith(("timm", "torchvision")) else "aot_eager"
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    assert_same(model, compiled, shape)


@pytest.mark.parametrize("name", ["tiny", "timm", "timm, clusters"])
def test_compiled_models_can_be_switched_off(name: str) -> None:
    model, shape = make(name)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    images = inputs(shape)
    with torch.no_grad():
        transferred = compiled(images)
        with transfer_disabled(model):
            plain = model(images)
            torch.testing.assert_close(compiled(images), plain)
        torch.testing.assert_close(compiled(images), transferred)
    assert plain.shape != transferred.shape or not torch.allclose(plain, transferred, atol=1e-3)


def test_compiled_training_gives_the_gradients_of_eager() -> None:
    model, shape = make("tiny")
    other = copy.deepcopy(model)
    compiled: Any = torch.compile(other, backend="inductor", fullgraph=True)
    images = inputs(shape)
    model(images).square().sum().backward()
    compiled(images).square().sum().backward()
    assert len(list(model.parameters())) == len(list(other.parameters())) > 10
    for wanted, got in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_export_with_any_batch(name: str, strict: bool) -> None:
    model, shape = make(name)
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},)
    program = torch.export.export(model, (inputs(shape),), dynamic_shapes=shapes, strict=strict)
    assert_same(model, program.module(), shape)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_onnx_runtime_gives_the_same(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, shape = make(name)
    shapes = ({0: torch.export.Dim("n", min=1, max=64)},)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (inputs(shape),), path, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (wanted,) = session.get_inputs()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {wanted.name: images.numpy()})[0])

    assert_same(model, run, shape)
