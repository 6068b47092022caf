"""Nearest neighbours by cosine similarity, with FAISS: one class per kind, one entry each in `INDEXES`.

FAISS brings an OpenMP runtime of its own, which must not share a process with torch's: nothing here imports torch,
and callers whose process holds torch reach this module through `serving.apart`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import faiss
import numpy as np

PROBES = 500
"""Vectors of the index that recall and time are measured with."""
LARGEST_FILE = 1 << 40


class Index(ABC):
    """A searchable set of unit vectors [N, D]; a row's number is its place in that set."""

    kind: ClassVar[str]

    def __init__(self, index: Any) -> None:
        self.index = index

    @classmethod
    @abstractmethod
    def build(cls, vectors: np.ndarray) -> Index:
        """The index of unit vectors float32 [N, D]."""

    @classmethod
    @abstractmethod
    def read(cls, folder: Path, vectors: np.ndarray) -> Index:
        """The index that `write` left in `folder`; its files' hashes were checked before."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """What cannot quickly be made again from the vectors lies in `folder`."""

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(cosine scores float32 [B, m], row numbers int64 [B, m]), best first; -1 where there are no more rows.

        Args:
            queries: float32 [B, D]; need not be of unit length.
            k: neighbours wanted; m is the smaller of k and N.
            allowed: bool [N], the rows that may be found.
        """
        unit = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
        return self._search(np.ascontiguousarray(unit, dtype=np.float32), min(k, self.index.ntotal), allowed)

    @abstractmethod
    def _search(self, unit: np.ndarray, count: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, for unit queries and a count that is not larger than N."""


class Flat(Index):
    """Exact search: every vector is compared."""

    kind = "flat"

    @classmethod
    def build(cls, vectors: np.ndarray) -> Flat:
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        return cls(index)

    @classmethod
    def read(cls, folder: Path, vectors: np.ndarray) -> Flat:
        return cls.build(vectors)

    def write(self, folder: Path) -> None:
        """Nothing: the vectors are the index."""

    def _search(self, unit: np.ndarray, count: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return exactly(self.index, unit, count, allowed)


class Hnsw(Index):
    """A navigable small-world graph (Malkov and Yashunin, 2018): approximate, in logarithmic time."""

    kind = "hnsw"
    FILE = "index.faiss"
    LINKS, BUILD_BREADTH, BREADTH = 32, 200, 128
    MOST_LEFT_OUT = 1000
    """Rows left out that a search still goes round; with more of them every vector is compared."""

    @classmethod
    def build(cls, vectors: np.ndarray) -> Hnsw:
        index = faiss.IndexHNSWFlat(vectors.shape[1], cls.LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = cls.BUILD_BREADTH
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        return cls(index)

    @classmethod
    def read(cls, folder: Path, vectors: np.ndarray) -> Hnsw:
        if hasattr(faiss, "set_deserialization_vector_byte_limit"):
            faiss.set_deserialization_vector_byte_limit(LARGEST_FILE)
        index = faiss.read_index(str(folder / cls.FILE))
        if (index.ntotal, index.d) != vectors.shape:
            raise ValueError(f"{cls.FILE} holds {index.ntotal} vectors of {index.d}, the snapshot {vectors.shape}")
        return cls(index)

    def write(self, folder: Path) -> None:
        faiss.write_index(self.index, str(folder / self.FILE))

    def _search(self, unit: np.ndarray, count: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        breadth = max(self.BREADTH, 2 * count)
        if allowed is None:
            parameters = faiss.SearchParametersHNSW(efSearch=breadth)  # type: ignore[attr-defined] # stubs lag behind
            scores, rows = self.index.search(unit, count, params=parameters)
            return scores, rows
        # Rows left out may well be the nearest (a patient's other images): unless the search is wider by their
        # number, they fill it, and it ends before it comes to any other.
        left_out = int((~allowed).sum())
        if left_out > min(self.MOST_LEFT_OUT, len(allowed) // 2):
            return exactly(faiss.downcast_index(self.index.storage), unit, count, allowed)
        bits = np.packbits(allowed, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
        parameters = faiss.SearchParametersHNSW(efSearch=breadth + left_out, sel=selector)  # type: ignore[attr-defined]
        scores, rows = self.index.search(unit, count, params=parameters)
        return scores, rows


def exactly(flat: Any, unit: np.ndarray, count: int, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """As `Index.search`, by comparison with every vector of a FAISS flat index."""
    if allowed is None:
        scores, rows = flat.search(unit, count)
        return scores, rows
    bits = np.packbits(allowed, bitorder="little")
    selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))
    parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg] # stubs lag behind
    scores, rows = flat.search(unit, count, params=parameters)
    return scores, rows


INDEXES: dict[str, type[Index]] = {"flat": Flat, "hnsw": Hnsw}


def search_ms(index: Index, vectors: np.ndarray) -> float:
    """Milliseconds of one search for 10 neighbours on one thread: the median of 50."""
    probes = vectors[probe_rows(len(vectors), 50)]
    taken = []
    with _one_thread():
        for probe in probes:
            began = time.perf_counter()
            index.search(probe[None], 10)
            taken.append(time.perf_counter() - began)
    return float(np.median(taken) * 1000)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A replica's searches have one thread each; what is built afterwards has all of them again."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def recall_at_10(index: Index, vectors: np.ndarray) -> float:
    """Share of the ten nearest others, by exact search, that the index finds for vectors of its own; ties count."""
    rows = probe_rows(len(vectors), PROBES)
    k = min(11, len(vectors))
    exact, exact_rows = Flat.build(vectors).search(vectors[rows], k)
    found_scores, found = index.search(vectors[rows], k)
    hits = total = 0
    for at, row in enumerate(rows):
        others = exact[at][exact_rows[at] != row][:10]
        if not len(others):
            continue
        worst = others[-1] - 1e-6
        mine = found_scores[at][(found[at] != row) & (found[at] >= 0)][:10]
        hits += min(len(others), int((mine >= worst).sum()))
        total += len(others)
    return hits / total if total else 1.0


def probe_rows(count: int, most: int) -> np.ndarray:
    """Evenly spread row numbers, at most `most`."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def choose(vectors: np.ndarray, kind: str, queries_per_second: float) -> tuple[Index, dict[str, float]]:
    """The index of the vectors and what was measured; `auto` is exact until that would take half a core.

    Args:
        queries_per_second: the expected load, by which `auto` judges the exact search's measured time.
    """
    if kind != "auto":
        index = INDEXES[kind].build(vectors)
        return index, {"search_ms": search_ms(index, vectors)}
    flat = Flat.build(vectors)
    exact_ms = search_ms(flat, vectors)
    if exact_ms * queries_per_second <= 500:
        return flat, {"search_ms": exact_ms, "exact_search_ms": exact_ms}
    index = Hnsw.build(vectors)
    return index, {"search_ms": search_ms(index, vectors), "exact_search_ms": exact_ms}
