"""What is attached runs, or it is said that it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featxfer_integrations import (
    AttachError,
    attach_transfer,
    attached_runs,
    detach_transfer,
    host_of,
    transfers_of,
)
from featxfer_integrations.mechanism.proof import prove
from tests.integrations.models import find_site, make_branched, randomise_all

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_what_is_attached_acts_on_the_result_though_it_is_the_identity() -> None:
    model = attach_transfer(
        attach_transfer(make_branched(), site="pool"), site="norm", hidden_features=16
    )
    plain = model(IMAGES)
    assert attached_runs(model, IMAGES) == {"pool": True, "norm": True}
    assert torch.equal(model(IMAGES), plain)
    assert attached_runs(nn.Sequential(model), IMAGES) == {"pool": True, "norm": True}


def test_a_branch_that_leads_nowhere_and_a_module_that_is_gone() -> None:
    model = attach_transfer(make_branched(), site="aside")
    assert attached_runs(model, IMAGES) == {"aside": False}
    model = attach_transfer(make_branched(), site="pool")
    stale = copy.deepcopy(detach_transfer(copy.deepcopy(model)))  # as a predictor has its own copy
    assert attached_runs(model, IMAGES, run=stale) == {"pool": False}


def test_results_that_tell_nothing() -> None:
    model = attach_transfer(make_branched(), site="pool")
    with pytest.raises(ValueError, match="batch: the model's result for it has no numbers"):
        attached_runs(model, IMAGES, run=lambda batch: [model(batch)[:0], None])
    with pytest.raises(ValueError, match="batch: the model gives another result for it each"):
        attached_runs(model, IMAGES, run=lambda batch: model(torch.randn_like(batch)))
    with pytest.raises(AttachError, match="nothing is attached to this Branched"):
        attached_runs(make_branched(), IMAGES)


@pytest.mark.parametrize("site", ["pool", "aside"])
def test_proof_before_a_fit_leaves_the_model_as_it_was(site: str) -> None:
    model = attach_transfer(make_branched(), site="norm", hidden_features=16)
    keys, hooks = list(model.state_dict()), len(model.pool[-1]._forward_hooks)
    sites = [find_site(model, site), find_site(model, "norm")]
    if site == "pool":
        prove(model, sites, IMAGES)
    else:
        with pytest.raises(AttachError, match="attached at 'aside' changes nothing that Branched"):
            prove(model, sites, IMAGES)
    assert list(model.state_dict()) == keys
    assert len(model.pool[-1]._forward_hooks) == hooks
    assert list(transfers_of(model)) == list(transfers_of(model).sites) == ["norm"]


@pytest.mark.parametrize("site", ["pool", "norm"])
def test_proof_sees_through_a_classifier_of_zeros(site: str) -> None:
    model = make_branched()
    nn.init.zeros_(model.fc.weight)
    prove(model, [find_site(model, site)], IMAGES)
    with pytest.raises(AttachError, match="attached at 'aside' changes nothing"):
        prove(model, [find_site(model, "aside")], IMAGES)


class Result:
    """As predictors return them."""

    def __init__(self, logits: Tensor) -> None:
        self.scores, self.names, self.parent = logits.numpy(), {0: "dog"}, self


def test_results_may_be_objects_of_arrays() -> None:
    model = attach_transfer(make_branched(), site="pool")
    assert attached_runs(model, IMAGES, run=lambda batch: [Result(model(batch))]) == {"pool": True}
    plain = make_branched()
    stale = attached_runs(model, IMAGES, run=lambda batch: [Result(plain(batch))])
    assert stale == {"pool": False}


def test_proof_in_detectors_does_not_hang_on_scores(
    by_hand: Callable[[str, str], nn.Module],
) -> None:
    for kind in ("faster r-cnn", "retinanet"):
        detector: Any = by_hand(kind, "test_resnet")
        holder = detector.roi_heads if kind == "faster r-cnn" else detector
        holder.score_thresh = 2.0  # nothing is found
        attach_transfer(attach_transfer(detector, site="backbone"), site="boxes")
        prove(
            detector, list(transfers_of(detector).sites.values()), host_of(detector).image(detector)
        )
        images = list(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
        assert all(attached_runs(detector, images).values())


# Compilers


def test_a_model_that_was_compiled_before_meets_what_is_attached_later() -> None:
    model = make_branched()
    compiled: Any = torch.compile(model, backend="eager")
    plain = compiled(IMAGES)
    attach_transfer(model, site="pool")
    assert attached_runs(compiled, IMAGES) == {"pool": True}
    assert attached_runs(model, IMAGES, run=compiled) == {"pool": True}
    randomise_all(model)
    torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
    assert not torch.allclose(compiled(IMAGES), plain)
    detach_transfer(model)
    torch.testing.assert_close(compiled(IMAGES), plain)


class Around(nn.Module):
    """A pipeline around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return 2 * logits


@pytest.mark.parametrize("kind", ["module", "function"])
def test_what_was_compiled_around_a_model_meets_what_is_attached_and_detached(kind: str) -> None:
    model = make_branched()
    around = Around(model).eval()
    run = around if kind == "module" else lambda images: around(images)
    compiled: Any = torch.compile(run, backend="eager")
    plain = compiled(IMAGES)
    attach_transfer(model, site="pool")
    assert attached_runs(model, IMAGES, run=compiled) == {"pool": True}
    randomise_all(model)
    torch.testing.assert_close(compiled(IMAGES), around(IMAGES))
    assert not torch.allclose(compiled(IMAGES), plain)
    detach_transfer(model)
    torch.testing.assert_close(compiled(IMAGES), plain)


def test_a_part_that_was_compiled_meets_what_is_attached_in_it() -> None:
    model: Any = make_branched()
    model.pool = torch.compile(model.pool, backend="eager")
    with torch.no_grad():
        model(IMAGES)
    attach_transfer(model, site="pool._orig_mod.0")
    assert attached_runs(model, IMAGES) == {"pool__orig_mod_0": True}


@pytest.mark.parametrize("name", ["", "pool"])
def test_a_model_that_was_compiled_in_place_is_refused(name: str) -> None:
    model = make_branched()
    model.get_submodule(name).compile(backend="eager")
    with pytest.raises(AttachError, match=r"(it|module 'pool') was compiled in place, which ign"):
        attach_transfer(model, site="pool")
    assert not hasattr(model, "feature_transfer")
