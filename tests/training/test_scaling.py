"""Columns that hardly vary in training do not drown the others."""

from __future__ import annotations

import numpy as np

from training.tasks.learners import Question, SmallNetworks, asked
from training.tasks.objective import objective_for
from training.tasks.scaling import FLOOR, spread_of


def test_a_column_counts_as_a_tenth_of_the_median_s_spread_at_least() -> None:
    features = np.random.default_rng(0).normal(size=(500, 5)) * [1.0, 2.0, 4.0, 1e-7, 0.0]
    own = features.std(axis=0)
    found = spread_of(features)
    np.testing.assert_allclose(found[:3], own[:3])
    np.testing.assert_allclose(found[3:], FLOOR * np.median(own[:4]))


def test_columns_that_all_stand_still_are_divided_by_one() -> None:
    assert spread_of(np.full((4, 3), 7.0)).tolist() == [1.0, 1.0, 1.0]


def test_a_column_that_wakes_after_training_does_not_decide() -> None:
    """As in pooled features of a convolutional network: next to nothing in all training rows, alive in a new one."""
    rng = np.random.default_rng(0)
    truth = np.arange(60) % 2
    features = (rng.normal(size=(60, 8)) + truth[:, None]).astype(np.float32)
    features[:, 7] = 1e-7 * rng.normal(size=60)
    learner = SmallNetworks(features, 20, 16, 5e-3, 0.05, 0.0, 0)
    rows = np.arange(60)
    wanted = Question(2, objective_for(truth, 2), truth, rows, rows[:0], ("a",))
    module = learner.fit(wanted).module
    quiet = np.concatenate([np.full((1, 8), -1.0), np.full((1, 8), 2.0)]).astype(np.float32)
    quiet[:, 7] = 0
    loud = quiet.copy()
    loud[:, 7] = 1.0
    said, again = asked(module, quiet), asked(module, loud)
    assert said.argmax(axis=1).tolist() == again.argmax(axis=1).tolist() == [0, 1]
    assert np.abs(again).max() < 20
