"""Conformal prediction sets: instead of one class, the classes that cannot be ruled out at a stated level.

The sets are MAPIE's (scikit-learn-contrib), which compares scores with an exact order statistic.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from mapie.classification import SplitConformalClassifier
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from training.bootstrap import Metric, Units, ratio
from training.calibration import IN_FOLDS, Fold, Inner, rows_by_fold
from training.report import Block, Table, Text, with_interval

LEVELS = (0.90, 0.95)
"""Stated shares of images whose set holds the true class."""


class Sets(TypedDict):
    """One level's entry of `conformal` in `summary.json`."""

    coverage: Metric
    size: Metric
    single: Metric
    empty: Metric
    single_right: Metric
    coverage_by_class: dict[str, Metric]
    largest_score_per_fold: list[float | None]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Sets [T,K] of one fold's rows, and the score 1 - p above which a class was left out (None: none was)."""

    member: NDArray[np.bool_]
    largest_score: float | None


def prediction_sets(inner: Inner, probabilities: ArrayLike, level: float) -> Prediction:
    """Sets that hold the true class of a share `level` of rows that are exchangeable with the inner ones.

    Split conformal with the score 1 - p of the true class, whose sets are the smallest on average and may be empty:
    Sadinle, Lei & Wasserman, "Least Ambiguous Set-Valued Classifiers With Bounded Error Levels", 2019. 1 / (1 - level)
    inner rows or fewer rule nothing out: each set is then of all classes.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if len(inner.truth) * (1 - level) <= 1 + 1e-9:
        return Prediction(np.ones(p.shape, dtype=bool), None)
    conformal = SplitConformalClassifier(_Given(p.shape[1]), confidence_level=level, conformity_score="lac")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*conformalization dataset has less labels")
        conformal.conformalize(_normalised(inner.raw), inner.truth)
    member = conformal.predict_set(_normalised(p))[1][:, :, 0]
    scores = np.sort(np.asarray(conformal.conformity_scores, dtype=np.float64).ravel())
    return Prediction(member.astype(bool), float(scores[_rank(len(scores), level) - 1]))


def judged_sets(
    classes: Sequence[str],
    truth: ArrayLike,
    raw: ArrayLike,
    fold: ArrayLike,
    repeat: ArrayLike,
    inner: Mapping[Fold, Inner],
    units: Units,
    level: float,
) -> Sets:
    """How the sets of all folds fare on truth [M] and raw probabilities [M,K], each fold's by its own inner rows.

    Raw probabilities, because a calibration fitted on the same inner rows would make them no longer exchangeable.
    """
    t, p = np.asarray(truth, dtype=np.int64), np.asarray(raw, dtype=np.float64)
    member, scores = np.zeros(p.shape, dtype=bool), []
    for one, rows in rows_by_fold(fold, repeat).items():
        sets = prediction_sets(inner[one], p[rows], level)
        member[rows] = sets.member
        scores.append(sets.largest_score)
    return _judge(classes, t, member, scores, units)


def _judge(
    classes: Sequence[str],
    truth: NDArray[np.int64],
    member: NDArray[np.bool_],
    scores: list[float | None],
    units: Units,
) -> Sets:
    size, right = member.sum(axis=1), member[np.arange(len(truth)), truth]
    single, every = size == 1, np.ones(len(truth), dtype=bool)
    of_class = np.eye(len(classes), dtype=bool)[truth]
    hits = np.column_stack([right, single, size == 0, single & right, right[:, None] & of_class])
    of = np.column_stack([every, every, every, single, of_class])
    coverage, alone, empty, alone_right, *by_class = units.rates(hits, of)
    return Sets(
        coverage=coverage,
        size=units.means(size)[0],
        single=alone,
        empty=empty,
        single_right=alone_right,
        coverage_by_class=dict(zip(classes, by_class, strict=True)),
        largest_score_per_fold=scores,
    )


def blocks(results: Mapping[str, Sets], images: int, chosen: str = IN_FOLDS) -> list[Block]:
    """Words and tables for the sets of each level (`"0.90"`) of `images` judged images; `chosen` as in thresholds."""
    names = list(next(iter(results.values()))["coverage_by_class"])
    rows = [
        [f"{float(level):.0%}", *(_shown(sets[key]) for key in ("coverage", "size", "single", "single_right", "empty"))]
        for level, sets in results.items()
    ]
    by_class = [[name, *(_shown(sets["coverage_by_class"][name]) for sets in results.values())] for name in names]
    found: list[Block] = [
        Text(
            "A prediction set holds every class that cannot be ruled out for an image, so that the true class is in "
            "it as often as stated. One class in a set: the model commits itself; several or none: it does not know, "
            f"and asks for a second look. What is ruled out was chosen {chosen}."
        ),
        Table(
            ["stated", "true class in the set", "classes per set", "sets of one class", "of those, right", "empty"],
            rows,
            f"Prediction sets of {images:,} images",
        ),
        Table(
            ["class", *(f"stated {float(level):.0%}" for level in results)],
            by_class,
            "How often the set holds the true class, by class",
        ),
        Text(
            "The stated share is a promise for images that are exchangeable with the calibrating ones. Images of one "
            "patient resemble each other and patients, not images, are drawn, so it is approximate here; and it is "
            "a promise on average over classes: a rare class may be covered less, as the second table shows."
        ),
    ]
    if any(score is None for sets in results.values() for score in sets["largest_score_per_fold"]):
        found.append(Text("Some folds had too few calibrating images for a level; their sets hold all classes."))
    return found


def _shown(metric: Metric) -> str:
    return with_interval(metric["value"], metric["ci95"])


def _rank(rows: int, level: float) -> int:
    """Which of the sorted scores bounds the set; the small term keeps 20 x 0.95 at 19."""
    return min(rows, int(np.ceil((rows + 1) * level - 1e-9)))


def _normalised(probabilities: ArrayLike) -> NDArray[np.float64]:
    """Rows that sum to 1, as MAPIE checks; rows of single precision do so only nearly."""
    p = np.asarray(probabilities, dtype=np.float64)
    return ratio(p, p.sum(axis=1, keepdims=True))


class _Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A fitted classifier, as MAPIE wants one, whose input is already the probabilities [N,K]."""

    def __init__(self, classes: int = 2) -> None:
        self.classes = classes
        self.classes_ = np.arange(classes)

    def fit(self, _images: Any, _truth: Any) -> _Given:
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict_proba(self, probabilities: Any) -> Any:
        return probabilities

    def predict(self, probabilities: Any) -> Any:
        return np.asarray(probabilities).argmax(axis=1)
