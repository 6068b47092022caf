"""How often the nearest images are of the query's class, images of its own group left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from training.bootstrap import Floats, Ints, Metric, Units, number, ratio

RANKS = (1, 2, 4, 6, 8)
NAMES = (*(f"recall_at_{k}" for k in RANKS), "map_at_r")
CELLS = 4_000_000
"""Largest queries x images array held at once."""


class Retrieved(Metric):
    """A metric and its value expected of a random ranking."""

    chance: float | None


@dataclass(frozen=True, eq=False)
class Queries:
    """What each of Q queries found: `scores` and expected `chances` [Q, 6] in order of `NAMES`, and whether there was
    anything of its class to find, bool [Q]."""

    scores: Floats
    chances: Floats
    judged: NDArray[np.bool_]


def retrieval_metrics(
    features: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Retrieved]:
    """`recall_at_1/2/4/6/8` and `map_at_r` of every image asked against all images of other groups.

    Args:
        features: [N,D], each of length 1; neighbours are ranked by cosine.
        labels: [N] names or indices of classes, or [N,K] of zeros and ones, where sharing one class is enough.
        groups: [N] names of what must not be split; no empty name.

    recall_at_k is the share of queries with at least one image of their class among the first k; map_at_r is
    mean average precision over the first R, with R the images of the query's class in other groups (Musgrave,
    Belongie & Lim, "A Metric Learning Reality Check", 2020, section 3.2). Queries without any (R = 0) are not judged.
    Equal similarities are ranked in an order drawn by `seed`, for each query anew: no neighbours in the file and no
    image for all are favoured.
    `chance` is exact for a random order of the same gallery. `ci95` draws the groups of the queries; the gallery is
    held fixed.

    Raises:
        ValueError: shapes differ, a feature is not finite or not of length 1, or a group has an empty name.
    """
    zeros = np.zeros(len(np.asarray(groups)), dtype=np.int64)
    units = Units.of(groups, zeros, zeros, resamples=resamples, seed=seed)
    return summarise(per_query(features, labels, groups, seed=seed), units)


def per_query(
    features: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, asked: ArrayLike | None = None, seed: int = 0
) -> Queries:
    """What rows `asked` (default all N) find among all N rows of other groups; arguments and errors as above."""
    x, member = _checked(features, labels)
    group = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    rows = np.arange(len(x)) if asked is None else np.asarray(asked, dtype=np.int64)
    scores, chances = np.zeros((len(rows), len(NAMES))), np.zeros((len(rows), len(NAMES)))
    judged = np.zeros(len(rows), dtype=bool)
    step = max(1, CELLS // len(x))
    for start in range(0, len(rows), step):
        part, queries = slice(start, start + step), rows[start : start + step]
        other = group[queries, None] != group
        relevant = (member[queries] @ member.T > 0) & other
        similar = np.where(other, x[queries] @ x.T, np.float32(-np.inf))
        scores[part] = _scores(similar, relevant, rng)
        chances[part] = _chances(relevant.sum(axis=1), other.sum(axis=1))
        judged[part] = relevant.any(axis=1)
    return Queries(scores, chances, judged)


def _checked(features: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    x, y = np.asarray(features, dtype=np.float32), np.asarray(labels)
    if x.ndim != 2 or len(y) != len(x) or y.ndim not in {1, 2}:
        raise ValueError(f"features {x.shape} and labels {y.shape}: must be [N,D] and [N] or [N,K]")
    lengths = np.linalg.norm(x, axis=1)
    if not (np.abs(lengths - 1) < 1e-3).all():
        wrong = int((~(np.abs(lengths - 1) < 1e-3)).sum())
        raise ValueError(f"features: {wrong} of {len(x)} rows are not of length 1; divide each by its norm")
    member = (y[:, None] == np.unique(y)) if y.ndim == 1 else y
    return x, member.astype(np.float32)


def _scores(similar: NDArray[np.float32], relevant: NDArray[np.bool_], rng: np.random.Generator) -> Floats:
    """Values [Q,len(NAMES)] of queries whose gallery has similarities [Q,N] (-inf: not in it) and relevance [Q,N]."""
    size, wanted = similar.shape[1], relevant.sum(axis=1)
    top = min(size, max(*RANKS, int(wanted.max(initial=0))))
    first = _first(similar, top, rng)
    hits = np.take_along_axis(relevant, first, axis=1)
    recall = [hits[:, :k].any(axis=1) for k in RANKS]
    precision = hits.cumsum(axis=1) / np.arange(1, top + 1)
    within = np.arange(top) < wanted[:, None]
    average = ratio((precision * hits * within).sum(axis=1), wanted)
    return np.column_stack([*recall, np.nan_to_num(average)]).astype(np.float64)


def _first(similar: NDArray[np.float32], top: int, rng: np.random.Generator) -> Ints:
    """The places [Q,top] of the largest values, largest first, equal ones in an order of chance."""
    bits = (similar + np.float32(0)).view(np.uint32)  # of -0 and 0 the same
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # sorted as numbers as the values are
    keys = ~((rising.astype(np.uint64) << np.uint64(32)) | rng.integers(2**32, size=bits.shape, dtype=np.uint32))
    if top * 4 > keys.shape[1]:
        return np.argsort(keys, axis=1)[:, :top].astype(np.int64)
    places = np.argpartition(keys, top - 1, axis=1)[:, :top]
    order = np.argsort(np.take_along_axis(keys, places, axis=1), axis=1)
    return np.take_along_axis(places, order, axis=1).astype(np.int64)


def _chances(relevant: Ints, gallery: Ints) -> Floats:
    """Values [Q,len(NAMES)] expected of a random order of a gallery of n images, R of them relevant.

    A recall at k fails where all of the first k are of the n - R others: C(n-R,k) / C(n,k). The mean average
    precision sums, over places i up to R, P(i hits) and P(i and an earlier one hit), divided by i and by R.
    """
    n, r = gallery.astype(np.float64), relevant.astype(np.float64)
    recall = []
    for k in RANKS:
        possible, cut = n - r >= k, np.minimum(k, n)
        logs = _log_choose(np.maximum(n - r, cut), cut) - _log_choose(n, cut)
        recall.append(np.where(possible, 1 - np.exp(logs), (r > 0).astype(np.float64)))
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, max(2, int(r.max(initial=0)) + 1)))])[relevant]
    pairs = np.nan_to_num(ratio(r * (r - 1), n * (n - 1)))
    precision = np.nan_to_num(ratio(ratio(r, n) * harmonic + pairs * (r - harmonic), r))
    return np.column_stack([*recall, precision])


def _log_choose(n: Floats, k: Floats) -> Floats:
    logs: Floats = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return logs


def summarise(found: Queries, units: Units) -> dict[str, Retrieved]:
    """The metrics of queries [Q], of which `units` knows group, fold and repeat."""
    scores, chances, judged = found.scores, found.chances, found.judged
    of = np.repeat(judged[:, None], len(RANKS), axis=1)
    rates = units.rates(scores[:, :-1] * of, of)
    columns = np.column_stack([scores[:, -1] * judged, judged])
    rates += units.draw(columns, lambda sums: ratio(sums[..., :1], sums[..., 1:])).metrics()
    chance = chances[judged].mean(axis=0) if judged.any() else np.full(len(NAMES), np.nan)
    return {
        name: Retrieved(value=m["value"], ci95=m["ci95"], per_fold=m["per_fold"], chance=number(chance[at]))
        for at, (name, m) in enumerate(zip(NAMES, rates, strict=True))
    }
