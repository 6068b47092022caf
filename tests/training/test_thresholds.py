"""Thresholds against brute force and scikit-learn, rates against by-hand counts, Bayes against counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from training.bootstrap import Units
from training.thresholds import GOALS, choose, judge, predictive_values


def rates(scores: np.ndarray, positive: np.ndarray, threshold: float) -> tuple[float, float]:
    called = scores >= threshold
    return float(called[positive].mean()), float((~called)[~positive].mean())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=40), st.sampled_from([0.5, 0.9, 1]))
def test_a_threshold_for_a_sensitivity_is_the_largest_score_that_reaches_it(
    rows: list[tuple[int, bool]], wanted: float
) -> None:
    scores, positive = np.asarray([s for s, _ in rows]) / 12, np.asarray([p for _, p in rows])
    found = choose(scores, positive, wanted)
    if positive.all() or not positive.any():
        assert found is None
        return
    assert found == max(s for s in scores if rates(scores, positive, s)[0] >= wanted)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=40))
def test_youdens_threshold_is_the_best_of_all_and_of_scikit_learns_curve(rows: list[tuple[int, bool]]) -> None:
    scores, positive = np.asarray([s for s, _ in rows]) / 12, np.asarray([p for _, p in rows])
    found = choose(scores, positive, None)
    if positive.all() or not positive.any():
        assert found is None
        return
    assert found is not None
    best = max(sum(rates(scores, positive, s)) for s in scores)
    false, true, _ = roc_curve(positive, scores)
    assert sum(rates(scores, positive, found)) == pytest.approx(best)
    assert best == pytest.approx(1 + (true - false).max())
    assert found == max(s for s in scores if sum(rates(scores, positive, s)) > best - 1e-9)


def data(seed: int = 0, rows: int = 240, classes: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, rows)
    group = np.arange(rows) // 4
    p = rng.dirichlet(np.ones(classes), rows) + 0.5 * np.eye(classes)[truth]
    inner = {}
    for repeat in (0, 1):
        for fold in (0, 1):
            t = rng.integers(0, classes, 90)
            q = rng.dirichlet(np.ones(classes), 90) + 0.5 * np.eye(classes)[t]
            inner[(repeat, fold)] = (t, q / q.sum(axis=1, keepdims=True))
    folds, repeats = group % 2, (np.arange(rows) >= rows // 2).astype(int)
    return {
        "truth": truth,
        "probabilities": p / p.sum(axis=1, keepdims=True),
        "fold": folds,
        "repeat": repeats,
        "inner": inner,
        "units": Units.of(group.astype(str), folds, repeats, resamples=60),
    }


def test_rates_are_counted_by_hand_over_folds_and_averaged_over_repeats() -> None:
    d = data()
    judged = judge(list("abc"), **d)
    for c, name in enumerate("abc"):
        for goal, wanted in GOALS.items():
            found, shares = judged[name][goal], []
            for repeat in (0, 1):
                tp = fp = tn = fn = 0
                for fold in (0, 1):
                    t, q = d["inner"][(repeat, fold)]
                    threshold = choose(q[:, c], t == c, wanted)
                    assert threshold == found["threshold_per_fold"][2 * repeat + fold]
                    for i in np.flatnonzero((d["repeat"] == repeat) & (d["fold"] == fold)):
                        called, is_class = d["probabilities"][i, c] >= threshold, d["truth"][i] == c
                        tp, fp = tp + (called and is_class), fp + (called and not is_class)
                        fn, tn = fn + (not called and is_class), tn + (not called and not is_class)
                shares.append((tp / (tp + fn), tn / (tn + fp), tp / (tp + fp), tn / (tn + fn)))
            values = [found["sensitivity"], found["specificity"], found["ppv"], found["npv"]]
            assert [v["value"] for v in values] == pytest.approx(np.mean(shares, axis=0))
            for metric in values:
                low, high = metric["ci95"]
                assert low is not None and high is not None and metric["value"] is not None
                assert low <= metric["value"] <= high


def test_thresholds_do_not_change_when_the_labels_of_the_judged_rows_do() -> None:
    d = data()
    before = judge(list("abc"), **d)
    after = judge(list("abc"), **d | {"truth": np.random.default_rng(9).permutation(d["truth"])})
    for name in "abc":
        for goal in GOALS:
            assert before[name][goal]["threshold_per_fold"] == after[name][goal]["threshold_per_fold"]
            assert before[name][goal]["sensitivity"] != after[name][goal]["sensitivity"]


def test_predictive_values_are_those_of_counting_a_population() -> None:
    """Of 1,000,000 people 20,000 are ill; 90 % of them are called, and 20 % of the healthy."""
    ppv, npv = predictive_values(0.9, 0.8, 0.02)
    assert ppv == pytest.approx(18_000 / (18_000 + 196_000))
    assert npv == pytest.approx(784_000 / (784_000 + 2_000))
    assert np.isnan(predictive_values(0.0, 1.0, 0.1)[0])


def test_at_the_prevalence_of_the_data_bayes_gives_the_counted_predictive_values() -> None:
    d = data(classes=2)
    one: dict[str, Any] = {"fold": np.zeros(240, dtype=int), "repeat": np.zeros(240, dtype=int)}
    units = Units.of(np.arange(240).astype(str), **one, resamples=30)
    share = float((d["truth"] == 1).mean())
    judged = judge(["a", "b"], **d | one | {"units": units}, prevalence=[share])["b"]["Youden"]
    (found,) = judged["at_prevalence"].values()
    assert found["ppv"]["value"] == pytest.approx(judged["ppv"]["value"], abs=1e-4)
    assert found["npv"]["value"] == pytest.approx(judged["npv"]["value"], abs=1e-4)


def test_a_fold_without_the_class_has_no_threshold_and_is_not_judged() -> None:
    d = data()
    t, q = d["inner"][(0, 0)]
    d["inner"][(0, 0)] = (np.where(t == 2, 1, t), q)
    found = judge(list("abc"), **d)["c"]["Youden"]
    assert found["threshold_per_fold"][0] is None and found["threshold_per_fold"][1] is not None
    assert found["sensitivity"]["per_fold"][0] is None


def test_perfect_separation_is_not_certainty() -> None:
    truth = np.arange(40) % 2
    p = np.eye(2)[truth] * 0.8 + 0.1
    zeros = np.zeros(40, dtype=int)
    units = Units.of(np.arange(40), zeros, zeros, resamples=30)
    found = judge(["a", "b"], truth, p, zeros, zeros, {(0, 0): (truth, p)}, units, [0.01])["b"]["Youden"]
    at = found["at_prevalence"]["0.01"]["ppv"]
    assert found["sensitivity"]["value"] == found["specificity"]["value"] == at["value"] == 1
    assert found["sensitivity"]["ci95"] == pytest.approx([0.025 ** (1 / 20), 1])
    assert at["ci95"][0] is not None and at["ci95"][0] < 0.1 and at["ci95"][1] == 1
