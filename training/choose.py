"""Which unlabelled images to label next: typical ones, of kinds that have no label yet.

Chosen by what was measured (tests/benchmarks/label_next.py): images that the model is unsure of taught no more than
images drawn by chance. There, the pool was of the same kind as the labels; in one that is not, a large kind may be
worthless (empty background came first on the CRIC patches): `training.suggest` keeps such images out of the pool.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

TYPICAL_NEIGHBOURS = 20
LARGEST_POOL = 10_000
"""Images that are clustered, at most; of more, as many drawn by chance."""
MOST_CLUSTERS = 500
_CHUNK = 1024


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


def label_uncertainty(probabilities: np.ndarray) -> np.ndarray:
    """[N] of labels that are judged by themselves [N, K], that of the least sure: 0 where all are, 1 at a half."""
    return np.asarray((1 - np.abs(2 * probabilities - 1)).max(axis=1))


def typical(
    features: np.ndarray, labelled: np.ndarray, pool: np.ndarray, groups: np.ndarray, budget: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """(rows of `pool` that are typical of images unlike the labelled ones, how many images each stands for).

    TypiClust (Hacohen, Dekel and Weinshall, ICML 2022): k-means into as many clusters as there are labels and `count`
    together, at most 500; clusters without a label first, the largest first; of each, the row with the smallest mean
    distance to its 20 nearest in the cluster (equation 1). Needs no classes, so an encoder is enough.

    Args:
        features: [N, D] of all rows; compared by cosine.
        labelled: [L] rows that have a label.
        pool: [P] rows to choose from.
        groups: [N] what must not be labelled more than `budget.per_group` times at once, such as a patient.

    Deviations: features of unit length; labels count by their groups, for those of one patient cover one place; the
    group limit, for which fewer than `count` may come back; of more than `LARGEST_POOL` rows, as many drawn by chance.
    """
    generator = np.random.default_rng(budget.seed)
    if len(pool) > LARGEST_POOL:
        pool = np.sort(generator.choice(pool, LARGEST_POOL, replace=False))
    if len(labelled) > LARGEST_POOL:
        labelled = np.sort(generator.choice(labelled, LARGEST_POOL, replace=False))
    rows = np.concatenate([labelled, pool]).astype(np.int64)
    vectors = _unit(features[rows])
    count = min(len(np.unique(groups[labelled])) + budget.count, MOST_CLUSTERS, len(rows))
    cluster = _k_means(vectors, count, budget.seed)
    known = np.arange(len(rows)) < len(labelled)
    sizes, covered = np.bincount(cluster, minlength=count), np.bincount(cluster[known], minlength=count)
    ranked = [_most_typical_first(vectors, np.flatnonzero(cluster == c), known) for c in range(count)]
    chosen = _in_turns(ranked, np.lexsort((-sizes, covered)), groups[rows], budget)
    return rows[chosen], sizes[cluster[chosen]]


def _most_typical_first(vectors: np.ndarray, members: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The members without a label, by mean distance to their nearest in the cluster."""
    asked, own = members[~known[members]], vectors[members]
    nearest = min(TYPICAL_NEIGHBOURS + 1, len(members))  # the first is itself, at 0
    means = np.empty(len(asked))
    for at in range(0, len(asked), _CHUNK):
        squared = np.maximum(2 - 2 * vectors[asked[at : at + _CHUNK]] @ own.T, 0)
        means[at : at + _CHUNK] = np.sqrt(np.sort(squared, axis=1)[:, :nearest]).mean(axis=1)
    return np.asarray(asked[np.argsort(means, kind="stable")])


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


def _k_means(vectors: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Cluster of each row; in one thread, for sums of several threads are not the same twice."""
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # copies leave clusters empty, which harms nothing
        return np.asarray(KMeans(clusters, n_init=1, random_state=seed).fit(vectors).labels_)
