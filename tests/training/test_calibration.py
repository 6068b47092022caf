"""Calibration against a known temperature, a grid, closed forms, its invariants and scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import brier_score_loss

from training.calibration import (
    LARGEST,
    SMALLEST,
    Inner,
    Isotonic,
    apply_isotonic,
    apply_temperature,
    fit_isotonic,
    fit_temperature,
    fold_temperatures,
    isotonic_by_fold,
    scaled_by_fold,
    squared_errors,
)
from training.metrics import ece


def sampled(temperature: float, rows: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits [rows,4], and classes drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(rows, 4))
    chances = softmax(logits / temperature, axis=1)
    return logits, (rng.random((rows, 1)) > chances.cumsum(1)).sum(1).clip(0, 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    logits, truth = sampled(temperature)
    assert fit_temperature(logits, truth) == pytest.approx(temperature, rel=0.05)


def test_the_temperature_is_the_best_of_a_fine_grid() -> None:
    logits, truth = sampled(1.7, rows=300)
    grid = np.exp(np.linspace(np.log(0.2), np.log(10), 4000))
    losses = [-log_softmax(logits / t, axis=1)[np.arange(300), truth].mean() for t in grid]
    assert fit_temperature(logits, truth) == pytest.approx(grid[int(np.argmin(losses))], rel=2e-3)


def test_the_temperature_of_one_repeated_score_has_a_closed_form() -> None:
    """Right in 3 of 4 rows with logit difference d: the best probability is 3/4, so d / T = log 3."""
    logits, truth = np.tile([2.0, 0.0], (4, 1)), [0, 0, 0, 1]
    assert fit_temperature(logits, truth) == pytest.approx(2 / np.log(3), rel=1e-4)


def test_scaling_mends_the_calibration_of_an_overconfident_classifier() -> None:
    logits, truth = sampled(2.5)
    before = softmax(logits, axis=1)
    after = apply_temperature(before, fit_temperature(logits, truth))
    assert ece(before, truth) > 0.1
    assert ece(after, truth) < 0.02


def test_logits_and_their_log_probabilities_give_the_same_temperature() -> None:
    logits, truth = sampled(2.0, rows=500)
    normalised = log_softmax(logits, axis=1)
    assert fit_temperature(logits, truth) == pytest.approx(fit_temperature(normalised, truth))


def test_predictions_without_an_error_and_those_of_pure_noise_stay_within_the_bounds() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 3))
    assert fit_temperature(logits, logits.argmax(1)) == pytest.approx(SMALLEST, rel=1e-3)
    assert fit_temperature(logits, logits.argmin(1)) == pytest.approx(LARGEST, rel=1e-3)


def test_a_probability_of_exactly_zero_for_the_truth_is_survived() -> None:
    with np.errstate(divide="ignore"):
        log_probabilities = np.log([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    temperature = fit_temperature(log_probabilities, [0, 1, 1])
    scaled = apply_temperature(np.exp(log_probabilities), temperature)
    assert 1 < temperature <= LARGEST
    assert np.isfinite(np.log(scaled)).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=6), st.floats(SMALLEST, LARGEST))
def test_scaled_probabilities_sum_to_one_and_keep_their_order(weights: list[float], temperature: float) -> None:
    p = np.array(weights) / np.sum(weights)
    scaled = apply_temperature(p, temperature)
    assert scaled.sum() == pytest.approx(1)
    assert (np.diff(scaled[np.argsort(p)]) >= -1e-12).all()
    np.testing.assert_allclose(scaled, p ** (1 / temperature) / (p ** (1 / temperature)).sum(), rtol=1e-6, atol=1e-12)


def test_temperature_one_changes_nothing() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(5), (3, 7))
    np.testing.assert_allclose(apply_temperature(p, 1.0), p, rtol=1e-9)
    np.testing.assert_allclose(apply_temperature(np.eye(3), 1.0), np.eye(3), atol=1e-11)


def test_wrong_shapes_and_temperatures_are_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        fit_temperature(np.zeros((3, 2)), [0, 1])
    with pytest.raises(ValueError, match="positive"):
        apply_temperature([0.5, 0.5], 0)


class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted classifier whose input is its answer."""

    def __init__(self, classes: int = 2) -> None:
        self.classes_ = np.arange(classes)
        self.classes = classes

    def fit(self, _x: Any, _y: Any) -> Given:
        return self

    def predict_proba(self, x: Any) -> Any:
        return x

    def predict(self, x: Any) -> Any:
        return x.argmax(axis=1)


def bent(classes: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [rows,classes] and truths drawn from their squares, normalised."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), rows)
    chances = p**2 / (p**2).sum(axis=1, keepdims=True)
    return p, (rng.random((rows, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(0, classes - 1)


@pytest.mark.parametrize("classes", [2, 4])
def test_isotonic_probabilities_are_those_of_scikit_learn(classes: int) -> None:
    p, truth = bent(classes, 300, 0)
    new = np.random.default_rng(1).dirichlet(np.ones(classes), 100)
    peer = CalibratedClassifierCV(FrozenEstimator(Given(classes)), method="isotonic").fit(p, truth)
    mine = apply_isotonic(new, fit_isotonic(p, truth))
    np.testing.assert_allclose(mine, peer.predict_proba(new), atol=1e-12)
    np.testing.assert_allclose(mine.sum(axis=1), 1)


def test_isotonic_regression_mends_the_calibration_of_rows_it_has_not_seen() -> None:
    p, truth = bent(3, 20_000, 2)
    new, new_truth = bent(3, 20_000, 3)
    mended = apply_isotonic(new, fit_isotonic(p, truth))
    assert ece(new, new_truth) > 0.08
    assert ece(mended, new_truth) < 0.02
    assert squared_errors(mended, new_truth).mean() < squared_errors(new, new_truth).mean()


def test_a_row_whose_every_class_maps_to_nothing_is_kept() -> None:
    isotonic = fit_isotonic([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8]], [0, 0, 1])
    empty = Isotonic(tuple((x, np.zeros_like(y)) for x, y in isotonic.maps))
    assert apply_isotonic([[0.3, 0.7]], empty).tolist() == [[0.3, 0.7]]


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_the_brier_score_is_scikit_learns(classes: int) -> None:
    rng = np.random.default_rng(classes)
    p, truth = rng.dirichlet(np.ones(classes), 200), rng.integers(0, classes, 200)
    expected = brier_score_loss(truth, p[:, 1] if classes == 2 else p, labels=list(range(classes)))
    assert squared_errors(p, truth).mean() == pytest.approx(expected)


def test_a_fold_is_calibrated_by_its_own_inner_predictions_alone() -> None:
    rng = np.random.default_rng(0)
    raw, fold, repeat = rng.dirichlet(np.ones(3), 40), np.arange(40) % 2, np.repeat([0, 1], 20)
    keys = [(r, f) for r in (0, 1) for f in (0, 1)]
    inner = {key: Inner(*bent(3, 80, at)[::-1]) for at, key in enumerate(keys)}
    changed = inner | {(1, 0): Inner(*bent(3, 80, 99)[::-1])}
    mine = (repeat == 1) & (fold == 0)
    for one, other in (
        (isotonic_by_fold(raw, fold, repeat, inner), isotonic_by_fold(raw, fold, repeat, changed)),
        (
            scaled_by_fold(raw, fold, repeat, fold_temperatures(inner)),
            scaled_by_fold(raw, fold, repeat, fold_temperatures(changed)),
        ),
    ):
        assert (one[~mine] == other[~mine]).all()
        assert (one[mine] != other[mine]).any()
    temperature = fit_temperature(np.log(inner[(0, 1)].raw), inner[(0, 1)].truth)
    own = (repeat == 0) & (fold == 1)
    np.testing.assert_allclose(
        scaled_by_fold(raw, fold, repeat, fold_temperatures(inner))[own], apply_temperature(raw[own], temperature)
    )
