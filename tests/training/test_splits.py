"""Splits: every row judged once, no group on two sides, classes spread evenly, and what a leak looks like."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from cluster.errors import UsageError
from training.splits import Fold, budget, cross_validation, hold_out, hold_outs, leave_one_site_out, require_inner

Labelled = tuple[list[str], list[str]]


@st.composite
def labelled_groups(draw: st.DrawFn) -> Labelled:
    """Labels and groups of rows; some groups hold several rows, some several classes."""
    rows = draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 25)), min_size=4, max_size=120))
    return [label for label, _ in rows], [f"g{group}" for _, group in rows]


@st.composite
def grouped_label_sets(draw: st.DrawFn) -> Labelled:
    """Label sets and groups of rows; some sets are rare, some groups hold several."""
    sets = st.sets(st.sampled_from("abcd"), min_size=1, max_size=3).map(lambda own: "|".join(sorted(own)))
    rows = draw(st.lists(st.tuples(sets, st.integers(0, 25)), min_size=10, max_size=120))
    return [label for label, _ in rows], [f"g{group}" for _, group in rows]


@settings(max_examples=150, deadline=None)
@given(grouped_label_sets(), st.integers(2, 5), st.sampled_from(["group", "image"]), st.integers(0, 2**32))
def test_label_sets_are_each_tested_once_and_every_class_can_be_learnt_in_every_fold(
    rows: Labelled, folds: int, split: Literal["group", "image"], seed: int
) -> None:
    labels, groups = rows
    try:
        fits = cross_validation(labels, groups, folds=folds, repeats=1, split=split, seed=seed)
    except UsageError as error:
        assert "cannot be spread" in str(error) or f"fewer than --folds {folds}" in str(error)
        return
    assert sorted(np.concatenate([fit.test for fit in fits]).tolist()) == list(range(len(labels)))
    classes = {name for label in labels for name in label.split("|")}
    for fit in fits:
        own = [set(labels[i].split("|")) for i in fit.train]
        assert set().union(*own) == classes
        if any("|" in label for label in labels):
            everywhere = {name for name in classes if all(name in label.split("|") for label in labels)}
            assert set.intersection(*own) == everywhere
        if split == "group":
            assert not {groups[i] for i in fit.train} & {groups[i] for i in fit.test}


def test_folds_hold_the_same_share_of_each_label_set_and_of_the_classes_of_rare_ones() -> None:
    labels = ["a"] * 60 + ["a|b"] * 40 + ["b"] * 40 + ["a|c", "b|c", "a|b|c", "c"] * 5
    for fit in cross_validation(labels, [""] * 160, folds=5, repeats=1, split="group", seed=0):
        tested = Counter(labels[i] for i in fit.test)
        assert (tested["a"], tested["a|b"], tested["b"]) == (12, 8, 8)
        assert sum(n for label, n in tested.items() if "c" in label) == 4


def test_a_class_that_few_groups_lack_is_refused_like_one_that_few_have() -> None:
    labels = ["a|b"] * 20 + ["a"] * 20 + ["b"] * 2
    with pytest.raises(UsageError, match="class 'no a' has 2 groups, fewer than --folds 5"):
        cross_validation(labels, [""] * 42, folds=5, repeats=1, split="group", seed=0)


def test_holding_out_label_sets_takes_the_share_of_each_class() -> None:
    labels = ["a"] * 100 + ["a|b"] * 100 + ["b|c"] * 100
    _, held = hold_out(labels, [f"g{i // 2}" for i in range(300)], fraction=0.2, seed=0)
    counts = Counter(name for i in held for name in labels[i].split("|"))
    assert counts["a"] == pytest.approx(40, abs=4) and counts["b"] == pytest.approx(40, abs=4)
    assert counts["c"] == pytest.approx(20, abs=4)


def groups_per_class(labels: list[str], groups: list[str]) -> Counter[str]:
    return Counter(label for label, _ in set(zip(labels, groups, strict=True)))


@settings(max_examples=150, deadline=None)
@given(labelled_groups(), st.integers(2, 5), st.integers(0, 2**32))
def test_every_row_is_tested_once_per_repeat_and_no_group_is_on_both_sides(
    rows: Labelled, folds: int, seed: int
) -> None:
    labels, groups = rows
    assume(min(groups_per_class(labels, groups).values()) >= folds)
    try:
        fits = cross_validation(labels, groups, folds=folds, repeats=2, split="group", seed=seed)
    except UsageError as error:  # a rare class whose groups are dragged together by other classes
        assert "cannot be spread" in str(error)
        return
    assert [(fit.repeat, fit.fold) for fit in fits] == [(r, f) for r in range(2) for f in range(folds)]
    for repeat in range(2):
        tested = np.concatenate([fit.test for fit in fits if fit.repeat == repeat])
        assert sorted(tested.tolist()) == list(range(len(labels)))
    for fit in fits:
        assert len(fit.train) and len(fit.test)
        assert sorted([*fit.train.tolist(), *fit.test.tolist()]) == list(range(len(labels)))
        assert not {groups[i] for i in fit.train} & {groups[i] for i in fit.test}
        assert {labels[i] for i in fit.train} == set(labels)


@settings(max_examples=150, deadline=None)
@given(labelled_groups(), st.floats(0.05, 0.6), st.integers(0, 2**32))
def test_holding_out_splits_groups_and_keeps_classes_in_training(rows: Labelled, fraction: float, seed: int) -> None:
    labels, groups = rows
    assume(len(set(groups)) >= 2)
    train, held = hold_out(labels, groups, fraction=fraction, seed=seed)
    assert len(train) and len(held)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert not {groups[i] for i in train} & {groups[i] for i in held}
    single = {label for label, n in groups_per_class(labels, groups).items() if n == 1}
    some_group_takes_no_class = any(not single & {y for y, g in zip(*rows, strict=True) if g == k} for k in groups)
    if some_group_takes_no_class:
        assert {labels[i] for i in train} == set(labels)


def test_the_held_share_of_each_class_is_the_fraction_asked_for() -> None:
    labels = ["rare"] * 40 + ["common"] * 400
    groups = [f"patient {i // 2}" for i in range(440)]
    for seed in range(5):
        _, held = hold_out(labels, groups, fraction=0.2, seed=seed)
        counts = Counter(labels[i] for i in held)
        assert counts == {"rare": 8, "common": 80}


def test_another_seed_holds_out_other_groups() -> None:
    labels, groups = ["a", "b"] * 50, [f"g{i}" for i in range(100)]
    one, again, other = (hold_out(labels, groups, fraction=0.2, seed=seed)[1].tolist() for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_a_single_group_cannot_be_held_out() -> None:
    with pytest.raises(UsageError, match="one group"):
        hold_out(["a", "b"], ["g", "g"], fraction=0.2, seed=0)


def test_two_groups_of_different_classes_still_give_two_sides() -> None:
    train, held = hold_out(["a", "a", "b"], ["g", "g", "h"], fraction=0.2, seed=0)
    assert {len(train), len(held)} == {1, 2}


def test_folds_hold_the_same_share_of_each_class() -> None:
    labels = ["a"] * 60 + ["b"] * 120
    groups = [f"g{i // 2}" for i in range(180)]
    for fit in cross_validation(labels, groups, folds=5, repeats=2, split="group", seed=3):
        assert Counter(labels[i] for i in fit.test) == {"a": 12, "b": 24}


def test_each_repeat_is_another_split_and_the_same_seed_gives_the_same() -> None:
    labels, groups = ["a", "b"] * 30, [f"g{i}" for i in range(60)]

    def tests(seed: int, split: Literal["group", "image"]) -> list[list[int]]:
        fits = cross_validation(labels, groups, folds=3, repeats=3, split=split, seed=seed)
        return [fit.test.tolist() for fit in fits]

    for split in ("group", "image"):
        assert tests(5, split) == tests(5, split)
        assert tests(5, split) != tests(6, split)
        first, second, third = tests(5, split)[::3]
        assert first != second != third != first


def test_a_longer_cross_validation_begins_with_the_shorter_one() -> None:
    labels, groups = ["a", "b"] * 30, [f"g{i}" for i in range(60)]
    one = cross_validation(labels, groups, folds=3, repeats=1, split="group", seed=0)
    two = cross_validation(labels, groups, folds=3, repeats=2, split="group", seed=0)
    assert [fit.test.tolist() for fit in one] == [fit.test.tolist() for fit in two[:3]]


@pytest.mark.parametrize("split", ["group", "image"])
def test_the_order_of_the_rows_does_not_matter(split: Literal["group", "image"]) -> None:
    rng = np.random.default_rng(0)
    groups = [f"g{i}" for i in (rng.integers(0, 30, 90) if split == "group" else range(90))]
    labels = ["ab"[int(group[1:]) % 2] for group in groups]
    order = rng.permutation(90)

    def contents(fits: list[Fold], rows: np.ndarray) -> list[set[int]]:
        return [{int(rows[i]) for i in fit.test} for fit in fits]

    straight = cross_validation(labels, groups, folds=3, repeats=2, split=split, seed=1)
    shuffled = cross_validation(
        [labels[i] for i in order], [groups[i] for i in order], folds=3, repeats=2, split=split, seed=1
    )
    assert contents(straight, np.arange(90)) == contents(shuffled, order)


def test_rows_without_a_group_are_their_own_group() -> None:
    fits = cross_validation(["a", "b"] * 10, [""] * 20, folds=5, repeats=1, split="group", seed=0)
    assert [len(fit.test) for fit in fits] == [4] * 5
    train, held = hold_out(["a", "b"] * 10, [""] * 20, fraction=0.2, seed=0)
    assert (len(train), len(held)) == (16, 4)


def test_a_class_with_too_few_groups_is_named_with_its_count_and_a_way_out() -> None:
    labels, groups = ["a"] * 10 + ["in_situ"] * 6, [f"g{i}" for i in range(10)] + ["x", "x", "y", "y", "z", "z"]
    with pytest.raises(UsageError) as caught:
        cross_validation(labels, groups, folds=5, repeats=1, split="group", seed=0)
    assert str(caught.value) == (
        "class 'in_situ' has 3 groups, fewer than --folds 5: lower --folds to 3, or merge or drop the class"
    )
    assert len(cross_validation(labels, groups, folds=5, repeats=1, split="image", seed=0)) == 5


def test_a_class_with_one_image_cannot_be_cross_validated_at_all() -> None:
    with pytest.raises(UsageError) as caught:
        cross_validation(["a"] * 9 + ["b"], [""] * 10, folds=2, repeats=1, split="image", seed=0)
    assert str(caught.value) == "class 'b' has 1 image, fewer than --folds 2: merge or drop the class"


def test_a_watermark_of_the_patient_is_worth_nothing_under_group_splits_and_everything_under_image_splits() -> None:
    """Random labels and a feature constant within a patient: only a leak lets a classifier do better than chance."""
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(100), 6)
    labels = np.array(["benign", "malignant"])[rng.integers(0, 2, 100)][patient]
    watermark = rng.normal(size=(100, 8))[patient]

    def accuracy(split: Literal["group", "image"]) -> float:
        right = np.zeros(len(labels))
        groups = [f"patient {p}" for p in patient]
        for fit in cross_validation(labels.tolist(), groups, folds=5, repeats=1, split=split, seed=0):
            model = KNeighborsClassifier(1).fit(watermark[fit.train], labels[fit.train])
            right[fit.test] = model.predict(watermark[fit.test]) == labels[fit.test]
        return float(right.mean())

    assert abs(accuracy("group") - 0.5) < 3 * np.sqrt(0.25 / 100)  # three standard errors of 100 patients
    assert accuracy("image") > 0.98


# Sites, hold-outs and budgets


def test_each_site_is_left_out_once_and_a_patient_of_two_sites_never_trains_against_himself() -> None:
    sites = ["b", "b", "a", "a", "c", "c", "a"]
    labels = ["x", "y", "x", "y", "x", "y", "y"]
    groups = ["1", "2", "3", "4", "5", "6", "2"]  # patient 2 was seen at a and b
    fits = leave_one_site_out(labels, groups, sites)
    assert [(f.fold, f.test.tolist(), f.train.tolist()) for f in fits] == [
        (0, [2, 3, 6], [0, 4, 5]),
        (1, [0, 1], [2, 3, 4, 5]),
        (2, [4, 5], [0, 1, 2, 3, 6]),
    ]


@pytest.mark.parametrize(
    ("sites", "said"),
    [(["a", "a", ""], "1 of 3 .* no site"), (["a", "a", "a"], "one site, 'a'"), (["a", "b", "b"], "'y' is known at")],
)
def test_sites_that_cannot_be_left_out_are_refused(sites: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        leave_one_site_out(["x", "y", "x"], ["1", "2", "3"], sites)


@settings(max_examples=60, deadline=None)
@given(labelled_groups(), st.integers(0, 2**32))
def test_hold_outs_keep_groups_whole_and_every_class_on_both_sides(rows: Labelled, seed: int) -> None:
    labels, groups = rows
    assume(len(set(groups)) >= 2)
    try:
        fits = hold_outs(labels, groups, fraction=0.3, repeats=2, seed=seed)
    except UsageError as error:
        assert "cannot be spread" in str(error)
        return
    assert [fit.repeat for fit in fits] == [0, 1]
    for fit in fits:
        assert not {groups[i] for i in fit.train} & {groups[i] for i in fit.test}
        assert {labels[i] for i in fit.train} == {labels[i] for i in fit.test} == set(labels)
        assert sorted([*fit.train.tolist(), *fit.test.tolist()]) == list(range(len(labels)))


@settings(max_examples=100, deadline=None)
@given(labelled_groups(), st.integers(0, 2**32))
def test_a_smaller_budget_lies_within_a_larger_one_holds_whole_groups_and_every_class(
    rows: Labelled, seed: int
) -> None:
    labels, groups = rows
    given_rows = np.arange(1, len(labels))  # the rows of a training side, not all
    known = {labels[i] for i in given_rows}
    before = set[int]()
    for share in (0.1, 0.25, 0.5, 1.0):
        kept = budget(labels, groups, given_rows, share=share, seed=seed)
        assert before <= set(kept.tolist()) <= set(given_rows.tolist())
        assert {labels[i] for i in kept} == known
        inside = {groups[i] for i in kept}
        assert [i for i in given_rows if groups[i] in inside] == kept.tolist()
        for label, count in groups_per_class([labels[i] for i in given_rows], [groups[i] for i in given_rows]).items():
            assert len({groups[i] for i in kept if labels[i] == label}) >= min(1, count)
        before = set(kept.tolist())
    assert before == set(given_rows.tolist())


def test_a_budget_is_that_share_of_the_groups_of_each_class() -> None:
    labels = ["a"] * 400 + ["b"] * 100
    groups = [f"a{i // 2}" for i in range(400)] + [f"b{i // 2}" for i in range(100)]
    kept = budget(labels, groups, np.arange(500), share=0.1, seed=0)
    assert Counter(labels[i] for i in kept) == {"a": 40, "b": 10}
    assert kept.tolist() != budget(labels, groups, np.arange(500), share=0.1, seed=1).tolist()


@pytest.mark.parametrize(
    ("labels", "groups", "split", "short"),
    [
        (["a", "a", "b", "b"], ["1", "2", "3", "3"], "group", "'b' has one group"),
        (["a", "a", "b", "b"], ["1", "2", "3", "4"], "group", ""),
        (["a", "a", "b", "b"], ["1", "1", "1", "1"], "image", ""),
        (["a", "a", "a", "b"], ["1", "2", "3", "4"], "image", "'b' has one image"),
        (["a", "a", "b", "b"], ["", "", "", ""], "group", ""),
        (["a|b", "a|b", "a|b", "b"], ["1", "2", "3", "4"], "group", "'no a' has one group"),
    ],
)
def test_inner_folds_need_two_groups_of_each_class_of_each_training_side(
    labels: list[str], groups: list[str], split: str, short: str
) -> None:
    """And of label sets two groups without each class."""

    def ask() -> None:
        require_inner([*labels, "x"], [*groups, "9"], sides, split=split, flag="--this", way_out="go")

    sides = [np.arange(4), np.arange(4)]
    if not short:
        return ask()
    with pytest.raises(UsageError, match=f"--this: class {short} in the training side of a fold.*, or go"):
        ask()
