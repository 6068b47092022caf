"""Probabilities of one class and of several labels: their activation, and the temperature that calibrates them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit

from training.calibration import apply_temperature, fit_temperature
from training.probabilities import calibrated, from_logits, temperature_for


def logits(rows: int = 4000, labels: int = 3) -> np.ndarray:
    return np.asarray(np.random.default_rng(0).normal(0, 2, (rows, labels)))


@pytest.mark.parametrize("several", [False, True])
def test_logits_become_what_torch_makes_of_them(several: bool) -> None:
    z = logits(20)
    expected = torch.sigmoid(torch.from_numpy(z)) if several else torch.softmax(torch.from_numpy(z), dim=1)
    assert np.allclose(from_logits(z.astype(np.float32), several=several), expected, atol=1e-6)


@pytest.mark.parametrize("sharper", [0.4, 1.0, 3.0])
def test_the_temperature_of_labels_undoes_how_much_sharper_they_were_made(sharper: float) -> None:
    z = logits()
    truth = np.random.default_rng(1).random(z.shape) < expit(z)
    raw = expit(z * sharper)
    found = temperature_for(raw, truth)
    assert found == pytest.approx(sharper, rel=0.06)
    assert np.allclose(calibrated(raw, found, several=True), expit(z * sharper / found), atol=1e-9)


def test_no_temperature_changes_the_order_or_the_side_of_a_half_of_labels() -> None:
    raw = expit(logits(50))
    for temperature in (0.6, 1.0, 7.0):
        found = calibrated(raw, temperature, several=True)
        assert np.array_equal(np.argsort(found, axis=None), np.argsort(raw, axis=None))
        assert np.array_equal(found >= 0.5, raw >= 0.5)
    assert np.allclose(calibrated(raw, 1.0, several=True), raw)
    assert np.isfinite(calibrated(np.asarray([[0.0, 1.0]]), 0.05, several=True)).all()


def test_one_class_per_image_is_calibrated_as_before() -> None:
    rng = np.random.default_rng(0)
    raw, truth = rng.dirichlet(np.ones(4), 100), rng.integers(0, 4, 100)
    temperature = temperature_for(raw, truth)
    assert temperature == fit_temperature(np.log(np.maximum(raw, 1e-12)), truth)
    assert np.array_equal(calibrated(raw, temperature, several=False), apply_temperature(raw, temperature))
