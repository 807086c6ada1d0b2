"""Compilers and exporters see what is attached: the same output as eager."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision.models
from torch import Tensor, nn

from featxfer import FeatureTransferBlock, FeatureTransferHead
from featxfer_integrations import attach_transfer, transfer_disabled
from featxfer_integrations._attach import transfers_of

NAMES = ("timm", "torchvision", "clusters", "block")


def trained(model: nn.Module) -> nn.Module:
    """What is attached, with random weights in the place of trained ones."""
    for module in transfers_of(model).values():
        if isinstance(module, FeatureTransferBlock):
            nn.init.normal_(module.project.weight, std=0.1)
        elif isinstance(module, FeatureTransferHead) and module.output == "features":
            nn.init.normal_(module.fc2.weight, std=30)
    return model.eval()


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "timm":
        return trained(attach_transfer(timm.create_model("test_resnet")))
    if name == "clusters":
        return trained(attach_transfer(timm.create_model("test_resnet"), output="clusters"))
    if name == "torchvision":
        return trained(attach_transfer(torchvision.models.shufflenet_v2_x0_5()))
    own = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return trained(attach_transfer(own, at="1", hidden_features=16))


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_compile_whole_graph(name: str) -> None:
    model = make(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = model(images(2))
    assert torch.allclose(compiled(images(2)), eager, atol=1e-4)
    with transfer_disabled(model):
        plain = model(images(2))
        assert torch.allclose(compiled(images(2)), plain, atol=1e-4)
    assert plain.shape != eager.shape or not torch.allclose(plain, eager, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_compile_to_machine_code() -> None:
    model = make("block")
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(images(2)), model(images(2)), atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_export_with_a_dynamic_batch(name: str, strict: bool) -> None:
    model = make(name)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(model, (images(2),), dynamic_shapes=(batch,), strict=strict)
    for count in (1, 5):
        wanted = model(images(count))
        assert torch.allclose(exported.module()(images(count)), wanted, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_onnx_in_onnxruntime(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = make(name), tmp_path / "model.onnx"
    program = torch.onnx.export(
        model, (images(2),), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False
    )
    assert program is not None
    program.save(path)
    session = runtime.InferenceSession(path)
    for count in (1, 5):
        (got,) = session.run(None, {session.get_inputs()[0].name: images(count).numpy()})
        assert torch.allclose(torch.from_numpy(got), model(images(count)), atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 12), (4, 12, 5, 6), (4, 7, 12)])
@torch.no_grad()
def test_a_head_alone(shape: tuple[int, ...]) -> None:
    head = FeatureTransferHead(12, 5, 16).eval()
    nn.init.normal_(head.fc2.weight)
    rows = torch.randn(shape)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(rows), head(rows), atol=1e-5)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(head, (rows,), dynamic_shapes=(batch,))
    more = torch.randn(9, *shape[1:])
    assert torch.allclose(exported.module()(more), head(more), atol=1e-5)


@torch.no_grad()
def test_a_block_alone_in_both_layouts() -> None:
    for layout, shape in (("nchw", (2, 6, 5, 4)), ("nhwc", (2, 5, 4, 6))):
        block = FeatureTransferBlock(6, 8, groups=2, layout=layout)
        nn.init.normal_(block.project.weight)
        maps = torch.randn(shape)
        exported = torch.export.export(block, (maps,))
        assert torch.allclose(exported.module()(maps), block(maps), atol=1e-5)
