"""Fits: what is chosen for a fold is chosen on its training side, and what was computed is found by its content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from training.fit import Labels, finetune_fold, frozen_fold
from training.fits import Fits
from training.judgement import judge
from training.splits import Fold, cross_validation
from training.tasks.finetune import Recipe
from training.transform import Augmentation
from training.weights import Wanted

CLASSES = ["a", "b", "c"]
ROWS = 120


def labels_of(truth: np.ndarray) -> Labels:
    return Labels(truth, [CLASSES[t] for t in truth], [f"g{row // 2}" for row in range(len(truth))], "group")


@pytest.fixture
def features() -> np.ndarray:
    """Noise that tells the class of a row a little."""
    rng = np.random.default_rng(0)
    truth = np.repeat(rng.integers(0, 3, ROWS // 2), 2)
    return np.asarray(rng.normal(size=(ROWS, 6)) + 1.2 * np.eye(3)[truth] @ np.ones((3, 6)) * truth[:, None] / 2)


@pytest.fixture
def truth() -> np.ndarray:
    return np.repeat(np.random.default_rng(0).integers(0, 3, ROWS // 2), 2)


def with_other_labels_of(truth: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The watermark: labels of `rows` say something else, group by group."""
    changed = truth.copy()
    changed[rows] = (truth[rows] + 1) % 3
    return changed


@pytest.mark.parametrize("task", ["linear", "knn", "svm"])
def test_the_labels_of_a_folds_test_side_change_nothing_of_what_is_said_of_it(
    features: np.ndarray, truth: np.ndarray, task: str
) -> None:
    """Neither regularisation, nor probability scale, nor the temperature that calibrates it."""
    labels = labels_of(truth)
    folds = cross_validation(labels.names, labels.groups, folds=3, repeats=1, split="group", seed=0)
    for fold in folds:
        other = labels_of(with_other_labels_of(truth, fold.test))
        said = []
        for known in (labels, other):
            result = frozen_fold(task, features, known, 3, 0, fold)
            judged = judge([result], known, CLASSES, 0)
            inner = judged.inner[fold.repeat, fold.fold]
            assert inner.raw.shape == (len(fold.train), 3)
            said.append((result.probabilities, judged.probabilities, inner.raw, inner.truth))
        for ours, theirs in zip(*said, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_nor_when_a_fine_tuned_network_is_stopped(truth: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 255, (ROWS, 32, 32, 1), dtype=np.uint8)
    labels = labels_of(truth)
    fold = cross_validation(labels.names, labels.groups, folds=3, repeats=1, split="group", seed=0)[0]
    wanted = Wanted("none", "auto", "test_vit", "32", 0, "cpu", 1, (0.5,), (0.2,), (("drop_path_rate", 0.0),))
    recipe = Recipe(wanted, 3, 3, 16, 1e-3, 0.05, None, 0.1, Augmentation(0.6, True, False, 0.1), 0, "cpu", 1)
    said = []
    for known in (labels, labels_of(with_other_labels_of(truth, fold.test))):
        result = finetune_fold(recipe, pixels, known, fold)
        judged = judge([result], known, CLASSES, 0)
        said.append((np.asarray([result.best_epoch]), result.probabilities, judged.probabilities))
        assert set(result.inner_rows) < set(fold.train)
        assert not {known.groups[r] for r in result.inner_rows} & {known.groups[r] for r in fold.test}
    for ours, theirs in zip(*said, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("task", ["linear", "knn", "svm"])
def test_inner_predictions_are_of_classifiers_that_did_not_train_on_them(task: str) -> None:
    """Labels drawn at random, one pair of twins per group: who has seen the twin knows the answer."""
    rng = np.random.default_rng(2)
    truth = np.repeat(rng.integers(0, 3, ROWS // 2), 2)
    features = np.repeat(rng.normal(size=(ROWS // 2, 30)), 2, axis=0)
    labels = labels_of(truth)
    fold = Fold(0, 0, np.arange(ROWS - 20), np.arange(ROWS - 20, ROWS))
    result = frozen_fold(task, features, labels, 3, 0, fold)
    right = (result.inner_probabilities.argmax(axis=1) == truth[result.inner_rows]).mean()
    assert right < 0.55
    np.testing.assert_allclose(result.inner_probabilities.sum(axis=1), 1)


def test_the_inner_predictions_of_an_svm_have_the_scale_of_its_own(features: np.ndarray, truth: np.ndarray) -> None:
    labels = labels_of(truth)
    fold = Fold(0, 0, np.arange(100), np.arange(100, ROWS))
    result = frozen_fold("svm", features, labels, 3, 0, fold)
    ours, inner = result.probabilities.max(axis=1).mean(), result.inner_probabilities.max(axis=1).mean()
    assert inner == pytest.approx(ours, abs=0.12)


def test_a_fit_is_found_again_by_what_it_was_made_of(features: np.ndarray, truth: np.ndarray, tmp_path: Path) -> None:
    labels = labels_of(truth)
    fold = replace(Fold(0, 1, np.arange(10, ROWS), np.arange(10)), share=0.5)
    result = frozen_fold("knn", features, labels, 3, 0, fold)
    ids = [f"image{row}" for row in range(ROWS)]
    fits = Fits(tmp_path / "folds", {"lr": 1.0}, ids)
    assert fits.load(fold) is None
    fits.save(fold, result)
    found = fits.load(fold)
    assert found is not None
    for name in ("test", "probabilities", "distances", "inner_rows", "inner_probabilities"):
        np.testing.assert_array_equal(getattr(found, name), getattr(result, name))
    assert (found.repeat, found.fold, found.share, found.best_epoch) == (0, 1, 0.5, 0)
    others = [
        (fits, replace(fold, train=fold.train[1:])),
        (fits, replace(fold, test=fold.test[1:])),
        (fits, replace(fold, repeat=1)),
        (replace(fits, subject={"lr": 2.0}), fold),
        (replace(fits, image_ids=[*ids[:-1], "another"]), fold),
    ]
    for other, same in others:
        assert other.load(same) is None
    assert len(list((tmp_path / "folds").iterdir())) == 1
