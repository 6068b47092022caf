"""Copies: a hash nominates, correlation decides, and groups are welded as sets are united."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training import copies
from training.copies import CORRELATION, HASH_DISTANCE, copy_sets, correlated, merge_groups, near_pairs

Edges = list[tuple[int, int]]


def pairs_of(found: np.ndarray) -> set[tuple[int, int]]:
    listed = [(int(i), int(j)) for i, j in found]
    assert len(listed) == len(set(listed))
    return set(listed)


def brute_force(hashes: list[int]) -> set[tuple[int, int]]:
    numbered = list(enumerate(hashes))
    return {(i, j) for (i, a), (j, b) in combinations(numbered, 2) if bin(a ^ b).count("1") <= HASH_DISTANCE}


def as_array(edges: Edges) -> np.ndarray:
    return np.asarray(edges, dtype=np.int64).reshape(-1, 2)


def components(count: int, edges: Edges) -> list[set[int]]:
    """The sets of connected rows, by merging sets by hand."""
    sets = [{at} for at in range(count)]
    for i, j in edges:
        one = next(s for s in sets if i in s)
        other = next(s for s in sets if j in s)
        if one is not other:
            sets.remove(other)
            one |= other
    return sets


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=14)), max_size=25))
def test_near_pairs_are_those_of_brute_force(drawn: list[tuple[int, set[int]]]) -> None:
    centres = [0, 2**64 - 1, 0x0123456789ABCDEF, 1 << 63]
    hashes = [centres[centre] ^ sum(1 << bit for bit in bits) for centre, bits in drawn]
    assert pairs_of(near_pairs(np.asarray(hashes, dtype=np.uint64))) == brute_force(hashes)


def test_ten_bits_are_near_and_eleven_are_not() -> None:
    hashes = np.asarray([0, 2**10 - 1, (2**11 - 1) << 40], dtype=np.uint64)
    assert pairs_of(near_pairs(hashes)) == {(0, 1)}


def test_pairs_are_found_across_the_blocks_of_a_large_set() -> None:
    count = copies._CHUNK + 40
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    planted = {(3, 4), (5, count - 1), (copies._CHUNK - 1, copies._CHUNK), (count - 9, count - 3)}
    for i, j in planted:
        hashes[j] = hashes[i] ^ np.uint64(0b1011)
    assert pairs_of(near_pairs(hashes)) == planted  # random 64-bit hashes are 32 bits apart


def test_no_hash_and_one_hash_make_no_pair() -> None:
    for count in (0, 1):
        assert near_pairs(np.zeros(count, np.uint64)).shape == (0, 2)


def test_only_pairs_above_the_threshold_are_copies() -> None:
    rng = np.random.default_rng(1)
    base = rng.uniform(60, 190, 4096)
    noisy = [base + rng.normal(0, sigma, 4096) for sigma in (0.5, 1.5, 2.2, 2.8, 5, 40)]
    grey = np.clip(np.rint([base, *noisy, base * 0.6 + 30]), 0, 255).astype(np.uint8)
    every = as_array(list(combinations(range(len(grey)), 2)))
    alike = np.asarray(np.corrcoef(grey.astype(np.float64)))
    assert pairs_of(correlated(every, grey)) == {(i, j) for i, j in every.tolist() if alike[i, j] >= CORRELATION}
    assert {(0, 1), (0, 7)} <= pairs_of(correlated(every, grey))  # brightness and contrast do not matter
    assert (0, 5) not in pairs_of(correlated(every, grey))


def test_constant_images_are_never_copies() -> None:
    grey = np.stack([np.full(4096, value, np.uint8) for value in (0, 0, 128, 255)])
    assert len(correlated(as_array(list(combinations(range(4), 2))), grey)) == 0


def test_many_pairs_are_judged_as_few_are() -> None:
    rng = np.random.default_rng(2)
    grey = rng.integers(0, 256, (4, 4096), dtype=np.uint8)
    grey[2] = grey[0]
    every = as_array(list(combinations(range(4), 2)) * 3000)
    kept = correlated(every, grey)
    assert kept.tolist() == [[0, 2]] * 3000


def test_no_pairs_stay_no_pairs() -> None:
    assert correlated(as_array([]), np.zeros((3, 4096), np.uint8)).shape == (0, 2)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=20), st.data())
def test_groups_are_welded_as_a_union_of_sets(groups: list[str], data: st.DataObject) -> None:
    row = st.integers(0, len(groups) - 1)
    edges = data.draw(st.lists(st.tuples(row, row), max_size=10))
    merged = merge_groups(groups, as_array(edges))
    by_group = [(i, j) for i, j in combinations(range(len(groups)), 2) if groups[i] == groups[j]]
    for members in components(len(groups), edges + by_group):
        assert {merged[m] for m in members} == {min(groups[m] for m in members)}


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.data())
def test_copy_sets_are_the_connected_rows(count: int, data: st.DataObject) -> None:
    row = st.integers(0, count - 1)
    edges = data.draw(st.lists(st.tuples(row, row), max_size=12))
    numbers = copy_sets(count, as_array(edges)).tolist()
    found = {frozenset(at for at in range(count) if numbers[at] == number) for number in numbers}
    assert found == set(map(frozenset, components(count, edges)))


def test_groups_keep_their_names_without_copies() -> None:
    groups = ["patient 2", "image:7", "patient 10", "é", "patient 2"]
    assert merge_groups(groups, as_array([])) == groups
