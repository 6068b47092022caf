"""Out-of-fold predictions, judged: calibrated fold by fold, measured, and pooled over cases or groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from training import calibration, metrics, multilabel
from training.bootstrap import Metric
from training.fit import FoldResult, Labels
from training.probabilities import calibrated, temperature_for
from training.units import Units, pooled


@dataclass(frozen=True, eq=False)
class Inner(calibration.Inner):
    """With the rows [I] of the selection that they are of; truth is [I, K] where images may have several labels."""

    rows: np.ndarray


@dataclass(frozen=True)
class Judged:
    """Predictions with their truth. `rows` [M] are rows of the selection; probabilities [M, K] are calibrated.

    `truth` is class numbers [M], or where images may have several labels bool [M, K].
    """

    classes: list[str]
    rows: np.ndarray
    truth: np.ndarray
    probabilities: np.ndarray
    raw: np.ndarray
    """As the fits said, float64 [M, K]; the calibrated ones where nothing else is known."""
    fold: np.ndarray
    repeat: np.ndarray
    metrics: dict[str, Any]
    temperature: float
    inner: Mapping[tuple[int, int], Inner] = field(default_factory=dict)
    """By (repeat, fold), on the scale of `raw`: what thresholds may be chosen on."""

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.truth.ndim == 2


def judge(
    results: Sequence[FoldResult], labels: Labels, classes: list[str], seed: int, *, ordered: bool = False
) -> Judged:
    """Out-of-fold predictions of one protocol, each fold calibrated by a temperature of its own inner predictions.

    The temperature that is kept for the final model comes from all out-of-fold predictions.
    """
    rows = np.concatenate([r.test for r in results])
    fold = np.concatenate([np.full(len(r.test), r.fold) for r in results])
    repeat = np.concatenate([np.full(len(r.test), r.repeat) for r in results])
    raw = np.concatenate([r.probabilities for r in results])
    parts, inner = [], {}
    for one in results:
        known = labels.truth[one.inner_rows]
        temperature = temperature_for(one.inner_probabilities, known)
        parts.append(calibrated(one.probabilities, temperature, several=labels.several))
        inner[one.repeat, one.fold] = Inner(known, one.inner_probabilities, one.inner_rows)
    truth, probabilities = labels.truth[rows], np.concatenate(parts)
    groups = [labels.groups[r] for r in rows]
    summary = summarise(truth, probabilities, group=groups, fold=fold, repeat=repeat, seed=seed, ordered=ordered)
    temperature = temperature_for(raw, truth)
    return Judged(classes, rows, truth, probabilities, raw, fold, repeat, dict(summary), temperature, inner)


def summarise(truth: np.ndarray, probabilities: np.ndarray, *, ordered: bool, **rows: Any) -> dict[str, Metric]:
    """The metrics of class numbers [M], or of label sets bool [M, K]; `rows` as in `metrics.summarise`."""
    if truth.ndim == 2:
        return multilabel.summarise(truth, probabilities, **rows)
    return metrics.summarise(truth, probabilities, ordered=ordered, **rows)


def of_units(judged: Judged, units: Units, groups: Sequence[str], seed: int, *, ordered: bool) -> Judged:
    """The judgement of units by the mean of their images' probabilities; its rows are those that stand for units.

    `groups` [N] are those of the selection's rows. Units whose images disagree on their label are left out.
    """
    p = pooled(units, judged.rows, judged.truth, judged.probabilities, judged.fold, judged.repeat)
    raw = pooled(units, judged.rows, judged.truth, judged.raw, judged.fold, judged.repeat)
    summary = summarise(
        p.truth,
        p.probabilities,
        group=[groups[r] for r in p.rows],
        fold=p.fold,
        repeat=p.repeat,
        seed=seed,
        ordered=ordered,
    )
    return replace(
        judged,
        rows=p.rows,
        truth=p.truth,
        probabilities=p.probabilities,
        raw=raw.probabilities,
        fold=p.fold,
        repeat=p.repeat,
        metrics=dict(summary),
        inner={key: _inner_units(units, one) for key, one in judged.inner.items()},
    )


def _inner_units(units: Units, inner: Inner) -> Inner:
    once = np.zeros(len(inner.rows), dtype=np.int64)
    p = pooled(units, inner.rows, inner.truth, inner.raw, once, once)
    return Inner(p.truth, p.probabilities, p.rows)


def confusion_of(judged: Judged) -> np.ndarray:
    """Counts [K, K] of one class per image: rows are the truth, columns what the model said."""
    return metrics.confusion(judged.truth, judged.probabilities.argmax(axis=1), len(judged.classes))


def guessing(truth: np.ndarray, classes: int) -> dict[str, float]:
    """What the better of two guesses reaches, by metric: always the most frequent class, or classes drawn as often as
    they occur; of label sets bool [M, K] the most frequent set, or every label on every image. Metrics of which a guess
    has no level of its own (ece, mean_level_error), or where less is better (hamming), are left out."""
    if truth.ndim == 2:
        sets, present = np.unique(truth, axis=0, return_counts=True)[1], truth.any(axis=0)
        share, overall = truth.mean(axis=0)[present], float(truth.mean())
        return {
            "accuracy": float(sets.max() / max(1, len(truth))),
            "balanced_accuracy": 0.5,
            "f1_macro": float((2 * share / (1 + share)).mean()),
            "f1_micro": 2 * overall / (1 + overall),
            "auroc": 0.5,
            "average_precision": float(share.mean()),
        }
    counts = np.bincount(truth, minlength=classes)
    level = 1 / max(1, int((counts > 0).sum()))
    return {
        "accuracy": float(counts.max() / max(1, counts.sum())),
        "balanced_accuracy": level,
        "kappa": 0.0,
        "kappa_quadratic": 0.0,
        "f1_macro": level,
        "auroc": 0.5,
    }
