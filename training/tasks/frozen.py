"""Classifiers on frozen features: linear probe, k-nearest neighbours, SVM. scikit-learn, kept without pickle by skops.

Whatever is chosen (regularisation, probability scale) is chosen by an inner, grouped cross-validation of the training
rows alone.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import skops.io
from sklearn.base import BaseEstimator, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from cluster.errors import UsageError
from training.tasks.svm import machine, select

INNER_FOLDS = 3
NEIGHBOURS = 20
TRUSTED = ("sklearn.calibration._CalibratedClassifier", "sklearn.calibration._TemperatureScaling")
"""The types beyond skops' own list that a head may contain; all are scikit-learn's."""

Inner = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Frozen:
    """A fitted classifier on features [N, D]."""

    estimator: BaseEstimator
    classes: int

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """float64 [N, K]; a class that was absent in training gets 0.

        Nearest neighbours share one pseudo-neighbour among the classes (Laplace): a class that none of them has is
        rare, not impossible, and a temperature could not mend a zero.
        """
        estimator: Any = self.estimator
        found = estimator.predict_proba(features)
        last = estimator[-1] if isinstance(estimator, Pipeline) else estimator
        if isinstance(last, KNeighborsClassifier):
            found = (found * last.n_neighbors + 1 / found.shape[1]) / (last.n_neighbors + 1)
        out = np.zeros((len(features), self.classes))
        out[:, estimator.classes_] = found
        return out

    def dumps(self) -> bytes:
        return bytes(skops.io.dumps(self.estimator))


def load_estimator(content: bytes, classes: int) -> Frozen:
    """The inverse of `Frozen.dumps`; errors as `load_kept`."""
    return Frozen(load_kept(content), classes)


def load_kept(content: bytes) -> Any:
    """What skops kept.

    Raises:
        UsageError: it holds a type that no head of ours has, or is damaged.
    """
    try:
        strange = sorted(set(skops.io.get_untrusted_types(data=content)) - set(TRUSTED))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UsageError(f"head.skops: not an estimator kept by skops ({error})") from error
    if strange:
        raise UsageError(f"head.skops holds types that Rayograph never writes: {', '.join(strange)}; it is not loaded")
    return skops.io.loads(content, trusted=list(TRUSTED))


def logistic(c: float = 1.0) -> Pipeline:
    """Standardised features, balanced multinomial logistic regression; unfitted."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=3000))


def linear(features: np.ndarray, truth: np.ndarray, inner: Inner) -> BaseEstimator:
    """Linear probe: `logistic` with a C of 10^-3..10 by inner CV."""
    grid = {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0, 10.0]}
    search = GridSearchCV(logistic(), grid, cv=inner, scoring="balanced_accuracy").fit(features, truth)
    best: BaseEstimator = search.best_estimator_
    return best


def knn(features: np.ndarray, truth: np.ndarray, inner: Inner) -> BaseEstimator:
    """20 nearest neighbours on the unit sphere, weighted by distance."""
    model = make_pipeline(
        Normalizer(), KNeighborsClassifier(min(NEIGHBOURS, len(features)), weights="distance", algorithm="brute")
    )
    fitted: BaseEstimator = model.fit(features, truth)
    return fitted


def svm(features: np.ndarray, truth: np.ndarray, inner: Inner) -> BaseEstimator:
    """SVM with C and kernel by inner CV; probabilities by a temperature from the same inner folds."""
    model = machine(*select(features, truth, inner))
    fitted: BaseEstimator = CalibratedClassifierCV(model, method="temperature", cv=inner, ensemble=False).fit(
        features, truth
    )
    return fitted


def chosen_by(estimator: Any) -> str:
    """C and kernel of a fitted `svm`, in words; empty for any other estimator."""
    if not isinstance(estimator, CalibratedClassifierCV):
        return ""
    (calibrated,) = estimator.calibrated_classifiers_
    last: Any = calibrated.estimator[-1]
    return f"{last.kernel} kernel, C = {last.C:g}"


ESTIMATORS: dict[str, Callable[[np.ndarray, np.ndarray, Inner], BaseEstimator]] = {
    "linear": linear,
    "knn": knn,
    "svm": svm,
}


def inner_probabilities(fitted: Frozen, features: np.ndarray, truth: np.ndarray, inner: Inner) -> np.ndarray:
    """float64 [N, K]: each row judged by a classifier like `fitted` whose inner fold did not train on it."""
    estimator: Any = fitted.estimator
    if isinstance(estimator, CalibratedClassifierCV):
        (calibrated,) = estimator.calibrated_classifiers_
        scores = cross_val_predict(clone(calibrated.estimator), features, truth, cv=inner, method="decision_function")
        found = np.zeros((len(features), fitted.classes))
        (scale,) = calibrated.calibrators
        found[:, estimator.classes_] = scale.predict(scores)
        return found
    found = np.zeros((len(features), fitted.classes))
    for train, test in inner:
        own = clone(estimator)
        if isinstance(own[-1], KNeighborsClassifier):
            own[-1].set_params(n_neighbors=min(own[-1].n_neighbors, len(train)))
        found[test] = Frozen(own.fit(features[train], truth[train]), fitted.classes).probabilities(features[test])
    return found
