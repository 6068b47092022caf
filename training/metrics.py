"""How good out-of-fold predictions are, with intervals: every metric of `summary.json`, written over row weights.

A bootstrap over groups is a set of row weights, so confusion matrices, bin gaps and ranks are computed for many
resamples at once. In the code below, G counts groups, B resamples, N rows of one fold, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from training.bootstrap import Floats, Ints, Metric, Units, group_weights, interval, mean_defined, number, ratio

BINS = 15
"""Bins of the expected calibration error, as in Guo et al., 2017."""
CELLS = 4_000_000
"""Largest rows x resamples array that the bootstrap holds at once."""


class Reliability(NamedTuple):
    """Top-1 confidence against accuracy in equal-width bins; [bins] each, NaN in an empty bin."""

    confidence: Floats
    accuracy: Floats
    counts: Ints


# --- Metrics of confusion matrices [..., C (truth), C (predicted)] -> [...]; NaN where undefined -------------------


def accuracy(confusions: ArrayLike) -> Floats:
    """Share of the rows that are right."""
    m = np.asarray(confusions, dtype=np.float64)
    return ratio(_diagonal(m).sum(-1), m.sum((-2, -1)))


def balanced_accuracy(confusions: ArrayLike) -> Floats:
    """Mean recall of the classes that occur in the truth."""
    m = np.asarray(confusions, dtype=np.float64)
    return mean_defined(ratio(_diagonal(m), m.sum(-1)), axis=-1)


def kappa(confusions: ArrayLike) -> Floats:
    """Cohen's kappa (Cohen, 1960)."""
    m = np.asarray(confusions, dtype=np.float64)
    return _kappa(m, 1.0 - np.eye(m.shape[-1], dtype=np.float64))


def kappa_quadratic(confusions: ArrayLike) -> Floats:
    """Cohen's kappa with squared distances between class indices (Cohen, 1968): classes must be in their order."""
    m = np.asarray(confusions, dtype=np.float64)
    index = np.arange(m.shape[-1], dtype=np.float64)
    return _kappa(m, np.square(index[:, None] - index[None, :]))


def mean_level_error(confusions: ArrayLike) -> Floats:
    """Mean distance, in classes, of the prediction from the truth: classes must be in their order."""
    m = np.asarray(confusions, dtype=np.float64)
    index = np.arange(m.shape[-1], dtype=np.float64)
    return ratio((m * np.abs(index[:, None] - index[None, :])).sum((-2, -1)), m.sum((-2, -1)))


def f1_macro(confusions: ArrayLike) -> Floats:
    """Mean F1 of the classes that occur in the truth or among the predictions."""
    m = np.asarray(confusions, dtype=np.float64)
    return mean_defined(ratio(2 * _diagonal(m), m.sum(-1) + m.sum(-2)), axis=-1)


def _kappa(m: Floats, cost: Floats) -> Floats:
    expected = m.sum(-1)[..., :, None] * m.sum(-2)[..., None, :]
    total = m.sum((-2, -1))
    return 1 - ratio((m * cost).sum((-2, -1)) * total, (expected * cost).sum((-2, -1)))


OF_CONFUSION: dict[str, Callable[[ArrayLike], Floats]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "kappa": kappa,
    "kappa_quadratic": kappa_quadratic,
    "f1_macro": f1_macro,
}
NAMES = (*OF_CONFUSION, "auroc", "ece")
ORDINAL = ("mean_level_error",)
"""What is known beyond `NAMES` where the classes have an order."""
TITLES = {
    "auroc": "AUROC",
    "ece": "ECE",
    "f1_macro": "F1, macro",
    "f1_micro": "F1, micro",
    "hierarchical_f1": "hierarchical F1",
    "map_at_r": "mAP@R",
}


def title_of(metric: str) -> str:
    """How a reader is told a metric of `summary.json`: `"balanced accuracy"`."""
    return TITLES.get(metric, metric.replace("_", " "))


def meaningful(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those metrics that mean something: the quadratic kappa does only where the classes were given an order."""
    ordered = set(ORDINAL) <= set(values)
    return {name: value for name, value in values.items() if ordered or name != "kappa_quadratic"}


# --- Metrics of probabilities --------------------------------------------------------------------------------------


def confusion(truth: ArrayLike, predicted: ArrayLike, classes: int) -> Ints:
    """Counts [classes, classes]: rows are the truth, columns the prediction."""
    t, p = np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    return np.bincount(t * classes + p, minlength=classes * classes).reshape(classes, classes)


def reliability(probabilities: ArrayLike, truth: ArrayLike, bins: int = BINS) -> Reliability:
    """Mean top-1 confidence, accuracy and count of rows per bin; bin b holds confidences in (b/bins, (b+1)/bins]."""
    p, t = np.asarray(probabilities, dtype=np.float64), np.asarray(truth, dtype=np.int64)
    which, counts = bin_of(p.max(1), bins), np.bincount(bin_of(p.max(1), bins), minlength=bins)
    return Reliability(
        ratio(np.bincount(which, p.max(1), bins), counts),
        ratio(np.bincount(which, (p.argmax(1) == t).astype(np.float64), bins), counts),
        counts,
    )


def ece(probabilities: ArrayLike, truth: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error of the top-1 confidence (Guo et al., 2017, equation 3), 0 to 1."""
    confidence, right, counts = reliability(probabilities, truth, bins)
    return float(np.nansum(counts * np.abs(right - confidence)) / counts.sum())


def bin_gaps(probabilities: ArrayLike, truth: ArrayLike, bins: int = BINS) -> Floats:
    """Each row's right - confidence in the column of its bin, [M,bins]: `ece` is a function of their sums."""
    p, t = np.asarray(probabilities, dtype=np.float64), np.asarray(truth, dtype=np.int64)
    gaps = np.zeros((len(p), bins))
    gaps[np.arange(len(p)), bin_of(p.max(1), bins)] = (p.argmax(1) == t) - p.max(1)
    return gaps


def auroc(probabilities: ArrayLike, truth: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Macro one-vs-rest area under the ROC curve, [B] for row weights [N,B] (all ones, B = 1, without them).

    The area is the chance that a row of the class scores above one of the rest, ties counting half. A class that is
    absent, or is the only one present, is skipped; two classes give the plain area of class 1. NaN if none is left.
    """
    p, t = np.asarray(probabilities, dtype=np.float64), np.asarray(truth, dtype=np.int64)
    w = np.ones((len(t), 1)) if weights is None else np.asarray(weights, dtype=np.float64)
    judged = [1] if p.shape[1] == 2 else sorted(set(t.tolist()))
    areas = [area(p[:, c], t == c, w) for c in judged]
    return mean_defined(np.stack(areas), axis=0) if areas else np.full(w.shape[1], np.nan)


def area(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """Weighted Mann-Whitney statistic of scores [N], one per column of the weights [N,B]."""
    order = np.argsort(scores, kind="stable")
    w, mask = weights[order], positive[order, None]
    ties = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)
    above = np.add.reduceat(w * mask, ties, axis=0)
    rest = np.add.reduceat(w * ~mask, ties, axis=0)
    below = np.cumsum(rest, axis=0) - rest / 2
    return ratio((above * below).sum(0), above.sum(0) * rest.sum(0))


# --- Summaries -----------------------------------------------------------------------------------------------------


def summarise(
    truth: ArrayLike,
    probabilities: ArrayLike,
    *,
    group: ArrayLike,
    fold: ArrayLike,
    repeat: ArrayLike,
    resamples: int = 1000,
    seed: int = 0,
    ordered: bool = False,
) -> dict[str, Metric]:
    """Every metric of out-of-fold predictions, ready for JSON: `{name: {"value", "ci95", "per_fold"}}`.

    Args:
        truth: [M] class indices.
        probabilities: [M,C], the classes in their order; the prediction is the largest, the first of equals.
        group: [M] names of what must not be split; no empty name (give an ungrouped image its own).
        fold, repeat: [M] indices; all zeros for one pass over a test set.
        ordered: the classes stand in an order of theirs, so `ORDINAL` is judged too.

    `value` pools the out-of-fold predictions of a repeat and averages over repeats; of `auroc` it is the mean over
    folds, then repeats, since scores of different fits do not rank against each other. `per_fold` is in order of
    (repeat, fold). `ci95` is the 95 % percentile interval of a bootstrap over groups (Efron & Tibshirani, 1993): as
    many groups as there are, drawn with replacement, each bringing all of its rows in all folds and repeats. Its
    percentiles are those of `tail_share`, since 2.5 and 97.5 are too narrow for few groups: on simulated patients they
    covered 92 % with 20 groups and 92 to 95 % with 60, these 93 to 96 % with both, 92 % with 12. What counts is the
    number of groups behind a figure: where one class has few, the interval of `balanced_accuracy` is too narrow.
    Resampling is not stratified, neither by class nor by fold: prevalence is taken to be random, and a class that a
    resample lacks is skipped as it is in the metric. The fits are held fixed, so the spread over training sets is
    not in the interval. A resample's noise can only widen the bin gaps of `ece`, so its interval is moved back by the
    bootstrap's estimate of that bias. Fewer than two groups give no interval.
    """
    table = _Table.checked(truth, probabilities, group, fold, repeat)
    return table.summarise((*NAMES, *(ORDINAL if ordered else ())), resamples, seed)


class Draws(NamedTuple):
    """Every metric of one side of a comparison, in the order of `NAMES`, then `ORDINAL`; NaN where undefined."""

    point: Floats
    """[len(NAMES) + len(ORDINAL)]"""
    resampled: Floats
    """[as many, B]; column b of every side is of the same resample of groups."""


@dataclass(frozen=True, eq=False)
class Table:
    """Predictions cut into repeats and folds, whose metrics take weights of the groups."""

    repeats: list[list[Any]]
    """Of each repeat its folds, in the form that `of_folds` takes."""
    groups: int

    def of_folds(self, folds: list[Any], weights: Floats) -> Floats:
        """Values [S,B] of the folds of one repeat under weights [G,B]."""
        raise NotImplementedError

    def evaluate(self, weights: Floats) -> Floats:
        """Values [S,B] under weights [G,B]: repeats averaged."""
        return mean_defined(np.stack([self.of_folds(folds, weights) for folds in self.repeats]), axis=0)

    def summarise(self, names: Sequence[str], resamples: int, seed: int) -> dict[str, Metric]:
        """The first values, by name, with intervals, and by fold."""
        ((point, draws),) = drawn([self], resamples, seed)
        whole = np.ones((self.groups, 1))
        per_fold = [self.of_folds([fold], whole)[:, 0] for folds in self.repeats for fold in folds]
        return {
            name: Metric(
                value=number(point[i]),
                ci95=interval(draws[i], point[i], self.groups, unbias=name == "ece"),
                per_fold=[number(values[i]) for values in per_fold],
            )
            for i, name in enumerate(names)
        }


def drawn(tables: Sequence[Table], resamples: int, seed: int) -> list[Draws]:
    """Values of tables over the same rows, as they are and resampled: every table under the same resamples."""
    groups = tables[0].groups
    rows = max(len(fold.truth) for folds in tables[0].repeats for fold in folds)
    step = max(1, CELLS // max(groups, rows))
    pieces = [[table.evaluate(w) for table in tables] for w in group_weights(groups, resamples, seed, step)]
    whole = np.ones((groups, 1))
    return [
        Draws(table.evaluate(whole)[:, 0], np.concatenate(parts, axis=1))
        for table, parts in zip(tables, zip(*pieces, strict=True), strict=True)
    ]


def paired_draws(
    truth: ArrayLike,
    sides: Sequence[ArrayLike],
    *,
    group: ArrayLike,
    fold: ArrayLike,
    repeat: ArrayLike,
    resamples: int,
    seed: int,
) -> list[Draws]:
    """Every metric of several probability arrays [M,C] over the same rows, under the same resamples of groups.

    Rows, values and resampling are those of `summarise`: the draws of one side are what its intervals come from.
    """
    tables = [_Table.checked(truth, probabilities, group, fold, repeat) for probabilities in sides]
    return drawn(tables, resamples, seed)


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of one fold of one repeat; `group` [N] indexes the rows of the weights [G,B]."""

    truth: Ints
    probabilities: Floats
    group: Ints
    groups: int

    def confusions(self, weights: Floats) -> Floats:
        """[B,C,C]"""
        classes = self.probabilities.shape[1]
        return np.asarray(self._counts.T @ weights).T.reshape(-1, classes, classes)

    def gaps(self, weights: Floats) -> Floats:
        """Sum over rows of (right - confidence), [B,BINS]."""
        return np.asarray(self._gaps.T @ weights).T

    def auroc(self, weights: Floats) -> Floats:
        return auroc(self.probabilities, self.truth, weights[self.group])

    @cached_property
    def _counts(self) -> csr_array:
        classes = self.probabilities.shape[1]
        cell = self.truth * classes + self.probabilities.argmax(1)
        return self._by_group(np.ones(len(cell)), cell, classes * classes)

    @cached_property
    def _gaps(self) -> csr_array:
        confidence = self.probabilities.max(1)
        right = self.probabilities.argmax(1) == self.truth
        return self._by_group(right - confidence, bin_of(confidence, BINS), BINS)

    def _by_group(self, values: Floats, column: Ints, columns: int) -> csr_array:
        return csr_array((values, (self.group, column)), shape=(self.groups, columns))


class _Table(Table):
    """Of one class per row; values are those of `NAMES`, then `ORDINAL`."""

    @classmethod
    def checked(
        cls, truth: ArrayLike, probabilities: ArrayLike, group: ArrayLike, fold: ArrayLike, repeat: ArrayLike
    ) -> _Table:
        t, p = np.asarray(truth, dtype=np.int64), np.asarray(probabilities, dtype=np.float64)
        if p.ndim != 2 or p.shape[1] < 2 or t.shape != (len(p),) or np.shape(group) != (len(p),):
            shapes = f"{t.shape}, {p.shape}, {np.shape(group)}"
            raise ValueError(f"shapes {shapes} of truth, probabilities, group: need [M], [M,C>1], [M]")
        units = Units.of(group, fold, repeat)
        if t.min() < 0 or t.max() >= p.shape[1]:
            raise ValueError(f"truth {t.min()} to {t.max()}: must index the {p.shape[1]} columns of probabilities")
        if not np.isfinite(p).all():
            raise ValueError(f"probabilities: {(~np.isfinite(p)).any(1).sum()} rows are not finite")
        repeats = [
            [_Part(t[rows], p[rows], units.group[rows], units.groups) for rows in folds] for folds in units.repeats
        ]
        return cls(repeats, units.groups)

    def of_folds(self, folds: list[_Part], weights: Floats) -> Floats:
        """The folds are pooled, but for auroc, which is their mean."""
        confusions = sum((part.confusions(weights) for part in folds[1:]), folds[0].confusions(weights))
        gaps = sum((part.gaps(weights) for part in folds[1:]), folds[0].gaps(weights))
        areas = mean_defined(np.stack([part.auroc(weights) for part in folds]), axis=0)
        errors = ratio(np.abs(gaps).sum(-1), confusions.sum((-2, -1)))
        of_confusion = [metric(confusions) for metric in OF_CONFUSION.values()]
        return np.stack([*of_confusion, areas, errors, mean_level_error(confusions)])


def bin_of(confidence: Floats, bins: int) -> Ints:
    return np.searchsorted(np.arange(1, bins) / bins, confidence, side="left").astype(np.int64)


def _diagonal(m: Floats) -> Floats:
    diagonal: Floats = np.diagonal(m, axis1=-2, axis2=-1)
    return diagonal
