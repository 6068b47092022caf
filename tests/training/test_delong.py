"""DeLong's test against structural components by hand, Obuchowski's formula by hand, permutations and simulation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm, rankdata
from sklearn.metrics import roc_auc_score

from training.delong import delong, influences


def scored(seed: int, *, patients: int = 60, images: int = 3, shift: float = 0.9, mixed: bool = False) -> Any:
    """(truth, ours, theirs, group): scores of two models that share what makes a patient and an image hard.

    Total variances are 1 and, unless `mixed`, a patient's images are of one class: the areas are Phi(shift / sqrt 2)
    for ours and Phi(0.7 shift / sqrt 2) for theirs.
    """
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(patients), images)
    of_patient = np.arange(patients) % 3 == 0
    truth = (rng.random(len(group)) < 0.4 if mixed else of_patient[group]).astype(int)
    patient, image = rng.normal(size=patients)[group], rng.normal(size=len(group))
    sides = []
    for strength in (1.0, 0.7):
        own_patient, own_image = rng.normal(size=patients)[group], rng.normal(size=len(group))
        noise = 0.5 * patient + 0.5 * image + 0.5 * own_patient + 0.5 * own_image
        sides.append(shift * strength * truth + noise)
    return truth, sides[0], sides[1], group


def one_fold(rows: int) -> dict[str, Any]:
    return {"fold": np.zeros(rows, dtype=int), "repeat": np.zeros(rows, dtype=int)}


def kernel(a: float, b: float) -> float:
    return 1.0 if a > b else 0.5 if a == b else 0.0


def components(scores: np.ndarray, truth: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(area, V10 of each positive, V01 of each negative), pair by pair, as DeLong et al. (1988) define them."""
    x, y = scores[truth == 1], scores[truth == 0]
    psi = np.asarray([[kernel(a, b) for b in y] for a in x])
    return float(psi.mean()), psi.mean(axis=1), psi.mean(axis=0)


def area(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Areas under the ROC curves of scores [..., N], by the rank sum of the positives."""
    m, n = (truth == 1).sum(), (truth == 0).sum()
    total = rankdata(scores, axis=-1)[..., truth == 1].sum(axis=-1)
    return np.asarray((total - m * (m + 1) / 2) / (m * n))


def by_hand_delong(truth: np.ndarray, sides: list[np.ndarray]) -> np.ndarray:
    found = [components(side, truth) for side in sides]
    m, n = (truth == 1).sum(), (truth == 0).sum()
    return np.asarray(np.cov([f[1] for f in found]) / m + np.cov([f[2] for f in found]) / n)


def by_hand_obuchowski(truth: np.ndarray, sides: list[np.ndarray], group: np.ndarray) -> np.ndarray:
    """Covariance of areas with clusters, sum by sum (Obuchowski, 1997)."""
    names = sorted(set(group.tolist()))
    m, n = (truth == 1).sum(), (truth == 0).sum()
    found = [components(side, truth) for side in sides]
    ten = np.zeros((len(sides), len(names)))
    one = np.zeros((len(sides), len(names)))
    for s, (theta, v10, v01) in enumerate(found):
        for k, name in enumerate(names):
            ten[s, k] = sum(v - theta for v in v10[group[truth == 1] == name])
            one[s, k] = sum(v - theta for v in v01[group[truth == 0] == name])
    i10 = len(set(group[truth == 1].tolist()))
    i01 = len(set(group[truth == 0].tolist()))
    covariance = np.zeros((len(sides), len(sides)))
    for r, s in itertools.product(range(len(sides)), repeat=2):
        s10 = i10 / ((i10 - 1) * m) * (ten[r] * ten[s]).sum()
        s01 = i01 / ((i01 - 1) * n) * (one[r] * one[s]).sum()
        s11 = len(names) / (len(names) - 1) * ((ten[r] * one[s]).sum() + (ten[s] * one[r]).sum())
        covariance[r, s] = s10 / m + s01 / n + s11 / (m * n)
    return covariance


@pytest.mark.parametrize("ties", [False, True])
def test_with_groups_of_one_image_it_is_delong_by_hand(ties: bool) -> None:
    truth, ours, theirs, _ = scored(0, images=1)
    sides = [s.round(0) if ties else s for s in (ours, theirs)]
    areas, found = influences(np.stack(sides), truth == 1, np.arange(len(truth)), len(truth))
    np.testing.assert_allclose(areas, [roc_auc_score(truth, s) for s in sides], atol=1e-12)
    np.testing.assert_allclose(found @ found.T, by_hand_delong(truth, sides), rtol=1e-10)


def test_with_groups_of_one_class_it_is_obuchowski_by_hand_and_with_both_classes_all_but_one_factor() -> None:
    truth, *sides, group = scored(1, patients=24)
    found = influences(np.stack(sides), truth == 1, group, 24)[1]
    np.testing.assert_allclose(found @ found.T, by_hand_obuchowski(truth, sides, group), rtol=1e-10)
    truth, *sides, group = scored(2, patients=40, mixed=True)
    found = influences(np.stack(sides), truth == 1, group, 40)[1]
    np.testing.assert_allclose(found @ found.T, by_hand_obuchowski(truth, sides, group), rtol=0.02)
    alone = influences(np.stack(sides), truth == 1, np.arange(len(truth)), len(truth))[1]
    assert not np.allclose(found @ found.T, alone @ alone.T, rtol=0.1)


def test_the_p_value_is_near_that_of_swapping_the_models_within_patients() -> None:
    """A permutation test of equal areas (Bandos et al., 2005), on ranks, so that both scores are of one scale."""
    rng = np.random.default_rng(0)
    for seed, shift in ((3, 0.9), (4, 0.6), (5, 1.2)):
        truth, ours, theirs, group = scored(seed, shift=shift)
        ranks = np.stack([rankdata(s) for s in (ours, theirs)])
        observed = area(ranks[0], truth) - area(ranks[1], truth)
        swaps = (rng.random((1000, group.max() + 1)) < 0.5)[:, group]
        drawn = area(np.where(swaps, ranks[1], ranks[0]), truth) - area(np.where(swaps, ranks[0], ranks[1]), truth)
        permuted = (1 + (np.abs(drawn) >= abs(observed)).sum()) / 1001
        found = delong(truth, ours, theirs, group=group, **one_fold(len(truth)))
        assert found["difference"] == pytest.approx(observed)
        assert found["p"] == pytest.approx(permuted, abs=0.05)


def test_the_interval_covers_over_folds_and_repeats_where_one_that_ignores_patients_does_not() -> None:
    """Repeats judge the same scores in other folds, as near to dependent as repeats can be."""
    studies, expected = 300, float(norm.cdf(0.9 / 2**0.5) - norm.cdf(0.63 / 2**0.5))
    covered = {"patients": 0, "images": 0}
    for seed in range(studies):
        truth, ours, theirs, group = scored(seed, patients=90)
        rng = np.random.default_rng(seed)
        fold = np.concatenate([rng.permutation(90)[group] % 3 for _ in range(2)])
        rows: Any = {"fold": fold, "repeat": np.repeat([0, 1], len(truth))}
        twice = [np.tile(a, 2) for a in (truth, ours, theirs)]
        for unit, names in {"patients": group, "images": np.arange(len(group))}.items():
            low, high = delong(*twice, group=np.tile(names, 2), **rows)["ci95"]
            assert low is not None and high is not None
            covered[unit] += low <= expected <= high
    assert 0.93 <= covered["patients"] / studies <= 0.97
    assert covered["images"] / studies < 0.9


def test_areas_are_means_over_folds_and_a_fold_without_both_classes_is_left_out() -> None:
    truth, ours, theirs, group = scored(6)
    fold = group % 4
    truth = np.where(fold == 3, 0, truth)
    found = delong(truth, ours, theirs, group=group, fold=fold, repeat=np.zeros(len(truth)))
    areas = [[roc_auc_score(truth[fold == f], s[fold == f]) for f in range(3)] for s in (ours, theirs)]
    assert (found["auroc"], found["against"]) == pytest.approx(tuple(np.mean(areas, axis=1)))


def test_a_repeat_that_says_the_same_again_makes_nothing_surer() -> None:
    truth, ours, theirs, group = scored(7)
    once = delong(truth, ours, theirs, group=group, **one_fold(len(truth)))
    twice = [np.tile(a, 2) for a in (truth, ours, theirs)]
    repeats: Any = {"fold": np.zeros(2 * len(truth)), "repeat": np.repeat([0, 1], len(truth))}
    again = delong(*twice, group=np.tile(group, 2), **repeats)
    assert again["ci95"] == pytest.approx(once["ci95"])
    assert again["p"] == pytest.approx(once["p"])


def test_what_has_no_spread_or_too_few_groups_has_no_p_value() -> None:
    truth, scores, group = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9]), np.arange(4)
    same = delong(truth, scores, scores, group=group, **one_fold(4))
    assert (same["difference"], same["ci95"], same["p"]) == (0, [0, 0], 1)
    opposite = delong(truth, scores, -scores, group=group, **one_fold(4))
    assert (opposite["difference"], opposite["p"]) == (1, None)
    few = delong(truth, scores, scores[::-1], group=[0, 1, 2, 2], **one_fold(4))
    assert few["p"] is None and few["ci95"] == [None, None]
    none = delong([0, 0], [0.1, 0.2], [0.1, 0.2], group=[0, 1], **one_fold(2))
    assert set(map(str, none.values())) == {"None", "[None, None]"}


def test_truths_of_three_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="truth of 0 or 1"):
        delong([0, 1, 2], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3], group=[0, 1, 2], **one_fold(3))
