from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import (
    check_set_output_transform,
    check_transformer_get_feature_names_out,
    parametrize_with_checks,
)
from threadpoolctl import threadpool_limits

from featxfer import FEATURES_RECIPE, DivergenceError, EpochLog, FeatureTransferHead, Recipe
from featxfer.estimator import FeatureTransfer

QUICK = Recipe(epochs=2, batch_size=16, optimizer="adamw", learning_rate=3e-4)
RECIPE = dataclasses.replace(FEATURES_RECIPE, epochs=20, batch_size=32, learning_rate=3e-3)
RNG = np.random.default_rng(0)
CLASSES = RNG.integers(6, size=500)
HR = (RNG.normal(size=(6, 12)) * 2)[CLASSES] + RNG.normal(size=(500, 12)) / 2
HR = HR.astype(np.float32)
DISTORTION = np.eye(12) * 0.6 + RNG.normal(size=(12, 12)) * 0.15
LR = HR @ DISTORTION + RNG.normal(size=12) + RNG.normal(size=HR.shape) / 10
LR = LR.astype(np.float32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of so small a k-means wait for each other for seconds."""
    with threadpool_limits(1):
        yield


def small(**parameters: Any) -> FeatureTransfer:
    defaults: dict[str, Any] = {"n_clusters": 5, "hidden_features": 8, "recipe": QUICK}
    return FeatureTransfer(**defaults | parameters)


@parametrize_with_checks([small()])  # type: ignore[untyped-decorator]
def test_scikit_learns_own_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.mark.parametrize(
    "check", [check_transformer_get_feature_names_out, check_set_output_transform]
)
def test_checks_that_scikit_learn_leaves_to_transformers(check: Callable[..., None]) -> None:
    check("FeatureTransfer", small())


def test_held_out_lr_rows_move_towards_their_hr_rows() -> None:
    transfer = FeatureTransfer(6, 64, RECIPE).fit(LR[:350], X_hr=HR[:350])
    hr, lr, moved = HR[350:], LR[350:], transfer.transform(LR[350:])
    assert distance(moved, hr) < distance(lr, hr) / 3
    assert distance(transfer.transform(hr), hr) < distance(lr, hr) / 3
    assert cosine(moved, hr) > 0.95 > 0.7 > cosine(lr, hr)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b, axis=1).mean())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / lengths).mean())


def test_what_fit_leaves() -> None:
    transfer = small(n_clusters=7)
    assert transfer.fit(LR, X_hr=HR) is transfer
    assert isinstance(transfer.head_, FeatureTransferHead)
    assert not transfer.head_.training
    assert transfer.head_.config["hidden_features"] == 8
    assert [type(entry) for entry in transfer.log_] == [EpochLog, EpochLog]
    assert transfer.clustering_.k == 7
    assert torch.equal(transfer.head_.centroids, transfer.clustering_.centroids)
    assert transfer.n_features_in_ == 12
    assert list(transfer.get_feature_names_out()[:2]) == ["featuretransfer0", "featuretransfer1"]


def test_transform_is_the_heads_transfer_in_float64() -> None:
    transfer = FeatureTransfer(6, 64, RECIPE).fit(LR[:100], X_hr=HR[:100])
    moved = transfer.transform(LR)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(moved, transfer.head_.transfer(LR), rtol=1e-4, atol=1e-5)
    assert transfer.head_.fc1.weight.dtype == torch.float32
    alone = np.concatenate([transfer.transform(row[None]) for row in LR])
    np.testing.assert_allclose(alone, moved, rtol=2e-7, atol=0)


def test_the_default_recipe_is_that_for_features() -> None:
    log = small(recipe=None).fit(LR[:20], X_hr=HR[:20]).log_
    assert len(log) == FEATURES_RECIPE.epochs
    assert log[0].learning_rate == FEATURES_RECIPE.learning_rate_at(0)


def test_without_hr_rows_it_learns_to_return_what_it_gets() -> None:
    moved = FeatureTransfer(6, 64, RECIPE).fit(LR[:350]).transform(LR)
    np.testing.assert_allclose(moved, LR, atol=1e-3)


def test_one_random_state_gives_the_same_head_bit_for_bit() -> None:
    states = (3, 3, np.random.RandomState(3), 4, None)
    outputs = [small(random_state=state).fit(LR, X_hr=HR).transform(LR) for state in states]
    assert np.array_equal(outputs[0], outputs[1])
    assert np.array_equal(outputs[0], outputs[2])
    assert not np.array_equal(outputs[0], outputs[3])
    assert not np.array_equal(outputs[0], outputs[4])


def test_a_random_state_object_moves_on() -> None:
    transfer = small(random_state=np.random.RandomState(3))
    first, second = (transfer.fit(LR, X_hr=HR).transform(LR) for _ in range(2))
    assert not np.array_equal(first, second)


def test_the_global_random_states_are_left_alone() -> None:
    state, numpy_state = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    for random_state in (0, None):
        small(random_state=random_state).fit(LR, X_hr=HR).transform(LR)
    assert torch.equal(torch.get_rng_state(), state)
    assert str(np.random.get_state()) == numpy_state  # noqa: NPY002


def new_pipeline() -> Pipeline:
    return make_pipeline(
        FeatureTransfer(6, 32, RECIPE), StandardScaler(), LinearSVC(random_state=0)
    )


def test_a_pipeline_passes_the_hr_rows_on() -> None:
    labels = CLASSES % 2
    pipeline = new_pipeline().fit(LR[:350], labels[:350], featuretransfer__X_hr=HR[:350])
    assert pipeline.score(LR[350:], labels[350:]) > 0.9
    alone = clone(pipeline[0]).fit(LR[:350], X_hr=HR[:350])
    assert np.array_equal(pipeline[0].transform(LR), alone.transform(LR))


def test_cross_validation_splits_the_hr_rows_as_well() -> None:
    scores = cross_val_score(
        new_pipeline(), LR, CLASSES % 2, cv=2, params={"featuretransfer__X_hr": HR}
    )
    assert scores.min() > 0.9


def test_a_grid_of_numpy_integers() -> None:
    pipeline = make_pipeline(small(), LinearSVC(random_state=0))
    grid = {"featuretransfer__n_clusters": np.array([2, 3])}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(LR, CLASSES % 2)
    assert search.best_estimator_[0].clustering_.k in (2, 3)


def test_clone_and_pickle() -> None:
    transfer = small(random_state=5).fit(LR, X_hr=HR)
    copied = clone(transfer)
    assert copied.get_params() == transfer.get_params()
    assert not hasattr(copied, "head_")
    restored = pickle.loads(pickle.dumps(transfer))
    assert np.array_equal(restored.transform(LR), transfer.transform(LR))
    assert restored.log_ == transfer.log_


def test_zero_rows_and_duplicates_leave_fewer_clusters() -> None:
    """Three directions: [1, 0] at two lengths, [0, 1], and one of them with a negative zero."""
    hr = np.array([[1, 0], [2, -0.0], [0, 0], [0, 3], [0, 0], [-0.0, 1], [-1, 1]])
    transfer = small(n_clusters=100).fit(hr + 0.5, X_hr=hr)
    assert transfer.clustering_.k == 3
    assert transfer.transform([[0.0, 0.0]]).shape == (1, 2)


def test_directions_that_cancel_out_leave_no_centroid_of_zero() -> None:
    transfer = small(n_clusters=1).fit([[2.0, 0.0], [-2.0, 0.0]])
    assert transfer.clustering_.centroids.tolist() == [[1.0, 0.0]]


def test_rows_of_any_length_have_a_direction() -> None:
    """The square of the shortest is below float32."""
    hr = np.array([[10, 0], [0, 1e-30], [1, 1]])
    directions = small().fit(hr / 2, X_hr=hr).clustering_.centroids.tolist()
    wanted = [[0, 1], [0.5**0.5, 0.5**0.5], [1, 0]]
    np.testing.assert_allclose(sorted(directions), wanted, rtol=1e-6)


def test_a_fit_that_fails_keeps_the_last_head() -> None:
    transfer = small().fit(LR, X_hr=HR)
    before = transfer.transform(LR)
    transfer.set_params(recipe=dataclasses.replace(RECIPE, learning_rate=1e30))
    with pytest.raises(DivergenceError, match="not finite at epoch"):
        transfer.fit(LR, X_hr=HR)
    assert np.array_equal(transfer.transform(LR), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_taken_for_their_values(dtype: torch.dtype) -> None:
    lr, hr = (torch.from_numpy(rows).to(dtype).requires_grad_() for rows in (LR, HR))
    given = small().fit(lr, X_hr=hr)
    wanted = small().fit(lr.detach().float().numpy(), X_hr=hr.detach().float().numpy())
    assert np.array_equal(given.transform(lr), wanted.transform(lr.detach().float().numpy()))


def test_arrays_are_left_alone() -> None:
    lr, hr = LR.copy(), HR.copy()
    small().fit(lr, X_hr=hr).transform(lr)
    assert np.array_equal(lr, LR)
    assert np.array_equal(hr, HR)


@pytest.mark.parametrize(
    ("parameters", "lr", "hr", "message"),
    [
        ({}, LR, HR[:5], r"^X_hr: got shape \(5, 12\), wanted \(500, 12\), an HR row for each"),
        ({}, LR, HR[:, :5], r"^X_hr: got shape \(500, 5\), wanted \(500, 12\)"),
        ({}, LR, HR[0], r"^X_hr: got shape \(12,\), wanted \(500, 12\)"),
        ({}, LR, HR * np.nan, "Input X_hr contains NaN"),
        ({}, LR * np.nan, HR, "Input X contains NaN"),
        ({}, LR[:3], HR[[0, 0, 0]], "^X_hr: got 3 equal rows, wanted features that vary"),
        ({}, LR[:3], np.zeros((3, 12)), "^X_hr: got 3 equal rows"),
        ({}, LR[[0, 0]], None, "^X: got 2 equal rows"),
        ({}, LR[:1], None, "1 sample.* a minimum of 2 is required by FeatureTransfer"),
        ({"n_clusters": 0}, LR, HR, "^n_clusters: got 0, wanted an int >= 1"),
        ({"n_clusters": 2.5}, LR, HR, "^n_clusters: got 2.5, wanted an int >= 1"),
        ({"hidden_features": "8"}, LR, HR, "^hidden_features: got '8', wanted an int >= 1"),
        ({"random_state": "x"}, LR, HR, "'x' cannot be used to seed"),
    ],
)
def test_bad_input_is_named(parameters: dict[str, Any], lr: Any, hr: Any, message: str) -> None:
    transfer = small(**parameters)
    with pytest.raises(ValueError, match=message):
        transfer.fit(lr, X_hr=hr)
    assert not hasattr(transfer, "head_")


def test_transform_refuses_what_fit_did_not_see() -> None:
    with pytest.raises(NotFittedError):
        small().transform(LR)
    transfer = small().fit(LR, X_hr=HR)
    with pytest.raises(ValueError, match="X has 11 features, but FeatureTransfer is expecting 12"):
        transfer.transform(LR[:, 1:])
