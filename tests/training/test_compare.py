"""Comparisons against statsmodels, enumeration and by-hand resampling; intervals and levels by simulation."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import balanced_accuracy_score, f1_score
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from training.bootstrap import tail_share
from training.compare import compare, differences, holm, mcnemar
from training.metrics import NAMES, summarise

CORRECT = ((0.8, 0.7), (0.75, 0.72))
"""Chance of each model to name an image of class 0 and 1 right."""
PREVALENCE = 0.35


def study(
    rng: np.random.Generator, *, patients: int, images: int, correct: Any = CORRECT
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """(truth, group, probabilities of two models): right where a latent normal value is small enough.

    A quarter of its variance is the patient's, for both models, 15 % the patient's for one model, 30 % the image's.
    """
    group = np.repeat(np.arange(patients), images)
    truth = (rng.random(len(group)) < PREVALENCE).astype(int)
    patient, image, sides = rng.normal(size=patients)[group], rng.normal(size=len(group)), []
    for chance in correct:
        own = 0.15**0.5 * rng.normal(size=patients)[group] + 0.3**0.5 * rng.normal(size=len(group))
        right = 0.5 * patient + 0.3**0.5 * image + own < norm.ppf(np.asarray(chance)[truth])
        sides.append(np.where(np.eye(2, dtype=bool)[np.where(right, truth, 1 - truth)], 0.9, 0.1))
    return truth, group, sides


def judged(seed: int = 0, *, classes: int = 3, repeats: int = 2, images: int = 150) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    truth, group = rng.integers(classes, size=images), rng.integers(40, size=images)
    fold = np.concatenate([rng.permutation(40)[group] % 3 for _ in range(repeats)])
    truth, group = np.tile(truth, repeats), np.tile(group, repeats)
    sides = [rng.dirichlet(np.ones(classes), len(truth)) + s * np.eye(classes)[truth] for s in (0.5, 0.3, 0.3)]
    rows = {"group": group, "fold": fold, "repeat": np.repeat(np.arange(repeats), images)}
    return {"truth": truth, "sides": [s / s.sum(axis=1, keepdims=True) for s in sides], "rows": rows}


# differences


def test_a_difference_is_that_of_the_values_of_both_sides_for_every_metric() -> None:
    for classes in (2, 3):
        data = judged(classes=classes)
        ours, theirs, _ = (summarise(data["truth"], s, **data["rows"], resamples=2) for s in data["sides"])
        found = differences(data["truth"], data["sides"][0], data["sides"][1:], **data["rows"], resamples=50)
        for name in NAMES:
            a, b = ours[name]["value"], theirs[name]["value"]
            assert a is not None and b is not None
            assert found[0][name]["difference"] == pytest.approx(a - b, abs=1e-12), name


def test_both_sides_are_judged_on_the_same_resamples_of_groups() -> None:
    data = judged(1, repeats=1)
    truth, (ours, theirs, _), rows = data["truth"], data["sides"], data["rows"]
    (found,) = differences(truth, ours, [theirs], **rows, resamples=100, seed=5)
    names, codes = np.unique(rows["group"].astype(str), return_inverse=True)
    draws: dict[str, list[float]] = {"balanced_accuracy": [], "f1_macro": []}
    for draw in np.random.default_rng(5).integers(len(names), size=(100, len(names))):
        chosen = np.concatenate([np.flatnonzero(codes == g) for g in draw])
        a, b = (side[chosen].argmax(axis=1) for side in (ours, theirs))
        t = truth[chosen]
        draws["balanced_accuracy"].append(balanced_accuracy_score(t, a) - balanced_accuracy_score(t, b))
        draws["f1_macro"].append(f1_score(t, a, average="macro") - f1_score(t, b, average="macro"))
    share = tail_share(len(names))
    for name, values in draws.items():
        assert found[name]["ci95"] == pytest.approx(np.quantile(values, [share, 1 - share]), abs=1e-12)


def test_a_model_does_not_differ_from_itself_and_the_other_way_round_has_the_other_sign() -> None:
    data = judged(2)
    truth, (ours, theirs, _), rows = data["truth"], data["sides"], data["rows"]
    (same,) = differences(truth, ours, [ours], **rows, resamples=100)
    (there,), (back,) = (differences(truth, a, [b], **rows, resamples=400) for a, b in ((ours, theirs), (theirs, ours)))
    for name in NAMES:
        assert same[name] == {"difference": 0, "ci95": [0, 0], "p": 1}
        low, high = there[name]["ci95"]
        assert low is not None and high is not None
        assert back[name]["ci95"] == pytest.approx([-high, -low])
        assert back[name]["p"] == pytest.approx(there[name]["p"])
        p = there[name]["p"]
        assert p is not None and (p < 0.05) == (not low <= 0 <= high)


def test_pairing_makes_the_interval_narrower_than_that_of_two_separate_studies() -> None:
    truth, group, (ours, theirs) = study(np.random.default_rng(0), patients=100, images=3)
    rows: Any = {"group": group, "fold": np.zeros(300), "repeat": np.zeros(300)}
    widths = []
    for side in (ours, theirs):
        low, high = summarise(truth, side, **rows)["accuracy"]["ci95"]
        assert low is not None and high is not None
        widths.append(high - low)
    low, high = differences(truth, ours, [theirs], **rows)[0]["accuracy"]["ci95"]
    assert low is not None and high is not None
    assert high - low < 0.9 * np.hypot(widths[0], widths[1])


def holds(found: Any, expected: float) -> bool:
    low, high = found["ci95"]
    return bool(low <= expected <= high)


@pytest.mark.slow
def test_intervals_cover_what_they_should_on_correlated_images() -> None:
    """95 % of studies: of values (the mean of both models') and of differences; with 100 patients and with 20.

    Simulated at length (1,500 studies), coverage is 93 to 96 %; the bounds leave room for 2.5 standard errors of as
    many studies as fit in a test. Plain percentiles cover 92 % with 20 patients.
    """
    by_class = {"accuracy": np.array([1 - PREVALENCE, PREVALENCE]), "balanced_accuracy": np.array([0.5, 0.5])}
    for patients, images, studies in ((100, 2, 800), (20, 4, 500)):
        covered = dict.fromkeys(itertools.product(by_class, ("value", "difference")), 0.0)
        rng = np.random.default_rng(patients)
        for seed in range(studies):
            truth, group, (ours, theirs) = study(rng, patients=patients, images=images)
            zeros = np.zeros(len(truth), dtype=int)
            rows: Any = {"group": group, "fold": zeros, "repeat": zeros, "resamples": 400, "seed": seed}
            own = [summarise(truth, side, **rows) for side in (ours, theirs)]
            (found,) = differences(truth, ours, [theirs], **rows)
            for name, weights in by_class.items():
                value, other = (float(weights @ np.asarray(chances)) for chances in CORRECT)
                covered[name, "value"] += (holds(own[0][name], value) + holds(own[1][name], other)) / 2
                covered[name, "difference"] += holds(found[name], value - other)
        for key, count in covered.items():
            assert (0.93 if patients == 100 else 0.92) <= count / studies <= 0.97, (patients, key, count / studies)


def test_one_group_has_differences_but_neither_interval_nor_p_value() -> None:
    data = judged(3)
    rows = data["rows"] | {"group": np.zeros(len(data["truth"]))}
    (found,) = differences(data["truth"], data["sides"][0], [data["sides"][1]], **rows, resamples=10)
    for name in NAMES:
        assert found[name]["difference"] is not None
        assert (found[name]["ci95"], found[name]["p"]) == ([None, None], None)


# McNemar


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 9), (12, 12), (12, 13), (20, 5), (40, 20), (0, 30)])
def test_mcnemar_is_that_of_statsmodels(b: int, c: int) -> None:
    ours, theirs = np.array([1] * b + [0] * c + [1, 1, 0], bool), np.array([0] * b + [1] * c + [1, 1, 0], bool)
    found = mcnemar(ours, theirs, group=np.arange(b + c + 3), repeat=np.zeros(b + c + 3))
    table = [[2, b], [c, 1]]
    exact = b + c < 25
    assert found["p"] == pytest.approx(statsmodels_mcnemar(table, exact=exact, correction=True).pvalue, rel=1e-9)
    assert found["method"].startswith("exact" if exact else "chi-squared")
    assert (found["only_ours"], found["only_theirs"]) == (b, c)
    # with one image per group, swapping within groups is the exact test
    assert found["p_group"] == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue, rel=1e-6, abs=1e-15)


def test_p_by_group_counts_every_way_of_swapping_the_models_within_groups() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        group = rng.integers(10, size=40)
        ours, theirs = rng.random(40) < 0.8, rng.random(40) < 0.6
        surplus = [int(ours[group == g].sum()) - int(theirs[group == g].sum()) for g in range(10)]
        sums = [abs(sum(s * x for s, x in zip(signs, surplus, strict=True))) for signs in _signs(10)]
        expected = np.mean([total >= abs(sum(surplus)) for total in sums])
        found = mcnemar(ours, theirs, group=group, repeat=np.zeros(40))
        assert found["p_group"] == pytest.approx(expected, abs=1e-12)


def _signs(count: int) -> itertools.product[tuple[int, ...]]:
    return itertools.product((1, -1), repeat=count)


def test_p_by_group_keeps_its_level_where_mcnemar_does_not() -> None:
    """Two equally good models, one of which is right on all images of a patient, or on none."""
    rng, alarms = np.random.default_rng(0), {"p": 0, "p_group": 0}
    group, studies = np.repeat(np.arange(40), 5), 500
    for _ in range(studies):
        ours, theirs = (rng.random(40) < 0.7)[group], (rng.random(40) < 0.7)[group]
        found = mcnemar(ours, theirs, group=group, repeat=np.zeros(len(group)))
        alarms["p"] += found["p"] <= 0.05
        alarms["p_group"] += found["p_group"] <= 0.05
    assert alarms["p_group"] / studies <= 0.06
    assert alarms["p"] / studies > 0.2


def test_repeats_average_the_counts_and_swap_a_group_as_a_whole() -> None:
    rng = np.random.default_rng(1)
    ours, theirs, group = rng.random(60) < 0.8, rng.random(60) < 0.6, np.arange(60) // 3
    once = mcnemar(ours, theirs, group=group, repeat=np.zeros(60))
    twice = mcnemar(np.tile(ours, 2), np.tile(theirs, 2), group=np.tile(group, 2), repeat=np.repeat([0, 1], 60))
    assert twice == pytest.approx(once)


def test_p_by_group_of_a_hundred_thousand_images_is_near_the_normal_one() -> None:
    rng = np.random.default_rng(2)
    group = rng.integers(20_000, size=100_000)
    ours, theirs = rng.random(100_000) < 0.802, rng.random(100_000) < 0.8
    surplus = np.bincount(group, ours.astype(float) - theirs)
    z = (abs(surplus.sum()) - 1) / np.sqrt(np.square(surplus).sum())
    found = mcnemar(ours, theirs, group=group, repeat=np.zeros(100_000))
    assert found["p_group"] == pytest.approx(2 * norm.sf(z), abs=1e-3)


# Holm, and all together


def test_holm_is_that_of_statsmodels_and_leaves_out_what_is_undefined() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 9):
        p = (rng.random(count) ** 3).round(2).tolist()
        expected = multipletests(p, method="holm")[1]
        assert holm(p) == pytest.approx(expected)
        assert holm([None, *p, None]) == [None, *holm(p), None]
    assert holm([]) == []


def test_a_comparison_holds_every_metric_and_corrects_over_the_models() -> None:
    data = judged(4, classes=2)
    others = {"a": data["sides"][1], "b": data["sides"][2]}
    found = compare(data["truth"], data["sides"][0], others, **data["rows"], resamples=200)
    assert list(found) == ["a", "b"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name in NAMES:
        both = [found[other]["metrics"][name] for other in found]
        assert [d["p_holm"] for d in both] == pytest.approx(holm([d["p"] for d in both]))
    assert [m["mcnemar"]["p_holm"] for m in found.values()] == holm([m["mcnemar"]["p_group"] for m in found.values()])
    for one in found.values():
        assert one["delong"] is not None
        assert one["delong"]["difference"] == pytest.approx(one["metrics"]["auroc"]["difference"])
        low, high = one["metrics"]["auroc"]["ci95"]
        assert low is not None and high is not None
        assert one["delong"]["ci95"] == pytest.approx([low, high], abs=0.05)


def test_more_than_two_classes_have_no_delong_and_one_comparison_is_not_corrected() -> None:
    data = judged(5)
    found = compare(data["truth"], data["sides"][0], {"a": data["sides"][1]}, **data["rows"], resamples=50)["a"]
    assert found["delong"] is None
    assert found["mcnemar"]["p_holm"] == found["mcnemar"]["p_group"]
    assert all(d["p_holm"] == d["p"] for d in found["metrics"].values())
