"""The bootstrap over groups against by-hand resampling, exact binomial intervals and simulated coverage."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from training.bootstrap import Units, all_alike, group_weights, interval_words, tail_share
from training.metrics import summarise


def rows(seed: int = 0, size: int = 120, groups: int = 30) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, size)
    return {
        "group": np.concatenate([group, group]).astype(str),
        "fold": np.concatenate([group % 3, (group + 1) % 3]),
        "repeat": np.repeat([0, 1], size),
    }


def test_rates_and_their_intervals_are_those_of_recomputing_each_resample_of_groups() -> None:
    where, rng = rows(), np.random.default_rng(1)
    of = rng.random(240) < 0.6
    hits = of & (rng.random(240) < 0.7)
    (rate,) = Units.of(**where, resamples=80, seed=5).rates(hits, of)
    names = np.unique(where["group"])
    drawn = np.random.default_rng(5).integers(len(names), size=(80, len(names)))

    def value(picked: np.ndarray) -> float:
        shares = []
        for repeat in (0, 1):
            chosen = np.concatenate(
                [np.flatnonzero((where["group"] == names[g]) & (where["repeat"] == repeat)) for g in picked]
            )
            shares.append(hits[chosen].sum() / of[chosen].sum())
        return float(np.mean(shares))

    assert rate["value"] == pytest.approx(value(np.arange(len(names))))
    assert rate["ci95"] == pytest.approx(
        np.quantile([value(d) for d in drawn], [tail_share(len(names)), 1 - tail_share(len(names))])
    )
    for at, one in enumerate(rate["per_fold"]):
        inside = (where["repeat"] == at // 3) & (where["fold"] == at % 3)
        assert one == pytest.approx(hits[inside].sum() / of[inside].sum())


def test_a_rate_of_right_answers_has_the_interval_of_the_accuracy() -> None:
    where, rng = rows(2), np.random.default_rng(3)
    truth, p = rng.integers(0, 3, 240), rng.dirichlet(np.ones(3), 240)
    expected = summarise(truth, p, **where, resamples=100, seed=4)["accuracy"]
    (rate,) = Units.of(**where, resamples=100, seed=4).rates(p.argmax(1) == truth, np.ones(240))
    assert rate["ci95"] == pytest.approx(expected["ci95"])
    assert rate["value"] == pytest.approx(expected["value"])
    assert rate["per_fold"] == pytest.approx(expected["per_fold"])


def test_means_are_those_of_numpy() -> None:
    where, values = rows(), np.random.default_rng(0).random((240, 2))
    means = Units.of(**where, resamples=10).means(values)
    assert [m["value"] for m in means] == pytest.approx(values.reshape(2, 120, 2).mean(axis=1).mean(axis=0))


def test_the_interval_of_a_rate_covers_it_in_95_of_100_studies_of_correlated_rows() -> None:
    """Rows of a patient share a chance: the rate is over rows, the evidence is of patients."""
    rng, studies, patients, covered = np.random.default_rng(0), 1000, 150, 0
    for study in range(studies):
        chance = rng.beta(4, 2, patients)
        group = np.repeat(np.arange(patients), rng.integers(1, 8, patients))
        zeros = np.zeros(len(group), dtype=int)
        (rate,) = Units.of(group, zeros, zeros, resamples=300, seed=study).rates(
            rng.random(len(group)) < chance[group], zeros + 1
        )
        low, high = rate["ci95"]
        assert low is not None and high is not None
        covered += low <= 4 / 6 <= high
    assert 0.93 <= covered / studies <= 0.97


def test_a_rate_without_a_failure_still_has_an_interval_that_covers() -> None:
    """Of 15 patients with a rate of 0.97, most studies see no failure; a percentile interval would be [1, 1]."""
    rng, studies, covered, whole = np.random.default_rng(1), 500, 0, 0
    zeros = np.zeros(15, dtype=int)
    for study in range(studies):
        (rate,) = Units.of(np.arange(15), zeros, zeros, resamples=200, seed=study).rates(
            rng.random(15) < 0.97, zeros + 1
        )
        low, high = rate["ci95"]
        assert low is not None and high is not None
        covered += low <= 0.97 <= high
        whole += rate["value"] == 1
    assert whole / studies > 0.5
    assert covered / studies > 0.93


@pytest.mark.parametrize("trials", [1, 5, 40])
def test_where_all_are_alike_the_bounds_are_the_exact_binomial_ones(trials: int) -> None:
    for succeeded in (True, False):
        exact = binomtest(trials if succeeded else 0, trials).proportion_ci(0.95, method="exact")
        assert all_alike(succeeded, trials) == pytest.approx((exact.low, exact.high))


def test_trials_of_the_exact_bounds_are_groups_not_rows() -> None:
    group, zeros = np.repeat(np.arange(6), 50), np.zeros(300, dtype=int)
    (rate,) = Units.of(group, zeros, zeros, resamples=20).rates(group < 4, group < 4)
    assert rate["value"] == 1
    assert rate["ci95"] == pytest.approx(all_alike(True, 4))


def test_resamples_cut_into_pieces_are_the_same_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    where, hits = rows(), np.random.default_rng(0).random(240) < 0.5
    whole = Units.of(**where, resamples=50).rates(hits, np.ones(240))
    monkeypatch.setattr("training.bootstrap.CELLS", 100)
    assert Units.of(**where, resamples=50).rates(hits, np.ones(240)) == whole
    one = np.concatenate(list(group_weights(7, 20, 0, 20)), axis=1)
    many = np.concatenate(list(group_weights(7, 20, 0, 3)), axis=1)
    assert (one == many).all() and (one.sum(axis=0) == 7).all()


def test_one_group_has_a_value_but_no_interval_and_nothing_to_count_has_neither() -> None:
    zeros = np.zeros(4, dtype=int)
    (rate,) = Units.of(["a"] * 4, zeros, zeros).rates([1, 0, 1, 1], zeros + 1)
    assert rate["value"] == 0.75 and rate["ci95"] == [None, None]
    (empty,) = Units.of(list("abcd"), zeros, zeros, resamples=5).rates(zeros, zeros)
    assert empty == {"value": None, "ci95": [None, None], "per_fold": [None]}


@pytest.mark.parametrize(
    ("change", "message"), [({"group": ["a", ""]}, "empty name"), ({"fold": [0]}, "shapes"), ({"group": []}, "shapes")]
)
def test_inputs_that_cannot_be_right_are_refused(change: dict[str, Any], message: str) -> None:
    data: dict[str, Any] = {"group": ["a", "b"], "fold": [0, 0], "repeat": [0, 0]}
    with pytest.raises(ValueError, match=message):
        Units.of(**data | change)


def test_how_intervals_were_made_is_told_with_the_percentiles_that_were_taken() -> None:
    assert f"with 40 groups {100 * tail_share(40):.2f} and {100 - 100 * tail_share(40):.2f}" in interval_words(40)
    assert interval_words(1).startswith("No intervals")
