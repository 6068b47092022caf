"""Temperature scaling: one number that makes a classifier's confidence match its accuracy (Guo et al., 2017)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

SMALLEST, LARGEST = 0.05, 20.0
"""Range of temperatures; predictions without a single error would otherwise ask for 0."""
FLOOR = float(np.log(1e-12))
"""Log-probabilities below this count as this, so that an exact zero (k-NN, underflow) costs a finite amount."""


def fit_temperature(log_probabilities: ArrayLike, truth: ArrayLike) -> float:
    """The temperature T in [0.05, 20] whose softmax(z / T) has the smallest negative log-likelihood.

    Args:
        log_probabilities: [M,C] log-probabilities or logits z of predictions made out of fold.
        truth: [M] class indices.

    Above 1 the predictions were overconfident. The likelihood is convex in 1/T, so the bounded search in log T finds
    its only minimum. Source: Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4.2. Deviations:
    T is bounded, and log-probabilities are floored at log 1e-12.
    """
    z = _log_probabilities(log_probabilities)
    rows, index = np.arange(len(z)), np.asarray(truth, dtype=np.int64)
    if z.ndim != 2 or index.shape != (len(z),) or not len(z):
        raise ValueError(f"scores {z.shape} and truth {index.shape}: must be [M,C] and [M] with M at least 1")

    def loss(log_t: float) -> float:
        return -float(log_softmax(z / np.exp(log_t), axis=1)[rows, index].mean())

    bounds = (np.log(SMALLEST), np.log(LARGEST))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x))


def apply_temperature(probabilities: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Probabilities [...,C] proportional to p^(1/T); T = 1 leaves them as they are, and no T changes their order.

    Probabilities below 1e-12 count as 1e-12, as in `fit_temperature`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be positive")
    p = np.asarray(probabilities, dtype=np.float64)
    scaled: NDArray[np.float64] = softmax(np.log(np.maximum(p, np.exp(FLOOR))) / temperature, axis=-1)
    return scaled


def _log_probabilities(scores: ArrayLike) -> NDArray[np.float64]:
    z = np.asarray(scores, dtype=np.float64)
    floored: NDArray[np.float64] = np.maximum(log_softmax(z, axis=-1), FLOOR)
    return floored
