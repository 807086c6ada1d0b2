from __future__ import annotations

import dataclasses
import math
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC
from torch import nn

from featxfer import PROTOCOLS, Backbone, FeatureTransferHead, Protocol, train_svms
from featxfer.evaluation.svm import SOLVERS, LinearSVMs, SVMClassifier, average_precisions

RNG = np.random.default_rng(0)
ROWS = torch.from_numpy(RNG.normal(size=(90, 6)).astype(np.float32))
LABELS = np.where(
    ROWS.numpy() @ RNG.normal(size=(6, 3)) + RNG.normal(size=(90, 3)) / 4 > 0.5, 1, -1
)


@pytest.mark.parametrize("solver", SOLVERS)
def test_plain_by_hand(solver: str) -> None:
    """Two points: min w^2/2 + b^2/2 + (1 - w)^2 + (1 - w)^2 has w = 4/5, b = 0."""
    rows, labels = torch.tensor([[1.0], [-1.0]]), np.array([[1], [-1]])
    svms = train_svms(rows, labels, PROTOCOLS["plain"], solver=solver)
    assert svms.coef == pytest.approx(np.array([[0.8]]), abs=1e-3)
    assert svms.intercept == pytest.approx(np.array([0.0]), abs=1e-3)
    assert svms.decisions(torch.tensor([[2.0]])) == pytest.approx(np.array([[1.6]]), abs=2e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_positive_weight_and_normalisation_by_hand(solver: str) -> None:
    """Both rows have the length 3; positive errors weigh 2: a linear system in w and b."""
    protocol = Protocol("one cost", (1.0,))
    rows, labels = torch.tensor([[3.0], [-3.0]]), np.array([[1], [-1]])
    svms = train_svms(rows, labels, protocol, solver=solver)
    system = [[1 + 4 + 2, 4 - 2], [4 - 2, 1 + 4 + 2]]
    w, b = np.linalg.solve(system, [4 + 2, 4 - 2])
    assert svms.coef[0, 0] == pytest.approx(w, abs=2e-3)
    assert svms.intercept[0] == pytest.approx(b, abs=2e-3)


@pytest.mark.parametrize("name", ["vissl", "virtex"])
def test_protocols_as_their_scripts_write_them(name: str) -> None:
    """Against scikit-learn's own cross-validation, called as those projects call it."""
    costs = {
        "vissl": [0.01, 0.1, 1.0, 2, 5, 10, 15, 20, 50, 100, 1000],
        "virtex": [0.01, 0.1, 1.0, 10.0],
    }[name]
    rows = ROWS.double().numpy()
    rows = rows / (np.linalg.norm(rows, axis=1)[:, None] + 1e-5)
    svms = train_svms(ROWS, LABELS, PROTOCOLS[name])
    assert svms.fits == LABELS.shape[1] * (len(costs) * 3 + 1)
    for column in range(LABELS.shape[1]):
        means = []
        for cost in costs:
            model = LinearSVC(
                C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=0
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scores = cross_val_score(
                    model, rows, LABELS[:, column], cv=3, scoring="average_precision"
                )
            means.append(scores.mean())
        best = costs[int(np.argmax(means))]
        assert svms.costs[column] == best
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LinearSVC(
                C=best, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=0
            ).fit(rows, LABELS[:, column])
        np.testing.assert_array_equal(svms.coef[column], model.coef_[0])


def test_more_columns_than_rows_by_rotation() -> None:
    """Against LinearSVC on the columns as they are."""
    rows = torch.from_numpy(RNG.normal(size=(40, 200)).astype(np.float32))
    labels = LABELS[:40]
    svms = train_svms(rows, labels, PROTOCOLS["plain"])
    assert svms.coef.shape == (3, 200)
    for column in range(3):
        model = LinearSVC(C=1.0, dual=True, max_iter=10_000, random_state=0)
        model.fit(rows.double().numpy(), labels[:, column])
        np.testing.assert_allclose(svms.coef[column], model.coef_[0], atol=1e-9)
        np.testing.assert_allclose(svms.intercept[column], model.intercept_[0], atol=1e-9)


def loss(
    svms: LinearSVMs, rows: torch.Tensor, labels: np.ndarray, protocol: Protocol
) -> list[float]:
    """What is minimised, a class each, at the weights found."""
    weights = np.where(labels == 1, protocol.positive_weight, 1.0)
    if protocol.difficult == "ignored":
        weights[labels == 0] = 0
    hinge = np.maximum(0, 1 - np.where(labels == 1, 1, -1) * svms.decisions(rows))
    errors = (np.array(svms.costs) * weights * hinge**2).sum(0)
    return list((svms.coef**2).sum(1) / 2 + svms.intercept**2 / 2 + errors)


@pytest.mark.parametrize("cost", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("width", [6, 200])
@pytest.mark.parametrize("difficult", ["negative", "ignored"])
def test_both_solvers_find_one_minimum(cost: float, width: int, difficult: str) -> None:
    """With more rows than columns and fewer, and rows that only have difficult instances."""
    protocol = Protocol("one", (cost,), difficult=difficult, max_iter=1_000_000)
    rows = torch.from_numpy(RNG.normal(size=(90, width)).astype(np.float32))
    labels = LABELS.copy()
    labels[::7] = 0
    reference = train_svms(rows, labels, protocol)
    batched = train_svms(rows, labels, protocol, solver="batched")
    np.testing.assert_allclose(
        loss(batched, rows, labels, protocol),
        loss(reference, rows, labels, protocol),
        rtol=1e-3,
    )
    assert batched.coef.shape == reference.coef.shape
    for column in range(3):
        both = (batched.decisions(rows)[:, column], reference.decisions(rows)[:, column])
        assert np.corrcoef(*both)[0, 1] > 0.9999


def test_the_batched_solver_chooses_the_same_costs() -> None:
    """Where the reference's choice is no near tie."""
    generator = np.random.default_rng(2)
    rows = torch.from_numpy(generator.normal(size=(300, 60)).astype(np.float32))
    noise = 4 * generator.normal(size=(300, 3))
    labels = np.where(rows.numpy() @ generator.normal(size=(60, 3)) + noise > 4, 1, -1)
    reference = train_svms(rows, labels, PROTOCOLS["virtex"])
    done: list[int] = []
    batched = train_svms(rows, labels, PROTOCOLS["virtex"], solver="batched", callback=done.append)
    assert (batched.fits, batched.unconverged, done) == (reference.fits, 0, [0, 1, 2])
    assert batched.costs == reference.costs
    fresh = generator.normal(size=(300, 60)).astype(np.float32)
    decisions = [svms.decisions(fresh) for svms in (batched, reference)]
    np.testing.assert_allclose(decisions[0], decisions[1], atol=0.01)


def test_columns_that_do_not_converge_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featxfer.evaluation.batched_svm.MAX_ITERATIONS", 1)
    assert train_svms(ROWS, LABELS, PROTOCOLS["plain"], solver="batched").unconverged == 3


def test_difficult_images_are_negative_or_ignored_in_training() -> None:
    labels = np.array([[1], [1], [-1], [-1], [0], [0]])
    rows = torch.tensor([[2.0], [1.0], [-1.0], [-2.0], [5.0], [6.0]])
    kept = train_svms(rows[:4], labels[:4], PROTOCOLS["plain"])
    ignored = train_svms(rows, labels, PROTOCOLS["plain"])
    np.testing.assert_array_equal(ignored.coef, kept.coef)
    as_negative = dataclasses.replace(PROTOCOLS["plain"], difficult="negative")
    negative = train_svms(rows, labels, as_negative)
    written_out = train_svms(rows, np.where(labels == 0, -1, labels), PROTOCOLS["plain"])
    np.testing.assert_array_equal(negative.coef, written_out.coef)
    assert negative.coef[0, 0] < 0 < ignored.coef[0, 0]


def test_difficult_images_are_dropped_at_test() -> None:
    decisions = np.array([[3.0], [2.0], [1.0]])
    assert average_precisions(decisions, np.array([[1], [0], [-1]])) == [1.0]
    assert average_precisions(decisions, np.array([[0], [-1], [1]]), "step") == [0.5]


def test_jobs_do_not_change_the_result() -> None:
    done: list[int] = []
    one = train_svms(ROWS, LABELS, PROTOCOLS["virtex"])
    two = train_svms(ROWS, LABELS, PROTOCOLS["virtex"], jobs=2, callback=done.append)
    np.testing.assert_array_equal(one.coef, two.coef)
    assert sorted(done) == [0, 1, 2]


def test_fits_that_stop_early_are_counted_and_not_warned_of() -> None:
    short = dataclasses.replace(PROTOCOLS["plain"], max_iter=1)
    assert train_svms(ROWS * 100, LABELS, short).unconverged == 3
    assert train_svms(ROWS, LABELS, PROTOCOLS["plain"]).unconverged == 0


def test_svms_tell_classes_apart() -> None:
    svms = train_svms(ROWS, LABELS, PROTOCOLS["vissl"])
    assert min(average_precisions(svms.decisions(ROWS), LABELS)) > 0.85


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (ROWS[:5], LABELS, r"labels: got shape \(90, 3\), wanted \(5, classes\)"),
        (ROWS, LABELS[:, 0], r"labels: got shape \(90,\), wanted \(90, classes\)"),
        (ROWS * math.nan, LABELS, "features: row 0 has NaN"),
        (
            ROWS,
            -np.ones_like(LABELS),
            "class 0 has 0 positive rows, protocol 'vissl' wants at least 3",
        ),
        (ROWS, np.ones_like(LABELS), "class 0 has 0 negative rows"),
    ],
)
def test_bad_input_is_named(rows: torch.Tensor, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_svms(rows, labels, PROTOCOLS["vissl"])


def test_an_unknown_solver() -> None:
    with pytest.raises(ValueError, match="solver: got 'newton', wanted"):
        train_svms(ROWS, LABELS, PROTOCOLS["plain"], solver="newton")


@pytest.mark.parametrize(("name", "value"), [("seed", 0), ("jobs", 1)])
def test_what_the_batched_solver_has_no_use_for_is_refused(name: str, value: int) -> None:
    arguments: Any = {name: value}
    with pytest.raises(ValueError, match=f"{name}: got {value}, which solver 'batched'"):
        train_svms(ROWS, LABELS, PROTOCOLS["plain"], solver="batched", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difficult": "ignore"}, "difficult: got 'ignore', wanted one of 'negative', 'ignored'"),
        ({"costs": ()}, r"costs: got \(\), wanted at least one value of C > 0"),
        ({"costs": (1.0, 0.0)}, r"costs: got \(1\.0, 0\.0\)"),
        ({"folds": 1}, "folds: got 1, wanted an int >= 2"),
        ({"max_iter": 0}, "max_iter: got 0"),
        ({"positive_weight": math.nan}, "positive_weight: got nan, wanted > 0"),
    ],
)
def test_protocols_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PROTOCOLS["plain"], **arguments)


def test_threads_do_not_change_each_others_liblinear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its random state is one a process, and it runs without the interpreter's lock."""
    running, most = 0, 0
    fit, counting = LinearSVC.fit, threading.Lock()

    def slow(self: LinearSVC, *arguments: Any) -> LinearSVC:
        nonlocal running, most
        with counting:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        fitted = fit(self, *arguments)
        with counting:
            running -= 1
        return fitted

    alone = train_svms(ROWS, LABELS, PROTOCOLS["virtex"])
    monkeypatch.setattr(LinearSVC, "fit", slow)
    with ThreadPoolExecutor(4) as pool:
        train = partial(train_svms, ROWS, LABELS)
        together = list(pool.map(train, [PROTOCOLS["virtex"]] * 4))
    assert most == 1
    for svms in together:
        np.testing.assert_array_equal(svms.coef, alone.coef)


def test_decisions_of_another_width() -> None:
    svms = train_svms(ROWS, LABELS, PROTOCOLS["plain"])
    with pytest.raises(ValueError, match="features: got width 5, wanted 6"):
        svms.decisions(ROWS[:, :5])
    with pytest.raises(ValueError, match=r"decisions: got shape \(2, 3\)"):
        average_precisions(np.zeros((2, 3)), LABELS)


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_a_module_decides_as_the_svms(name: str) -> None:
    svms = train_svms(ROWS, LABELS, PROTOCOLS[name])
    rows = torch.cat([ROWS * 1e-5, ROWS, ROWS * 1e3, torch.zeros(1, 6)])
    wanted = svms.decisions(rows)
    exact = svms.as_module(torch.float64)(rows)
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact.detach(), wanted, rtol=1e-12, atol=1e-9)
    usual = svms.as_module()(rows)
    assert usual.dtype == torch.float32
    np.testing.assert_allclose(usual.detach(), wanted, rtol=1e-4, atol=1e-6)
    assert svms.as_module().linear.weight.shape == (3, 6)


def test_a_module_shares_no_memory_with_the_svms() -> None:
    svms = train_svms(ROWS, LABELS, PROTOCOLS["plain"])
    before, module = svms.decisions(ROWS), svms.as_module(torch.float64)
    nn.init.zeros_(module.linear.weight)
    np.testing.assert_array_equal(svms.decisions(ROWS), before)


def test_a_new_module_is_zero_and_uses_no_randomness() -> None:
    state = torch.get_rng_state()
    module = SVMClassifier(6, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not module(ROWS).any()
    assert "normalize=True" in repr(module)
    with pytest.raises(RuntimeError, match="90x5 and 6x3"):
        module(ROWS[:, :5])


def moved_head(features: torch.Tensor) -> FeatureTransferHead:
    """A head that is no longer the identity, in eval mode."""
    head = FeatureTransferHead(features.shape[1], 4, 16)
    head.set_input_statistics(features)
    nn.init.normal_(head.fc2.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return head.eval()


@pytest.mark.parametrize("name", ["vissl", "plain"])
def test_backbone_head_and_svms_as_one_module(backbone: Backbone, name: str) -> None:
    """From pixels to decisions, as called and as exported."""
    extractor = backbone.module.eval()
    images = torch.randn(90, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = extractor(images)
    head = moved_head(features)
    svms = train_svms(head.transfer(features), LABELS, PROTOCOLS[name])
    wanted = svms.decisions(head.transfer(features))
    assert not np.allclose(svms.decisions(features), wanted, rtol=1e-3)
    system = nn.Sequential(extractor, head, svms.as_module()).eval()
    batch = {"input": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(system, (images[:2],), dynamic_shapes=batch).module()
    for module in (system, exported):
        with torch.no_grad():
            decisions = module(images).numpy()
        np.testing.assert_allclose(decisions, wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(decisions.argmax(1), wanted.argmax(1))
        np.testing.assert_array_equal(decisions > 0, wanted > 0)
