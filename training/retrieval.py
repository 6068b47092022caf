"""How often the nearest images are of the query's class, images of its own group left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from training.bootstrap import Floats, Ints, Metric, Units, mean_defined, number, ratio

RANKS = (1, 2, 4, 6, 8)
NAMES = (*(f"recall_at_{k}" for k in RANKS), "map_at_r")
CELLS = 4_000_000
"""Largest queries x images array held at once."""
DEALS = 30
"""Labellings drawn for what would be found by chance."""
CHANCE_CELLS = 150_000_000
"""Queries x images x labellings that are looked at for it, at most: else evenly spread queries speak for all."""


class Retrieved(Metric):
    """A metric and its value under labels that say nothing of the features."""

    chance: float | None


@dataclass(frozen=True, eq=False)
class Queries:
    """What each of Q queries found: `scores` [Q, 6] in order of `NAMES`, what it would by chance (NaN where it was not
    asked for that), and whether there was anything of its class to find, bool [Q]."""

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
    `ci95` draws the groups of the queries; the gallery is held fixed.
    `chance` is the mean over `DEALS` labellings in which whole groups carry the labels of others (see `dealt`), under
    the same ranking. It is not that of a random ranking: images of one group lie together, so the first k are of fewer
    than k groups, and recall without any signal is the lower for it.

    Raises:
        ValueError: shapes differ, a feature is not finite or not of length 1, or a group has an empty name.
    """
    zeros = np.zeros(len(np.asarray(groups)), dtype=np.int64)
    units = Units.of(groups, zeros, zeros, resamples=resamples, seed=seed)
    return summarise(per_query(features, labels, groups, seed=seed), units)


def per_query(
    features: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    *,
    asked: ArrayLike | None = None,
    seed: int = 0,
    deals: int = DEALS,
) -> Queries:
    """What rows `asked` (default all N) find among all N rows of other groups, and what by chance under `deals`
    labellings; arguments and errors as above."""
    x, member = _checked(features, labels)
    group = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    labellings = np.stack([np.arange(len(x)), *(dealt(group, rng) for _ in range(deals))])
    common = np.stack([member[rows].sum(axis=0) for rows in labellings])
    rows = np.arange(len(x)) if asked is None else np.asarray(asked, dtype=np.int64)
    spoken = max(1, CHANCE_CELLS // (max(1, deals) * len(x))) if deals else 0
    speaks = np.isin(np.arange(len(rows)), np.linspace(0, len(rows) - 1, min(len(rows), spoken)).astype(np.int64))
    scores, chances = np.zeros((len(rows), len(NAMES))), np.full((len(rows), len(NAMES)), np.nan)
    judged = np.zeros(len(rows), dtype=bool)
    step = max(1, CELLS // len(x))
    for start in range(0, len(rows), step):
        part = np.arange(start, min(start + step, len(rows)))
        queries, told = rows[part], np.flatnonzero(speaks[part])
        # no more share a label with a query than carry one of its labels
        most = int(np.einsum("dqk,dk->dq", member[labellings[:, queries]], common).max(initial=0))
        other = group[queries, None] != group
        similar = np.where(other, x[queries] @ x.T, np.float32(-np.inf))
        first = _first(similar, min(len(x), max(*RANKS, most)), rng)
        scores[part], judged[part] = _scores(first, (member[queries] @ member.T > 0) & other)
        chances[part[told]] = _by_chance(first[told], member, labellings[1:], queries[told], other[told])
    return Queries(scores, chances, judged)


def _by_chance(
    first: Ints, member: NDArray[np.float32], labellings: Ints, queries: Ints, other: NDArray[np.bool_]
) -> Floats:
    """Mean values [Q,len(NAMES)] over labellings [D,N] under which there is anything to find, else NaN."""
    sums, counts = np.zeros((len(queries), len(NAMES))), np.zeros((len(queries), 1))
    for labelling in labellings:
        shared = np.take(member[labelling[queries]] @ member.T > 0, labelling, axis=1)
        values, judged = _scores(first, shared & other)
        sums, counts = sums + values, counts + judged[:, None]
    return ratio(sums, counts)


def dealt(group: Ints, rng: np.random.Generator) -> Ints:
    """Rows [N] of which each row gets its label: labels are dealt anew to whole groups, given as numbers [N].

    Groups are laid end to end in one order and again in another; each carries what lies at its middle, image by image,
    from the beginning again where it has more images. Of groups of one size this is a permutation; else a group is
    drawn about as often as it has images, so that classes stay as common as they are.
    """
    by_group, sizes = np.argsort(group, kind="stable"), np.bincount(group)
    starts = np.cumsum(sizes) - sizes
    here, there = rng.permutation(len(sizes)), rng.permutation(len(sizes))
    middle = np.cumsum(sizes[here]) - sizes[here] / 2
    giver = np.empty(len(sizes), dtype=np.int64)
    giver[here] = there[np.searchsorted(np.cumsum(sizes[there]), middle, side="right")]
    turned = rng.integers(sizes[giver])
    own, giving = group[by_group], giver[group[by_group]]
    place = np.arange(len(group)) - starts[own]
    rows = np.empty(len(group), dtype=np.int64)
    rows[by_group] = by_group[starts[giving] + (place + turned[own]) % sizes[giving]]
    return rows


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


def _scores(first: Ints, relevant: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
    """(values [Q,len(NAMES)], whether anything was to be found [Q]) of queries with the images [Q,top] first found and
    relevance [Q,N]; values are 0 where there was not."""
    wanted, top = relevant.sum(axis=1), first.shape[1]
    hits = np.take_along_axis(relevant, first, axis=1)
    recall = [hits[:, :k].any(axis=1) for k in RANKS]
    precision = hits.cumsum(axis=1) / np.arange(1, top + 1)
    within = np.arange(top) < wanted[:, None]
    average = np.nan_to_num(ratio((precision * hits * within).sum(axis=1), wanted))
    return np.column_stack([*recall, average]).astype(np.float64), wanted > 0


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


def summarise(found: Queries, units: Units) -> dict[str, Retrieved]:
    """The metrics of queries [Q], of which `units` knows group, fold and repeat."""
    scores, chances, judged = found.scores, found.chances, found.judged
    of = np.repeat(judged[:, None], len(RANKS), axis=1)
    rates = units.rates(scores[:, :-1] * of, of)
    columns = np.column_stack([scores[:, -1] * judged, judged])
    rates += units.draw(columns, lambda sums: ratio(sums[..., :1], sums[..., 1:])).metrics()
    chance = mean_defined(chances, axis=0) if judged.any() else np.full(len(NAMES), np.nan)
    return {
        name: Retrieved(value=m["value"], ci95=m["ci95"], per_fold=m["per_fold"], chance=number(chance[at]))
        for at, (name, m) in enumerate(zip(NAMES, rates, strict=True))
    }
