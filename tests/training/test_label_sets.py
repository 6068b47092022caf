"""Classifiers of label sets on frozen features: the contract of every entry, and what each one is."""

from __future__ import annotations

import io

import numpy as np
import pytest
import skops.io
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import FunctionTransformer

from cluster.errors import UsageError
from training.fit import Labels, fit_frozen, frozen_fold
from training.probabilities import temperature_for
from training.splits import Fold
from training.tasks.frozen import ESTIMATORS, Frozen, Inner
from training.tasks.label_sets import LABEL_SET_ESTIMATORS, LabelSets, load_label_sets

every_estimator = pytest.mark.parametrize("name", sorted(LABEL_SET_ESTIMATORS))


def toy(count: int = 150, spread: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three independent labels, each seen along an axis of its own: features [N, 5] and sets bool [N, 3]."""
    rng = np.random.default_rng(seed)
    sets = rng.random((count, 3)) < [0.5, 0.3, 0.6]
    features = np.concatenate(
        [2 * sets - 1 + rng.normal(0, spread, (count, 3)), rng.normal(0, 0.3, (count, 2))], axis=1
    )
    return features.astype(np.float32), sets


def thirds(count: int) -> Inner:
    rows = np.arange(count)
    return [(rows[rows // 3 % 3 != k], rows[rows // 3 % 3 == k]) for k in range(3)]


def fitted(name: str, spread: float = 0.5) -> LabelSets:
    features, sets = toy(spread=spread)
    return LabelSets(LABEL_SET_ESTIMATORS[name](features, sets, thirds(len(sets))), 3)


def test_every_task_on_frozen_features_knows_label_sets() -> None:
    assert set(LABEL_SET_ESTIMATORS) == set(ESTIMATORS)


@every_estimator
def test_independent_labels_are_told_each_by_itself(name: str) -> None:
    features, sets = toy(300, seed=1)
    found = fitted(name).probabilities(features)
    assert found.shape == (300, 3) and found.dtype == np.float64
    assert ((found >= 0) & (found <= 1)).all() and not np.allclose(found.sum(axis=1), 1)
    assert ((found >= 0.5) == sets).mean() > 0.93
    assert (((found >= 0.5) == sets).all(axis=1)).mean() > 0.8  # a set of three, of which guessing finds an eighth


@every_estimator
def test_a_kept_classifier_answers_exactly_as_before(name: str) -> None:
    model, (features, _) = fitted(name), toy()
    content = model.dumps()
    assert np.array_equal(load_label_sets(content, 3).probabilities(features), model.probabilities(features))
    assert b"pickle" not in content
    wrong = 4 if name != "knn" else None
    if wrong is not None:
        with pytest.raises(UsageError, match="not the classifiers of 4 labels"):
            load_label_sets(content, wrong)


def test_a_type_that_no_head_has_is_not_loaded() -> None:
    content = skops.io.dumps([FunctionTransformer(io.StringIO)] * 3)
    with pytest.raises(UsageError, match="it is not loaded"):
        load_label_sets(content, 3)
    with pytest.raises(UsageError, match="not an estimator"):
        load_label_sets(b"junk", 3)


@every_estimator
def test_a_label_that_training_never_or_always_saw_is_said_as_often(name: str) -> None:
    features, sets = toy()
    sets[:, 1], sets[:, 2] = False, True
    found = LabelSets(LABEL_SET_ESTIMATORS[name](features, sets, thirds(len(sets))), 3).probabilities(features)
    tolerance = 0.03 if name == "knn" else 0.0  # its pseudo-neighbour
    assert np.abs(found[:, 1]).max() <= tolerance and np.abs(1 - found[:, 2]).max() <= tolerance
    assert roc_auc_score(sets[:, 0], found[:, 0]) > 0.95


@pytest.mark.parametrize("name", ["linear", "svm"])
def test_one_against_the_rest_is_the_classifier_of_two_classes(name: str) -> None:
    features, sets = toy()
    found = fitted(name).probabilities(features)
    for at in range(3):
        alone = Frozen(ESTIMATORS[name](features, sets[:, at].astype(int), thirds(len(sets))), 2)
        assert np.array_equal(found[:, at], alone.probabilities(features)[:, 1])


def test_neighbours_give_the_mean_of_their_label_sets() -> None:
    features, sets = toy(spread=1.0)
    asked = features[:10] + 0.01
    found = fitted("knn", spread=1.0).probabilities(asked)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for at, one in enumerate(asked):
        distance = np.linalg.norm(unit - one / np.linalg.norm(one), axis=1)
        near = np.argsort(distance)[:20]
        share = np.average(sets[near], axis=0, weights=1 / distance[near])
        assert np.allclose(found[at], (20 * share + 0.5) / 21, atol=1e-4)


def test_fewer_rows_than_neighbours_are_enough() -> None:
    features, sets = toy(9)
    assert LabelSets(LABEL_SET_ESTIMATORS["knn"](features, sets, []), 3).probabilities(features).shape == (9, 3)


@every_estimator
def test_the_rows_of_the_test_never_reach_the_fit(name: str) -> None:
    features, sets = toy(120)
    groups = [f"patient {at // 4}" for at in range(120)]
    names = ["|".join(n for n, has in zip("abcd", [*own, not own.any()], strict=True) if has) for own in sets]
    rows = np.arange(120)
    fold = Fold(0, 0, rows[rows // 4 % 3 != 0], rows[rows // 4 % 3 == 0])
    truth = np.column_stack([sets, ~sets.any(axis=1)])
    honest = frozen_fold(name, features, Labels(truth, names, groups, "group"), 4, 0, fold)
    wrong_truth, wrong_features = truth.copy(), features.copy()
    wrong_truth[fold.test] = ~truth[fold.test]
    wrong_features[fold.test] = 1e3
    model = fit_frozen(name, wrong_features, Labels(wrong_truth, names, groups, "group"), fold.train, 4, 0)
    assert np.array_equal(model.probabilities(features[fold.test]), honest.probabilities)
    assert temperature_for(honest.probabilities, truth[fold.test]) > 0
