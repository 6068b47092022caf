"""What to label next: the order of doubt, group limits, one of each kind, and the same answer twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from training.choose import LARGEST_POOL, Budget, typical, uncertainty

KINDS, EACH = 6, 40


def places() -> tuple[np.ndarray, np.ndarray]:
    """(features [N, 16], kind [N]): six bundles of directions, well apart."""
    kind = np.arange(KINDS * EACH) % KINDS
    features = 0.1 * np.random.default_rng(0).normal(size=(len(kind), 16))
    features[np.arange(len(kind)), kind] += 1
    return features, kind


def test_uncertainty_is_one_at_a_tie_and_nothing_where_the_model_is_sure() -> None:
    p = np.asarray([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.7, 0.1]])
    np.testing.assert_allclose(uncertainty(p), [1, 0, 0.5])


@pytest.mark.parametrize("per_group", [1, 2])
def test_the_choice_keeps_to_the_pool_and_to_the_group_limit(per_group: int) -> None:
    features, kind = places()
    generator = np.random.default_rng(2)
    groups = generator.permutation(len(kind)) // 8
    pool = np.flatnonzero(generator.random(len(kind)) < 0.6)
    labelled = np.setdiff1d(np.arange(len(kind)), pool)
    chosen, sizes = typical(features, labelled, pool, groups, Budget(20, per_group))
    assert len(chosen) == len(set(chosen.tolist())) == len(sizes) == 20
    assert set(chosen.tolist()) <= set(pool.tolist())
    assert max(Counter(groups[chosen].tolist()).values()) <= per_group
    assert (sizes >= 1).all()


def test_fewer_groups_than_images_asked_for_give_one_each() -> None:
    features, kind = places()
    groups, pool = kind, np.arange(len(kind))
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
    pool, groups = np.arange(5, len(kind)), np.arange(len(kind)) // 2
    first, again, other = (
        typical(features, np.arange(5), pool, groups, Budget(12, seed=seed))[0].tolist() for seed in (4, 4, 5)
    )
    assert first == again
    assert first != other


def test_images_that_are_all_alike_still_fill_the_list() -> None:
    pool = np.arange(300)
    chosen, _ = typical(np.ones((300, 8)), pool[:0], pool, pool, Budget(12))
    assert len(set(chosen.tolist())) == 12


def test_a_pool_too_large_to_cluster_is_thinned_and_still_fills_the_list() -> None:
    count = LARGEST_POOL + 500
    features = np.random.default_rng(5).normal(size=(count, 3)).astype(np.float32)
    pool = np.arange(count)
    chosen, sizes = typical(features, pool[:0], pool, pool, Budget(5))
    assert len(set(chosen.tolist())) == 5
    assert sizes.sum() == LARGEST_POOL
