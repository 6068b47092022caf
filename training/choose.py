"""Which unlabelled images to label next: uncertain ones that differ, or, with no classes yet, typical ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

SHORTLIST = 10
"""Uncertain images looked at for each that is suggested."""
TYPICAL_NEIGHBOURS = 20
LARGEST_POOL = 10_000
"""Images that are clustered, at most; of more, as many drawn by chance."""
MOST_CLUSTERS = 500


@dataclass(frozen=True)
class Budget:
    """How many images are wanted, how many of one group at most, and the seed of what is drawn by chance."""

    count: int
    per_group: int = 1
    seed: int = 0


def uncertainty(probabilities: np.ndarray) -> np.ndarray:
    """[N] one less the margin between the two likeliest of the classes [N, K]: 0 where sure, 1 at a tie."""
    best = np.sort(probabilities, axis=1)[:, -2:]
    return np.asarray(1 - (best[:, 1] - best[:, 0]))


def within_groups(rows: np.ndarray, groups: np.ndarray, per_group: int) -> np.ndarray:
    """`rows`, in order, less those that come after `per_group` of their own group; `groups` [N] is of all rows."""
    _, member = np.unique(groups[rows], return_inverse=True)
    order = np.argsort(member, kind="stable")
    starts = np.searchsorted(member[order], member[order])
    place = np.empty(len(rows), dtype=np.int64)
    place[order] = np.arange(len(rows)) - starts
    return np.asarray(rows[place < per_group])


def uncertain(
    features: np.ndarray, probabilities: np.ndarray, pool: np.ndarray, groups: np.ndarray, budget: Budget
) -> np.ndarray:
    """Rows of `pool` that the classifier is unsure of and that differ from each other, the most uncertain first.

    Args:
        features: [N, D] of all rows; compared by cosine.
        probabilities: [N, K] of all rows.
        pool: [P] rows to choose from.
        groups: [N] what must not be labelled more than `budget.per_group` times at once, such as a patient.

    The `SHORTLIST` times `count` most uncertain rows are clustered into `count` clusters by k-means weighted by
    uncertainty; of each, the row nearest the centre is taken: Zhdanov, "Diverse mini-batch active learning", 2019.
    Deviations: the group limit, applied to the shortlist; features of unit length. Fewer rows than `count` come back
    only where the group limit leaves fewer.
    """
    doubt = uncertainty(probabilities)
    order = within_groups(pool[np.argsort(-doubt[pool], kind="stable")], groups, budget.per_group)
    shortlist = order[: SHORTLIST * budget.count]
    if len(shortlist) <= budget.count:
        return shortlist
    vectors = _unit(features[shortlist])
    weights = np.maximum(doubt[shortlist], 1e-6)
    centres, cluster = _k_means(vectors, budget.count, budget.seed, weights)
    far = np.linalg.norm(vectors - centres[cluster], axis=1)
    nearest = np.lexsort((far, cluster))
    first = nearest[np.unique(cluster[nearest], return_index=True)[1]]
    chosen = np.zeros(len(shortlist), dtype=bool)
    chosen[first] = True
    chosen[np.flatnonzero(~chosen)[: budget.count - len(first)]] = True  # copies leave clusters empty
    return np.asarray(shortlist[chosen])


def typical(
    features: np.ndarray, labelled: np.ndarray, pool: np.ndarray, groups: np.ndarray, budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """(rows of `pool` that are typical of images unlike the labelled ones, how many images each stands for).

    TypiClust (Hacohen, Dekel and Weinshall, ICML 2022): k-means into as many clusters as there are labels and `count`
    together, at most 500; clusters without a label first, the largest first; of each, the row with the smallest mean
    distance to its 20 nearest in the cluster (equation 1). Arguments as of `uncertain`, but no probabilities: this is
    what an encoder without classes allows. Deviations: features of unit length; labels count by their groups, for
    those of one patient cover one place; the group limit; of more than `LARGEST_POOL` rows, as many drawn by chance.
    """
    generator = np.random.default_rng(budget.seed)
    if len(pool) > LARGEST_POOL:
        pool = np.sort(generator.choice(pool, LARGEST_POOL, replace=False))
    if len(labelled) > LARGEST_POOL:
        labelled = np.sort(generator.choice(labelled, LARGEST_POOL, replace=False))
    rows = np.concatenate([labelled, pool]).astype(np.int64)
    vectors = _unit(features[rows])
    count = min(len(np.unique(groups[labelled])) + budget.count, MOST_CLUSTERS, len(rows))
    _, cluster = _k_means(vectors, count, budget.seed)
    known = np.arange(len(rows)) < len(labelled)
    sizes, covered = np.bincount(cluster, minlength=count), np.bincount(cluster[known], minlength=count)
    ranked = [_most_typical_first(vectors, np.flatnonzero(cluster == c), known) for c in range(count)]
    chosen = _in_turns(ranked, np.lexsort((-sizes, covered)), groups[rows], budget)
    return rows[chosen], sizes[cluster[chosen]]


def _most_typical_first(vectors: np.ndarray, members: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The members without a label, by mean distance to their nearest in the cluster."""
    squared = np.maximum(2 - 2 * vectors[members] @ vectors[members].T, 0)
    nearest = np.sort(np.sqrt(squared), axis=1)[:, : TYPICAL_NEIGHBOURS + 1]  # the first is itself, at 0
    order = np.argsort(nearest.mean(axis=1), kind="stable")
    return np.asarray(members[order][~known[members[order]]])


def _in_turns(ranked: list[np.ndarray], turns: np.ndarray, groups: np.ndarray, budget: Budget) -> np.ndarray:
    """One place of each cluster of `turns` in turn, until `count` are chosen or nothing is left."""
    used: dict[object, int] = {}
    waiting, chosen = [list(ranked[c]) for c in turns], list[int]()
    while any(waiting) and len(chosen) < budget.count:
        for queue in waiting:
            while queue and used.get(groups[queue[0]], 0) >= budget.per_group:
                queue.pop(0)
            if queue and len(chosen) < budget.count:
                chosen.append(int(queue.pop(0)))
                used[groups[chosen[-1]]] = used.get(groups[chosen[-1]], 0) + 1
    return np.asarray(chosen, dtype=np.int64)


def _unit(features: np.ndarray) -> np.ndarray:
    values = features.astype(np.float64)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))


def _k_means(
    vectors: np.ndarray, clusters: int, seed: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(centres, cluster of each row); in one thread, for sums of several threads are not the same twice."""
    with threadpool_limits(1):
        fitted = KMeans(clusters, n_init=1, random_state=seed).fit(vectors, sample_weight=weights)
    return np.asarray(fitted.cluster_centers_), np.asarray(fitted.labels_)
