from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from featxfer import FeatureTransferHead, Recipe, fit_head, kmeans
from featxfer.modules.scaling import scale_features
from featxfer.training.pseudo_labels import ASSIGNMENTS

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
        ({"scaling": "max"}, "scaling: got 'max', wanted one of 'none', 'l2'"),
        ({"scaling": "l2"}, "scaling: got 'l2', wanted 'none' with output 'features'"),
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


def residual(**options: Any) -> FeatureTransferHead:
    return FeatureTransferHead(12, 5, 32, **options)


def randomised(head: FeatureTransferHead) -> FeatureTransferHead:
    nn.init.normal_(head.fc2.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return head.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 12), (12,), (2, 7, 12), (3, 12, 4, 5), (3, 4, 5, 12)])
@pytest.mark.parametrize("training", [False, True])
def test_an_untrained_features_head_is_the_identity_to_the_last_bit(
    dtype: torch.dtype, shape: tuple[int, ...], training: bool
) -> None:
    head = residual().to(dtype).train(training)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    features.view(-1)[:3] = torch.tensor([0.0, -0.0, 1e-7])
    output = head(features)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert output.dtype == dtype
    assert torch.equal(output.detach().view(as_bits), features.view(as_bits))


def test_a_trained_features_head_subtracts_its_second_layer() -> None:
    head = randomised(residual())
    head.set_input_statistics(ROWS * 3 + 1)
    wanted = ROWS - F.linear(
        F.relu(F.linear((ROWS - head.input_mean) / head.input_std, head.fc1.weight)),
        head.fc2.weight,
    )
    assert torch.allclose(head(ROWS), wanted, atol=1e-6)
    assert not torch.equal(head(ROWS), ROWS)


@pytest.mark.parametrize("output", ["features", "clusters"])
def test_a_map_is_transferred_position_by_position(output: str) -> None:
    head = randomised(residual(output=output))
    maps = torch.randn(3, 12, 4, 5)
    wanted = torch.stack(
        [torch.stack([head(maps[:, :, y, x]) for x in range(5)], -1) for y in range(4)], -2
    )
    assert head(maps).shape == (3, head.out_features, 4, 5)
    assert torch.allclose(head(maps), wanted, atol=1e-6)


def test_layers_run_in_the_dtype_of_their_weights() -> None:
    head = randomised(residual())
    half = copy.deepcopy(head).to(torch.bfloat16)
    assert half(ROWS).dtype == torch.float32
    assert torch.allclose(half(ROWS), head(ROWS), atol=0.2)
    assert not torch.equal(half(ROWS), head(ROWS))


def test_dropout_is_for_training_only() -> None:
    head = randomised(residual(dropout=0.9))
    assert torch.equal(head(ROWS), head(ROWS))
    head.train()
    assert not torch.equal(head(ROWS), head(ROWS))
    assert torch.equal(head.transfer(ROWS), head.eval()(ROWS).detach())
    assert FeatureTransferHead(12).dropout == 0.5
    assert FeatureTransferHead(12, output="clusters").dropout == 0.0


def test_dropout_draws_from_the_heads_own_generator() -> None:
    heads = [randomised(residual(dropout=0.5)).train() for _ in range(2)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = [heads[0](ROWS) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(torch.stack([heads[1](ROWS) for _ in range(2)]), torch.stack(first))
    other = randomised(residual(dropout=0.5)).train()
    other.generator.manual_seed(7)
    assert not torch.equal(other(ROWS), first[0])


def test_dropout_keeps_the_share_that_it_says_and_the_mean() -> None:
    head = FeatureTransferHead(
        12, hidden_features=4000, activation="identity", dropout=0.75
    ).train()
    with torch.no_grad():
        head.fc1.weight.zero_()
        head.fc1.bias.fill_(1)
    hidden = head.hidden(torch.zeros(50, 12))
    assert set(hidden.unique().tolist()) == {0.0, 4.0}
    assert float((hidden == 0).float().mean()) == pytest.approx(0.75, abs=0.01)


def test_a_copied_head_drops_what_the_head_would() -> None:
    head = randomised(residual(dropout=0.5)).train()
    head(ROWS)
    copies = [copy.deepcopy(head), pickle.loads(pickle.dumps(head))]
    wanted = head(ROWS)
    assert all(torch.equal(part(ROWS), wanted) for part in copies)
    assert "generator" not in head.state_dict()


def test_dropout_on_the_meta_device_and_in_bfloat16() -> None:
    head = residual(dropout=0.5).train()
    assert copy.deepcopy(head).to("meta")(torch.empty(3, 12, device="meta")).shape == (3, 12)
    half = head.to(torch.bfloat16).hidden(ROWS)
    assert half.dtype == torch.bfloat16
    assert float((half == 0).float().mean()) == pytest.approx(0.5, abs=0.3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_that_activation_checkpointing_would_change_is_refused(reentrant: bool) -> None:
    """The recomputed activations would be others, and the gradients wrong without a word."""
    head = randomised(residual(dropout=0.5)).train()
    rows = ROWS.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"dropout: got a head that activation checkpointing"):
        checkpoint(head, rows, use_reentrant=reentrant).sum().backward()
    head.dropout = 0.0
    checkpoint(head, rows, use_reentrant=reentrant).sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_head_drops_anew_each_time() -> None:
    head = randomised(residual(dropout=0.5)).train()
    plain, compiled = copy.deepcopy(head), torch.compile(head, backend="eager")
    found = [compiled(ROWS) for _ in range(2)]
    assert not torch.equal(*found)
    torch.testing.assert_close(torch.stack(found), torch.stack([plain(ROWS) for _ in range(2)]))


def test_transfer_restores_the_mode() -> None:
    head = residual().train()
    head.transfer(ROWS)
    assert head.training


@pytest.mark.parametrize("shape", [(4, 11), (2, 11, 3, 3), ()])
def test_another_width_is_told(shape: tuple[int, ...]) -> None:
    wanted = r"got shape \(.*\), wanted \(\.\.\., 12\) or \(n, 12, h, w\)"
    with pytest.raises(ValueError, match=wanted):
        residual()(torch.zeros(shape))


def test_a_dropout_of_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout: got 1, wanted a share in \[0, 1\)"):
        residual(dropout=1)


def scaling_head(**options: Any) -> FeatureTransferHead:
    return FeatureTransferHead(12, 5, 32, output="clusters", **options)


def test_a_head_scales_as_what_it_was_trained_on() -> None:
    scaled = scale_features(ROWS, "l2")
    plain, scaling = scaling_head(), scaling_head(scaling="l2")
    plain.set_input_statistics(scaled)
    scaling.set_input_statistics(ROWS)
    assert torch.equal(scaling.scale(ROWS), scaled)
    assert torch.equal(scaling.input_mean, plain.input_mean)
    assert torch.equal(scaling.input_std, plain.input_std)
    assert torch.equal(scaling(ROWS), plain(scaled))
    assert torch.equal(scaling.hidden(ROWS), plain.hidden(scaled))
    assert torch.equal(scaling.transfer(ROWS), plain.transfer(scaled))
    assert not torch.allclose(scaling(ROWS), plain(ROWS), atol=1)
    maps = ROWS[:60].view(3, 4, 5, 12).movedim(-1, 1)
    torch.testing.assert_close(scaling(maps)[1, :, 2, 3], plain(scaled[20 + 10 + 3]))
    assert FeatureTransferHead(**scaling.config).scaling == "l2"


@pytest.mark.parametrize("labels", ASSIGNMENTS)
def test_fitting_takes_rows_as_they_come(labels: str) -> None:
    lr = ROWS.roll(3, 0) * torch.linspace(0.5, 2, 64)[:, None]
    heads = [scaling_head(seed=1), scaling_head(seed=1, scaling="l2")]
    clustering = kmeans(heads[1].scale(ROWS), 5, seed=0)
    for head, scaling in zip(heads, ("l2", "none"), strict=True):
        hr_rows, lr_rows = scale_features(ROWS, scaling), scale_features(lr, scaling)
        head.set_input_statistics(lr_rows)
        fit_head(head, hr_rows, lr_rows, clustering, labels=labels, recipe=Recipe(epochs=3))
    assert torch.equal(heads[1].transfer(lr), heads[0].transfer(scale_features(lr, "l2")))
    assert torch.equal(heads[1].centroids, clustering.centroids)


def test_centroids_of_rows_that_were_not_scaled_are_refused() -> None:
    head = scaling_head(scaling="l2")
    with pytest.raises(ValueError, match=r"centroids: got one of length \d.*`head\.scale`"):
        fit_head(head, ROWS, ROWS, kmeans(ROWS, 5, seed=0), recipe=Recipe(epochs=1))
    assert not head.centroids.any()
    head.set_centroids(scale_features(ROWS[:5], "l2"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_feature_of_zeros_or_of_any_length_gives_finite_logits(dtype: torch.dtype) -> None:
    head = scaling_head(scaling="l2")
    head.set_input_statistics(ROWS)
    head.to(dtype)
    most = torch.finfo(dtype).max
    rows = torch.stack([torch.zeros(12), torch.full((12,), most), ROWS[0], ROWS[0] * 100]).to(dtype)
    logits = head(rows)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[3], logits[2], rtol=0.02, atol=0.02)
    maps = rows[0].expand(1, 3, 3, 12).movedim(-1, 1)
    torch.testing.assert_close(head(maps)[0, :, 1, 1], logits[0], rtol=0.02, atol=0.02)


def test_training_on_a_feature_of_zeros_is_refused() -> None:
    with pytest.raises(ValueError, match="features: row 1 is zero"):
        scaling_head(scaling="l2").set_input_statistics(torch.stack([ROWS[0], ROWS[0] * 0]))


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features: got torch\.int64, wanted a floating-point"):
        randomised(residual())(torch.ones(3, 12, dtype=torch.int64))


def test_a_batch_of_no_rows_at_a_time_is_refused(head: FeatureTransferHead) -> None:
    with pytest.raises(ValueError, match="batch_size: got 0, wanted an int >= 1"):
        head.transfer(ROWS, batch_size=0)
