"""Metrics against scikit-learn and by-hand loops; intervals against by-hand resampling and simulated coverage."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, t
from sklearn import metrics as sk

from training.bootstrap import tail_share
from training.metrics import NAMES, auroc, confusion, ece, meaningful, reliability, summarise, title_of

Arrays = dict[str, Any]


def predictions(
    seed: int = 0, *, rows: int = 200, classes: int = 4, folds: int = 5, repeats: int = 2, groups: int = 60
) -> Arrays:
    """Out-of-fold predictions that are better than chance, rounded so that scores tie."""
    rng = np.random.default_rng(seed)
    truth, group = rng.integers(0, classes, rows), rng.integers(0, groups, rows)
    parts = []
    for repeat in range(repeats):
        noisy = rng.dirichlet(np.ones(classes), rows) + 0.4 * np.eye(classes)[truth]
        fold = rng.permutation(groups)[group] % folds
        p = np.round(noisy / noisy.sum(1, keepdims=True), 2)
        parts.append((truth, p / p.sum(1, keepdims=True), group, fold, np.full(rows, repeat)))
    names = ("truth", "probabilities", "group", "fold", "repeat")
    return {name: np.concatenate(columns) for name, columns in zip(names, zip(*parts, strict=True), strict=True)}


def by_scikit_learn(truth: np.ndarray, p: np.ndarray) -> dict[str, float]:
    labels, predicted = list(range(p.shape[1])), p.argmax(1)
    return {
        "accuracy": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, predicted),
        "kappa": sk.cohen_kappa_score(truth, predicted, labels=labels),
        "kappa_quadratic": sk.cohen_kappa_score(truth, predicted, labels=labels, weights="quadratic"),
        "f1_macro": sk.f1_score(truth, predicted, average="macro"),
        "ece": by_hand_ece(truth, p),
    }


def by_hand_ece(truth: np.ndarray, p: np.ndarray, bins: int = 15) -> float:
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [i for i in range(len(truth)) if low < p[i].max() <= high]
        if inside:
            right = np.mean([p[i].argmax() == truth[i] for i in inside])
            total += len(inside) / len(truth) * abs(right - np.mean([p[i].max() for i in inside]))
    return total


def by_hand_auroc(truth: np.ndarray, p: np.ndarray) -> float:
    """Counts pairs: how often a row of the class scores above one of another class."""
    areas = []
    for c in sorted(set(truth.tolist())):
        inside, outside = p[truth == c, c], p[truth != c, c]
        if len(inside) and len(outside):
            wins = (inside[:, None] > outside).sum() + (inside[:, None] == outside).sum() / 2
            areas.append(wins / (len(inside) * len(outside)))
    return float(np.mean(areas))


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_values_are_those_of_scikit_learn_pooled_per_repeat_and_averaged_over_repeats(classes: int) -> None:
    data = predictions(classes, classes=classes)
    result = summarise(**data, resamples=2)
    repeats = [data["repeat"] == r for r in (0, 1)]
    expected = [by_scikit_learn(data["truth"][rows], data["probabilities"][rows]) for rows in repeats]
    for name in expected[0]:
        assert result[name]["value"] == pytest.approx(np.mean([e[name] for e in expected]), abs=1e-12), name


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_auroc_is_the_mean_over_folds_of_scikit_learns(classes: int) -> None:
    data = predictions(classes, classes=classes, rows=300)
    result = summarise(**data, resamples=2)["auroc"]
    expected = []
    for repeat in range(2):
        for fold in range(5):
            rows = (data["repeat"] == repeat) & (data["fold"] == fold)
            truth, p = data["truth"][rows], data["probabilities"][rows]
            score = sk.roc_auc_score(truth, p[:, 1] if classes == 2 else p, multi_class="ovr", average="macro")
            expected.append(score)
            assert score == pytest.approx(by_hand_auroc(truth, p))
    assert result["per_fold"] == pytest.approx(expected, abs=1e-12)
    assert result["value"] == pytest.approx(np.mean(expected), abs=1e-12)


def test_values_per_fold_are_those_of_the_folds_alone_in_order_of_repeat_and_fold() -> None:
    data = predictions(1, groups=30)
    result = summarise(**data, resamples=2)
    for i in range(10):
        rows = (data["repeat"] == i // 5) & (data["fold"] == i % 5)
        for name, value in by_scikit_learn(data["truth"][rows], data["probabilities"][rows]).items():
            assert result[name]["per_fold"][i] == pytest.approx(value, abs=1e-12), (name, i)


def test_auroc_skips_a_class_that_a_fold_lacks() -> None:
    truth = np.array([0, 1, 0, 1, 1])
    p = np.random.default_rng(0).dirichlet(np.ones(3), 5)
    expected = np.mean([sk.roc_auc_score(truth == c, p[:, c]) for c in (0, 1)])
    assert auroc(p, truth)[0] == pytest.approx(expected)


def test_auroc_of_a_single_class_is_undefined() -> None:
    assert np.isnan(auroc([[0.4, 0.6], [0.1, 0.9]], [1, 1])).all()
    result = summarise([1, 1], [[0.4, 0.6], [0.1, 0.9]], group=["a", "b"], fold=[0, 1], repeat=[0, 0])
    assert result["auroc"] == {"value": None, "ci95": [None, None], "per_fold": [None, None]}


def test_auroc_with_weights_is_auroc_with_rows_repeated() -> None:
    rng = np.random.default_rng(3)
    truth, p = rng.integers(0, 3, 40), rng.dirichlet(np.ones(3), 40).round(1)
    weights = rng.integers(0, 4, (40, 6))
    for column, value in enumerate(auroc(p, truth, weights)):
        rows = np.repeat(np.arange(40), weights[:, column])
        assert value == pytest.approx(by_hand_auroc(truth[rows], p[rows]))


def test_ordered_classes_have_the_mean_level_error_with_its_interval_and_nothing_else_changes() -> None:
    data = predictions(3, classes=4, groups=40)
    plain, ordered = summarise(**data, resamples=50), summarise(**data, resamples=50, ordered=True)
    assert list(ordered) == [*NAMES, "mean_level_error"]
    assert {name: ordered[name] for name in NAMES} == plain
    off = np.abs(data["probabilities"].argmax(1) - data["truth"])
    expected = np.mean([off[data["repeat"] == r].mean() for r in (0, 1)])
    found = ordered["mean_level_error"]
    assert found["value"] == pytest.approx(expected, abs=1e-12)
    assert found["per_fold"][3] == pytest.approx(off[(data["repeat"] == 0) & (data["fold"] == 3)].mean())
    low, high = found["ci95"]
    assert low is not None and high is not None and low < expected < high


def test_quadratic_kappa_follows_the_order_of_the_classes() -> None:
    """Neighbours are mixed up here: far apart in another order, so the same predictions agree less."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, 200)
    said = np.clip(truth + rng.integers(-1, 2, 200), 0, 3)
    found = {}
    for order in ([0, 1, 2, 3], [0, 2, 1, 3]):
        place = np.argsort(order)
        zeros = np.zeros(200, int)
        result = summarise(place[truth], np.eye(4)[place[said]], group=np.arange(200), fold=zeros, repeat=zeros,
                           resamples=2, ordered=True)  # fmt: skip
        expected = sk.cohen_kappa_score(place[truth], place[said], weights="quadratic")
        assert result["kappa_quadratic"]["value"] == pytest.approx(expected)
        found[tuple(order)] = (expected, result["mean_level_error"]["value"])
    (near, off), (far, further) = found.values()
    assert near > far and off is not None and further is not None and off < further


def test_kappa_of_a_textbook_table_is_four_tenths() -> None:
    """20 + 15 of 50 agree, 25 would by chance: (0.7 - 0.5) / (1 - 0.5) = 0.4."""
    truth, predicted = [1] * 25 + [0] * 25, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    result = summarise(truth, np.eye(2)[predicted], group=np.arange(50), fold=[0] * 50, repeat=[0] * 50)
    assert result["kappa"]["value"] == pytest.approx(0.4)


def test_the_interval_is_the_percentile_of_recomputing_each_resample_of_groups() -> None:
    data = predictions(2, rows=80, groups=25, classes=3, folds=2)
    result = summarise(**data, resamples=60, seed=7)
    names, codes = np.unique(data["group"].astype(str), return_inverse=True)
    drawn = np.random.default_rng(7).integers(len(names), size=(60, len(names)))
    values: dict[str, list[float]] = {name: [] for name in NAMES}
    for draw in drawn:
        per_repeat: list[dict[str, float]] = []
        for repeat in range(2):
            rows = np.concatenate([np.flatnonzero((codes == g) & (data["repeat"] == repeat)) for g in draw])
            truth, p, fold = data["truth"][rows], data["probabilities"][rows], data["fold"][rows]
            areas = [by_hand_auroc(truth[fold == f], p[fold == f]) for f in range(2)]
            per_repeat.append(by_scikit_learn(truth, p) | {"auroc": float(np.mean(areas))})
        for name in NAMES:
            values[name].append(float(np.mean([v[name] for v in per_repeat])))
    for name in NAMES:
        expected = np.quantile(values[name], [tail_share(len(names)), 1 - tail_share(len(names))])
        if name == "ece":
            expected = expected - np.mean(values[name]) + np.float64(result[name]["value"] or 0)
        assert result[name]["ci95"] == pytest.approx(expected.clip(0, 1), abs=1e-12), name


def test_the_interval_covers_the_truth_for_correlated_rows_where_one_that_ignores_groups_does_not() -> None:
    """A classifier is right on all images of a patient or on none: 95 % means 95 % of repeated studies."""
    rng = np.random.default_rng(0)
    studies, patients, images, accuracy = 200, 50, 4, 0.7
    group = np.repeat(np.arange(patients), images)
    zeros, covered = np.zeros(len(group), dtype=int), {"groups": 0, "rows": 0}
    for _ in range(studies):
        truth = rng.integers(0, 2, len(group))
        right = (rng.random(patients) < accuracy)[group]
        p = np.eye(2)[np.where(right, truth, 1 - truth)]
        for unit, names in {"groups": group, "rows": np.arange(len(group))}.items():
            result = summarise(truth, p, group=names, fold=zeros, repeat=zeros, resamples=200)
            low, high = result["accuracy"]["ci95"]
            assert low is not None and high is not None
            covered[unit] += low <= accuracy <= high
    assert 0.89 <= covered["groups"] / studies <= 0.99
    assert covered["rows"] / studies < 0.8


def test_the_percentiles_of_resampled_means_of_normal_values_are_the_ends_of_students_interval() -> None:
    for n in (2, 5, 20, 60, 1000):
        values = np.random.default_rng(n).normal(size=n)
        resampled = norm(values.mean(), values.std() / n**0.5)  # what the mean of a resample has, for large n
        students = t(n - 1, values.mean(), values.std(ddof=1) / n**0.5).interval(0.95)
        share = tail_share(n)
        if n > 2:  # beyond, the normal distribution has no probability left that a number could hold
            assert (resampled.ppf(share), resampled.ppf(1 - share)) == pytest.approx(students)
        assert share <= 0.025
    assert tail_share(10**6) == pytest.approx(0.025, abs=1e-6)


def test_every_interval_holds_its_value() -> None:
    for seed in range(8):
        result = summarise(**predictions(seed, rows=60, groups=20, repeats=1), resamples=200, seed=seed)
        for name in NAMES:
            low, high = result[name]["ci95"]
            value = result[name]["value"]
            assert low is not None and value is not None and high is not None
            assert low <= value <= high, (name, seed)


def test_the_same_seed_gives_the_same_interval_and_the_order_of_rows_does_not_matter() -> None:
    data = predictions(4)
    order = np.random.default_rng(0).permutation(len(data["truth"]))
    shuffled = {name: values[order] for name, values in data.items()}
    one, two = summarise(**data, resamples=50, seed=1), summarise(**shuffled, resamples=50, seed=1)
    other = summarise(**data, resamples=50, seed=2)
    for name in NAMES:
        assert one[name]["ci95"] == pytest.approx(two[name]["ci95"], abs=1e-12)
        assert one[name]["ci95"] != other[name]["ci95"]


def test_resamples_cut_into_pieces_are_the_same_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    data = predictions(5)
    whole = summarise(**data, resamples=50)
    monkeypatch.setattr("training.metrics.CELLS", 700)
    assert summarise(**data, resamples=50) == whole


def test_the_summary_is_plain_json_without_nan() -> None:
    result = summarise(**predictions(6), resamples=20)
    assert list(result) == list(NAMES)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_one_group_has_values_but_no_interval() -> None:
    result = summarise([0, 1, 1], np.eye(2)[[0, 1, 0]], group=["a"] * 3, fold=[0] * 3, repeat=[0] * 3)
    assert result["accuracy"]["value"] == pytest.approx(2 / 3)
    assert all(result[name]["ci95"] == [None, None] for name in NAMES)


def test_perfect_predictions_score_one_and_err_by_nothing() -> None:
    truth = np.arange(30) % 3
    result = summarise(truth, np.eye(3)[truth], group=np.arange(30), fold=np.arange(30) % 2, repeat=np.zeros(30))
    for name in NAMES:
        assert result[name]["value"] == (0 if name == "ece" else 1)


def test_confusion_counts_truth_in_rows() -> None:
    truth, predicted = [0, 0, 2, 2, 2], [0, 1, 2, 2, 0]
    assert confusion(truth, predicted, 4)[:3, :3].tolist() == sk.confusion_matrix(truth, predicted).tolist()
    assert confusion(truth, predicted, 4).shape == (4, 4)


def test_reliability_is_that_of_each_bin_and_the_error_follows_from_it() -> None:
    data = predictions(7, classes=3)
    p, truth = data["probabilities"], data["truth"]
    confidence, accuracy, counts = reliability(p, truth, bins=10)
    assert counts.sum() == len(truth)
    for b in range(10):
        inside = (p.max(1) > b / 10) & (p.max(1) <= (b + 1) / 10)
        assert counts[b] == inside.sum()
        if inside.any():
            assert confidence[b] == pytest.approx(p[inside].max(1).mean())
            assert accuracy[b] == pytest.approx((p[inside].argmax(1) == truth[inside]).mean())
        else:
            assert np.isnan(confidence[b]) and np.isnan(accuracy[b])
    assert ece(p, truth) == pytest.approx(by_hand_ece(truth, p))


def test_always_sure_and_half_right_is_off_by_a_half() -> None:
    assert ece(np.eye(2)[[0, 0, 1, 1]], [0, 1, 0, 1]) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": [0, 2]}, "must index the 2 columns"),
        ({"group": ["a", ""]}, "empty name"),
        ({"probabilities": [[0.5, 0.5], [np.nan, 1]]}, "1 rows are not finite"),
        ({"fold": [0]}, "shapes"),
    ],
)
def test_inputs_that_cannot_be_right_are_refused(change: dict[str, Any], message: str) -> None:
    data: dict[str, Any] = {
        "truth": [0, 1],
        "probabilities": np.eye(2),
        "group": ["a", "b"],
        "fold": [0, 0],
        "repeat": [0, 0],
    }
    with pytest.raises(ValueError, match=message):
        summarise(**data | change)


def test_a_thousand_resamples_of_a_thousand_rows_take_seconds() -> None:
    data = predictions(8, rows=1000, classes=7, repeats=1, groups=400)
    start = time.perf_counter()
    summarise(**data, resamples=1000)
    assert time.perf_counter() - start < 5


def test_the_quadratic_kappa_is_told_only_where_classes_have_an_order() -> None:
    values = {"accuracy": 1.0, "kappa_quadratic": 0.5}
    assert meaningful(values) == {"accuracy": 1.0}
    assert meaningful(values | {"mean_level_error": 0.1}) == values | {"mean_level_error": 0.1}
    assert [title_of(name) for name in ("auroc", "balanced_accuracy")] == ["AUROC", "balanced accuracy"]
