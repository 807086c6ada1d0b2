from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from featxfer import FeatureTransferHead

ROWS = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)) * 3 + 5


@pytest.fixture
def head() -> FeatureTransferHead:
    head = FeatureTransferHead(12, 7, 32, output="clusters", seed=3)
    head.set_input_statistics(ROWS)
    return head


def test_two_layers_with_relu_on_standardised_input(head: FeatureTransferHead) -> None:
    x = (ROWS.double() - ROWS.double().mean(0)) / ROWS.double().std(0, correction=0)
    hidden = (x @ head.fc1.weight.double().T + head.fc1.bias.double()).clamp(min=0)
    logits = hidden @ head.fc2.weight.double().T + head.fc2.bias.double()
    torch.testing.assert_close(head(ROWS).double(), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.hidden(ROWS).double(), hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12)])
def test_leading_dimensions_are_kept(head: FeatureTransferHead, shape: tuple[int, ...]) -> None:
    assert head(torch.zeros(shape)).shape == (*shape[:-1], 7)


def test_he_initialisation_of_both_layers() -> None:
    head = FeatureTransferHead(400, 300, 500, output="clusters", seed=0)
    for layer in (head.fc1, head.fc2):
        assert float(layer.weight.detach().std()) == pytest.approx(
            math.sqrt(2 / layer.in_features), rel=0.02
        )
        assert float(layer.weight.detach().mean()) == pytest.approx(0, abs=1e-3)
        assert not layer.bias.any()


def test_initialisation_is_by_seed_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, same, other = (
        FeatureTransferHead(12, 7, 32, output="clusters", seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(first.fc1.weight, same.fc1.weight)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_papers_sizes_are_the_default() -> None:
    config = FeatureTransferHead(2048, output="clusters").config
    assert (config["hidden_features"], config["clusters"]) == (4096, 100)


def test_config_makes_the_same_head(head: FeatureTransferHead) -> None:
    again = FeatureTransferHead(**head.config)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(ROWS), head(ROWS))


@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
def test_activations(activation: str) -> None:
    hidden = FeatureTransferHead(12, 7, 32, output="clusters", activation=activation).hidden(ROWS)
    assert bool((hidden >= 0).all()) == (activation == "relu")


def test_constant_dimensions_and_single_rows_stay_finite() -> None:
    head = FeatureTransferHead(12, 7, 32, output="clusters")
    rows = ROWS.clone()
    rows[:, 4] = 1e6
    head.set_input_statistics(rows)
    assert float(head.input_std[4]) == 1
    head.set_input_statistics(rows[:1])
    assert torch.equal(head.input_std, torch.ones(12))
    assert torch.isfinite(head(rows)).all()


def test_transfer_is_forward_in_batches_without_gradient(head: FeatureTransferHead) -> None:
    for layer, wanted in (("output", head(ROWS)), ("hidden", head.hidden(ROWS))):
        got = head.transfer(ROWS, layer=layer, batch_size=10)
        assert not got.requires_grad
        torch.nn.Linear(got.shape[1], 1)(got).sum().backward()
        torch.testing.assert_close(got, wanted.detach())


def test_bfloat16_heads_follow_their_dtype(head: FeatureTransferHead) -> None:
    low = copy.deepcopy(head).to(torch.bfloat16)
    assert low(ROWS.to(torch.bfloat16)).dtype == torch.bfloat16
    assert low.transfer(ROWS).dtype == torch.float32


def test_copies_pickles_and_sequences(head: FeatureTransferHead) -> None:
    wanted = head(ROWS)
    assert torch.equal(copy.deepcopy(head)(ROWS), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(head))(ROWS), wanted)
    assert torch.equal(nn.Sequential(nn.Identity(), head)(ROWS), wanted)


def test_centroids_travel_with_the_state(head: FeatureTransferHead) -> None:
    centroids = torch.randn(7, 12)
    head.set_centroids(centroids)
    other = FeatureTransferHead(12, 7, 32, output="clusters")
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.centroids, centroids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features: got 0, wanted an int >= 1"),
        ({"clusters": -1}, "clusters: got -1"),
        ({"hidden_features": 1.5}, r"hidden_features: got 1\.5"),
        ({"output": "logits"}, "output: got 'logits', wanted one of 'features', 'clusters'"),
        ({"activation": "elu"}, "activation: got 'elu', wanted one of 'relu', 'gelu', 'identity'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureTransferHead(**{"in_features": 12, **arguments})


def test_bad_rows_leave_the_head_unchanged(head: FeatureTransferHead) -> None:
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match="features: got width 11, wanted 12"):
        head.set_input_statistics(ROWS[:, 1:])
    with pytest.raises(ValueError, match="features: row 0 has NaN"):
        head.set_input_statistics(ROWS * math.nan)
    with pytest.raises(ValueError, match="centroids: got 64, wanted 7, the head's clusters"):
        head.set_centroids(ROWS)
    with pytest.raises(ValueError, match="layer: got 'fc1', wanted one of 'output', 'hidden'"):
        head.transfer(ROWS, layer="fc1")
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
