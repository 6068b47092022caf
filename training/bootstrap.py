"""Bootstrap over groups of whatever is a function of sums over rows: rates, their ratios, counts of a confusion matrix.

What may not be split (a patient, a slide) is drawn whole, so rows of one group never count as independent evidence.
In the code below, M counts rows of predictions, G groups, B resamples, Q columns that are summed, S values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.special import ndtr, stdtrit

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Statistic = Callable[[Floats], Floats]
"""Values [...,S] of sums [...,Q]; NaN where they are not defined."""

CELLS = 4_000_000
"""Largest array of weights or sums that is held at once."""
TAILS = (2.5, 97.5)


class Metric(TypedDict):
    """One entry of `metrics` in `summary.json`; `None` where a value is not defined."""

    value: float | None
    ci95: list[float | None]
    per_fold: list[float | None]


@dataclass(frozen=True, eq=False)
class Draws:
    """A statistic's values [S], those of its resamples [S,B] and of the folds [F,S], in order of (repeat, fold)."""

    values: Floats
    resampled: Floats
    per_fold: Floats
    groups: int

    def metrics(self, *, unbias: bool = False) -> list[Metric]:
        """One `Metric` a value; `unbias` as in `interval`."""
        return [
            Metric(
                value=number(value),
                ci95=interval(draws, value, self.groups, unbias=unbias),
                per_fold=[number(v) for v in self.per_fold[:, at]],
            )
            for at, (value, draws) in enumerate(zip(self.values, self.resampled, strict=True))
        ]


@dataclass(frozen=True, eq=False)
class Units:
    """Which group each of M rows belongs to, and the rows of each fold of each repeat: what is summed and resampled."""

    group: Ints
    groups: int
    repeats: list[list[Ints]]
    resamples: int = 1000
    seed: int = 0

    @classmethod
    def of(cls, group: ArrayLike, fold: ArrayLike, repeat: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Units:
        """From names of groups and indices of folds and repeats, [M] each; all zeros for one pass over a test set.

        Raises:
            ValueError: shapes differ, there is no row, or a group has an empty name.
        """
        g, f, r = np.asarray(group, dtype=str), np.asarray(fold), np.asarray(repeat)
        if not len(g) or g.ndim != 1 or f.shape != g.shape or r.shape != g.shape:
            raise ValueError(f"shapes {g.shape}, {f.shape}, {r.shape} of group, fold, repeat: need [M], M at least 1")
        if (g == "").any():
            raise ValueError(f"group: {(g == '').sum()} rows have an empty name; give each ungrouped image its own")
        names, codes = np.unique(g, return_inverse=True)
        repeats = [
            [np.flatnonzero((r == k) & (f == v)).astype(np.int64) for v in np.unique(f[r == k])] for k in np.unique(r)
        ]
        return cls(codes.astype(np.int64), len(names), repeats, resamples, seed)

    def draw(self, columns: ArrayLike | csr_array, statistic: Statistic) -> Draws:
        """The statistic of the sums of columns [M,Q], its resamples and its values by fold.

        The sums are over a repeat, whose folds are pooled; the value is the mean over repeats. Every call on the same
        Units draws the same groups, so resamples of two statistics may be subtracted from each other.
        """
        table = columns if isinstance(columns, csr_array) else csr_array(np.asarray(columns, dtype=np.float64))
        sums = [self._by_group(table, np.concatenate(folds)) for folds in self.repeats]
        step = max(1, CELLS // max(self.groups, table.shape[1]))
        pieces = [
            mean_defined(np.stack([statistic(weights.T @ one) for one in sums]), axis=0)
            for weights in group_weights(self.groups, self.resamples, self.seed, step)
        ]
        values = mean_defined(np.stack([statistic(one.sum(0)) for one in sums]), axis=0)
        rows = [part for folds in self.repeats for part in folds]
        per_fold = np.stack([statistic(np.asarray(table[part].sum(axis=0)).ravel()) for part in rows])
        return Draws(values, np.concatenate(pieces).T, per_fold, self.groups)

    def rates(self, hits: ArrayLike, of: ArrayLike) -> list[Metric]:
        """Shares hits / of for columns [M,S] of zeros and ones (or [M]), hits within of.

        Where all groups succeed or all fail, every resample is alike and a percentile interval would have no width;
        there it is Clopper and Pearson's (1934) with the groups as trials, which errs on the wide side.
        """
        top, bottom = _columns(hits), _columns(of)
        size = top.shape[1]
        draws = self.draw(np.hstack([top, bottom]), lambda sums: ratio(sums[..., :size], sums[..., size:]))
        metrics = draws.metrics()
        for at, metric in enumerate(metrics):
            trials = len(np.unique(self.group[bottom[:, at] > 0]))
            if metric["value"] in {0.0, 1.0} and trials and self.groups > 1:
                metric["ci95"] = list(all_alike(metric["value"] == 1, trials))
        return metrics

    def means(self, columns: ArrayLike) -> list[Metric]:
        """Means of the columns [M,S] (or [M])."""
        table = _columns(columns)
        ones = np.ones((len(table), 1))
        return self.draw(np.hstack([table, ones]), lambda sums: ratio(sums[..., :-1], sums[..., -1:])).metrics()

    def _by_group(self, table: csr_array, rows: Ints) -> Floats:
        """Sums [G,Q] of the rows of a repeat."""
        shape = (self.groups, table.shape[0])
        member = csr_array((np.ones(len(rows)), (self.group[rows], rows)), shape=shape)
        return np.asarray((member @ table).toarray(), dtype=np.float64)


def group_weights(groups: int, resamples: int, seed: int, step: int) -> Iterator[Floats]:
    """How often each group was drawn, [G,b], in pieces of `step` resamples: the pieces do not change the draws.

    Source: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993; as many groups as there are are drawn with
    replacement, each bringing all of its rows.
    """
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(groups, size=(size, groups)) + groups * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * groups).reshape(size, groups)
        yield np.ascontiguousarray(counts.T, dtype=np.float64)


def tail_share(groups: int) -> float:
    """Share of resamples outside each end of a 95 % percentile interval: 0.025 for many groups, less for few.

    A resample of G groups varies by (G - 1) / G of what it should, and its percentiles are as narrow as if the variance
    were known. Both are mended by taking the percentiles at which a normal distribution has the width of Student's
    interval: the expanded percentile interval of Hesterberg (2015).
    """
    return float(ndtr(stdtrit(groups - 1, 0.025) * np.sqrt(groups / (groups - 1))))


def interval_words(groups: int) -> str:
    """How the intervals of metrics over so many groups are made, for a reader."""
    if groups < 2:
        return "No intervals: a bootstrap over groups needs more than one."
    low = 100 * tail_share(groups)
    return (
        "95 % intervals by a percentile bootstrap over groups, fits held fixed. Few groups would give intervals that "
        "are too narrow, so percentiles further out are taken, where a normal distribution has the width of Student's "
        f"interval (Hesterberg, 2015): with {groups:,} groups {low:.2f} and {100 - low:.2f}, not 2.5 and 97.5. That of "
        "ece is moved back by its estimated bias."
    )


def interval(draws: Floats, point: float, groups: int, *, unbias: bool = False) -> list[float | None]:
    """The percentiles `tail_share(groups)` and 1 less that of the defined draws; fewer than two groups give none.

    `unbias` is for errors that a resample's noise can only raise: the interval is moved back by the bootstrap's
    estimate of that bias and cut to 0 to 1.
    """
    defined = draws[~np.isnan(draws)]
    if not len(defined) or np.isnan(point) or groups < 2:
        return [None, None]
    share = tail_share(groups)
    ends = np.quantile(defined, [share, 1 - share])
    if unbias:
        ends = np.clip(ends - (defined.mean() - point), 0, 1)
    return [float(end) for end in ends]


def all_alike(succeeded: bool, trials: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval where all of the trials succeeded, or all failed."""
    bound = float((1 - (TAILS[1] - TAILS[0]) / 100) / 2) ** (1 / trials)
    return (bound, 1.0) if succeeded else (0.0, 1 - bound)


def ratio(a: ArrayLike, b: ArrayLike) -> Floats:
    """a / b, NaN where b is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    quotient: Floats = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)
    return quotient


def mean_defined(values: Floats, axis: int) -> Floats:
    """Mean over an axis without its NaN; NaN where there is nothing else."""
    defined = ~np.isnan(values)
    return ratio(np.where(defined, values, 0).sum(axis), defined.sum(axis))


def number(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return None if np.isnan(value) else float(value)


def _columns(values: ArrayLike) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    return table[:, None] if table.ndim == 1 else table
