"""DeLong's test: two areas under the ROC curve of two classes, judged on the same images, with groups respected."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr
from scipy.stats import rankdata

from training.bootstrap import Floats, Ints

Z95 = 1.959963984540054
"""97.5 % point of the normal distribution."""
_ROUNDING = 1e-20
"""Variance below which nothing but rounding is left."""


class DeLong(TypedDict):
    """The areas of both sides, and their difference; `None` where it is not defined."""

    auroc: float | None
    against: float | None
    difference: float | None
    ci95: list[float | None]
    p: float | None


def delong(
    truth: ArrayLike, ours: ArrayLike, theirs: ArrayLike, *, group: ArrayLike, fold: ArrayLike, repeat: ArrayLike
) -> DeLong:
    """The difference of two areas under the ROC curve, with a normal interval and a two-sided p-value.

    Args:
        truth: [M] of 0 and 1.
        ours, theirs: [M] scores of class 1 on the same rows.
        group: [M] names of what is not independent, such as the patient.
        fold, repeat: [M] indices; all zeros for one pass over a test set.

    Scores of different fits do not rank against each other, so an area is computed per fold, averaged over the folds
    of a repeat, then over repeats, as `auroc` of `training.metrics`; a fold that lacks a class is left out. The
    variance is that of this average: each group's `influences` on the areas of the folds are averaged in the same way,
    and their squares summed. So a group that several repeats judge, or, in a split by image, several folds, counts
    once. With one fold and groups of one image this is DeLong, DeLong & Clarke-Pearson (1988); with groups of several
    images it is the clustered version of Obuchowski (1997) but for one factor, see `influences`.

    No interval and no p-value where a fold holds fewer than two groups of a class, or where both sides are without
    spread (both perfect, say) but not equal.
    """
    t = np.asarray(truth, dtype=np.int64)
    scores = np.stack([np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)])
    g, f, r = np.asarray(group, dtype=str), np.asarray(fold), np.asarray(repeat)
    if any(a.shape != t.shape for a in (scores[0], g, f, r)) or not set(np.unique(t)) <= {0, 1}:
        raise ValueError(f"truth {t.shape}, scores {scores.shape}: need one truth of 0 or 1, group and fold per score")
    names, codes = np.unique(g, return_inverse=True)
    repeats = [_of_repeat(t, scores, codes, f, r == k, len(names)) for k in np.unique(r)]
    found = [one for one in repeats if one is not None]
    if not found:
        return DeLong(auroc=None, against=None, difference=None, ci95=[None, None], p=None)
    areas, influence = (np.mean([one[at] for one in found], axis=0) for at in (0, 1))
    return _tested(areas, float(np.square(influence[0] - influence[1]).sum()))


def influences(scores: Floats, positive: np.ndarray, group: Ints, groups: int) -> tuple[Floats, Floats]:
    """Areas [S] under the ROC curves of scores [S,N], and what each group adds to their errors, [S,groups].

    The product of the second with its transpose estimates the covariance [S,S] of the areas. Placement values (the
    share of the other class that an image stands above, or below) come from midranks, O(N log N): Sun & Xu, 2014.
    Their deviations from the area are summed within groups, positive and negative images apart, each part enlarged by
    the root of K / (K - 1), K its groups: these are S10, S01 and S11 of Obuchowski, 1997. Where a group holds images of
    both classes, S11 here is enlarged by the geometric mean of both factors instead of I / (I - 1), I all groups: a
    difference of order 1 / I, for which errors can be added up over folds and repeats.

    NaN where a class has fewer than two groups.
    """
    whole = rankdata(scores, axis=1)
    own = np.empty_like(whole)
    own[:, positive], own[:, ~positive] = rankdata(scores[:, positive], axis=1), rankdata(scores[:, ~positive], axis=1)
    others = np.where(positive, (~positive).sum(), positive.sum())
    placed = (whole - own) / others
    placed = np.where(positive, placed, 1 - placed)
    areas = placed[:, positive].mean(axis=1)
    total = np.zeros((len(scores), groups))
    for rows in (positive, ~positive):
        count = len(np.unique(group[rows]))
        enlarged = np.sqrt(count / (count - 1)) if count > 1 else np.nan
        for side, values in enumerate(placed[:, rows] - areas[:, None]):
            total[side] += enlarged * np.bincount(group[rows], values, groups) / rows.sum()
    return areas, total


def _of_repeat(
    truth: Ints, scores: Floats, group: Ints, fold: np.ndarray, keep: np.ndarray, groups: int
) -> tuple[Floats, Floats] | None:
    """Areas and influences of one repeat, averaged over its folds that have both classes."""
    parts = []
    for one in np.unique(fold[keep]):
        rows = np.flatnonzero(keep & (fold == one))
        positive = truth[rows] == 1
        if positive.any() and not positive.all():
            parts.append(influences(scores[:, rows], positive, group[rows], groups))
    return (np.mean([a for a, _ in parts], axis=0), np.mean([u for _, u in parts], axis=0)) if parts else None


def _tested(areas: Floats, variance: float) -> DeLong:
    ours, theirs = (float(area) for area in areas)
    difference = ours - theirs
    ci95: list[float | None] = [None, None]
    p = None
    if variance > _ROUNDING:
        error = float(np.sqrt(variance))
        ci95 = [difference - Z95 * error, difference + Z95 * error]
        p = float(2 * ndtr(-abs(difference) / error))
    elif difference == 0 and not np.isnan(variance):
        ci95, p = [0.0, 0.0], 1.0
    return DeLong(auroc=ours, against=theirs, difference=difference, ci95=ci95, p=p)
