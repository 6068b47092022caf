"""One fit of a transfer: a fold of the cross-validation or the final refit, for each task. No Ray in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from training.domain import LARGEST, distances_to, sampled_rows
from training.splits import Fold, cross_validation, hold_out
from training.tasks.finetune import Recipe, fine_tune, predict
from training.tasks.frozen import ESTIMATORS, INNER_FOLDS, Frozen, inner_probabilities

HELD_FRACTION = 0.15
"""Share of a fold's training groups that only chooses when to stop."""
FOLD_REFERENCE = 2000
"""Training rows that a fine-tuned fold measures distances to, at most."""


@dataclass(frozen=True)
class Labels:
    """The labelled rows of a run: class numbers and names [N], and groups [N]."""

    truth: np.ndarray
    names: list[str]
    groups: list[str]
    split: str

    def take(self, rows: np.ndarray) -> tuple[list[str], list[str]]:
        return [self.names[r] for r in rows], [self.groups[r] for r in rows]


@dataclass(frozen=True)
class FoldResult:
    """What one fit says of its `test` rows [T], and of those of its training rows that it can judge fairly.

    Whatever is chosen after the fit (temperature, thresholds, sizes of sets) is chosen on the inner rows: no row of a
    fold's test side ever decides how that side is judged.
    """

    repeat: int
    fold: int
    test: np.ndarray
    probabilities: np.ndarray
    """float64 [T, K], not yet calibrated."""
    best_epoch: int
    history: list[dict[str, float]]
    distances: np.ndarray
    """Of the test rows to the training rows, in this fold's own feature space; see `training.domain`."""
    inner_rows: np.ndarray
    """int64 [I]: rows of the training side that were predicted without having been fitted."""
    inner_probabilities: np.ndarray
    """float64 [I, K]: of the groups held back for stopping; of frozen features by inner cross-validation."""
    share: float = 1.0
    """As the fold's."""


def finetune_fold(recipe: Recipe, pixels: np.ndarray, labels: Labels, fold: Fold) -> FoldResult:
    """Trains on the fold's training rows, of which some groups only choose the epoch; judges its test rows."""
    names, groups = labels.take(fold.train)
    own = groups if labels.split != "image" else [str(r) for r in fold.train]
    train, held = hold_out(names, own, fraction=HELD_FRACTION, seed=recipe.seed + fold.repeat)
    outcome = fine_tune(recipe, pixels, labels.truth, fold.train[train], fold.train[held], fold.repeat, fold.fold)
    features, logits = predict(outcome.network, outcome.initial.input, pixels[fold.test], "cpu")
    known = fold.train[sampled_rows(len(fold.train), FOLD_REFERENCE)]
    reference, _ = predict(outcome.network, outcome.initial.input, pixels[known], "cpu")
    _, held_logits = predict(outcome.network, outcome.initial.input, pixels[fold.train[held]], "cpu")
    return FoldResult(
        repeat=fold.repeat,
        fold=fold.fold,
        test=fold.test,
        probabilities=softmax(logits),
        best_epoch=outcome.best_epoch,
        history=outcome.history,
        distances=distances_to(reference, features),
        inner_rows=fold.train[held],
        inner_probabilities=softmax(held_logits),
        share=fold.share,
    )


def refit_network(
    recipe: Recipe, pixels: np.ndarray, labels: Labels, rows: np.ndarray, epochs: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights by name of the network trained on `rows` for `epochs` of the recipe's schedule, and features of those of
    them that its domain keeps."""
    outcome = fine_tune(recipe, pixels, labels.truth, rows, rows[:0], "refit", stop_after=epochs)
    kept = pixels[rows[sampled_rows(len(rows), LARGEST)]]
    features, _ = predict(outcome.network, outcome.initial.input, kept, "cpu")
    return {k: v.numpy() for k, v in outcome.network.state_dict().items()}, features


def refit_and_judge(
    recipe: Recipe, pixels: np.ndarray, truth: np.ndarray, train: np.ndarray, test: np.ndarray, epochs: int
) -> np.ndarray:
    """Probabilities [T, K] of rows `test`, by a network trained on rows `train` as `refit_network` does on all."""
    outcome = fine_tune(recipe, pixels, truth, train, train[:0], "refit", stop_after=epochs)
    return softmax(predict(outcome.network, outcome.initial.input, pixels[test], "cpu")[1])


def frozen_fold(task: str, features: np.ndarray, labels: Labels, classes: int, seed: int, fold: Fold) -> FoldResult:
    """As `finetune_fold`, for a classifier on features [N, D]."""
    inner = _inner(labels, fold.train, seed)
    fitted = Frozen(ESTIMATORS[task](features[fold.train], labels.truth[fold.train], inner), classes)
    return FoldResult(
        repeat=fold.repeat,
        fold=fold.fold,
        test=fold.test,
        probabilities=fitted.probabilities(features[fold.test]),
        best_epoch=0,
        history=[],
        distances=distances_to(features[fold.train], features[fold.test]),
        inner_rows=fold.train,
        inner_probabilities=inner_probabilities(fitted, features[fold.train], labels.truth[fold.train], inner),
        share=fold.share,
    )


def fit_frozen(task: str, features: np.ndarray, labels: Labels, rows: np.ndarray, classes: int, seed: int) -> Frozen:
    """A classifier on the features of `rows`; inner folds keep groups whole."""
    return Frozen(ESTIMATORS[task](features[rows], labels.truth[rows], _inner(labels, rows, seed)), classes)


def _inner(labels: Labels, rows: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inner folds of `rows`, numbered within them."""
    names, groups = labels.take(rows)
    split: Any = "image" if labels.split == "image" else "group"
    count = _inner_folds(names, groups, split)
    inner = cross_validation(names, groups, folds=count, repeats=1, split=split, seed=seed)
    return [(f.train, f.test) for f in inner]


def _inner_folds(names: list[str], groups: list[str], split: str) -> int:
    """As many as the rarest class allows, at most `INNER_FOLDS`."""
    units = [len({g for n, g in zip(names, groups, strict=True) if n == c}) for c in set(names)]
    images = [names.count(c) for c in set(names)]
    return max(2, min(INNER_FOLDS, *(units if split == "group" else images)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 [N, K]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))
