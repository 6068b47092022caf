"""Classifiers of label sets on frozen features: each label is judged by itself (binary relevance), whatever the others.

The same three kinds as in `training.tasks.frozen`, fitted and chosen label by label by the same inner folds; k-NN alone
answers all labels at once, by the mean of its neighbours' label sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import skops.io
from sklearn.base import BaseEstimator, clone
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer

from cluster.errors import UsageError
from training.tasks import frozen
from training.tasks.frozen import Frozen, Inner


@dataclass(frozen=True)
class LabelSets:
    """Fitted classifiers on features [N, D]: one per label, or a single one of all labels.

    A label that all training rows have, or none, has no classifier but this constant.
    """

    estimators: list[BaseEstimator | float]
    classes: int

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """float64 [N, K], each label's own. Nearest neighbours count one pseudo-neighbour that has half of each."""
        if len(self.estimators) == 1:
            votes: Any = self.estimators[0]
            count = votes[-1].n_neighbors
            return np.asarray((votes.predict(features) * count + 0.5) / (count + 1), dtype=np.float64)
        return np.stack([_of_one(estimator, features) for estimator in self.estimators], axis=1)

    def dumps(self) -> bytes:
        return bytes(skops.io.dumps(self.estimators))


def _of_one(estimator: Any, features: np.ndarray) -> np.ndarray:
    if isinstance(estimator, float):
        return np.full(len(features), estimator)
    return np.asarray(estimator.predict_proba(features)[:, 1], dtype=np.float64)


def load_label_sets(content: bytes, classes: int) -> LabelSets:
    """The inverse of `LabelSets.dumps`.

    Raises:
        UsageError: it holds a type that no head of ours has, or is damaged.
    """
    return label_sets_of(frozen.load_kept(content), classes)


def label_sets_of(kept: Any, classes: int) -> LabelSets:
    """The classifiers that skops `kept`; UsageError where they are not those of `classes` labels."""
    if not isinstance(kept, list) or len(kept) not in {1, classes}:
        raise UsageError(f"head.skops: not the classifiers of {classes} labels")
    return LabelSets(kept, classes)


def linear(features: np.ndarray, truth: np.ndarray, inner: Inner) -> list[BaseEstimator | float]:
    """Linear probes, balanced, each with a C of its own by inner CV."""
    return _each(frozen.linear, features, truth, inner)


def svm(features: np.ndarray, truth: np.ndarray, inner: Inner) -> list[BaseEstimator | float]:
    """SVMs, balanced, each with C, kernel and temperature of its own by the inner folds."""
    return _each(frozen.svm, features, truth, inner)


def knn(features: np.ndarray, truth: np.ndarray, inner: Inner) -> list[BaseEstimator | float]:
    """20 nearest neighbours on the unit sphere, weighted by distance, all labels at once."""
    votes = KNeighborsRegressor(min(frozen.NEIGHBOURS, len(features)), weights="distance", algorithm="brute")
    return [make_pipeline(Normalizer(), votes).fit(features, truth.astype(np.float64))]


def _each(
    fit: Callable[[np.ndarray, np.ndarray, Inner], BaseEstimator], features: np.ndarray, truth: np.ndarray, inner: Inner
) -> list[BaseEstimator | float]:
    found: list[BaseEstimator | float] = []
    for column in truth.T:
        constant = column.all() or not column.any()
        found.append(float(column[0]) if constant else fit(features, column.astype(np.int64), inner))
    return found


def inner_label_probabilities(fitted: LabelSets, features: np.ndarray, truth: np.ndarray, inner: Inner) -> np.ndarray:
    """float64 [N, K]: each row judged by classifiers like `fitted` whose inner folds did not train on it."""
    found = np.zeros(truth.shape)
    if len(fitted.estimators) == 1:
        for train, test in inner:
            votes: Any = clone(fitted.estimators[0])
            votes[-1].set_params(n_neighbors=min(votes[-1].n_neighbors, len(train)))
            own = LabelSets([votes.fit(features[train], truth[train].astype(np.float64))], fitted.classes)
            found[test] = own.probabilities(features[test])
        return found
    for at, estimator in enumerate(fitted.estimators):
        if isinstance(estimator, float):
            found[:, at] = estimator
        else:
            column = truth[:, at].astype(np.int64)
            found[:, at] = frozen.inner_probabilities(Frozen(estimator, 2), features, column, inner)[:, 1]
    return found


LABEL_SET_ESTIMATORS: dict[str, Callable[[np.ndarray, np.ndarray, Inner], list[BaseEstimator | float]]] = {
    "linear": linear,
    "knn": knn,
    "svm": svm,
}
