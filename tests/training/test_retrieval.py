"""Retrieval against loops over sorted neighbours; chance against shuffled rankings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from training.findings import first_neighbours
from training.retrieval import NAMES, RANKS, _first, dealt, per_query, retrieval_metrics


def data(seed: int = 0, rows: int = 90, classes: int = 4, groups: int = 25, help_: float = 1.0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    labels, group = rng.integers(0, classes, rows), rng.integers(0, groups, rows).astype(str)
    x = rng.normal(size=(rows, 6)) + help_ * np.eye(6)[labels]
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels, group


def by_hand(x: np.ndarray, labels: np.ndarray, groups: np.ndarray, rng: Any = None) -> dict[str, float]:
    """Ranks by cosine, or at random where a generator is given."""
    recalls: dict[int, list[float]] = {k: [] for k in RANKS}
    averages = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if groups[j] != groups[i]]
        if rng is None:
            others.sort(key=lambda j: -float(x[i] @ x[j]))
        else:
            rng.shuffle(others)
        hits = [labels[j] == labels[i] for j in others]
        wanted = sum(hits)
        if not wanted:
            continue
        for k in RANKS:
            recalls[k].append(float(any(hits[:k])))
        averages.append(sum(sum(hits[: r + 1]) / (r + 1) for r in range(wanted) if hits[r]) / wanted)
    return {f"recall_at_{k}": float(np.mean(v)) for k, v in recalls.items()} | {"map_at_r": float(np.mean(averages))}


@pytest.mark.parametrize("classes", [2, 4, 20])
def test_values_are_those_of_sorting_each_querys_neighbours(classes: int) -> None:
    x, labels, group = data(classes, classes=classes) if classes <= 6 else many()
    found = retrieval_metrics(x, labels, group, resamples=20)
    assert {name: m["value"] for name, m in found.items()} == pytest.approx(by_hand(x, labels, group))
    assert tuple(found) == NAMES


def many() -> tuple[Any, Any, Any]:
    """Many small classes: only the first few of a large gallery need sorting."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 20, 200)
    x = rng.normal(size=(200, 20)) + np.eye(20)[labels]
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels, rng.integers(0, 60, 200).astype(str)


def test_chance_of_images_that_are_their_own_groups_is_the_mean_over_random_rankings() -> None:
    x, labels, _ = data(1, rows=60, help_=0.0)
    group, rng = np.arange(60), np.random.default_rng(0)
    drawn = [by_hand(x, labels, group, rng) for _ in range(150)]
    for name, metric in retrieval_metrics(x, labels, group, resamples=5).items():
        assert metric["chance"] == pytest.approx(np.mean([d[name] for d in drawn]), abs=0.02), name


@pytest.mark.parametrize("sizes", [(8, 9), (1, 16)])
def test_features_that_know_patients_but_no_class_are_worth_chance(sizes: tuple[int, int]) -> None:
    """A patient's images are nearly alike and of one class: eight neighbours are of two patients at most, or of few."""
    values, chances = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        group = np.repeat(np.arange(40), rng.integers(*sizes, 40))
        labels = rng.integers(0, 3, 40)[group]
        x = rng.normal(size=(40, 16))[group] + 0.01 * rng.normal(size=(len(group), 16))
        found = retrieval_metrics(x / np.linalg.norm(x, axis=1, keepdims=True), labels, group, resamples=2)
        values.append([found[name]["value"] or 0.0 for name in NAMES])
        chances.append([found[name]["chance"] or 0.0 for name in NAMES])
    np.testing.assert_allclose(np.mean(values, axis=0), np.mean(chances, axis=0), atol=0.05)
    naive = by_hand(x, labels, group, rng)["recall_at_8"]
    assert naive > np.mean(chances, axis=0)[NAMES.index("recall_at_8")] + 0.1


def test_labels_are_dealt_to_whole_groups_and_stay_as_common_as_they_are() -> None:
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(30), 4))
    for _ in range(5):
        rows = dealt(group, rng)
        assert sorted(rows.tolist()) == list(range(120))
        assert all(len(set(group[rows[group == g]])) == 1 for g in range(30))
    uneven = np.repeat(np.arange(40), rng.integers(1, 12, 40))
    rare = np.asarray(uneven < 10)
    shares = [rare[dealt(uneven, rng)].mean() for _ in range(200)]
    assert np.mean(shares) == pytest.approx(rare.mean(), abs=0.02) and np.std(shares) < 0.08


def test_where_there_are_many_images_a_few_queries_speak_for_what_chance_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels, group = data(3)
    whole = per_query(x, labels, group)
    monkeypatch.setattr("training.retrieval.CHANCE_CELLS", 30 * len(x) * 40)
    found = per_query(x, labels, group)
    asked = np.asarray(~np.isnan(found.chances).any(axis=1))
    assert asked.sum() == 40 and asked[0] and asked[-1]
    np.testing.assert_array_equal(found.chances[asked], whole.chances[asked])
    np.testing.assert_array_equal(found.scores, whole.scores)
    assert np.isnan(per_query(x, labels, group, deals=0).chances).all()


def test_images_of_the_querys_own_group_are_never_found() -> None:
    """Each patient's images are copies of one another and of one class: counting them would give 1."""
    rng = np.random.default_rng(2)
    own = rng.normal(size=(60, 16))
    x = np.repeat(own / np.linalg.norm(own, axis=1, keepdims=True), 3, axis=0)
    labels, group = np.repeat(rng.integers(0, 4, 60), 3), np.repeat(np.arange(60), 3)
    honest = retrieval_metrics(x, labels, group, resamples=20)["recall_at_1"]
    leaking = retrieval_metrics(x, labels, np.arange(180), resamples=20)["recall_at_1"]
    assert leaking["value"] == 1
    assert (honest["value"] or 0) < 0.5


def test_a_collapsed_encoder_is_worth_chance_also_where_the_file_is_sorted_by_class() -> None:
    x, labels, group = np.tile([1.0, 0.0], (300, 1)), np.sort(np.arange(300) % 3), np.arange(300)
    values = [retrieval_metrics(x, labels, group, resamples=2, seed=s)["map_at_r"]["value"] or 0 for s in range(12)]
    chance = retrieval_metrics(x, labels, group, resamples=2)["map_at_r"]["chance"]
    assert np.mean(values) == pytest.approx(chance, abs=0.02)


def test_of_images_that_are_equally_like_each_query_finds_others() -> None:
    """One order for all would have the same eight images stand for what all queries find."""
    x, labels, group = np.tile([1.0, 0.0], (400, 1)), np.arange(400) % 4, np.arange(400)
    for seed in range(5):
        found = retrieval_metrics(x, labels, group, resamples=2, seed=seed)["recall_at_8"]["value"]
        assert found == pytest.approx(1 - 0.75**8, abs=0.06)
    rng = np.random.default_rng(0)
    few = rng.integers(0, 3, size=(50, 400)).astype(np.float32)
    for top in (8, 300):
        places = _first(few, top, rng)
        values = np.take_along_axis(few, places, axis=1)
        np.testing.assert_array_equal(values, -np.sort(-few, axis=1)[:, :top])
        assert all(len(set(row)) == top for row in places.tolist())


def test_of_many_images_only_the_queries_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels, group = data(3)
    monkeypatch.setattr("training.findings.SHOWN", 20)
    asked = first_neighbours(3 * x, labels, group.tolist(), seed=0)
    assert len(asked.rows) == 20
    expected = per_query(x, labels, group, asked=asked.rows)
    np.testing.assert_array_equal(asked.found["all", 1].scores, expected.scores)


def test_perfect_features_score_one() -> None:
    labels = np.arange(40) % 4
    found = retrieval_metrics(np.eye(4)[labels], labels, np.arange(40), resamples=20)
    assert all(metric["value"] == 1 for metric in found.values())
    low, _ = found["recall_at_1"]["ci95"]
    assert low is not None and low < 1


def test_queries_in_pieces_give_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels, group = data(3)
    whole = retrieval_metrics(x, labels, group, resamples=10)
    monkeypatch.setattr("training.retrieval.CELLS", 500)
    cut = retrieval_metrics(x, labels, group, resamples=10)
    for name in NAMES:
        assert cut[name]["value"] == pytest.approx(whole[name]["value"])


def test_classes_that_no_other_group_has_are_not_asked() -> None:
    x, labels, group = data(4)
    labels[0] = 99
    assert {n: m["value"] for n, m in retrieval_metrics(x, labels, group, resamples=5).items()} == pytest.approx(
        by_hand(x, labels, group)
    )
    alone = retrieval_metrics(x[:3], [0, 1, 2], ["a", "b", "c"], resamples=5)
    assert all(m["value"] is None and m["chance"] is None for m in alone.values())


def test_of_several_labels_one_in_common_is_enough_and_no_label_is_not_asked() -> None:
    x, labels, group = data(6, classes=3)
    member = np.eye(3, dtype=int)[labels]
    one = retrieval_metrics(x, labels, group, resamples=5)
    assert retrieval_metrics(x, member, group, resamples=5) == one
    member[labels == 0] = 0
    rest = labels != 0
    found = retrieval_metrics(x, member, group, resamples=5)["recall_at_1"]["value"]
    hits = []
    for i in np.flatnonzero(rest):
        others = [j for j in range(len(x)) if group[j] != group[i]]
        hits.append(labels[max(others, key=lambda j: float(x[i] @ x[j]))] == labels[i])
    assert found == pytest.approx(np.mean(hits))


@pytest.mark.parametrize(
    ("x", "labels", "groups", "message"),
    [
        (np.ones((2, 2)), [0, 1], ["a", "b"], "not of length 1"),
        (np.eye(2), [0], ["a", "b"], "must be"),
        (np.eye(2), [0, 1], ["a", ""], "empty name"),
        ([[np.nan, 1], [0, 1]], [0, 1], ["a", "b"], "1 of 2 rows"),
    ],
)
def test_inputs_that_cannot_be_right_are_refused(x: Any, labels: Any, groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(x, labels, groups)
