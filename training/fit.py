"""One fit of a transfer: a fold of the cross-validation or the final refit, for each task. No Ray in here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from training.domain import LARGEST, distances_to, sampled_rows
from training.learnt import retrieved
from training.probabilities import from_logits
from training.splits import Fold, cross_validation, hold_out, require_inner
from training.tasks.finetune import Recipe, fine_tune, predict
from training.tasks.frozen import INNER_FOLDS, Inner
from training.tasks.fusion import Fused, Head, fit_fused, fit_head, judge_inner
from training.tasks.metric import MetricRecipe, embed, learn
from training.tasks.nearness import dump_metric, learn_nearness
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
    more: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By name, what only some tasks find of the test rows, [T, …] each."""


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
        probabilities=from_logits(logits, several=labels.several),
        best_epoch=outcome.best_epoch,
        history=outcome.history,
        distances=distances_to(reference, features),
        inner_rows=fold.train[held],
        inner_probabilities=from_logits(held_logits, several=labels.several),
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
    return from_logits(predict(outcome.network, outcome.initial.input, pixels[test], "cpu")[1], several=False)


def frozen_fold(task: str, features: np.ndarray, labels: Labels, classes: int, seed: int, fold: Fold) -> FoldResult:
    """As `finetune_fold`, for a classifier on features [N, D]."""
    return fused_fold(0, task, features, labels, classes, seed, fold)


def fused_fold(
    columns: int, task: str, features: np.ndarray, labels: Labels, classes: int, seed: int, fold: Fold
) -> FoldResult:
    """As `frozen_fold`, for one classifier of the first `columns` features and one of the rest; 0: one of them all."""
    inner = _inner(labels, fold.train, seed)
    known, truth = features[fold.train], labels.truth[fold.train]
    fitted = _fit(columns, task, known, truth, inner, classes)
    return FoldResult(
        repeat=fold.repeat,
        fold=fold.fold,
        test=fold.test,
        probabilities=fitted.probabilities(features[fold.test]),
        best_epoch=0,
        history=[],
        distances=distances_to(known, features[fold.test]),
        inner_rows=fold.train,
        inner_probabilities=judge_inner(fitted, known, truth, inner),
        share=fold.share,
    )


def fit_frozen(
    task: str, features: np.ndarray, labels: Labels, rows: np.ndarray, classes: int, seed: int, columns: int = 0
) -> Head | Fused:
    """A classifier on the features of `rows`, or two as in `fused_fold`; inner folds keep groups whole."""
    return _fit(columns, task, features[rows], labels.truth[rows], _inner(labels, rows, seed), classes)


def _fit(columns: int, task: str, features: np.ndarray, truth: np.ndarray, inner: Inner, classes: int) -> Head | Fused:
    if columns:
        return fit_fused(task, features, truth, inner, classes, columns)
    return fit_head(task, features, truth, inner, classes)


def require_judges(labels: Labels, sides: Iterable[np.ndarray], task: str) -> None:
    """Raises UsageError where the inner folds of a frozen task cannot be laid in a training side."""
    known: dict[str, str] = {"split": labels.split, "flag": f"--task {task}", "way_out": "use --task finetune"}
    require_inner(labels.names, labels.groups, sides, **known)


def _inner(labels: Labels, rows: np.ndarray, seed: int) -> Inner:
    """Inner folds of `rows`, numbered within them."""
    names, groups = labels.take(rows)
    split: Any = "image" if labels.split == "image" else "group"
    count = _inner_folds(names, groups, split)
    inner = cross_validation(names, groups, folds=count, repeats=1, split=split, seed=seed)
    return [(f.train, f.test) for f in inner]


def metric_fold(recipe: MetricRecipe, pixels: np.ndarray, labels: Labels, fold: Fold) -> FoldResult:
    """As `finetune_fold`, of an embedding whose class means judge; `more` holds what the test rows retrieve, see
    `training.learnt.name_of`: neighbours are looked for among all rows, those too that a share of the labels left out
    of the fit, or among its test rows alone."""
    names, groups = labels.take(fold.train)
    own = groups if labels.split != "image" else [str(r) for r in fold.train]
    train, held = hold_out(names, own, fraction=HELD_FRACTION, seed=recipe.base.seed + fold.repeat)
    outcome = learn(
        recipe, pixels, labels.truth, labels.groups, fold.train[train], fold.train[held], fold.repeat, fold.fold
    )
    shown = outcome.initial.input
    others = np.setdiff1d(np.arange(len(labels.truth)), fold.test)
    gallery, asked = (embed(outcome.model, shown, pixels[rows], "cpu") for rows in (others, fold.test))
    known = gallery[-1][np.searchsorted(others, fold.train)]
    nearness = learn_nearness(known[train], labels.truth[fold.train[train]], recipe.base.classes)
    return FoldResult(
        repeat=fold.repeat,
        fold=fold.fold,
        test=fold.test,
        probabilities=nearness.probabilities(asked[-1]),
        best_epoch=outcome.best_epoch,
        history=outcome.history,
        distances=distances_to(known[sampled_rows(len(fold.train), FOLD_REFERENCE)], asked[-1]),
        inner_rows=fold.train[held],
        inner_probabilities=nearness.probabilities(known[held]),
        share=fold.share,
        more=retrieved(gallery, asked, labels.truth, labels.groups, replace(fold, train=others), recipe.base.seed),
    )


def refit_metric(
    recipe: MetricRecipe, pixels: np.ndarray, labels: Labels, rows: np.ndarray, epochs: int
) -> tuple[dict[str, np.ndarray], bytes, np.ndarray]:
    """(network's weights by name, content of `nearness.METRIC`, embeddings of those rows that the domain keeps) of the
    embedding trained on `rows` for `epochs` of the recipe's schedule."""
    outcome = learn(recipe, pixels, labels.truth, labels.groups, rows, rows[:0], "refit", stop_after=epochs)
    found = embed(outcome.model, outcome.initial.input, pixels[rows], "cpu")[-1]
    nearness = learn_nearness(found, labels.truth[rows], recipe.base.classes)
    content = dump_metric(outcome.model.head(), nearness, recipe.steps)
    state = {k: v.numpy() for k, v in outcome.model.network.state_dict().items()}
    return state, content, found[sampled_rows(len(rows), LARGEST)]


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
    return FoldResult(
        repeat=fold.repeat,
        fold=fold.fold,
        test=fold.test,
        probabilities=pooled_by(pooler, features, units, fold.test),
        best_epoch=pooler.best_epoch,
        history=[],
        distances=np.empty(0),
        inner_rows=fold.train[held],
        inner_probabilities=pooled_by(pooler, features, units, fold.train[held]),
        share=fold.share,
    )


def refit_attention(
    features: np.ndarray, labels: Labels, units: Units, classes: int, seed: int, rows: np.ndarray, epochs: int
) -> Pooler:
    """Attention trained for `epochs` on the units that have a label and whose standing row is one of `rows`."""
    truth, nobody = labels.truth[units.first], np.empty(0, dtype=np.int64)
    chosen = units.judged[np.isin(units.first[units.judged], rows)]
    return fit_attention(features, units.of_row, truth, chosen, nobody, classes=classes, seed=seed, epochs=epochs)


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
