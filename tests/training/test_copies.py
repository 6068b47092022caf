"""Copies: a hash nominates, correlation decides, and groups are welded as sets are united."""

from __future__ import annotations

import io
from itertools import combinations

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training import copies, phantom
from training.copies import CORRELATION, HASH_DISTANCE, TURNS, copy_sets, merge_groups, near_copies, near_pairs
from training.images import ImagePath, decode_bytes, grey64

Edges = list[tuple[int, int]]


def pairs_of(found: np.ndarray) -> set[tuple[int, int]]:
    listed = [(int(i), int(j)) for i, j in found]
    assert len(listed) == len(set(listed))
    return set(listed)


def brute_force(hashes: list[int]) -> set[tuple[int, int]]:
    numbered = list(enumerate(hashes))
    return {(i, j) for (i, a), (j, b) in combinations(numbered, 2) if bin(a ^ b).count("1") <= HASH_DISTANCE}


def upright(hashes: np.ndarray) -> np.ndarray:
    """Pairs of `near_pairs` when nothing is turned."""
    found = near_pairs(hashes, hashes[None])
    assert not found[:, 2].any()
    return found[:, :2]


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
    assert pairs_of(upright(np.asarray(hashes, dtype=np.uint64))) == brute_force(hashes)


def test_ten_bits_are_near_and_eleven_are_not() -> None:
    hashes = np.asarray([0, 2**10 - 1, (2**11 - 1) << 40], dtype=np.uint64)
    assert pairs_of(upright(hashes)) == {(0, 1)}


def test_pairs_are_found_across_the_blocks_of_a_large_set() -> None:
    count = copies._CHUNK + 40
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    planted = {(3, 4), (5, count - 1), (copies._CHUNK - 1, copies._CHUNK), (count - 9, count - 3)}
    for i, j in planted:
        hashes[j] = hashes[i] ^ np.uint64(0b1011)
    assert pairs_of(upright(hashes)) == planted  # random 64-bit hashes are 32 bits apart


def test_no_hash_and_one_hash_make_no_pair() -> None:
    for count in (0, 1):
        assert upright(np.zeros(count, np.uint64)).shape == (0, 2)


PATH = ImagePath(128, 128)
PATIENTS = 40


@pytest.fixture(scope="module")
def slices() -> list[Image.Image]:
    """A slice each of PATIENTS phantom patients, not square, so that a turn changes the shape."""
    firsts = {row.group: row.index for row in reversed(phantom.rows(200, 0))}
    return [Image.fromarray(phantom.render(n, 200, 0, 160)[10:130]) for n in sorted(firsts.values())[:PATIENTS]]


def thumbnail(picture: Image.Image, quality: int | None = None) -> np.ndarray:
    file = io.BytesIO()
    picture.save(file, "PNG") if quality is None else picture.save(file, "JPEG", quality=quality)
    decoded = decode_bytes(file.getvalue(), PATH)
    height, width = decoded.source_height, decoded.source_width
    fitted = ImagePath(128 * height // max(height, width), 128 * width // max(height, width))
    return grey64(decode_bytes(file.getvalue(), fitted).pixels).ravel()


def toned(picture: Image.Image, gain: float = 1, offset: float = 0, gamma: float = 1) -> Image.Image:
    table = np.clip(np.rint(255 * gain * (np.arange(256) / 255) ** gamma + offset), 0, 255)
    return picture.point(table.astype(int).tolist())


def turned(picture: Image.Image, turn: int) -> Image.Image:
    """The picture that must be put into position `turn` of `TURNS` to be seen as it was."""
    for _ in range(turn % 4):
        picture = picture.transpose(Image.Transpose.ROTATE_270)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if turn >= 4 else picture


def found_of(originals: list[np.ndarray], planted: list[np.ndarray]) -> tuple[float, copies.Near]:
    """(share of planted copies found, all copies found); nothing else may be called a copy."""
    near = near_copies(np.stack([*originals, *planted]))
    near = near.take(near.copies)
    wanted = {(at, at + len(originals)) for at in range(len(originals))}
    assert pairs_of(near.rows) <= wanted, "a pair was called a copy that is none"
    return len(near) / len(wanted), near


CHANGES = {
    "JPEG 95": lambda p: thumbnail(p, 95),
    "JPEG 60": lambda p: thumbnail(p, 60),
    "half the size": lambda p: thumbnail(p.resize((p.width // 2, p.height // 2), Image.Resampling.LANCZOS)),
    "gain 1.25, clipped": lambda p: thumbnail(toned(p, gain=1.25)),
    "gain 0.8": lambda p: thumbnail(toned(p, gain=0.8)),
    "offset 25, clipped": lambda p: thumbnail(toned(p, offset=25)),
    "gamma 0.7": lambda p: thumbnail(toned(p, gamma=0.7)),
    "gamma 1.4": lambda p: thumbnail(toned(p, gamma=1.4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_encoded_again_resized_and_brightened_are_found_and_nothing_else(
    slices: list[Image.Image], change: str
) -> None:
    recall, near = found_of([thumbnail(p) for p in slices], [CHANGES[change](p) for p in slices])
    assert recall >= 0.9
    assert not near.turn.any()


@pytest.mark.parametrize("turn", range(1, 8))
def test_turned_and_mirrored_copies_are_found_with_what_was_done_to_them(slices: list[Image.Image], turn: int) -> None:
    recall, near = found_of([thumbnail(p) for p in slices], [thumbnail(turned(p, turn), 75) for p in slices])
    assert recall >= 0.9
    assert set(near.turn.tolist()) == {turn}
    assert ("mirrored" in TURNS[turn]) == (turn >= 4) and ("turn" in TURNS[turn]) == (turn < 4)


def test_a_copy_that_was_turned_encoded_again_and_brightened_at_once_is_found(slices: list[Image.Image]) -> None:
    planted = [thumbnail(toned(turned(p, 1 + n % 7), gain=1.15, gamma=0.85), 75) for n, p in enumerate(slices)]
    assert found_of([thumbnail(p) for p in slices], planted)[0] >= 0.9


def test_hashes_of_turned_images_need_no_turning_and_are_imagehash_s_idea() -> None:
    rng = np.random.default_rng(3)
    small = rng.integers(0, 256, (20, 10, 10), dtype=np.uint8)
    grey = np.stack([np.asarray(Image.fromarray(s).resize((64, 64), Image.Resampling.BICUBIC)) for s in small])
    coefficients = copies._low_frequencies(grey.reshape(-1, 4096))
    for turn in range(8):
        by_hand = copies._low_frequencies(np.ascontiguousarray(copies._turn(grey, turn)).reshape(-1, 4096))
        np.testing.assert_allclose(copies._turned(coefficients, turn), by_hand, rtol=1e-4, atol=20)
    theirs = [int(str(imagehash.phash(Image.fromarray(g))), 16) for g in grey]
    apart = [int(a ^ b).bit_count() for a, b in zip(theirs, copies._hashes(coefficients).tolist(), strict=True)]
    assert max(apart) <= 4 and np.mean(apart) <= 1  # they scale to 32 pixels first


def test_only_pairs_above_the_threshold_are_copies() -> None:
    rng = np.random.default_rng(1)
    base = np.asarray(Image.fromarray(rng.integers(60, 190, (9, 9), dtype=np.uint8)).resize((64, 64))).ravel()
    noisy = [base + rng.normal(0, sigma, 4096) for sigma in (0.5, 1.5, 2.2, 8, 12)]
    grey = np.clip(np.rint([base, *noisy, base * 0.6 + 30]), 0, 255).astype(np.uint8)
    near = near_copies(grey)
    assert {(0, 1), (0, 2), (0, 6)} <= pairs_of(near.take(near.copies).rows)
    assert not {(0, 4), (0, 5), (4, 5)} & pairs_of(near.take(near.copies).rows)
    plain = np.asarray(np.corrcoef(grey.astype(np.float64)))
    for (i, j), correlation in zip(near.rows, near.correlation, strict=True):
        assert correlation >= plain[i, j] - 1e-5  # to give one the other's grey values takes nothing away
    assert np.array_equal(near.copies, near.correlation >= CORRELATION)


def test_clipped_values_are_undone_in_the_one_direction_in_which_they_can_be() -> None:
    rng = np.random.default_rng(4)
    base = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).resize((64, 64))).ravel()
    clipped = np.clip(base.astype(int) + 90, 0, 255).astype(np.uint8)
    for pair in ((base, clipped), (clipped, base)):
        near = near_copies(np.stack(pair))
        assert near.correlation[0] > CORRELATION > np.corrcoef(pair)[0, 1]


def test_constant_images_are_never_copies() -> None:
    grey = np.stack([np.full(4096, value, np.uint8) for value in (0, 0, 128, 255)])
    assert len(near_copies(grey)) == 0


def test_no_image_and_one_image_make_no_pair() -> None:
    for count in (0, 1):
        near = near_copies(np.zeros((count, 4096), np.uint8))
        assert (near.rows.shape, near.correlation.shape, near.turn.shape) == ((0, 2), (0,), (0,))


def test_a_picture_that_is_its_own_mirror_image_makes_one_pair() -> None:
    rng = np.random.default_rng(6)
    half = rng.integers(0, 256, (8, 4), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(np.hstack([half, half[:, ::-1]])).resize((64, 64), Image.Resampling.NEAREST))
    near = near_copies(np.stack([grey.ravel(), grey.ravel()]))
    assert (near.rows.tolist(), near.turn.tolist()) == ([[0, 1]], [0])


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
