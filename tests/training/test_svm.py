"""The SVM of frozen features: chosen as a nested scikit-learn search would, inside the fold; and two of them fused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV

from cluster.errors import UsageError
from training.fit import Labels, fit_frozen, fused_fold
from training.splits import Fold
from training.tasks import svm
from training.tasks.frozen import ESTIMATORS, chosen_by
from training.tasks.fusion import Fused, fit_fused, fit_head, judge_inner, load_head


def clouds(count: int = 120, classes: int = 3, columns: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clouds: features [N, D] of which the third column never varies, and truth [N]."""
    rng = np.random.default_rng(seed)
    truth = np.arange(count) % classes
    features = rng.normal(0, 1, (count, columns)) + rng.normal(0, 0.7, (classes, columns))[truth]
    features[:, 2] = 7
    return features.astype(np.float32), truth


def rings(count: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Two classes that no line tells apart."""
    rng = np.random.default_rng(1)
    truth, angle = np.arange(count) % 2, rng.uniform(0, 2 * np.pi, count)
    radius = 1 + truth + rng.normal(0, 0.15, count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), truth


def thirds(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = np.arange(count)
    return [(rows[rows // 6 % 3 != k], rows[rows // 6 % 3 == k]) for k in range(3)]


# Selection


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (3, 1), (5, 2)])
def test_the_choice_is_that_of_a_nested_scikit_learn_search(classes: int, seed: int) -> None:
    features, truth = clouds(classes=classes, seed=seed)
    inner = thirds(len(truth))
    grid = {"svc__C": list(svm.GRID), "svc__kernel": list(svm.KERNELS)}
    search = GridSearchCV(svm.machine(1.0, "rbf"), grid, cv=inner, scoring="balanced_accuracy").fit(features, truth)
    assert svm.select(features, truth, inner) == (search.best_params_["svc__C"], search.best_params_["svc__kernel"])


def test_the_grid_is_that_of_the_paper_s_reading() -> None:
    assert min(svm.GRID) == 2**-10 and max(svm.GRID) == 2**4 and svm.KERNELS == ("linear", "rbf")


def test_rings_get_a_curved_border() -> None:
    features, truth = rings()
    _, kernel = svm.select(features, truth, thirds(len(truth)))
    assert kernel == "rbf"
    fitted = ESTIMATORS["svm"](features, truth, thirds(len(truth)))
    assert chosen_by(fitted).startswith("rbf kernel, C = ")
    assert chosen_by(ESTIMATORS["linear"](features, truth, thirds(len(truth)))) == ""


def test_a_column_that_did_not_vary_in_training_has_no_say() -> None:
    features, truth = clouds()
    fitted: Any = ESTIMATORS["svm"](features, truth, thirds(len(truth)))
    moved = features.copy()
    moved[:, 2] = 1e3
    assert np.array_equal(fitted.predict_proba(moved), fitted.predict_proba(features))


def test_features_that_are_all_alike_are_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="the same features") as caught:
        ESTIMATORS["svm"](np.ones((30, 4)), np.arange(30) % 2, thirds(30))
    assert "\n" not in str(caught.value)


def test_of_many_rows_a_share_of_every_class_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svm, "SELECTED", 50)
    truth = np.asarray([0] * 300 + [1] * 90 + [2] * 10)
    rows = np.random.default_rng(0).permutation(400)
    found = svm.sampled(truth, rows)
    assert len(found) == len(set(found.tolist())) == 50
    assert np.bincount(truth[found]).tolist() == pytest.approx([37.5, 11.25, 1.25], abs=1)
    assert np.array_equal(svm.sampled(truth, rows), found)
    assert np.array_equal(svm.sampled(truth, rows[:50]), rows[:50])


# Two classifiers fused


def truths(count: int, several: bool) -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.random((count, 3)) < 0.5 if several else np.arange(count) % 3


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("task", sorted(ESTIMATORS))
def test_fused_probabilities_are_the_mean_of_two_classifiers_of_their_own(task: str, several: bool) -> None:
    features, truth, inner = clouds()[0], truths(120, several), thirds(120)
    fused = fit_fused(task, features, truth, inner, 3, 8)
    sides = [fit_head(task, part, truth, inner, 3) for part in (features[:, :8], features[:, 8:])]
    asked = clouds(seed=9)[0]
    parts = (asked[:, :8], asked[:, 8:])
    expected = np.mean([side.probabilities(part) for side, part in zip(sides, parts, strict=True)], axis=0)
    np.testing.assert_allclose(fused.probabilities(asked), expected, atol=1e-12)
    parts = (features[:, :8], features[:, 8:])
    own = [judge_inner(side, part, truth, inner) for side, part in zip(sides, parts, strict=True)]
    np.testing.assert_allclose(judge_inner(fused, features, truth, inner), np.mean(own, axis=0), atol=1e-12)


@pytest.mark.parametrize("several", [False, True])
def test_kept_heads_answer_exactly_as_before(several: bool) -> None:
    features, truth, inner = clouds()[0], truths(120, several), thirds(120)
    fused, single = fit_fused("svm", features, truth, inner, 3, 8), fit_head("svm", features, truth, inner, 3)
    for head in (fused, single):
        content = head.dumps()
        again = load_head(content, 3, several=several)
        assert type(again) is type(head) and b"pickle" not in content
        assert np.array_equal(again.probabilities(features), head.probabilities(features))


def test_a_damaged_pair_of_classifiers_is_refused() -> None:
    import skops.io

    with pytest.raises(UsageError, match=r"head\.skops: not two classifiers"):
        load_head(skops.io.dumps({"columns": 3}), 3, several=False)


@pytest.mark.parametrize("columns", [0, 8])
def test_the_rows_of_the_test_never_reach_selection_scaling_or_calibration(columns: int) -> None:
    """Test rows with wrong labels and absurd features leave every number of the fold's fit as it was."""
    features, truth = clouds(96)
    groups, rows = [f"patient {at // 6}" for at in range(96)], np.arange(96)
    fold = Fold(0, 0, rows[rows // 6 % 4 != 0], rows[rows // 6 % 4 == 0])
    honest = fused_fold(columns, "svm", features, Labels(truth, [str(t) for t in truth], groups, "group"), 3, 0, fold)
    marked, wrong = features.copy(), truth.copy()
    marked[fold.test], wrong[fold.test] = 1e4, (truth[fold.test] + 1) % 3
    labels = Labels(wrong, [str(t) for t in wrong], groups, "group")
    head = fit_frozen("svm", marked, labels, fold.train, 3, 0, columns)
    assert isinstance(head, Fused) == (columns > 0)
    assert np.array_equal(head.probabilities(features[fold.test]), honest.probabilities)
    again = fused_fold(columns, "svm", marked, labels, 3, 0, fold)
    assert np.array_equal(again.inner_probabilities, honest.inner_probabilities)
