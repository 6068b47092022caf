"""How good predictions of label sets are, with intervals: what `training.metrics` is for one class per image.

In the code below, G counts groups, B resamples, N rows of one fold, K labels. A label is said where its probability is
a half or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from training.bootstrap import Floats, Ints, Metric, Units, mean_defined, ratio
from training.metrics import BINS, Draws, Reliability, Table, area, bin_of, drawn
from training.probabilities import HALF

Sets = NDArray[np.bool_]

NAMES = (
    "accuracy",
    "balanced_accuracy",
    "f1_macro",
    "f1_micro",
    "hamming",
    "auroc",
    "average_precision",
    "ece",
)


def reliability(probabilities: ArrayLike, truth: ArrayLike, bins: int = BINS) -> Reliability:
    """Mean probability, share of labels that hold and count per bin, over all labels of all rows; see `metrics`."""
    p, t = np.asarray(probabilities, dtype=np.float64).ravel(), np.asarray(truth, dtype=bool).ravel()
    which = bin_of(p, bins)
    counts = np.bincount(which, minlength=bins)
    return Reliability(
        ratio(np.bincount(which, p, bins), counts),
        ratio(np.bincount(which, t.astype(np.float64), bins), counts),
        counts,
    )


def average_precision(scores: Floats, positive: Sets, weights: Floats) -> Floats:
    """Mean precision at each row that has the label, rows ranked by score [N]; [B] for row weights [N,B].

    The sum over thresholds of the step in recall times the precision there, equal scores at once and without
    interpolation (scikit-learn's definition). NaN where no row has the label.
    """
    order = np.argsort(-scores, kind="stable")
    ties = np.flatnonzero(np.diff(-scores[order], prepend=-np.inf) > 0)
    w, mask = weights[order], positive[order, None]
    right = np.add.reduceat(w * mask, ties, axis=0)
    said = np.cumsum(np.add.reduceat(w, ties, axis=0), axis=0)
    precision = np.divide(np.cumsum(right, axis=0), said, out=np.zeros_like(said), where=said > 0)
    return ratio((right * precision).sum(0), right.sum(0))


def summarise(
    truth: ArrayLike,
    probabilities: ArrayLike,
    *,
    group: ArrayLike,
    fold: ArrayLike,
    repeat: ArrayLike,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Metric]:
    """Every metric of `NAMES` of out-of-fold predictions of label sets, ready for JSON.

    Args:
        truth: bool [M,K], the labels of each row.
        probabilities: [M,K], of each label by itself.
        group, fold, repeat: as in `metrics.summarise`, and so are values, intervals and folds.

    `accuracy` is the share of rows whose whole set is right; `balanced_accuracy` the mean over labels of the mean of
    sensitivity and specificity; `f1_macro` the mean over labels of F1, `f1_micro` the F1 of all decisions together;
    `hamming` the share of all decisions that are wrong; `auroc` and `average_precision` (mAP) means over labels, folds
    and repeats; `ece` the calibration error of all probabilities of all labels. A label that has no row, or that every
    row has, is left out where it makes a value undefined.
    """
    return _Table.checked(truth, probabilities, group, fold, repeat).summarise(NAMES, resamples, seed)


def paired_draws(
    truth: ArrayLike, sides: Sequence[ArrayLike], resamples: int, seed: int, **rows: ArrayLike
) -> list[Draws]:
    """As `metrics.paired_draws`, of label sets and in the order of `NAMES`; `rows` are group, fold and repeat."""
    return drawn([_Table.checked(truth, side, **rows) for side in sides], resamples, seed)


def of_each_label(truth: Sets, probabilities: Floats, fold: Ints, repeat: Ints) -> list[dict[str, float]]:
    """Of each label: `rows` that have it, `sensitivity`, `specificity`, `auroc`, `average_precision`; NaN if undefined.

    The last two are means over the folds of all repeats, the others pool them; rows are of one repeat.
    """
    said, found = probabilities >= HALF, []
    places = np.unique(np.stack([repeat, fold]), axis=1).T
    parts = [np.flatnonzero((repeat == k) & (fold == v)) for k, v in places]
    for at in range(truth.shape[1]):
        has, says, p = truth[:, at], said[:, at], probabilities[:, at]
        areas = [area(p[rows], has[rows], np.ones((len(rows), 1))) for rows in parts]
        precisions = [average_precision(p[rows], has[rows], np.ones((len(rows), 1))) for rows in parts]
        found.append(
            {
                "rows": float(has[repeat == repeat.min()].sum()),
                "sensitivity": float(ratio((has & says).sum(), has.sum())),
                "specificity": float(ratio((~has & ~says).sum(), (~has).sum())),
                "auroc": float(mean_defined(np.stack(areas), axis=0)[0]),
                "average_precision": float(mean_defined(np.stack(precisions), axis=0)[0]),
            }
        )
    return found


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of one fold of one repeat; `group` [N] indexes the rows of the weights [G,B]."""

    truth: Sets
    probabilities: Floats
    group: Ints
    groups: int

    def decisions(self, weights: Floats) -> Floats:
        """Sums over rows [B,4,K]: right and wrong where the label is said, wrong and right where it is not."""
        return np.asarray(self._decisions.T @ weights).T.reshape(weights.shape[1], 4, -1)

    def exact(self, weights: Floats) -> Floats:
        """Sums over rows [B,2]: whole sets that are right, and rows."""
        return np.asarray(self._exact.T @ weights).T

    def gaps(self, weights: Floats) -> Floats:
        """Sum over all labels of all rows of (holds - probability), [B,BINS]."""
        return np.asarray(self._gaps.T @ weights).T

    def ranked(self, weights: Floats) -> tuple[Floats, Floats]:
        """(area under the ROC curve, average precision), [B] each, means over labels."""
        w = weights[self.group]
        columns = [(self.probabilities[:, k], self.truth[:, k]) for k in range(self.truth.shape[1])]
        areas = np.stack([area(p, t, w) for p, t in columns])
        precisions = np.stack([average_precision(p, t, w) for p, t in columns])
        return mean_defined(areas, axis=0), mean_defined(precisions, axis=0)

    @cached_property
    def _decisions(self) -> csr_array:
        said = self.probabilities >= HALF
        cells = [said & self.truth, said & ~self.truth, ~said & self.truth, ~said & ~self.truth]
        return self._by_group(np.concatenate(cells, axis=1).astype(np.float64))

    @cached_property
    def _exact(self) -> csr_array:
        right = ((self.probabilities >= HALF) == self.truth).all(axis=1)
        return self._by_group(np.stack([right, np.ones(len(right))], axis=1).astype(np.float64))

    @cached_property
    def _gaps(self) -> csr_array:
        values, column = (self.truth - self.probabilities).ravel(), bin_of(self.probabilities.ravel(), BINS)
        rows = np.repeat(self.group, self.truth.shape[1])
        return csr_array((values, (rows, column)), shape=(self.groups, BINS))

    def _by_group(self, values: Floats) -> csr_array:
        """Sums [G,C] of values [N,C]."""
        ones = csr_array((np.ones(len(values)), (self.group, np.arange(len(values)))), shape=(self.groups, len(values)))
        return csr_array(ones @ values)


class _Table(Table):
    """Of label sets; values are those of `NAMES`."""

    @classmethod
    def checked(
        cls, truth: ArrayLike, probabilities: ArrayLike, group: ArrayLike, fold: ArrayLike, repeat: ArrayLike
    ) -> _Table:
        t, p = np.asarray(truth), np.asarray(probabilities, dtype=np.float64)
        if p.ndim != 2 or not p.size or t.shape != p.shape or np.shape(group) != (len(p),):
            shapes = f"{t.shape}, {p.shape}, {np.shape(group)}"
            raise ValueError(f"shapes {shapes} of truth, probabilities, group: need [M,K], [M,K], [M]")
        if not np.isin(t, (0, 1)).all():
            raise ValueError("truth: must be 0 or 1 for each label of each row")
        if not np.isfinite(p).all():
            raise ValueError(f"probabilities: {(~np.isfinite(p)).any(1).sum()} rows are not finite")
        units = Units.of(group, fold, repeat)
        has = t.astype(bool)
        repeats = [
            [_Part(has[rows], p[rows], units.group[rows], units.groups) for rows in folds] for folds in units.repeats
        ]
        return cls(repeats, units.groups)

    def of_folds(self, folds: list[_Part], weights: Floats) -> Floats:
        """The folds are pooled, but for what ranks, which are their means."""
        cells = np.moveaxis(np.sum([part.decisions(weights) for part in folds], axis=0), 1, 0)
        said_right, said_wrong, missed, left = cells  # [B,K] each
        exact = np.sum([part.exact(weights) for part in folds], axis=0)
        gaps = np.sum([part.gaps(weights) for part in folds], axis=0)
        ranks = np.stack([np.stack(part.ranked(weights)) for part in folds])
        areas, precisions = mean_defined(ranks, axis=0)
        balanced = (ratio(said_right, said_right + missed) + ratio(left, left + said_wrong)) / 2
        wrong = (said_wrong + missed).sum(-1)
        of_all = ratio(2 * said_right.sum(-1), 2 * said_right.sum(-1) + wrong)
        decisions = cells.sum((0, -1))
        return np.stack(
            [
                ratio(exact[:, 0], exact[:, 1]),
                mean_defined(balanced, axis=-1),
                mean_defined(ratio(2 * said_right, 2 * said_right + said_wrong + missed), axis=-1),
                of_all,
                ratio(wrong, decisions),
                areas,
                precisions,
                ratio(np.abs(gaps).sum(-1), decisions),
            ]
        )
