"""FAISS against brute force. What touches it runs apart: this process holds torch, as production ones do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from cluster.errors import ResourceError
from serving.apart import Apart, apart
from tests.runs import ROOT, wait_until

KINDS = ["flat", "hnsw"]


@pytest.fixture(scope="module")
def other() -> Iterator[Apart]:
    with apart() as found:
        yield found


def unit(count: int, width: int = 24, seed: int = 0) -> np.ndarray:
    """float32 [count, width] of unit length, in clusters: a base and a share of noise."""
    rng = np.random.default_rng(seed)
    bases = rng.normal(size=(max(1, count // 40), width))
    vectors = bases[rng.integers(0, len(bases), count)] + 0.3 * rng.normal(size=(count, width))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def brute(vectors: np.ndarray, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """The k highest cosines [B, k] of each query, -inf where fewer rows are allowed."""
    scores = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ vectors.T
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    return np.asarray(-np.sort(-scores, axis=1)[:, :k])


# These run apart.


def found(
    kind: str, vectors: np.ndarray, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    from serving.indexes import INDEXES

    return INDEXES[kind].build(vectors).search(queries, k, allowed)


def found_after_writing(kind: str, vectors: np.ndarray, queries: np.ndarray, folder: str) -> list[np.ndarray]:
    from serving.indexes import INDEXES

    built = INDEXES[kind].build(vectors)
    built.write(Path(folder))
    return [index.search(queries, 7)[1] for index in (built, INDEXES[kind].read(Path(folder), vectors))]


def read_of_others(kind: str, folder: str, vectors: np.ndarray) -> None:
    from serving.indexes import INDEXES

    INDEXES[kind].read(Path(folder), vectors)


def recall(kind: str, vectors: np.ndarray) -> float:
    from serving.indexes import INDEXES, recall_at_10

    return recall_at_10(INDEXES[kind].build(vectors), vectors)


def recall_of_a_liar(vectors: np.ndarray) -> float:
    """Recall of an index that knows only the first half of the rows."""
    from serving.indexes import Flat, recall_at_10

    return recall_at_10(Flat.build(vectors[: len(vectors) // 2]), vectors)


def chosen(kind: str, vectors: np.ndarray, measured_ms: float) -> tuple[str, dict[str, float]]:
    from serving import indexes

    with mock.patch.object(indexes, "search_ms", lambda index, vectors: measured_ms):
        index, facts = indexes.choose(vectors, kind, queries_per_second=50)
    return index.kind, facts


def threads_after_timing(vectors: np.ndarray) -> tuple[int, int]:
    import faiss

    from serving.indexes import Flat, search_ms

    faiss.omp_set_num_threads(2)
    search_ms(Flat.build(vectors), vectors)
    return faiss.omp_get_max_threads(), 2


def loaded() -> set[str]:
    return {name for name in ("torch", "faiss") if name in sys.modules}


def killed() -> None:
    import os

    os._exit(9)


# Search


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 10, 500])
def test_neighbours_are_those_of_brute_force(other: Apart, kind: str, k: int) -> None:
    vectors, queries = unit(300), 5 * unit(20, seed=1)  # queries need not be of unit length
    scores, rows = other.call(found, kind, vectors, queries, k)
    assert scores.shape == rows.shape == (20, min(k, 300))
    assert (rows >= 0).all() and all(len(set(row)) == len(row) for row in rows.tolist())
    np.testing.assert_allclose(scores, brute(vectors, queries, k), atol=1e-5)
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ vectors.T
    np.testing.assert_allclose(scores, np.take_along_axis(cosines, rows, 1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95, 1.0])
def test_only_allowed_rows_are_found_and_the_best_of_them(other: Apart, kind: str, share: float) -> None:
    vectors, queries = unit(1000), unit(12, seed=2)
    allowed = np.random.default_rng(3).random(1000) < share
    scores, rows = other.call(found, kind, vectors, queries, 10, allowed)
    wanted = brute(vectors, queries, 10, allowed)
    there = np.isfinite(wanted)
    assert ((rows >= 0) == there).all()
    assert allowed[rows[rows >= 0]].all()
    np.testing.assert_allclose(scores[there], wanted[there], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_whose_own_group_fills_its_surroundings_still_finds_others(other: Apart, kind: str) -> None:
    """400 images of one patient lie nearer than any other."""
    rng = np.random.default_rng(4)
    patient = np.ones(24) + 0.01 * rng.normal(size=(400, 24))
    vectors = np.concatenate([patient, unit(1600, seed=5)]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    allowed = np.arange(2000) >= 400
    query = np.ones((1, 24), dtype=np.float32)
    scores, rows = other.call(found, kind, vectors, query, 10, allowed)
    assert (rows >= 400).all()
    np.testing.assert_allclose(scores, brute(vectors, query, 10, allowed), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_of_one_vector_finds_it_once(other: Apart, kind: str) -> None:
    scores, rows = other.call(found, kind, unit(1), unit(1), 10)
    assert rows.tolist() == [[0]] and scores[0, 0] == pytest.approx(1)
    _, none = other.call(found, kind, unit(1), unit(1), 10, np.zeros(1, dtype=bool))
    assert none.tolist() == [[-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_reads_what_it_wrote(other: Apart, kind: str, tmp_path: Path) -> None:
    before, after = other.call(found_after_writing, kind, unit(500), unit(30, seed=6), str(tmp_path))
    assert (before == after).all()


def test_a_graph_of_other_vectors_is_refused(other: Apart, tmp_path: Path) -> None:
    other.call(found_after_writing, "hnsw", unit(50), unit(2), str(tmp_path))
    with pytest.raises(ValueError, match=r"holds 50 vectors of 24, the snapshot \(49, 24\)"):
        other.call(read_of_others, "hnsw", str(tmp_path), unit(49))


# Recall and choice


def test_recall_is_one_for_exact_search_and_half_for_an_index_of_half(other: Apart) -> None:
    vectors = unit(1000)
    assert other.call(recall, "flat", vectors) == 1
    assert other.call(recall, "hnsw", vectors) > 0.98
    assert 0.2 < other.call(recall_of_a_liar, vectors) < 0.7


@pytest.mark.parametrize("count", [1, 2, 5, 11, 12])
def test_recall_of_few_vectors_counts_what_there_is(other: Apart, count: int) -> None:
    assert other.call(recall, "flat", unit(count)) == 1


def test_copies_of_a_vector_do_not_lower_recall(other: Apart) -> None:
    """Of thirty copies any ten are right."""
    copies = np.repeat(unit(20), 30, axis=0)
    assert other.call(recall, "flat", copies) == 1
    assert other.call(recall, "hnsw", copies) > 0.98


@pytest.mark.parametrize(
    ("kind", "ms", "expected"),
    [("auto", 10.0, "flat"), ("auto", 10.1, "hnsw"), ("hnsw", 0.1, "hnsw"), ("flat", 99, "flat")],
)
def test_auto_is_exact_until_that_takes_half_a_core_at_the_expected_load(
    other: Apart, kind: str, ms: float, expected: str
) -> None:
    name, facts = other.call(chosen, kind, unit(60), ms)
    assert name == expected
    assert facts["search_ms"] == ms
    assert ("exact_search_ms" in facts) == (kind == "auto")


def test_timing_a_search_leaves_the_threads_as_they_were(other: Apart) -> None:
    after, before = other.call(threads_after_timing, unit(60))
    assert after == before


# Apart


def test_what_runs_apart_never_loads_torch(other: Apart, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from serving.neighbours import build_files

    save_file({"vectors": unit(40)}, tmp_path / "vectors.safetensors")
    (tmp_path / "out").mkdir()
    with apart() as fresh:
        built = fresh.call(build_files, str(tmp_path), str(tmp_path / "out"), "hnsw", 50.0)
        assert fresh.call(loaded) == {"faiss"}
    assert (built["kind"], built["vectors"], built["dimensions"]) == ("hnsw", 40, 24)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["index.faiss"]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("app", ""),
        ("door", ""),
        ("snapshot", ""),
        ("neighbours", ""),
        ("deployments", ""),
        ("indexes", "faiss"),
        pytest.param("index", "torch", marks=pytest.mark.slow),
    ],
)
def test_no_module_loads_torch_and_faiss_together(module: str, expected: str) -> None:
    code = f"import sys, serving.{module}; print(*(n for n in ('torch', 'faiss') if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def test_a_process_that_dies_is_one_clear_error() -> None:
    with apart() as fresh, pytest.raises(ResourceError, match="the index's process was killed"):
        fresh.call(killed)


def test_nothing_is_left_of_the_process_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal\nfrom serving.apart import apart\n"
        "if __name__ == '__main__':\n    with apart() as other:\n"
        "        print(other.call(os.getpid), flush=True)\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    child = Path(f"/proc/{int(done.stdout)}/stat")
    wait_until(lambda: not child.exists() or ") Z " in child.read_text(), 20, "the other process has ended")
