"""Prediction sets against by-hand order statistics, MAPIE's own figures and simulated coverage."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from mapie.metrics.classification import classification_coverage_score, classification_mean_width_score

from training.bootstrap import Units
from training.calibration import Inner
from training.conformal import blocks, judged_sets, prediction_sets


def drawn(rows: int, seed: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Truth and overconfident probabilities that are exchangeable over rows."""
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(np.full(classes, 0.6), rows)
    truth = (rng.random((rows, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(0, classes - 1)
    return truth, chances**2 / (chances**2).sum(axis=1, keepdims=True)


def by_hand(inner: Inner, p: np.ndarray, level: float) -> np.ndarray:
    """The k-th smallest score is the bound, k = ceil((n + 1) level) in whole hundredths, so without rounding."""
    scores = sorted(1 - inner.raw[i, t] for i, t in enumerate(inner.truth))
    rank = math.ceil((len(scores) + 1) * round(level * 100) / 100 - 1e-12)
    return np.asarray([[1 - value <= scores[rank - 1] + 1e-9 for value in row] for row in p])


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_true_class_is_in_the_set_as_often_as_stated_on_exchangeable_rows(level: float) -> None:
    shares = []
    for seed in range(40):
        inner, (truth, p) = Inner(*drawn(200, seed)), drawn(500, 1000 + seed)
        member = prediction_sets(inner, p, level).member
        shares.append(member[np.arange(500), truth].mean())
    assert level - 0.02 <= np.mean(shares) <= level + 0.02


@pytest.mark.parametrize("rows", [21, 22, 29, 39, 40, 59, 99, 100, 199])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_sets_are_those_of_the_order_statistic_by_hand(rows: int, level: float) -> None:
    inner, (_, p) = Inner(*drawn(rows, rows)), drawn(60, 7)
    found = prediction_sets(inner, p, level)
    assert (found.member == by_hand(inner, p, level)).all()
    assert found.largest_score is not None
    assert (found.member == (1 - p <= found.largest_score + 1e-8)).all()


def test_too_few_inner_rows_rule_nothing_out() -> None:
    for rows, level in ((0, 0.9), (9, 0.9), (10, 0.9), (20, 0.95)):
        inner, (_, p) = Inner(*drawn(rows, 0)), drawn(10, 1)
        found = prediction_sets(inner, p, level)
        assert found.member.all() and found.largest_score is None


def test_a_class_that_the_inner_rows_lack_is_handled_without_a_warning() -> None:
    truth, p = drawn(200, 0)
    keep = truth != 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = prediction_sets(Inner(truth[keep], p[keep]), p, 0.9)
    assert found.member.shape == p.shape


def test_rows_of_single_precision_are_taken() -> None:
    truth, p = drawn(200, 0)
    single: Any = p.astype(np.float32)
    assert prediction_sets(Inner(truth, single), single, 0.9).member.any()


def test_judged_sets_are_mapies_own_figures_pooled_over_folds() -> None:
    truth, p = drawn(300, 3)
    fold, zeros = np.arange(300) % 3, np.zeros(300, dtype=int)
    inner = {(0, f): Inner(*drawn(120, 10 + f)) for f in range(3)}
    units = Units.of(np.arange(300), fold, zeros, resamples=20)
    sets = judged_sets(list("abcd"), truth, p, fold, zeros, inner, units, 0.9)
    member = np.zeros(p.shape, dtype=bool)
    for f in range(3):
        member[fold == f] = by_hand(inner[(0, f)], p[fold == f], 0.9)
    assert sets["coverage"]["value"] == pytest.approx(classification_coverage_score(truth, member[:, :, None])[0])
    assert sets["size"]["value"] == pytest.approx(classification_mean_width_score(member[:, :, None])[0])
    single = member.sum(axis=1) == 1
    assert sets["single"]["value"] == pytest.approx(single.mean())
    assert sets["single_right"]["value"] == pytest.approx(member[single, truth[single]].mean())
    assert sets["empty"]["value"] == pytest.approx((member.sum(axis=1) == 0).mean())
    for c, name in enumerate("abcd"):
        assert sets["coverage_by_class"][name]["value"] == pytest.approx(member[truth == c, c].mean())
    assert sets["coverage"]["per_fold"] == pytest.approx(
        [member[np.arange(300), truth][fold == f].mean() for f in range(3)]
    )


def test_the_words_name_folds_with_too_few_images() -> None:
    truth, p = drawn(60, 3)
    zeros = np.zeros(60, dtype=int)
    units = Units.of(np.arange(60), zeros, zeros, resamples=20)
    few = judged_sets(list("abcd"), truth, p, zeros, zeros, {(0, 0): Inner(*drawn(5, 1))}, units, 0.9)
    many = judged_sets(list("abcd"), truth, p, zeros, zeros, {(0, 0): Inner(*drawn(50, 1))}, units, 0.9)
    assert "too few calibrating images" in str(blocks({"0.90": few}, 60))
    assert "too few calibrating images" not in str(blocks({"0.90": many}, 60))
