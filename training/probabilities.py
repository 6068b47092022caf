"""From scores to probabilities and their calibration, for one class per image and for several labels of an image.

One class: a softmax over classes. Several labels: a sigmoid of each, so that the row's probabilities are independent.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from scipy.special import expit, log_expit, logit

from training.calibration import FLOOR, apply_temperature, best_temperature, fit_temperature

Activation = Literal["softmax", "sigmoid"]
HALF = 0.5
"""A label is said where its probability is that or more."""
ACTIVATIONS: Final[tuple[Activation, ...]] = ("softmax", "sigmoid")


def from_logits(logits: np.ndarray, *, several: bool) -> np.ndarray:
    """Probabilities float64 [N, K] of logits [N, K]."""
    if several:
        return np.asarray(expit(logits.astype(np.float64)))
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def temperature_for(raw: np.ndarray, truth: np.ndarray) -> float:
    """The temperature that fits probabilities [M, K] best to class numbers [M], or to label sets bool [M, K]."""
    if truth.ndim == 2:
        return _label_temperature(raw, truth)
    return fit_temperature(np.log(np.maximum(raw, 1e-12)), truth)


def calibrated(raw: np.ndarray, temperature: float, *, several: bool) -> np.ndarray:
    """Probabilities [M, K] whose logits are divided by the temperature; no temperature changes their order."""
    if several:
        return np.asarray(expit(_logits(raw) / temperature))
    return apply_temperature(raw, temperature)


def _label_temperature(raw: np.ndarray, truth: np.ndarray) -> float:
    """The T in [0.05, 20] whose sigmoid(z / T) has the smallest mean binary cross-entropy over all labels of all rows.

    One T for all labels, as `fit_temperature` has one for all classes; logits are floored likewise at 1e-12.
    """
    if raw.shape != truth.shape or not len(raw):
        raise ValueError(f"probabilities {raw.shape} and labels {truth.shape}: must be alike, with a row at least")
    signed = np.where(truth, 1.0, -1.0) * _logits(raw)

    return best_temperature(lambda temperature: -float(log_expit(signed / temperature).mean()))


def _logits(raw: np.ndarray) -> np.ndarray:
    smallest = np.exp(FLOOR)
    return np.asarray(logit(np.clip(np.asarray(raw, dtype=np.float64), smallest, 1 - smallest)))
