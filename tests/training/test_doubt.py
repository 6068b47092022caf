"""Labels that look wrong: confident learning by hand, flips that are found, and votes that leave the own group out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.neighbors import NearestNeighbors

from tests.training.test_artifact import CONV, card, network_of, pixels
from training.artifact import load_model, save_model
from training.dataset import Selection
from training.doubt import NEIGHBOURS, TEMPERATURE, doubts, neighbour_probabilities, thresholds
from training.suggest import CROSS_VALIDATION, MODEL, NOTHING, Rows, held_out
from training.suggest import NEIGHBOURS as BY_NEIGHBOURS


def clusters(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(features [N, 16], truth [N]): one direction per class, well apart."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(classes, size=count)
    features = 0.15 * generator.normal(size=(count, 16))
    features[np.arange(count), truth] += 1
    return features, truth


def by_hand(p: np.ndarray, y: np.ndarray) -> list[tuple[int, int, float]]:
    """(row, rival, margin) of confident learning, as loops."""
    limits = [np.mean([p[i, k] for i in range(len(p)) if y[i] == k]) for k in range(p.shape[1])]
    found = []
    for i in range(len(p)):
        reached = [k for k in range(p.shape[1]) if p[i, k] >= limits[k]]
        if reached and (best := max(reached, key=lambda k: (p[i, k], -k))) != y[i]:
            found.append((i, best, float(p[i, y[i]] - max(p[i, k] for k in range(p.shape[1]) if k != y[i]))))
    return sorted(found, key=lambda one: one[2])


def test_confident_learning_is_that_of_a_loop() -> None:
    generator = np.random.default_rng(0)
    p, y = generator.dirichlet(np.ones(4), size=200), generator.integers(4, size=200)
    found, expected = doubts(p, y), by_hand(p, y)
    assert len(expected) > 20
    assert found.rows.tolist() == [row for row, _, _ in expected]
    assert found.rivals.tolist() == [rival for _, rival, _ in expected]
    np.testing.assert_allclose(found.margins, [margin for _, _, margin in expected])


def test_labels_that_the_model_agrees_with_are_not_doubted() -> None:
    y = np.arange(30) % 3
    found = doubts(np.full((30, 3), 0.1) + 0.7 * np.eye(3)[y], y)
    assert len(found.rows) == len(found.rivals) == len(found.margins) == 0


def test_a_class_that_no_row_carries_has_no_threshold_to_reach() -> None:
    p = np.asarray([[0.2, 0.1, 0.7], [0.3, 0.6, 0.1]])
    assert thresholds(p, np.asarray([0, 1])).tolist() == [0.2, 0.6, np.inf]
    assert 2 not in doubts(p, np.asarray([0, 1])).rivals


def test_doubts_of_another_number_of_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[M, K\] and \[M\]"):
        doubts(np.ones((3, 2)) / 2, np.zeros(4, dtype=np.int64))


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_labels_flipped_on_purpose_are_found_among_separable_classes(share: float) -> None:
    features, truth = clusters(600, 5, seed=1)
    generator = np.random.default_rng(2)
    flipped = generator.random(600) < share
    labels = np.where(flipped, (truth + generator.integers(1, 5, size=600)) % 5, truth)
    p = neighbour_probabilities(features, labels, np.arange(600) // 3, 5)
    found = doubts(p, labels)
    assert flipped[found.rows].mean() > 0.95
    assert flipped[found.rows].sum() > 0.95 * flipped.sum()
    assert (found.rivals == truth[found.rows])[flipped[found.rows]].all()


def test_neighbours_of_the_own_group_have_no_vote() -> None:
    features, truth = clusters(90, 3, seed=3)
    groups = np.arange(90) // 3
    alone = neighbour_probabilities(features, truth, groups, 3)
    for row in (0, 40, 89):
        others = np.flatnonzero(groups != groups[row])
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        search = NearestNeighbors(n_neighbors=NEIGHBOURS, metric="cosine").fit(unit[others])
        distance, nearest = search.kneighbors(unit[[row]])
        weights = np.exp(-distance[0] / TEMPERATURE)
        votes = np.bincount(truth[others[nearest[0]]], weights, minlength=3)
        expected = (votes / votes.sum() * NEIGHBOURS + 1 / 3) / (NEIGHBOURS + 1)
        np.testing.assert_allclose(alone[row], expected, rtol=1e-3)


def test_a_label_does_not_reach_its_own_probabilities_nor_those_of_its_group() -> None:
    features, truth = clusters(90, 3, seed=4)
    groups = np.arange(90) // 3
    changed = truth.copy()
    changed[:3] = (changed[:3] + 1) % 3
    before, after = (neighbour_probabilities(features, y, groups, 3, np.arange(3)) for y in (truth, changed))
    np.testing.assert_array_equal(before, after)


def test_neighbours_of_one_group_alone_know_nothing() -> None:
    features, truth = clusters(8, 2, seed=5)
    np.testing.assert_allclose(neighbour_probabilities(features, truth, np.zeros(8), 2), 0.5)


def test_a_label_that_shaped_the_features_is_judged_by_nothing_but_what_was_said_out_of_fold(tmp_path: Path) -> None:
    """12 images: of four the network has learnt the labels, four it has seen without, four are new to it."""
    digests = [f"{at:02x}" * 32 for at in range(12)]
    names, ids = ["a", "b"] * 6, [f"image {at}" for at in range(12)]
    save_model(
        tmp_path / "model",
        card(CONV, head="network", classes=("a", "b")),
        network_of(CONV, 2),
        seen=[digest[:32] for digest in digests[:8]],
        labelled=[digest[:32] for digest in digests[:4]],
    )
    table = pa.table({"image_id": ids, "sha256": digests, "label": names})
    everyone, nobody = np.arange(12), np.empty(0, dtype=np.int64)
    groups = np.asarray([f"g{at}" for at in range(12)])
    rows = Rows(Selection(table), np.asarray(names), groups, everyone, nobody, nobody)
    model = load_model(tmp_path)
    features = np.random.default_rng(0).normal(size=(12, model.embed(pixels(1)).shape[1])).astype(np.float32)
    dataset: Any = None  # not looked at
    _, probabilities, by = held_out(str(tmp_path), model, dataset, rows, features)
    assert by.tolist() == [NOTHING] * 4 + [BY_NEIGHBOURS] * 4 + [MODEL] * 4
    assert np.isnan(probabilities[:4]).all() and not np.isnan(probabilities[4:]).any()
    said = pa.table({"image_id": ids[:2], "a": [0.9, 0.2], "b": [0.1, 0.8]})
    pq.write_table(said, tmp_path / "predictions.parquet")
    _, probabilities, by = held_out(str(tmp_path), model, dataset, rows, features)
    assert by.tolist() == [CROSS_VALIDATION] * 2 + [NOTHING] * 2 + [BY_NEIGHBOURS] * 4 + [MODEL] * 4
    np.testing.assert_allclose(probabilities[:2], [[0.9, 0.1], [0.2, 0.8]])
