"""Several models on the same rows: differences of every metric, McNemar's test, DeLong's, and Holm's correction.

Signs are `ours - theirs`: above zero, ours has the larger value, which is better of every metric but those of `LESS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtr
from scipy.stats import binom, chi2

from training import multilabel
from training.bootstrap import Floats, tail_share
from training.delong import DeLong, delong
from training.metrics import NAMES, paired_draws
from training.probabilities import HALF

RESAMPLES = 2000
"""Resamples of groups: the smallest p-value that they can give is 0.001."""
LESS = frozenset({"ece", "hamming"})
"""Metrics of which less is better."""
EXACT_BELOW = 25
"""Discordant images from which McNemar's chi-squared approximation is used."""
_ROUNDING = 1e-12


class Difference(TypedDict):
    """`ours - theirs` of one metric; `None` where it is not defined."""

    difference: float | None
    ci95: list[float | None]
    p: float | None


class Adjusted(Difference):
    """A difference among several: `p_holm` is adjusted for the number of comparisons of this metric."""

    p_holm: float | None


class McNemar(TypedDict):
    """Images that only one side names right, and whether that is more than chance."""

    only_ours: float
    only_theirs: float
    method: str
    p: float
    p_group: float


class AdjustedMcNemar(McNemar):
    p_holm: float | None


class AdjustedDeLong(DeLong):
    p_holm: float | None


class Comparison(TypedDict):
    """What `summary.json` says of one comparison; `delong` is None for more than two classes."""

    metrics: dict[str, Adjusted]
    mcnemar: AdjustedMcNemar
    delong: AdjustedDeLong | None


def compare(
    truth: ArrayLike,
    ours: ArrayLike,
    others: Mapping[str, ArrayLike],
    *,
    group: ArrayLike,
    fold: ArrayLike,
    repeat: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Ours against each of the others, by name: ready for JSON.

    Args:
        truth, group, fold, repeat: [M], as for `training.metrics.summarise`; truth of label sets is bool [M,C].
        ours: probabilities [M,C].
        others: name -> probabilities [M,C] of the same rows.

    With several others, `p_holm` is the p-value adjusted by Bonferroni-Holm (Holm, 1979) over them, each metric being a
    question of its own: choose the metric before looking. Of McNemar it adjusts `p_group`. A label set is right as a
    whole; `delong` is for two classes.
    """
    rows = {"group": group, "fold": fold, "repeat": repeat}
    names, sides = list(others), [np.asarray(p, dtype=np.float64) for p in others.values()]
    t, own = np.asarray(truth), np.asarray(ours, dtype=np.float64)
    found = differences(t, own, sides, **rows, resamples=resamples, seed=seed)
    discordant = [mcnemar(_right(own, t), _right(p, t), group=group, repeat=repeat) for p in sides]
    two = own.shape[1] == 2 and t.ndim == 1
    areas = [delong(t, own[:, 1], p[:, 1], **rows) if two else None for p in sides]
    measured = multilabel.NAMES if t.ndim == 2 else NAMES
    by_metric = {name: holm([one[name]["p"] for one in found]) for name in measured}
    by_group, by_area = holm([m["p_group"] for m in discordant]), holm([a["p"] if a else None for a in areas])
    return {
        name: Comparison(
            metrics={metric: Adjusted(**found[at][metric], p_holm=by_metric[metric][at]) for metric in measured},
            mcnemar=AdjustedMcNemar(**discordant[at], p_holm=by_group[at]),
            delong=None if area is None else AdjustedDeLong(**area, p_holm=by_area[at]),
        )
        for at, (name, area) in enumerate(zip(names, areas, strict=True))
    }


def _right(probabilities: Floats, truth: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows [M] are named right, label sets as a whole."""
    if truth.ndim == 2:
        return np.asarray(((probabilities >= HALF) == truth).all(axis=1))
    return np.asarray(probabilities.argmax(axis=1) == truth)


def differences(
    truth: ArrayLike,
    ours: ArrayLike,
    others: Sequence[ArrayLike],
    *,
    group: ArrayLike,
    fold: ArrayLike,
    repeat: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Difference]]:
    """For each of the others, every metric of ours less that of theirs, on the same rows; truth as `judgement` has it.

    One bootstrap over groups serves all sides: a resample weighs the groups of every side alike, so what makes a group
    easy or hard for both cancels out. The difference is taken within a repeat, where both sides judge the same folds,
    and averaged over repeats; values and intervals are those of `training.metrics.summarise`. `p` is two-sided, the
    level at which the interval would touch 0: from the share of resamples on the far side of 0, the data counted as
    one of them (Davison & Hinkley, 1997), with the correction for few groups of the interval. Resamples in
    which a side is undefined are left out. As in `summarise`, those of `ece` are moved back by the bootstrap's estimate
    of their bias. Fewer than two groups give neither interval nor p-value.
    """
    several = np.ndim(truth) == 2
    draws, names = (multilabel.paired_draws, multilabel.NAMES) if several else (paired_draws, NAMES)
    rows = {"group": group, "fold": fold, "repeat": repeat}
    first, *rest = draws(truth, [ours, *others], resamples=resamples, seed=seed, **rows)
    groups = len(np.unique(np.asarray(group, dtype=str)))
    return [
        {
            name: difference_of(
                float(first.point[at] - side.point[at]),
                first.resampled[at] - side.resampled[at],
                groups,
                unbias=name == "ece",
            )
            for at, name in enumerate(names)
        }
        for side in rest
    ]


def mcnemar(ours: ArrayLike, theirs: ArrayLike, *, group: ArrayLike, repeat: ArrayLike) -> McNemar:
    """McNemar's test on which images each side names right, bool [M], and the same with groups respected.

    `p` is McNemar's (1947): exact binomial below 25 discordant images, else chi-squared with continuity correction
    (Edwards, 1948), as `method` says. It takes images as independent, which those of one patient are not. `p_group`
    is the exact permutation test that swaps both sides within whole groups: if they are equally good, each group's
    surplus of images that only ours has right could as well have the other sign. With groups of one image it is the
    exact McNemar test. With several repeats the counts are means over repeats and `p` is that of the rounded means,
    which errs on the safe side, for a mean varies no more than one repeat does; `p_group` swaps a group in all repeats
    at once.
    """
    a, b = np.asarray(ours, dtype=bool), np.asarray(theirs, dtype=bool)
    repeats = len(np.unique(np.asarray(repeat)))
    only_ours, only_theirs = float((a & ~b).sum() / repeats), float((b & ~a).sum() / repeats)
    _, codes = np.unique(np.asarray(group, dtype=str), return_inverse=True)
    surplus = np.bincount(codes, a.astype(np.float64) - b).astype(np.int64)
    method, p = _plain_mcnemar(round(only_ours), round(only_theirs))
    return McNemar(only_ours=only_ours, only_theirs=only_theirs, method=method, p=p, p_group=_sign_flips(surplus))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted so that the chance of any false alarm among them stays below the level (Holm, 1979).

    Undefined ones stay so, and are not counted.
    """
    defined = [at for at, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, at in enumerate(sorted(defined, key=lambda i: p_values[i] or 0.0)):
        largest = min(1.0, max(largest, (len(defined) - rank) * (p_values[at] or 0.0)))
        adjusted[at] = largest
    return adjusted


def difference_of(point: float, draws: Floats, groups: int, *, unbias: bool) -> Difference:
    """The difference, its interval and p-value, from its resamples [B] over so many groups; see `differences`."""
    defined = draws[~np.isnan(draws)]
    if np.isnan(point) or not len(defined) or groups < 2:
        return Difference(difference=None if np.isnan(point) else point, ci95=[None, None], p=None)
    if unbias:
        defined = defined - (defined.mean() - point)
    share = tail_share(groups)
    low, high = (float(end) for end in np.quantile(defined, [share, 1 - share]))
    return Difference(difference=point, ci95=[low, high], p=_two_sided(defined, groups))


def _two_sided(draws: Floats, groups: int) -> float:
    """The inverse of `tail_share`: the level of the interval that ends at 0."""
    sides = (draws <= _ROUNDING).sum(), (draws >= -_ROUNDING).sum()
    share = (1 + min(sides)) / (1 + len(draws))
    return float(2 * stdtr(groups - 1, min(0.0, ndtri(share)) * np.sqrt((groups - 1) / groups)))


def _plain_mcnemar(ours: int, theirs: int) -> tuple[str, float]:
    total = ours + theirs
    if total < EXACT_BELOW:
        return "exact binomial", float(min(1.0, 2 * binom.cdf(min(ours, theirs), total, 0.5)))
    return "chi-squared, continuity-corrected", float(chi2.sf((abs(ours - theirs) - 1) ** 2 / total, 1))


def _sign_flips(values: np.ndarray) -> float:
    """Chance that integers [G] with random signs have a sum as far from 0 as theirs is: exact, not sampled.

    The characteristic function of the sum is the product of cos(v t), and its discrete Fourier transform over as many
    points as the sum has values is the distribution.
    """
    sizes, counts = np.unique(np.abs(values[values != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    reach = int((sizes * counts).sum())
    points = 2 * reach + 1
    characteristic = np.ones(points)
    for size, count in zip(sizes, counts, strict=True):
        turned = np.arange(points) * size % points  # whole turns are taken away first: small angles have exact cosines
        characteristic *= np.cos(2 * np.pi / points * turned) ** count
    chances = np.fft.fft(characteristic).real / points
    sums = np.abs(np.fft.fftfreq(points, 1 / points).round())
    p = chances[sums >= abs(int(values.sum()))].sum()
    return float(np.clip(p, 2.0 ** (1 - counts.sum()), 1))
