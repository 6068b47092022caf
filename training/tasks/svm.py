"""The support vector machine of `--task svm`, whose C and kernel the training rows choose by themselves.

Source: Huynh, Li & Giger, "Digital mammographic tumor classification using transfer learning from deep convolutional
neural networks", J Med Imaging 3(3), 2016: an SVM on frozen features, judged by groups. Its grid and the size of its
inner selection are not known; those below are our choice. Deviation: no feature is selected; only columns
that do not vary are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from sklearn.feature_selection import VarianceThreshold
from sklearn.metrics import recall_score
from sklearn.metrics.pairwise import linear_kernel, rbf_kernel
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from cluster.errors import UsageError
from training import keyed

if TYPE_CHECKING:
    from training.tasks.frozen import Inner

GRID = tuple(2.0**k for k in range(-10, 5, 2))
"""Values of C, from 2^-10 to 2^4."""
KERNELS = ("linear", "rbf")
SELECTED = 2000
"""Rows of either side of an inner fold that choose, at most: the time of a fit grows with their square."""
CACHE_MB = 1000
"""Of kernel rows that libsvm keeps; a fit of many rows is several times slower with its own 200."""


def machine(c: float, kernel: str) -> Pipeline:
    """Columns that vary, each standardised, and a balanced SVM, whose RBF has gamma = 1 / columns; unfitted."""
    svc = SVC(C=c, kernel=kernel, class_weight="balanced", cache_size=CACHE_MB)
    return make_pipeline(VarianceThreshold(), StandardScaler(), svc)


def select(features: np.ndarray, truth: np.ndarray, inner: Inner) -> tuple[float, str]:
    """(C, kernel) of the highest mean balanced accuracy over the inner folds; of equals the smallest C, then linear.

    What scikit-learn's GridSearchCV finds, but each kernel matrix is computed once for all C, and of large folds only
    `SELECTED` rows, every class in its share, have a say.

    Raises:
        UsageError: all features are constant.
    """
    require_variance(features)
    scores = np.zeros((len(GRID), len(KERNELS)))
    for train, test in inner:
        known, asked = sampled(truth, train), sampled(truth, test)
        present = np.unique(truth[asked])
        for at, (ours, theirs) in enumerate(_kernels(features[known], features[asked])):
            for row, c in enumerate(GRID):
                fitted = SVC(C=c, kernel="precomputed", class_weight="balanced").fit(ours, truth[known])
                said = fitted.predict(theirs)
                recalls = recall_score(truth[asked], said, labels=present, average=None, zero_division=0)
                scores[row, at] += np.mean(recalls)
    best = int(scores.argmax())  # the first of equals, C by C
    return GRID[best // len(KERNELS)], KERNELS[best % len(KERNELS)]


def _kernels(known: np.ndarray, asked: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each kernel its matrices ([M, M] among known rows, [N, M] of those asked about), as `machine` has them."""
    prepare = make_pipeline(VarianceThreshold(), StandardScaler())
    require_variance(known)
    ours = prepare.fit_transform(known).astype(np.float64)
    theirs = prepare.transform(asked).astype(np.float64)
    yield linear_kernel(ours), linear_kernel(theirs, ours)
    gamma = 1 / (ours.shape[1] * ours.var())
    yield rbf_kernel(ours, gamma=gamma), rbf_kernel(theirs, ours, gamma=gamma)


def sampled(truth: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """At most `SELECTED` of `rows`, always the same ones, every class in its share."""
    if len(rows) <= SELECTED:
        return rows
    shuffled = keyed.generator("svm", len(rows)).permutation(rows)
    by_class = shuffled[np.argsort(truth[shuffled], kind="stable")]
    return np.sort(by_class[np.linspace(0, len(rows) - 1, SELECTED).round().astype(np.int64)])


def require_variance(features: np.ndarray) -> None:
    """Raises UsageError where no column tells rows apart."""
    if not np.ptp(features, axis=0).any():
        raise UsageError("--task svm: all images have the same features, so nothing can be learnt from them")
