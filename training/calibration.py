"""Calibration: probabilities that match frequencies, by one temperature (Guo et al., 2017) or by isotonic regression.

What calibrates a fold is fitted on predictions of that fold's training side alone (`Inner`), never on what it judges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, softmax

SMALLEST, LARGEST = 0.05, 20.0
"""Range of temperatures; predictions without a single error would otherwise ask for 0."""
FLOOR = float(np.log(1e-12))
"""Log-probabilities below this count as this, so that an exact zero (k-NN, underflow) costs a finite amount."""


@dataclass(frozen=True, eq=False)
class Inner:
    """Predictions of rows of a fold's training side, made without them: truth [I] and raw probabilities [I,K]."""

    truth: NDArray[np.int64]
    raw: NDArray[np.float64]


IN_FOLDS = "in each fold on images of its own training part"
"""Where inner predictions come from, as reports say it."""

Fold = tuple[int, int]
"""(repeat, fold)"""


@dataclass(frozen=True, eq=False)
class Isotonic:
    """A monotone map of each class's probability: heights `y` at knots `x`, straight between them."""

    maps: tuple[tuple[NDArray[np.float64], NDArray[np.float64]], ...]


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

    def loss(temperature: float) -> float:
        return -float(log_softmax(z / temperature, axis=1)[rows, index].mean())

    return best_temperature(loss)


def best_temperature(loss: Callable[[float], float]) -> float:
    """The temperature in [0.05, 20] of the smallest loss, to a millionth of itself; `loss` has one minimum in 1/T."""
    from scipy.optimize import minimize_scalar  # slow to load, and whoever reads an artifact loads this module

    found = minimize_scalar(
        lambda log_t: loss(np.exp(log_t)),
        bounds=(np.log(SMALLEST), np.log(LARGEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def apply_temperature(probabilities: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """Probabilities [...,C] proportional to p^(1/T); T = 1 leaves them as they are, and no T changes their order.

    Probabilities below 1e-12 count as 1e-12, as in `fit_temperature`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be positive")
    p = np.asarray(probabilities, dtype=np.float64)
    scaled: NDArray[np.float64] = softmax(np.log(np.maximum(p, np.exp(FLOOR))) / temperature, axis=-1)
    return scaled


def fit_isotonic(probabilities: ArrayLike, truth: ArrayLike) -> Isotonic:
    """For each class the increasing map of its probability that is nearest, in squares, to being of that class.

    Args:
        probabilities: [I,K], of rows that trained neither the model nor anything chosen before.
        truth: [I] class indices.

    Source: Zadrozny & Elkan, "Transforming Classifier Scores into Accurate Multiclass Probability Estimates", 2002.
    It needs more rows than a temperature: with few it learns their noise.
    """
    from sklearn.isotonic import IsotonicRegression  # slow to load, as above

    p, t = _checked(probabilities, truth)
    maps = []
    for c in range(p.shape[1]):
        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(p[:, c], t == c)
        maps.append((np.asarray(fitted.X_thresholds_, np.float64), np.asarray(fitted.y_thresholds_, np.float64)))
    return Isotonic(tuple(maps))


def apply_isotonic(probabilities: ArrayLike, isotonic: Isotonic) -> NDArray[np.float64]:
    """Probabilities [N,K] mapped class by class and divided by their sum; a row whose every class maps to 0 is kept."""
    p = np.asarray(probabilities, dtype=np.float64)
    mapped = np.stack([np.interp(p[:, c], x, y) for c, (x, y) in enumerate(isotonic.maps)], axis=1)
    total = mapped.sum(axis=1, keepdims=True)
    return np.where(total > 0, mapped / np.where(total > 0, total, 1), p)


def fold_temperatures(inner: Mapping[Fold, Inner]) -> dict[Fold, float]:
    """The temperature of each fold, fitted on its inner predictions."""
    return {fold: fit_temperature(np.log(np.maximum(i.raw, np.exp(FLOOR))), i.truth) for fold, i in inner.items()}


def scaled_by_fold(
    raw: ArrayLike, fold: ArrayLike, repeat: ArrayLike, temperatures: Mapping[Fold, float]
) -> NDArray[np.float64]:
    """Probabilities [M,K], each row under the temperature of its own fold [M] and repeat [M]."""
    p = np.asarray(raw, dtype=np.float64).copy()
    for one, rows in rows_by_fold(fold, repeat).items():
        p[rows] = apply_temperature(p[rows], temperatures[one])
    return p


def isotonic_by_fold(
    raw: ArrayLike, fold: ArrayLike, repeat: ArrayLike, inner: Mapping[Fold, Inner]
) -> NDArray[np.float64]:
    """Probabilities [M,K], each row under the isotonic maps of its own fold's inner predictions."""
    p = np.asarray(raw, dtype=np.float64).copy()
    for one, rows in rows_by_fold(fold, repeat).items():
        p[rows] = apply_isotonic(p[rows], fit_isotonic(inner[one].raw, inner[one].truth))
    return p


def rows_by_fold(fold: ArrayLike, repeat: ArrayLike) -> dict[Fold, NDArray[np.int64]]:
    """Rows of each fold, in order of (repeat, fold)."""
    f, r = np.asarray(fold), np.asarray(repeat)
    keys = sorted({(int(a), int(b)) for a, b in zip(r, f, strict=True)})
    return {(a, b): np.flatnonzero((r == a) & (f == b)).astype(np.int64) for a, b in keys}


def squared_errors(probabilities: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    """Each row's part [M] of the Brier score (Brier, 1950), their mean: the sum over classes of squared errors.

    With two classes it is halved, so that it is the squared error of one of them, 0 to 1, as is the custom there.
    """
    p, t = _checked(probabilities, truth)
    errors: NDArray[np.float64] = np.square(p - np.eye(p.shape[1])[t]).sum(axis=1)
    return errors / 2 if p.shape[1] == 2 else errors


def _checked(probabilities: ArrayLike, truth: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    p, t = np.asarray(probabilities, dtype=np.float64), np.asarray(truth, dtype=np.int64)
    if p.ndim != 2 or t.shape != (len(p),) or not len(p):
        raise ValueError(f"probabilities {p.shape} and truth {t.shape}: must be [M,C] and [M] with M at least 1")
    return p, t


def _log_probabilities(scores: ArrayLike) -> NDArray[np.float64]:
    z = np.asarray(scores, dtype=np.float64)
    floored: NDArray[np.float64] = np.maximum(log_softmax(z, axis=-1), FLOOR)
    return floored
