"""Metrics of label sets: against scikit-learn, with weights against repeated rows, intervals by recomputation."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk

from training.bootstrap import tail_share
from training.multilabel import NAMES, average_precision, of_each_label, reliability, summarise


def predictions(seed: int, rows: int = 240, labels: int = 4, folds: int = 3, groups: int = 60) -> dict[str, Any]:
    """Two repeats of out-of-fold predictions with ties; groups share their label sets somewhat, and stay in a fold."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, rows)
    truth = rng.random((rows, labels)) < np.linspace(0.15, 0.6, labels) + rng.normal(0, 0.1, (groups, 1))[group]
    parts = []
    for repeat in range(2):
        p = np.clip(rng.beta(2, 3, (rows, labels)) + 0.3 * truth, 0, 1).round(2)
        parts.append((truth, p, group, (group * 7 + repeat) % folds, np.full(rows, repeat)))
    names = ("truth", "probabilities", "group", "fold", "repeat")
    return dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))


def by_scikit_learn(truth: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """Of one repeat; but for `ece` and what is a mean over folds."""
    said = p >= 0.5
    return {
        "accuracy": sk.accuracy_score(truth, said),
        "balanced_accuracy": np.mean([sk.balanced_accuracy_score(t, s) for t, s in zip(truth.T, said.T, strict=True)]),
        "f1_macro": sk.f1_score(truth, said, average="macro"),
        "f1_micro": sk.f1_score(truth, said, average="micro"),
        "hamming": sk.hamming_loss(truth, said),
    }


def ranked_by_scikit_learn(truth: np.ndarray, p: np.ndarray) -> dict[str, float]:
    return {
        "auroc": sk.roc_auc_score(truth, p, average="macro"),
        "average_precision": sk.average_precision_score(truth, p, average="macro"),
    }


def by_hand_ece(truth: np.ndarray, p: np.ndarray) -> float:
    gaps = 0.0
    for b in range(15):
        inside = (p > b / 15) & (p <= (b + 1) / 15) if b else p <= 1 / 15
        gaps += abs((truth[inside] - p[inside]).sum())
    return gaps / p.size


@pytest.mark.parametrize("labels", [2, 5])
def test_values_are_those_of_scikit_learn_and_of_a_loop(labels: int) -> None:
    data = predictions(labels, labels=labels)
    result = summarise(**data, resamples=2)
    assert list(result) == list(NAMES)
    repeats = [data["repeat"] == r for r in (0, 1)]
    expected = [by_scikit_learn(data["truth"][rows], data["probabilities"][rows]) for rows in repeats]
    for name in expected[0]:
        assert result[name]["value"] == pytest.approx(np.mean([e[name] for e in expected]), abs=1e-12), name
    errors = [by_hand_ece(data["truth"][rows], data["probabilities"][rows]) for rows in repeats]
    assert result["ece"]["value"] == pytest.approx(np.mean(errors), abs=1e-12)
    folds = []
    for repeat in (0, 1):
        for fold in range(3):
            rows = (data["repeat"] == repeat) & (data["fold"] == fold)
            folds.append(ranked_by_scikit_learn(data["truth"][rows], data["probabilities"][rows]))
    for name in folds[0]:
        assert result[name]["per_fold"] == pytest.approx([f[name] for f in folds], abs=1e-12), name
        assert result[name]["value"] == pytest.approx(np.mean([f[name] for f in folds]), abs=1e-12), name


def test_weighted_average_precision_is_that_of_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.random(50).round(1), rng.random(50) < 0.3
    weights = rng.integers(0, 4, (50, 6)).astype(np.float64)
    for column, value in enumerate(average_precision(scores, positive, weights)):
        rows = np.repeat(np.arange(50), weights[:, column].astype(int))
        assert value == pytest.approx(sk.average_precision_score(positive[rows], scores[rows]))


def test_the_interval_is_the_percentile_of_recomputing_each_resample_of_groups() -> None:
    data = predictions(1, rows=90, groups=20, folds=2, labels=3)
    result = summarise(**data, resamples=50, seed=3)
    names, codes = np.unique(data["group"].astype(str), return_inverse=True)
    rng = np.random.default_rng(3)
    drawn = rng.integers(len(names), size=(50, len(names)))
    values: dict[str, list[float]] = {name: [] for name in NAMES}
    for draw in drawn:
        rows = np.concatenate([np.flatnonzero(codes == g) for g in draw])
        again = summarise(**{key: value[rows] for key, value in data.items()}, resamples=1)
        for name in NAMES:
            value = again[name]["value"]
            values[name].append(np.nan if value is None else value)
    for name in NAMES:
        if name == "ece":  # moved back by its bias
            continue
        share = 100 * tail_share(len(names))
        low, high = np.nanpercentile(values[name], [share, 100 - share])
        assert result[name]["ci95"] == pytest.approx([low, high], abs=1e-9), name


def test_a_label_that_no_row_or_every_row_has_is_left_out_of_what_it_makes_undefined() -> None:
    rng = np.random.default_rng(0)
    truth = np.column_stack([rng.random(40) < 0.5, np.zeros(40, bool), np.ones(40, bool)])
    p = rng.random((40, 3))
    zeros = np.zeros(40, int)
    result = summarise(truth, p, group=np.arange(40), fold=zeros, repeat=zeros, resamples=5)
    assert result["auroc"]["value"] == pytest.approx(sk.roc_auc_score(truth[:, 0], p[:, 0]))
    assert result["balanced_accuracy"]["value"] == pytest.approx(
        sk.balanced_accuracy_score(truth[:, 0], p[:, 0] >= 0.5)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [sk.average_precision_score(truth[:, k], p[:, k]) for k in (0, 2)]
    assert result["average_precision"]["value"] == pytest.approx(np.mean(expected))
    json.dumps(result, allow_nan=False)


def test_perfect_predictions_score_one_and_err_by_nothing() -> None:
    truth = predictions(0)["truth"][:60]
    zeros = np.zeros(60, int)
    result = summarise(truth, truth.astype(float), group=np.arange(60), fold=zeros, repeat=zeros, resamples=5)
    assert {name: result[name]["value"] for name in NAMES} == {
        name: 0 if name in {"hamming", "ece"} else 1 for name in NAMES
    }


def test_each_label_by_itself_is_scikit_learns() -> None:
    data = predictions(4)
    found = of_each_label(data["truth"], data["probabilities"], data["fold"], data["repeat"])
    for at, own in enumerate(found):
        truth, p = data["truth"][:, at], data["probabilities"][:, at]
        assert own["rows"] == truth[data["repeat"] == 0].sum()
        assert own["sensitivity"] == pytest.approx(sk.recall_score(truth, p >= 0.5))
        assert own["specificity"] == pytest.approx(sk.recall_score(~truth, p < 0.5))
        areas = [
            sk.roc_auc_score(truth[rows], p[rows])
            for rows in (((data["fold"] == f) & (data["repeat"] == r)) for r in (0, 1) for f in range(3))
        ]
        assert own["auroc"] == pytest.approx(np.mean(areas))


def test_reliability_is_of_all_probabilities_of_all_labels() -> None:
    data = predictions(2)
    confidence, share, counts = reliability(data["probabilities"], data["truth"], bins=5)
    p, t = data["probabilities"].ravel(), data["truth"].ravel()
    assert counts.sum() == p.size
    inside = (p > 0.4) & (p <= 0.6)
    assert (confidence[2], share[2], counts[2]) == pytest.approx((p[inside].mean(), t[inside].mean(), inside.sum()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": [[0, 2], [1, 0]]}, "must be 0 or 1"),
        ({"truth": [0, 1]}, "shapes"),
        ({"group": ["a", ""]}, "empty name"),
        ({"probabilities": [[0.5, 0.5], [np.nan, 1]]}, "1 rows are not finite"),
    ],
)
def test_inputs_that_cannot_be_right_are_refused(change: dict[str, Any], message: str) -> None:
    data: dict[str, Any] = {
        "truth": np.eye(2),
        "probabilities": np.eye(2),
        "group": ["a", "b"],
        "fold": [0, 0],
        "repeat": [0, 0],
    }
    with pytest.raises(ValueError, match=message):
        summarise(**data | change)
