"""One fit of a transfer: a fold of the cross-validation or the final refit, for each task. No Ray in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from training.domain import LARGEST, distances_to, sampled_rows
from training.probabilities import from_logits
from training.splits import Fold, cross_validation, hold_out
from training.tasks.finetune import Recipe, fine_tune, predict
from training.tasks.frozen import ESTIMATORS, INNER_FOLDS, Frozen
from training.tasks.label_sets import LABEL_SET_ESTIMATORS, LabelSets
from training.tasks.pooling import Pooler, fit_attention
from training.units import Units

HELD_FRACTION = 0.15
"""Share of a fold's training groups that only chooses when to stop."""
FOLD_REFERENCE = 2000
"""Training rows that a fine-tuned fold measures distances to, at most."""


@dataclass(frozen=True)
class Labels:
    """The labelled rows of a run: class numbers [N] or label sets bool [N, K], their names [N], and groups [N]."""

    truth: np.ndarray
    names: list[str]
    groups: list[str]
    split: str

    @property
    def several(self) -> bool:
        """Whether an image may have several labels."""
        return self.truth.ndim == 2

    def take(self, rows: np.ndarray) -> tuple[list[str], list[str]]:
        return [self.names[r] for r in rows], [self.groups[r] for r in rows]


@dataclass(frozen=True)
class FoldResult:
    repeat: int
    fold: int
    test: np.ndarray
    probabilities: np.ndarray
    best_epoch: int
    history: list[dict[str, float]]
    distances: np.ndarray
    """Of the test rows to the training rows, in this fold's own feature space; see `training.domain`."""


def finetune_fold(recipe: Recipe, pixels: np.ndarray, labels: Labels, fold: Fold) -> FoldResult:
    """Trains on the fold's training rows, of which some groups only choose the epoch; judges its test rows."""
    names, groups = labels.take(fold.train)
    own = groups if labels.split == "group" else [str(r) for r in fold.train]
    train, held = hold_out(names, own, fraction=HELD_FRACTION, seed=recipe.seed + fold.repeat)
    outcome = fine_tune(recipe, pixels, labels.truth, fold.train[train], fold.train[held], fold.repeat, fold.fold)
    features, logits = predict(outcome.network, outcome.initial.input, pixels[fold.test], "cpu")
    known = fold.train[sampled_rows(len(fold.train), FOLD_REFERENCE)]
    reference, _ = predict(outcome.network, outcome.initial.input, pixels[known], "cpu")
    distances = distances_to(reference, features)
    return FoldResult(
        fold.repeat,
        fold.fold,
        fold.test,
        from_logits(logits, several=labels.several),
        outcome.best_epoch,
        outcome.history,
        distances,
    )


def refit_network(
    recipe: Recipe, pixels: np.ndarray, labels: Labels, epochs: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights by name of the network trained on all rows for `epochs` of the recipe's schedule, and features of the
    rows that its domain keeps."""
    everything = np.arange(len(labels.truth))
    outcome = fine_tune(recipe, pixels, labels.truth, everything, everything[:0], "refit", stop_after=epochs)
    kept = pixels[sampled_rows(len(pixels), LARGEST)]
    features, _ = predict(outcome.network, outcome.initial.input, kept, "cpu")
    return {k: v.numpy() for k, v in outcome.network.state_dict().items()}, features


def refit_and_judge(
    recipe: Recipe, pixels: np.ndarray, truth: np.ndarray, train: np.ndarray, test: np.ndarray, epochs: int
) -> np.ndarray:
    """Probabilities [T, K] of rows `test`, by a network trained on rows `train` as `refit_network` does on all."""
    outcome = fine_tune(recipe, pixels, truth, train, train[:0], "refit", stop_after=epochs)
    return from_logits(predict(outcome.network, outcome.initial.input, pixels[test], "cpu")[1], several=False)


def frozen_fold(task: str, features: np.ndarray, labels: Labels, classes: int, seed: int, fold: Fold) -> FoldResult:
    fitted = fit_frozen(task, features, labels, fold.train, classes, seed)
    probabilities = fitted.probabilities(features[fold.test])
    distances = distances_to(features[fold.train], features[fold.test])
    return FoldResult(fold.repeat, fold.fold, fold.test, probabilities, 0, [], distances)


def fit_frozen(
    task: str, features: np.ndarray, labels: Labels, rows: np.ndarray, classes: int, seed: int
) -> Frozen | LabelSets:
    """A classifier on the features of `rows`; inner folds keep groups whole."""
    names, groups = labels.take(rows)
    split: Any = labels.split
    inner = cross_validation(names, groups, folds=_inner_folds(names, groups, split), repeats=1, split=split, seed=seed)
    pairs = [(f.train, f.test) for f in inner]
    if labels.several:
        return LabelSets(LABEL_SET_ESTIMATORS[task](features[rows], labels.truth[rows], pairs), classes)
    return Frozen(ESTIMATORS[task](features[rows], labels.truth[rows], pairs), classes)


def attention_fold(
    features: np.ndarray, labels: Labels, units: Units, classes: int, seed: int, fold: Fold
) -> FoldResult:
    """Attention over the images of each unit of the fold; its rows stand for units (`units.fold_of_units`).

    Some of the training side's groups only choose when to stop. The result holds one row per unit.
    """
    names, groups = labels.take(fold.train)
    train, held = hold_out(names, groups, fraction=HELD_FRACTION, seed=seed + fold.repeat)
    sides = [units.of_row[fold.train[side]] for side in (train, held)]
    truth = labels.truth[units.first]
    pooler = fit_attention(features, units.of_row, truth, *sides, classes=classes, seed=seed + fold.fold)
    probabilities = pooled_by(pooler, features, units, fold.test)
    return FoldResult(fold.repeat, fold.fold, fold.test, probabilities, pooler.best_epoch, [], np.empty(0))


def refit_attention(features: np.ndarray, labels: Labels, units: Units, classes: int, seed: int, epochs: int) -> Pooler:
    """Attention trained on all units that have a label, for `epochs`."""
    truth, nobody = labels.truth[units.first], np.empty(0, dtype=np.int64)
    everyone = units.judged
    return fit_attention(features, units.of_row, truth, everyone, nobody, classes=classes, seed=seed, epochs=epochs)


def pooled_by(pooler: Pooler, features: np.ndarray, units: Units, standing: np.ndarray) -> np.ndarray:
    """Probabilities [S, K], not calibrated, of the units for which the rows `standing` [S] stand."""
    place = np.full(len(units), -1)
    place[units.of_row[standing]] = np.arange(len(standing))
    unit = place[units.of_row]
    return pooler.probabilities(features[unit >= 0], unit[unit >= 0])


def _inner_folds(names: list[str], groups: list[str], split: str) -> int:
    """As many as the rarest class allows, at most `INNER_FOLDS`."""
    sets = [set(name.split("|")) for name in names]
    several = any(len(own) > 1 for own in sets)
    spread = (True, False) if several else (True,)  # of label sets, also those without a class must be spread
    rarest = INNER_FOLDS
    for name in set().union(*sets):
        sides = [[g for own, g in zip(sets, groups, strict=True) if (name in own) == has] for has in spread]
        rarest = min(rarest, *(len(set(side)) if split == "group" else len(side) for side in sides if side))
    return max(2, rarest)
