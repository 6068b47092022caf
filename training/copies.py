"""Copies and near copies: which images are the same picture, and which groups they weld together.

A perceptual hash (Hamming distance <= 10 of 64 bits) only nominates a pair; it is a copy if the 64x64 grey images
correlate >= 0.998. Merging by hash alone joins most of a homogeneous modality into one group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

HASH_DISTANCE = 10
CORRELATION = 0.998
_CHUNK = 2048


def near_pairs(hashes: np.ndarray) -> np.ndarray:
    """Pairs [P, 2] (i < j) whose 64-bit hashes [N] (uint64) differ in at most `HASH_DISTANCE` bits."""
    found = []
    for at in range(0, len(hashes), _CHUNK):
        block = hashes[at : at + _CHUNK]
        for other in range(at, len(hashes), _CHUNK):
            distance = np.bitwise_count(block[:, None] ^ hashes[None, other : other + _CHUNK])
            i, j = np.nonzero(distance <= HASH_DISTANCE)
            i, j = i + at, j + other
            found.append(np.stack([i[i < j], j[i < j]], axis=1))
    return np.concatenate(found) if found else np.empty((0, 2), dtype=np.int64)


def correlated(pairs: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Those of `pairs` [P, 2] whose grey images [N, 4096] correlate >= `CORRELATION` (constant images never do)."""
    values = grey.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    values /= np.where(norm > 0, norm, np.inf)
    keep = [
        np.einsum("ij,ij->i", values[part[:, 0]], values[part[:, 1]]) >= CORRELATION
        for part in np.array_split(pairs, max(1, len(pairs) // 8192))
    ]
    return pairs[np.concatenate(keep)] if len(pairs) else pairs


def merge_groups(groups: Sequence[str], pairs: np.ndarray) -> list[str]:
    """Each row's group after rows of `pairs` [P, 2] were welded: the smallest name of the joined groups."""
    names, member = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    edges = member[pairs] if len(pairs) else np.empty((0, 2), dtype=np.int64)
    graph = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(names), len(names)))
    _, component = connected_components(graph, directed=False)
    # names are sorted, so the first of a component is its smallest
    first = np.full(component.max() + 1, -1)
    for index in range(len(names) - 1, -1, -1):
        first[component[index]] = index
    return [str(names[first[component[m]]]) for m in member]


def copy_sets(count: int, pairs: np.ndarray) -> np.ndarray:
    """Set number [count] of each row: rows linked by `pairs` share one."""
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1])
