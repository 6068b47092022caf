"""Generated patients: exact counts, known truth, and images that depend on their key alone."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest

from training.images import grey64
from training.phantom import BLOCK, LEAVES, PhantomRow, draw, render, rows


def same(a: list[PhantomRow], b: list[PhantomRow]) -> bool:
    return repr(a) == repr(b)  # NaN differs from itself


def by_group(found: list[PhantomRow]) -> dict[str, list[PhantomRow]]:
    groups: dict[str, list[PhantomRow]] = defaultdict(list)
    for row in found:
        groups[row.group].append(row)
    return groups


@pytest.mark.parametrize("n", [0, 1, 7, 18, 100, 601])
def test_there_are_exactly_n_rows(n: int) -> None:
    found = rows(n, 0)
    assert [row.index for row in found] == list(range(n))
    assert len({row.path for row in found}) == n


def test_rows_are_the_same_again_differ_by_seed_and_do_not_depend_on_n() -> None:
    assert same(rows(200, 3), rows(200, 3))
    assert same(rows(200, 3), rows(500, 3)[:200])
    assert not same(rows(200, 3), rows(200, 4))


def test_patients_have_several_slices_of_one_label_and_one_truth() -> None:
    groups = by_group(rows(BLOCK * 10, 1))
    assert len(groups) == 40
    for slices in groups.values():
        assert 3 <= len(slices) <= 6
        assert len({(row.label, row.truth) for row in slices}) == 1
        indices = [row.index for row in slices]
        assert indices == list(range(indices[0], indices[-1] + 1))


def test_labels_are_the_truth_or_empty_and_half_the_patients_of_each_leaf_are_labelled() -> None:
    found = rows(BLOCK * 10, 2)
    assert all(row.label in ("", row.truth) for row in found)
    groups = [slices[0] for slices in by_group(found).values()]
    for leaf in LEAVES:
        of_leaf = [row for row in groups if row.truth == leaf]
        assert len(of_leaf) == 10
        assert sum(row.label != "" for row in of_leaf) == 5


def test_lesions_are_inside_the_image_and_healthy_heads_have_none() -> None:
    for row in rows(BLOCK * 20, 5):
        place = (row.lesion_x, row.lesion_y, row.lesion_radius)
        if row.truth == "healthy":
            assert all(map(math.isnan, place))
        else:
            assert 0.02 < row.lesion_radius < 0.15
            assert 0.1 < row.lesion_x < 0.9 and 0.1 < row.lesion_y < 0.9


def test_an_image_depends_on_its_index_and_seed_alone() -> None:
    alone = render(37, 38, 0, 64)
    for index in (90, 3, 12):
        render(index, 100, 0, 64)
    assert np.array_equal(render(37, 1000, 0, 64), alone)
    assert not np.array_equal(render(37, 38, 1, 64), alone)
    assert not np.array_equal(render(36, 38, 0, 64), alone)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_images_are_grey_squares_with_a_bright_head_on_dark_ground(size: int) -> None:
    image = render(5, 10, 0, size)
    assert image.shape == (size, size) and image.dtype == np.uint8
    corner, middle = image[: size // 16, : size // 16], image[size // 3 : -size // 3, size // 3 : -size // 3]
    assert corner.mean() < 25 and middle.mean() > 60


def test_an_index_outside_is_refused() -> None:
    for index in (-1, 10):
        with pytest.raises(IndexError, match="of 10 phantoms"):
            render(index, 10, 0)


def test_the_lesion_changes_the_image_at_its_place_and_nowhere_else() -> None:
    n, size = BLOCK * 6, 96
    at = (np.arange(size) + 0.5) / size
    effects: dict[str, list[float]] = defaultdict(list)
    for row in rows(n, 0)[::2]:
        change = render(row.index, n, 0, size).astype(float) - draw(row.index, n, 0, size, lesion=False)
        if row.truth == "healthy":
            assert not change.any()
            continue
        distance = np.hypot(at[None] - row.lesion_x, at[:, None] - row.lesion_y) / row.lesion_radius
        assert np.abs(change[distance > 2.5]).max() <= 6
        inside = change[distance < 0.7]
        effects[row.truth].append(float(inside.std() if row.truth == "disease/diffuse" else inside.mean()))
    assert min(effects["disease/nodule"]) > 10
    assert max(effects["disease/cyst"]) < -10
    assert min(effects["disease/diffuse"]) > 8


def test_no_two_images_pass_for_copies_and_slices_of_a_patient_are_alike() -> None:
    n = BLOCK * 8
    found = rows(n, 0)
    thumbnails = np.stack([grey64(render(i, n, 0, 96)[:, :, None]).ravel() for i in range(n)]).astype(float)
    alike = np.corrcoef(thumbnails)
    np.fill_diagonal(alike, 0)
    assert alike.max() < 0.998
    neighbours = [alike[a.index, b.index] for a, b in pairwise(found) if a.group == b.group]
    strangers = [alike[a.index, b.index] for a, b in pairwise(found) if a.group != b.group]
    assert np.median(neighbours) > 0.9 > np.median(strangers)
