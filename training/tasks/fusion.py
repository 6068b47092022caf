"""Two classifiers of an image, of a network's features and of radiomics, whose calibrated probabilities are averaged.

Source: Huynh, Li & Giger (J Med Imaging 3(3), 2016) fuse the two classifiers; the mean of calibrated probabilities is
the soft voting of the same group's later papers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import skops.io

from cluster.errors import UsageError
from training.tasks.frozen import ESTIMATORS, Frozen, Inner, inner_probabilities, load_kept
from training.tasks.label_sets import LABEL_SET_ESTIMATORS, LabelSets, inner_label_probabilities, label_sets_of

Head = Frozen | LabelSets


@dataclass(frozen=True)
class Fused:
    """Fitted classifiers of the first `columns` features, and of the rest."""

    first: Head
    second: Head
    columns: int

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """float64 [N, K], the mean of both."""
        first = self.first.probabilities(features[:, : self.columns])
        return np.asarray((first + self.second.probabilities(features[:, self.columns :])) / 2)

    def dumps(self) -> bytes:
        return bytes(skops.io.dumps({"columns": self.columns, "parts": [_kept(self.first), _kept(self.second)]}))


def fit_head(task: str, features: np.ndarray, truth: np.ndarray, inner: Inner, classes: int) -> Head:
    """A classifier of classes [N] or of label sets [N, K], from features [N, D]."""
    if truth.ndim == 2:
        return LabelSets(LABEL_SET_ESTIMATORS[task](features, truth, inner), classes)
    return Frozen(ESTIMATORS[task](features, truth, inner), classes)


def fit_fused(task: str, features: np.ndarray, truth: np.ndarray, inner: Inner, classes: int, columns: int) -> Fused:
    """One classifier of the first `columns` features, one of the rest, each chosen and calibrated by itself."""
    sides = (features[:, :columns], features[:, columns:])
    first, second = (fit_head(task, np.ascontiguousarray(side), truth, inner, classes) for side in sides)
    return Fused(first, second, columns)


def judge_inner(fitted: Head | Fused, features: np.ndarray, truth: np.ndarray, inner: Inner) -> np.ndarray:
    """float64 [N, K]: each row judged by classifiers like `fitted` whose inner folds did not train on it."""
    if isinstance(fitted, Fused):
        sides = ((fitted.first, features[:, : fitted.columns]), (fitted.second, features[:, fitted.columns :]))
        return np.asarray(sum(judge_inner(head, side, truth, inner) for head, side in sides) / 2)
    if isinstance(fitted, LabelSets):
        return inner_label_probabilities(fitted, features, truth, inner)
    return inner_probabilities(fitted, features, truth, inner)


def load_head(content: bytes, classes: int, *, several: bool) -> Head | Fused:
    """The inverse of `dumps` of any of them.

    Raises:
        UsageError: it holds a type that no head of ours has, or is damaged.
    """
    kept = load_kept(content)
    if not isinstance(kept, dict):
        return _head(kept, classes, several)
    if set(kept) != {"columns", "parts"} or len(kept["parts"]) != 2:
        raise UsageError("head.skops: not two classifiers of the features' two parts")
    first, second = (_head(part, classes, several) for part in kept["parts"])
    return Fused(first, second, int(kept["columns"]))


def _kept(head: Head) -> Any:
    return head.estimators if isinstance(head, LabelSets) else head.estimator


def _head(kept: Any, classes: int, several: bool) -> Head:
    return label_sets_of(kept, classes) if several else Frozen(kept, classes)
