"""Hierarchical metrics against sets of ancestors by hand, levels against scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from training.hierarchical import at_level, depth, overlaps, summarise
from training.metrics import NAMES

CLASSES = ["disease/eye/a", "disease/eye/b", "disease/skin", "healthy"]


def data(seed: int = 0, rows: int = 200) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 4, rows)
    p = rng.dirichlet(np.ones(4), rows) + 0.3 * np.eye(4)[truth]
    group = np.arange(rows) // 2
    return {
        "truth": truth,
        "probabilities": p / p.sum(axis=1, keepdims=True),
        "group": group.astype(str),
        "fold": group % 2,
        "repeat": np.zeros(rows, dtype=int),
    }


def ancestors(name: str) -> set[str]:
    parts = name.split("/")
    return {"/".join(parts[: i + 1]) for i in range(len(parts))}


def test_precision_recall_and_f1_are_those_of_sets_with_ancestors() -> None:
    d = data()
    shared = predicted = true = 0
    for t, p in zip(d["truth"], d["probabilities"].argmax(axis=1), strict=True):
        a, b = ancestors(CLASSES[t]), ancestors(CLASSES[p])
        shared, predicted, true = shared + len(a & b), predicted + len(b), true + len(a)
    found = summarise(CLASSES, **d, resamples=50)
    precision, recall = shared / predicted, shared / true
    assert found["hierarchical_precision"]["value"] == pytest.approx(precision)
    assert found["hierarchical_recall"]["value"] == pytest.approx(recall)
    assert found["hierarchical_f1"]["value"] == pytest.approx(2 * precision * recall / (precision + recall))
    for name in ("hierarchical_precision", "hierarchical_recall", "hierarchical_f1"):
        low, high = found[name]["ci95"]
        assert low is not None and high is not None
        assert low <= (found[name]["value"] or 0) <= high
        assert len(found[name]["per_fold"]) == 2


def test_a_mistake_within_a_branch_costs_less_than_one_across() -> None:
    one: dict[str, Any] = {"group": ["x"], "fold": [0], "repeat": [0], "resamples": 1}
    near = summarise(CLASSES, [0], np.eye(4)[[1]], **one)["hierarchical_f1"]["value"]
    far = summarise(CLASSES, [0], np.eye(4)[[3]], **one)["hierarchical_f1"]["value"]
    assert near == pytest.approx(2 / 3)
    assert far == 0


@pytest.mark.parametrize("level", [1, 2])
def test_a_level_is_judged_on_summed_probabilities_as_scikit_learn_does(level: int) -> None:
    d = data(1)
    cut = ["/".join(name.split("/")[:level]) for name in CLASSES]
    names = sorted(set(cut))
    summed = np.stack([d["probabilities"][:, [c == n for c in cut]].sum(axis=1) for n in names], axis=1)
    truth = np.asarray([names.index(cut[t]) for t in d["truth"]])
    found = summarise(CLASSES, **d, resamples=10)
    assert found[f"level_{level}/accuracy"]["value"] == pytest.approx((summed.argmax(axis=1) == truth).mean())
    expected = sk.balanced_accuracy_score(truth, summed.argmax(axis=1))
    assert found[f"level_{level}/balanced_accuracy"]["value"] == pytest.approx(expected)
    assert {name.split("/")[1] for name in found if name.startswith(f"level_{level}/")} == set(NAMES)


def test_the_leaves_are_no_level_and_flat_classes_have_none() -> None:
    assert not any(name.startswith("level_3") for name in summarise(CLASSES, **data(), resamples=2))
    assert summarise(list("abcd"), **data()) == {}
    assert depth(CLASSES) == 3 and depth(list("abcd")) == 1


def test_a_level_with_a_single_branch_is_not_judged() -> None:
    names = ["all/a", "all/b", "all/c", "all/d"]
    assert not any(name.startswith("level_1") for name in summarise(names, **data(), resamples=2))


def test_overlaps_and_levels_of_uneven_trees() -> None:
    assert overlaps(CLASSES).tolist() == [[3, 2, 1, 0], [2, 3, 1, 0], [1, 1, 2, 0], [0, 0, 0, 1]]
    names, truth, p = at_level(CLASSES, [0, 3], np.asarray([[0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1]]), 1)
    assert names == ["disease", "healthy"] and truth.tolist() == [0, 1]
    np.testing.assert_allclose(p, np.asarray([[0.6, 0.4], [0, 1]]))


def test_a_name_that_another_starts_with_is_not_its_ancestor() -> None:
    assert overlaps(["ab/x", "a/x"]).tolist() == [[2, 0], [0, 2]]
