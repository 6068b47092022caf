"""What to label next: the order of doubt, group limits, one of each kind, and the same answer twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from training.choose import Budget, typical, uncertain, uncertainty, within_groups

KINDS, EACH = 6, 40


def places() -> tuple[np.ndarray, np.ndarray]:
    """(features [N, 16], kind [N]): six bundles of directions, well apart."""
    kind = np.arange(KINDS * EACH) % KINDS
    features = 0.1 * np.random.default_rng(0).normal(size=(len(kind), 16))
    features[np.arange(len(kind)), kind] += 1
    return features, kind


def two_classes(doubt: np.ndarray) -> np.ndarray:
    """Probabilities [N, 3] with that uncertainty."""
    first = 0.9 - 0.45 * doubt
    return np.stack([first, 0.9 - first, np.full(len(doubt), 0.1)], axis=1)


def test_uncertainty_is_one_at_a_tie_and_nothing_where_the_model_is_sure() -> None:
    p = np.asarray([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.7, 0.1]])
    np.testing.assert_allclose(uncertainty(p), [1, 0, 0.5])


def test_no_group_is_asked_more_often_than_allowed() -> None:
    groups = np.asarray(["a", "b", "a", "a", "b", "c"])
    rows = np.asarray([3, 0, 5, 1, 2, 4])
    assert within_groups(rows, groups, 1).tolist() == [3, 5, 1]
    assert within_groups(rows, groups, 2).tolist() == [3, 0, 5, 1, 4]


def test_uncertain_images_are_of_different_kinds_though_one_kind_is_the_most_uncertain() -> None:
    features, kind = places()
    doubt = np.where(kind == 0, 0.9, 0.8) + 0.05 * np.random.default_rng(1).random(len(kind))
    p, pool = two_classes(doubt), np.arange(len(kind))
    chosen = uncertain(features, p, pool, pool, Budget(12))
    shortlist = np.argsort(-doubt, kind="stable")[:120]  # the 40 of kind 0, then a mixture
    assert set(chosen.tolist()) <= set(shortlist.tolist())
    assert set(kind[chosen]) == set(range(KINDS))
    assert set(kind[shortlist[:12]]) == {0}  # what the most uncertain alone would have been
    assert (np.diff(uncertainty(p)[chosen]) <= 0).all()


@pytest.mark.parametrize("per_group", [1, 2])
def test_both_choices_keep_to_the_pool_and_to_the_group_limit(per_group: int) -> None:
    features, kind = places()
    generator = np.random.default_rng(2)
    groups = generator.permutation(len(kind)) // 8
    pool = np.flatnonzero(generator.random(len(kind)) < 0.6)
    labelled = np.setdiff1d(np.arange(len(kind)), pool)
    budget = Budget(20, per_group)
    found = uncertain(features, two_classes(generator.random(len(kind))), pool, groups, budget)
    plain, sizes = typical(features, labelled, pool, groups, budget)
    for chosen in (found, plain):
        assert len(chosen) == len(set(chosen.tolist())) == 20
        assert set(chosen.tolist()) <= set(pool.tolist())
        assert max(Counter(groups[chosen].tolist()).values()) <= per_group
    assert len(sizes) == 20
    assert (sizes >= 1).all()


def test_fewer_groups_than_images_asked_for_give_one_each() -> None:
    features, kind = places()
    groups, pool = kind, np.arange(len(kind))
    assert sorted(groups[uncertain(features, two_classes(kind / 6), pool, groups, Budget(50))]) == list(range(KINDS))
    assert sorted(groups[typical(features, pool[:0], pool, groups, Budget(50))[0]]) == list(range(KINDS))


def test_without_labels_one_typical_image_of_each_kind_is_chosen() -> None:
    features, kind = places()
    pool = np.arange(len(kind))
    chosen, sizes = typical(features, pool[:0], pool, pool, Budget(KINDS))
    assert sorted(kind[chosen]) == list(range(KINDS))
    assert sizes.tolist() == [EACH] * KINDS
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for row in chosen:  # nearer to its own kind than most of it
        own = unit[kind == kind[row]]
        far = np.linalg.norm(own - own.mean(axis=0), axis=1)
        assert np.linalg.norm(unit[row] - own.mean(axis=0)) < np.quantile(far, 0.25)


def test_kinds_that_are_labelled_already_are_not_typical_again() -> None:
    features, kind = places()
    labelled = np.flatnonzero(kind < 4)[:40]
    pool = np.setdiff1d(np.arange(len(kind)), labelled)
    groups = np.where(kind < 4, kind, 100 + np.arange(len(kind)))
    groups[pool] = 1000 + pool
    chosen, _ = typical(features, labelled, pool, groups, Budget(2))
    assert sorted(kind[chosen]) == [4, 5]


def test_the_same_seed_chooses_the_same_images() -> None:
    features, kind = places()
    pool, groups = np.arange(len(kind)), np.arange(len(kind)) // 2
    p = two_classes(np.random.default_rng(3).random(len(kind)))
    first, again, other = (uncertain(features, p, pool, groups, Budget(12, seed=s)).tolist() for s in (4, 4, 5))
    assert first == again
    assert first != other
    assert typical(features, pool[:5], pool[5:], groups, Budget(12, seed=4))[0].tolist() == (
        typical(features, pool[:5], pool[5:], groups, Budget(12, seed=4))[0].tolist()
    )


def test_images_that_are_all_alike_still_fill_the_list() -> None:
    pool = np.arange(300)
    features, p = np.ones((300, 8)), np.full((300, 2), 0.5)
    assert len(set(uncertain(features, p, pool, pool, Budget(12)).tolist())) == 12
    assert len(set(typical(features, pool[:0], pool, pool, Budget(12))[0].tolist())) == 12
