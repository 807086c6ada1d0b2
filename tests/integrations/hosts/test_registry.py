"""Hosts of one's own are found by asking them, and models of no known host by being told more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from featxfer import FeatureTransferBlock, FeatureTransferHead, Preprocessing
from featxfer_integrations import (
    AttachError,
    Host,
    Site,
    attach_transfer,
    attached_runs,
    backbone_of,
    detach_transfer,
    host_of,
    register_host,
    transfer_disabled,
    transfers_of,
)
from tests.integrations.models import make, randomise, run, untouched


class Deep(nn.Module):
    """A model of a library that nobody knows: two stages, pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, stride=4, padding=1), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pooled = self.pool(self.second(self.first(images)))
        return {"logits": self.classifier(pooled)}


class DeepHost(Host):
    """What is known of it."""

    name = "deep"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def owns(self, model: nn.Module) -> bool:
        self.asked.append(type(model).__name__)
        return isinstance(model, Deep)

    def model_name(self, model: Any) -> str:
        return "deep/small"

    def preprocessing(self, model: Any) -> Preprocessing:
        return Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    def input_size(self, model: Any) -> int:
        return 64

    def head(self, model: Any) -> Site:
        width = model.classifier.in_features
        return Site("head", ("classifier",), "input", width, layout="rows", kind="head")

    def stages(self, model: Any) -> list[str]:
        return ["first", "second"]

    def blocks(self, model: Any) -> list[str]:
        return ["second"]


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featxfer_integrations.hosts._REGISTERED", [])


def make_deep() -> Any:
    torch.manual_seed(0)
    return Deep().eval()


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_registered_host_says_where_heads_and_blocks_go() -> None:
    host = DeepHost()
    register_host(host)
    model = make_deep()
    assert host_of(model) is host
    plain = model(IMAGES)["logits"]
    for site, name, kind, width in (
        (None, "head", FeatureTransferHead, 16),
        ("head", "head", FeatureTransferHead, 16),
        ("stage0", "first", FeatureTransferBlock, 8),
        ("blocks", "second", FeatureTransferBlock, 16),
        ("pool", "pool", FeatureTransferHead, 16),
    ):
        attach_transfer(model, site=site)
        assert list(transfers_of(model)) == [name]
        module: Any = transfers_of(model)[name]
        assert isinstance(module, kind)
        assert module.in_features == width
        assert torch.equal(model(IMAGES)["logits"], plain)
        assert attached_runs(model, IMAGES) == {name: True}
        randomise(model, name)
        assert not torch.equal(model(IMAGES)["logits"], plain)
        assert torch.equal(detach_transfer(model)(IMAGES)["logits"], plain)
    with pytest.raises(AttachError, match="Deep has no stage2; it has stage0 = first, stage1"):
        attach_transfer(model, site="stage2")


def test_a_backbone_is_what_its_host_says() -> None:
    register_host(DeepHost())
    model = make_deep()
    backbone = backbone_of(model)
    assert backbone.name == "deep/small"
    assert backbone.preprocessing == Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    with torch.no_grad():
        assert torch.equal(backbone.module(IMAGES), model.pool(model.second(model.first(IMAGES))))
    before = backbone.weights_sha256
    nn.init.zeros_(model.classifier.weight)
    assert backbone_of(model).weights_sha256 == before


def test_hosts_are_asked_before_those_that_are_known_and_the_last_one_first() -> None:
    class Everything(DeepHost):
        """Says that all models are its own."""

        name = "everything"

        def owns(self, model: nn.Module) -> bool:
            return True

    known, first, second = host_of(timm.create_model("test_resnet")), DeepHost(), DeepHost()
    assert known.name == "timm"
    register_host(first)
    assert host_of(timm.create_model("test_resnet")) is known
    assert first.asked == ["ResNet"]
    register_host(Everything())
    assert host_of(timm.create_model("test_resnet")).name == "everything"
    register_host(second)  # of the same name as the first, whose place it takes
    assert host_of(make_deep()) is second
    assert host_of(nn.Identity()).name == "everything"
    assert first.asked == ["ResNet"]


@pytest.mark.parametrize("host", [DeepHost, "deep", None])
def test_what_is_no_host_is_refused(host: Any) -> None:
    with pytest.raises(TypeError, match=r"host: got \w+, wanted a featxfer_integrations\.Host"):
        register_host(host)


# Models of no known host


def test_a_model_of_no_known_host_is_told_where() -> None:
    model = make("tiny")
    host = host_of(model)
    assert type(host) is Host
    assert (host.name, host.model_name(model)) == ("torch", "Tiny")
    assert (host.stages(model), host.blocks(model)) == ([], [])
    logits = run(model)[0]
    attach_transfer(attach_transfer(model, site="stem"), site="pool")
    assert torch.equal(run(model)[0], logits)
    kinds = {name: type(module) for name, module in transfers_of(model).items()}
    assert kinds == {"stem": FeatureTransferBlock, "pool": FeatureTransferHead}
    randomise(model, "stem")
    randomise(model, "pool")
    assert not torch.equal(run(model)[0], logits)
    with pytest.raises(AttachError, match="site: wanted the name of a module whose output is the"):
        backbone_of(detach_transfer(model))
    assert backbone_of(model, site="pool").name == "Tiny"


CANDIDATES = r"; candidates in Tiny: stem, stem\.0, stem\.1, stem\.2, pool, pool\.0, pool\.1, fc$"


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (None, "site: wanted the name of a module whose output is the feature"),
        ("head", "site: wanted the name of a module whose output is the feature"),
        ("blocks", "site: Tiny names no stage of maps"),
        ("stage0", "site: no module 'stage0'"),
        ("boxes", "site: no module 'boxes'"),
        ("stem.7", r"site: no module 'stem\.7', nearest: stem\.2, stem\.1, stem\.0"),
    ],
)
def test_errors_of_a_model_of_no_known_host_list_candidates(site: str, message: str) -> None:
    model = make("tiny")
    with untouched(model), pytest.raises(AttachError, match=f"{message}{CANDIDATES}"):
        attach_transfer(model, site=site)


def test_many_candidates_are_cut_to_the_last() -> None:
    model = nn.Sequential(*[nn.Identity() for _ in range(20)])
    last = ", ".join(map(str, range(8, 20)))
    with pytest.raises(AttachError, match=rf"in Sequential \(the last 12 of 20\): {last}$"):
        attach_transfer(model)


class Served(nn.Module):
    """An object around a model, which answers by a copy of it that it makes each time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        model = super().__getattr__("model")
        return model if name == "model" else getattr(model, name)

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        logits: Tensor = copy.deepcopy(self.model)(images)["logits"]
        return logits


class ServedHost(DeepHost):
    """It says which model is in that object."""

    def owns(self, model: nn.Module) -> bool:
        return isinstance(model, Deep | Served)

    def unwrapped(self, model: Any) -> nn.Module:
        inner: nn.Module = model.model if isinstance(model, Served) else model
        return inner


def test_what_is_attached_through_an_object_around_a_model_is_disabled_in_its_copies() -> None:
    register_host(ServedHost())
    served = Served(make_deep())
    plain = served.answer(IMAGES)
    assert attach_transfer(served) is served
    assert list(transfers_of(served)) == list(transfers_of(served.model)) == ["head"]
    randomise(served.model)
    changed = served.answer(IMAGES)
    assert not torch.equal(changed, plain)
    with transfer_disabled(served):
        assert torch.equal(served.answer(IMAGES), plain)
    assert attached_runs(served, IMAGES) == {"head": True}
    assert attached_runs(served, IMAGES, run=served.answer) == {"head": True}
    stale = copy.deepcopy(served.model)
    attach_transfer(served, site="blocks", hidden_features=16)  # copies of before are not its own
    assert not any(attached_runs(served, IMAGES, run=stale).values())
    assert detach_transfer(served) is served
    assert torch.equal(served.answer(IMAGES), plain)
    attach_transfer(served.model)  # of which the object is not known
    assert attached_runs(served.model, IMAGES, run=served.answer) == {"head": False}


def test_branches_are_of_detectors() -> None:
    model = make("tiny")
    with (
        untouched(model),
        pytest.raises(ValueError, match="branch: got 'both', which is for site="),
    ):
        attach_transfer(model, site="pool", branch="both")


def test_a_host_that_names_what_is_not_there_attaches_nothing() -> None:
    class Wrong(DeepHost):
        def head(self, model: Any) -> Site:
            return Site("head", ("fc",), "input", 16, kind="head")

    register_host(Wrong())
    model = make_deep()
    with pytest.raises(AttachError, match="host 'deep' has 'head' at 'fc', which is no module of"):
        attach_transfer(model)
    assert "feature_transfer" not in dict(model.named_children())


@pytest.mark.parametrize("given", [{"side": "inputs"}, {"modules": "out"}])
def test_a_site_says_what_is_wrong_with_it(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"site: got side=.*, wanted 'input' or 'output'"):
        Site(**{"name": "head", "modules": ("out",), **given})


def test_a_version_that_is_not_tested_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featxfer_integrations.hosts._REGISTERED", [])
    host = DeepHost()
    host.tested = "torch 0.1."
    register_host(host)
    with pytest.warns(
        UserWarning, match=r"torch [\d.]+\S*: featxfer was tested with 0\.1\.\*, and"
    ):
        host_of(Deep())
    assert host_of(Deep()) is host


def test_a_library_that_lacks_what_its_host_needs_is_warned_of_and_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An older version of it may be installed beside a model that is not its own."""
    monkeypatch.setattr("featxfer_integrations.hosts._BUILT_IN", {"gone": "torch"})
    monkeypatch.setattr("featxfer_integrations.hosts._REGISTERED", [])
    with pytest.warns(UserWarning, match="host 'gone': No module named .*its models are not known"):
        assert host_of(make("tiny")).name == "torch"


def test_a_method_of_the_instances_own_is_not_passed_by() -> None:
    model: Any = Deep()
    type(model).save_pretrained = lambda self, folder: None
    model.save_pretrained = print
    try:
        with pytest.raises(
            AttachError, match="it has a save_pretrained of its own on this instance"
        ):
            attach_transfer(model, site="first")
    finally:
        del type(model).save_pretrained
    assert vars(model)["save_pretrained"] is print
