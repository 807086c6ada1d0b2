"""What hosts, other libraries and threads do to what is attached."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from featxfer import Card, Degradation
from featxfer_integrations import (
    AttachError,
    attach_transfer,
    detach_transfer,
    host_of,
    load_transfers,
    save_transfers,
    train_transfer_only,
    transfer_disabled,
    transfers_of,
)
from featxfer_integrations.mechanism.fingerprint import backbone_sha256
from tests.integrations.models import Branched, find_site, make_branched, randomise_all

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Fusing(Branched):
    """As detectors have it: the batch norm goes into the convolution before it."""

    def fuse(self) -> None:
        self.conv = nn.utils.fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()  # type: ignore[assignment]


def test_a_batch_norm_that_the_host_fuses_is_no_site() -> None:
    model = make_branched(Fusing)
    with pytest.raises(
        AttachError, match=r"'norm' is a batch norm, which fuse\(\) of Fusing takes"
    ):
        attach_transfer(model, site="norm")
    attach_transfer(model, site="conv", hidden_features=16)
    model.fuse()
    with pytest.raises(AttachError, match="module 'conv', to which 'conv' was attached, was taken"):
        model(IMAGES)


class Saved(Branched, PyTorchModelHubMixin):
    """A host that saves itself, as those of the model hub do."""


def test_what_a_host_saves_of_itself_lacks_what_is_attached(tmp_path: Path) -> None:
    model = attach_transfer(make_branched(Saved), site="pool")
    randomise_all(model)
    with pytest.warns(UserWarning, match="gives the model without what is attached; save that by"):
        model.save_pretrained(tmp_path / "host")
    transfers_of(model)["pool"].card = Card(
        "Saved", backbone_sha256(host_of(model), model, find_site(model, "pool")), (Degradation(),),
        {"site": "pool"},
    )  # fmt: skip
    save_transfers(model, tmp_path / "transfer")
    plain = detach_transfer(copy.deepcopy(model))
    plain.save_pretrained(tmp_path / "host")  # nothing is lost, nothing is said
    loaded = load_transfers(Saved.from_pretrained(tmp_path / "host"), tmp_path / "transfer")
    assert torch.equal(loaded.eval()(IMAGES), model(IMAGES))


def test_a_wrapper_that_freezes_is_refused_and_what_is_in_a_wrapper_is_named() -> None:
    layer = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    model = make_branched()
    model.fc = layer(8, 5)
    with pytest.raises(AttachError, match="module 'fc' is peft's Linear, which freezes what is"):
        attach_transfer(model, site="pool")
    wrapper = nn.Sequential(attach_transfer(make_branched(), site="pool"))
    with pytest.raises(AttachError, match="this Sequential, something is to its module '0': pass"):
        train_transfer_only(wrapper)
    wrapper.requires_grad_(False)
    assert all(p.requires_grad for p in train_transfer_only(wrapper[0]))


# Threads


def test_disabling_is_the_callers_own() -> None:
    """A server's other threads go on with what is attached."""
    model = attach_transfer(make_branched(), site="pool")
    plain = model(IMAGES)
    randomise_all(model)
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
