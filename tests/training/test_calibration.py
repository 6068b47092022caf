"""Temperature scaling against a known temperature, a grid, closed forms and its invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from training.calibration import LARGEST, SMALLEST, apply_temperature, fit_temperature
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
