"""Units: whose probabilities are pooled, by a loop; and cases that cannot be judged as one."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import UsageError
from training.report import Text, Warning
from training.results import unit_blocks
from training.splits import Fold
from training.units import Units, fold_of_units, pooled, units_of


def cases(rows: int = 60, seed: int = 0) -> tuple[Units, list[str], list[str]]:
    """Units of about 20 cases in 8 groups, some rows without a case; their cases and labels."""
    rng = np.random.default_rng(seed)
    names = [f"case {n}" if n else "" for n in rng.integers(0, 20, rows)]
    labels = [f"label {len(name) % 3}" if name else "label 1" for name in names]
    groups = [f"group {hash_of(name) % 8}" for name in names]
    return units_of("case", labels, names, groups), names, labels


def hash_of(name: str) -> int:
    return sum(name.encode())


def test_the_mean_of_each_case_is_that_of_a_loop_over_its_rows_in_each_repeat() -> None:
    units, names, _ = cases()
    rng = np.random.default_rng(1)
    rows = np.concatenate([rng.permutation(60), rng.permutation(60)])
    repeat = np.repeat([0, 1], 60)
    fold = (units.of_row[rows] + repeat) % 3
    truth, p = units.of_row[rows] % 3, rng.dirichlet(np.ones(3), 120)
    found = pooled(units, rows, truth, p, fold, repeat)
    expected: dict[tuple[int, str | int], list[np.ndarray]] = {}
    for at, row in enumerate(rows):
        expected.setdefault((int(repeat[at]), names[row] or int(row)), []).append(p[at])
    assert len(found.rows) == len(expected)
    for at, row in enumerate(found.rows):
        own = expected[int(found.repeat[at]), names[row] or int(row)]
        assert np.allclose(found.probabilities[at], np.mean(own, axis=0))
        assert found.images[at] == len(own)
        assert found.truth[at] == units.of_row[row] % 3
        assert found.fold[at] == (units.of_row[row] + found.repeat[at]) % 3
        assert row == min(r for r in range(60) if r == row or (names[r] and names[r] == names[row]))


def test_pooling_images_that_stand_alone_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    units = units_of("image", ["a"] * 9, [""] * 9, ["g"] * 9)
    zeros, p = np.zeros(9, int), rng.dirichlet(np.ones(2), 9)
    found = pooled(units, np.arange(9), zeros, p, zeros, zeros)
    assert np.array_equal(found.probabilities, p) and np.array_equal(found.rows, np.arange(9))


def test_label_sets_are_pooled_like_class_numbers() -> None:
    units = units_of("case", ["a|b", "a|b", "c"], ["x", "x", ""], ["g", "g", "h"])
    truth = np.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=bool)
    zeros = np.zeros(3, int)
    p = np.asarray([[0.2, 0.4, 0], [0.4, 0.8, 0.2], [0, 0, 1.0]])
    found = pooled(units, np.arange(3), truth, p, zeros, zeros)
    assert np.array_equal(found.truth, truth[[0, 2]])
    assert np.allclose(found.probabilities, np.asarray([[0.3, 0.6, 0.1], [0.0, 0.0, 1.0]]))


def test_a_case_in_two_groups_is_refused_by_name() -> None:
    with pytest.raises(UsageError) as caught:
        units_of("case", ["a"] * 4, ["left", "left", "right", "right"], ["p1", "p2", "p3", "p4"])
    assert str(caught.value) == (
        "case 'left' lies in the groups p1, p2 (and 1 more cases): a case must be of one patient: rename one of them"
    )
    assert len(units_of("group", ["a"] * 4, ["left"] * 4, ["p1", "p2", "p3", "p4"])) == 4


def test_a_case_whose_images_disagree_is_refused_and_a_group_is_left_out() -> None:
    labels, names = ["a", "b", "a", "a"], ["x", "x", "y", "y"]
    with pytest.raises(UsageError, match="case 'x' has images of the labels a, b: correct the labels, or judge by"):
        units_of("case", labels, names, ["g"] * 4)
    units = units_of("group", labels, [""] * 4, names)
    assert units.conflicting.tolist() == [True, False] and units.judged.tolist() == [1]
    zeros = np.zeros(4, int)
    found = pooled(units, np.arange(4), np.asarray([0, 1, 0, 0]), np.full((4, 2), 0.5), zeros, zeros)
    assert found.rows.tolist() == [2] and found.images.tolist() == [2]


def test_cases_that_nobody_named_are_asked_for() -> None:
    with pytest.raises(UsageError, match="--unit case: no labelled image has a case"):
        units_of("case", ["a", "b"], ["", ""], ["g", "h"])


def test_a_case_on_two_sides_of_a_split_is_not_judged_as_one() -> None:
    units = units_of("case", ["a"] * 2, ["x", "x"], ["g", "g"])
    with pytest.raises(ValueError, match="two folds of one repeat"):
        pooled(units, np.arange(2), np.zeros(2, int), np.ones((2, 2)) / 2, np.asarray([0, 1]), np.zeros(2, int))


def test_a_fold_of_units_holds_each_unit_with_a_label_once_on_the_side_of_its_rows() -> None:
    units = units_of("group", ["a", "a", "b", "a", "b", "b"], [""] * 6, ["x", "x", "y", "z", "z", "w"])
    fold = fold_of_units(units, Fold(1, 2, np.asarray([0, 1, 3, 4]), np.asarray([2, 5])))
    assert (fold.repeat, fold.fold, fold.train.tolist(), fold.test.tolist()) == (1, 2, [0], [2, 5])


def test_the_report_says_what_was_judged_how_and_what_was_left_out() -> None:
    units = units_of("group", ["a", "b", "a", "a", "a"], [""] * 5, ["left out", "left out", "y", "y", "z"])
    text, warning = unit_blocks(units, "mean")
    assert isinstance(text, Text) and isinstance(warning, Warning)
    assert (
        "Judged by group" in text.paragraph and "2 were judged, of 1.5 images at the median and 2 at" in text.paragraph
    )
    assert (
        "the mean of the probabilities" in text.paragraph and "left out" in warning.text and "1 groups" in warning.text
    )
    (alone,) = unit_blocks(units_of("case", ["a"] * 2, ["x", "x"], ["g", "g"]), "attention")
    assert isinstance(alone, Text) and "gated attention" in alone.paragraph
    assert unit_blocks(units_of("image", ["a"], [""], ["g"]), "mean") == []
