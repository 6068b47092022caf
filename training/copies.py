"""Copies and near copies: which images are the same picture, and which groups they weld together.

All is read off grey thumbnails of 64x64. A perceptual hash, also of the seven turned and mirrored forms, only nominates
a pair; it is a copy if the thumbnails correlate >= 0.998 after the grey values of one were given the distribution of
the other's, which undoes brightness, contrast, gamma and clipping. Merging by hash alone joins most of a homogeneous
modality into one group. `python -m tests.benchmarks.copies` says what is found and what is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

HASH_DISTANCE = 10
"""Bits of 64 in which the hashes of a nominated pair differ at most."""
CORRELATION = 0.998
"""From here on a pair is a copy."""
LOOK = 0.98
"""From here on a pair that is none is worth a look."""
COARSE, COARSE_CORRELATION = 16, 0.97
"""Side of the means by which most nominated pairs are dismissed, and the least correlation that these must have."""
UNTONED_CORRELATION = 0.9
"""What thumbnails must correlate as they are: any two vignettes agree once their grey values are made to."""
SIDE = 64
TURNS = (
    *("", "a quarter turn", "half a turn", "a quarter turn"),
    *("mirrored left to right", "mirrored along a diagonal", "mirrored top to bottom", "mirrored along a diagonal"),
)
"""What was done to the second image of a pair: quarter turns, then the same of its mirror image."""
_BLOCK, _CHUNK = 512, 2048

Thumbnails = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Near:
    """Pairs of rows that look alike: `rows` [P, 2] (i < j, each pair once), `correlation` [P], and `turn` [P], the
    number in `TURNS` of what makes the second look like the first."""

    rows: NDArray[np.int64]
    correlation: NDArray[np.float32]
    turn: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: np.ndarray) -> Near:
        return Near(self.rows[which], self.correlation[which], self.turn[which])

    @property
    def copies(self) -> NDArray[np.bool_]:
        """[P]: whether a pair is a copy, or only worth a look."""
        return np.asarray(self.correlation >= CORRELATION)


def near_copies(grey: Thumbnails, least: float = LOOK) -> Near:
    """All nominated pairs of thumbnails [N, 4096] that correlate >= `least` in one of the eight positions.

    Of several positions the best is kept. Images of one grey value are alike to none.
    """
    coefficients = _low_frequencies(grey)
    nominated = near_pairs(_hashes(coefficients), np.stack([_hashes(_turned(coefficients, t)) for t in range(8)]))
    coarse = grey.reshape(-1, COARSE, SIDE // COARSE, COARSE, SIDE // COARSE).mean(axis=(2, 4), dtype=np.float32)
    nominated = nominated[_toned_correlation(coarse, nominated) >= COARSE_CORRELATION]
    found = _toned_correlation(grey.reshape(-1, SIDE, SIDE), nominated)
    order = np.lexsort((nominated[:, 2], -found))
    _, first = np.unique(nominated[order, :2], axis=0, return_index=True)
    best = order[np.sort(first)]
    best = best[found[best] >= least]
    return Near(nominated[best, :2], found[best], nominated[best, 2])


def near_pairs(hashes: NDArray[np.uint64], turned: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rows (i, j, turn) [P, 3], i < j, for which `hashes[i]` and `turned[turn, j]` differ in <= `HASH_DISTANCE` bits.

    hashes: [N] of the images; turned: [T, N] of their turned forms.
    """
    found = [np.empty((0, 3), dtype=np.int64)]
    for at in range(0, len(hashes), _BLOCK):
        block = hashes[at : at + _BLOCK, None]
        for other in range(at, len(hashes), _CHUNK):
            for turn, row in enumerate(turned):
                # arrays of this size stay in the cache
                near = np.bitwise_count(block ^ row[None, other : other + _CHUNK]) <= HASH_DISTANCE
                if near.any():
                    i, j = np.nonzero(near)
                    later = i + at < j + other
                    rows = (i[later] + at, j[later] + other, np.full(later.sum(), turn))
                    found.append(np.stack(rows, axis=1))
    return np.concatenate(found)


def _low_frequencies(grey: Thumbnails) -> NDArray[np.float32]:
    """The 8 x 8 lowest coefficients of the cosine transform, [N, 8, 8]."""
    basis = dct(np.eye(SIDE, dtype=np.float32), axis=0)[:8]
    parts = [grey[:0].reshape(0, 8, 8).astype(np.float32)]
    for at in range(0, len(grey), _CHUNK):
        parts.append(basis @ grey[at : at + _CHUNK].reshape(-1, SIDE, SIDE).astype(np.float32) @ basis.T)
    return np.concatenate(parts)


def _turned(coefficients: NDArray[np.float32], turn: int) -> NDArray[np.float32]:
    """Coefficients of the turned images: to mirror an axis changes the sign of its odd frequencies."""
    signs = np.where(np.arange(8) % 2, -1, 1).astype(np.float32)
    mirrored = coefficients * signs if turn >= 4 else coefficients
    for _ in range(turn % 4):  # np.rot90 is a transposition, then the rows in reverse
        mirrored = mirrored.transpose(0, 2, 1) * signs[:, None]
    return mirrored


def _hashes(coefficients: NDArray[np.float32]) -> NDArray[np.uint64]:
    """64 bits per image [N]: which of its coefficients [N, 8, 8] are above their median, as in `imagehash.phash`."""
    flat = coefficients.reshape(-1, 64)
    bits = flat > np.median(flat, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64)


def _toned_correlation(images: np.ndarray, pairs: NDArray[np.int64]) -> NDArray[np.float32]:
    """Correlation [P] of the pairs (i, j, turn) of images [N, S, S] after their grey values were made to agree.

    Either image is given the values of the other, by rank, and the better of the two counts: a clipped image can be
    made from an unclipped one, not the other way. Pairs that correlate less than `UNTONED_CORRELATION` as they are
    keep that.
    """
    used, place = np.unique(pairs[:, :2], return_inverse=True)
    pairs = np.column_stack([place.reshape(-1, 2), pairs[:, 2]])
    images = images[used]
    flat = images.reshape(len(used), images.shape[1] * images.shape[2])
    order = np.argsort(flat, axis=1, kind="stable")
    values = np.take_along_axis(flat, order, axis=1)
    ranks: np.ndarray = np.empty(images.shape, dtype=np.int16)
    np.put_along_axis(ranks.reshape(flat.shape), order, np.arange(flat.shape[1], dtype=np.int16)[None], axis=1)
    found = [np.empty(0, dtype=np.float32)]
    for part in _parts(pairs, 1 << 21, flat.shape[1]):
        i, j = part[:, 0], part[:, 1]
        one, other = flat[i], _each_turned(images, part)
        plain = _correlation(one, other)
        alike = np.flatnonzero(plain >= UNTONED_CORRELATION)
        i, j, one, other = i[alike], j[alike], one[alike], other[alike]
        as_other = np.take_along_axis(values[j], ranks[i].reshape(one.shape).astype(np.intp), axis=1)
        as_one = np.take_along_axis(values[i], _each_turned(ranks, part[alike]).astype(np.intp), axis=1)
        better = np.maximum(_correlation(as_other, other), _correlation(one, as_one))
        plain[alike] = np.maximum(plain[alike], better)
        found.append(plain)
    return np.concatenate(found)


def _each_turned(images: np.ndarray, pairs: NDArray[np.int64]) -> np.ndarray:
    """The second image of each pair (i, j, turn), turned and flat: [P, S * S]."""
    out = np.empty((len(pairs), *images.shape[1:]), dtype=images.dtype)
    for turn in np.unique(pairs[:, 2]):
        mine = pairs[:, 2] == turn
        out[mine] = _turn(images[pairs[mine, 1]], int(turn))
    return out.reshape(len(pairs), images.shape[1] * images.shape[2])


def _parts(pairs: NDArray[np.int64], cells: int, each: int) -> Iterator[NDArray[np.int64]]:
    step = max(1, cells // each)
    return (pairs[at : at + step] for at in range(0, len(pairs), step))


def _turn(images: np.ndarray, turn: int) -> np.ndarray:
    """Images [N, S, S] in position `turn` of `TURNS`."""
    return np.rot90(images[:, :, ::-1] if turn >= 4 else images, turn % 4, axes=(1, 2))


def _correlation(one: np.ndarray, other: np.ndarray) -> NDArray[np.float32]:
    """Pearson's correlation [P] of rows [P, D]; 0 where a row is constant."""
    a, b = (rows - rows.mean(axis=1, keepdims=True, dtype=np.float32) for rows in (one, other))
    norm = np.sqrt(np.einsum("ij,ij->i", a, a) * np.einsum("ij,ij->i", b, b))
    return np.asarray(np.einsum("ij,ij->i", a, b) / np.where(norm > 0, norm, np.inf), dtype=np.float32)


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
