"""Classifiers on frozen features: the contract of every entry of ESTIMATORS, and what each one is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from training.fit import Labels, fit_frozen, frozen_fold
from training.splits import Fold
from training.tasks.frozen import ESTIMATORS, Frozen, Inner, load_estimator

every_estimator = pytest.mark.parametrize("name", sorted(ESTIMATORS))


def toy(classes: int = 3, count: int = 90, spread: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Clouds on the corners of a cube, one for each class: features [N, 5] of very different scales, and truth [N]."""
    rng = np.random.default_rng(0)
    truth = np.arange(count) % classes
    corners = rng.permutation(np.asarray([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]))[:classes]
    features = np.concatenate([corners[truth] * 2 + rng.normal(0, spread, (count, 3)), rng.normal(0, 1, (count, 2))], 1)
    return (features * [1, 1, 1, 0.1, 0.1]).astype(np.float32), truth


def thirds(count: int) -> Inner:
    rows = np.arange(count)
    return [(rows[rows // 3 % 3 != k], rows[rows // 3 % 3 == k]) for k in range(3)]


def fitted(name: str, classes: int = 3, spread: float = 0.5) -> tuple[Frozen, np.ndarray, np.ndarray]:
    features, truth = toy(classes, spread=spread)
    return Frozen(ESTIMATORS[name](features, truth, thirds(len(truth))), classes), features, truth


@every_estimator
@pytest.mark.parametrize("classes", [2, 3])
def test_clouds_that_lie_apart_are_told_apart(name: str, classes: int) -> None:
    model, _, _ = fitted(name, classes)
    features, truth = toy(classes, 300)
    found = model.probabilities(features[150:])
    assert found.shape == (150, classes) and found.dtype == np.float64
    assert np.allclose(found.sum(axis=1), 1) and (found >= 0).all()
    assert (found.argmax(axis=1) == truth[150:]).mean() > 0.95


@every_estimator
def test_a_class_that_was_absent_in_training_gets_no_probability(name: str) -> None:
    features, truth = toy(3)
    present = truth != 1
    inner = thirds(int(present.sum()))
    model = Frozen(ESTIMATORS[name](features[present], truth[present], inner), 4)
    found = model.probabilities(features)
    assert found.shape == (90, 4)
    assert not found[:, [1, 3]].any() and np.allclose(found.sum(axis=1), 1)
    assert (found[present].argmax(axis=1) == truth[present]).mean() > 0.95


@every_estimator
def test_a_kept_estimator_answers_exactly_as_before(name: str) -> None:
    model, features, _ = fitted(name)
    content = model.dumps()
    again = load_estimator(content, 3)
    assert np.array_equal(again.probabilities(features), model.probabilities(features))
    assert b"pickle" not in content


@every_estimator
def test_fitting_twice_gives_the_same(name: str) -> None:
    (one, features, _), (other, _, _) = fitted(name), fitted(name)
    assert np.array_equal(one.probabilities(features), other.probabilities(features))


@every_estimator
def test_training_features_are_not_written_into(name: str) -> None:
    features, truth = toy()
    before = features.copy()
    features.flags.writeable = truth.flags.writeable = False
    ESTIMATORS[name](features, truth, thirds(len(truth)))
    assert np.array_equal(features, before)


@pytest.mark.parametrize("name", ["linear", "svm"])
def test_the_scale_of_a_feature_does_not_matter(name: str) -> None:
    features, truth = toy(spread=1.5)
    scale = np.asarray([1000, 1, 0.001, 7, 1])
    inner = thirds(len(truth))
    plain = Frozen(ESTIMATORS[name](features.astype(np.float64), truth, inner), 3).probabilities(features)
    scaled = Frozen(ESTIMATORS[name](features * scale, truth, inner), 3).probabilities(features * scale)
    assert np.allclose(plain, scaled, atol=1e-3)


@pytest.mark.parametrize("name", ["linear", "svm"])
def test_a_rare_class_has_the_same_say(name: str) -> None:
    rng = np.random.default_rng(1)
    truth = np.asarray([1] * 12 + [0] * 228)
    features = rng.normal(0, 1, (240, 2)) + 1.5 * truth[:, None]
    order = rng.permutation(240)
    model = Frozen(ESTIMATORS[name](features[order], truth[order], thirds(240)), 2)
    fresh = rng.normal(0, 1, (400, 2)) + 1.5 * (np.arange(400) % 2)[:, None]
    found = model.probabilities(fresh).argmax(axis=1)
    if name == "linear":  # balanced weights put the border half-way; without them hardly any would be called rare
        assert 0.3 < found.mean() < 0.7
    assert found[1::2].mean() > 0.5


def test_neighbours_are_weighed_by_distance_on_the_unit_sphere() -> None:
    features, truth = toy(spread=1.0)
    found = Frozen(ESTIMATORS["knn"](features, truth, []), 3).probabilities(features[:10] + 0.01)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for at, asked in enumerate(features[:10] + 0.01):
        distance = np.linalg.norm(unit - asked / np.linalg.norm(asked), axis=1)
        near = np.argsort(distance)[:20]
        votes = np.bincount(truth[near], 1 / distance[near], minlength=3)
        shares = votes / votes.sum()  # and one neighbour more, of every class a third
        assert np.allclose(found[at], (20 * shares + 1 / 3) / 21, atol=1e-4)


def test_fewer_rows_than_neighbours_are_enough() -> None:
    features, truth = toy(count=9)
    assert Frozen(ESTIMATORS["knn"](features, truth, []), 3).probabilities(features).shape == (9, 3)


def test_the_svm_s_probabilities_are_not_sharper_than_it_deserves() -> None:
    """On clouds that overlap: the mean confidence of fresh rows is about the share that is right."""
    model, _, _ = fitted("svm", spread=2.2)
    rows, labels = toy(count=900, spread=2.2)
    found = model.probabilities(rows[90:])
    right = (found.argmax(axis=1) == labels[90:]).mean()
    assert abs(found.max(axis=1).mean() - right) < 0.12


# As a fold of a cross-validation


def folds_of(count: int) -> Iterator[Fold]:
    rows = np.arange(count)
    for k in range(3):
        yield Fold(0, k, rows[rows // 6 % 3 != k], rows[rows // 6 % 3 == k])


@every_estimator
def test_the_rows_of_the_test_never_reach_the_fit(name: str) -> None:
    features, truth = toy(count=72)
    groups = [f"patient {at // 6}" for at in range(72)]
    fold = next(folds_of(72))
    labels = Labels(truth, [str(t) for t in truth], groups, "group")
    honest = frozen_fold(name, features, labels, 3, 0, fold)
    wrong_truth, wrong_features = truth.copy(), features.copy()
    wrong_truth[fold.test] = (truth[fold.test] + 1) % 3
    wrong_features[fold.test] = 1e3
    wrong = Labels(wrong_truth, [str(t) for t in wrong_truth], groups, "group")
    model = fit_frozen(name, wrong_features, wrong, fold.train, 3, 0)
    assert np.array_equal(model.probabilities(features[fold.test]), honest.probabilities)
    assert np.array_equal(honest.test, fold.test)
