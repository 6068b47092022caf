"""The price of a leak: large where features carry the group's mark, about none where they do not."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from training import leak_price
from training.leak_price import price

Study = tuple[np.ndarray, np.ndarray, list[str], list[str]]


def study(signal: float, mark: float, *, groups: int = 60, each: int = 6, seed: int = 0) -> Study:
    """Features of `groups` patients of one class each: `signal` of the class, and a `mark` of the patient alone."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), each)
    truth = group % 3
    values = rng.normal(size=(len(group), 120))
    values[:, :3] += signal * np.eye(3)[truth]
    values += mark * rng.normal(size=(groups, 120))[group]
    return values, truth, [f"class {t}" for t in truth], [f"p{g}" for g in group]


def test_a_watermark_of_the_patient_costs_a_split_by_image_most_of_what_it_claims() -> None:
    found = price(*study(signal=0, mark=3), unit="patient")
    assert found is not None
    assert found.by_image > 0.9
    assert found.by_group < 0.5
    assert found.difference == pytest.approx(found.by_image - found.by_group)
    assert 0.3 < found.ci95[0] < found.difference < found.ci95[1]
    assert f"{found.by_image:.2f}; by patient it is {found.by_group:.2f}" in found.sentence
    assert found.sentence.endswith("of it is the leak.")


def test_features_without_a_mark_have_a_price_of_about_nothing() -> None:
    found = price(*study(signal=2.5, mark=0))
    assert found is not None
    assert found.by_group > 0.8
    assert abs(found.difference) < 0.04
    assert found.ci95[0] <= 0 <= found.ci95[1]
    assert "is not told from none" in found.sentence


def test_the_interval_holds_nothing_for_features_of_pure_noise_in_nearly_all_studies() -> None:
    """Nothing leaks from independent rows: 95 % intervals hold 0 in most of these small studies."""
    found = [price(*study(signal=1, mark=0, groups=30, each=3, seed=s), seed=s, resamples=300) for s in range(6)]
    held = [f is not None and f.ci95[0] <= 0 <= f.ci95[1] for f in found]
    assert sum(held) >= 5


def test_single_images_and_classes_of_one_patient_have_no_price() -> None:
    features, truth, names, groups = study(signal=1, mark=1)
    assert price(features, truth, names, [""] * len(names)) is None
    assert price(features, truth, names, [str(row) for row in range(len(names))]) is None
    alone = ["p0" if t == 0 else g for t, g in zip(truth, groups, strict=True)]
    assert price(features, truth, names, alone) is None


def test_few_groups_of_a_class_lower_the_number_of_folds() -> None:
    features, truth, names, groups = study(signal=1, mark=1)
    few = [f"p{3 * (row % 3)}" if t == 0 else g for row, (t, g) in enumerate(zip(truth, groups, strict=True))]
    assert price(features, truth, names, few) is not None


def test_values_are_the_balanced_accuracies_of_out_of_fold_predictions_and_intervals_pair_them() -> None:
    rng = np.random.default_rng(5)
    truth, groups = rng.integers(3, size=200), [f"p{n}" for n in rng.integers(30, size=200)]
    one = np.where(rng.random(200) < 0.7, truth, rng.integers(3, size=200))
    other = np.where(rng.random(200) < 0.5, truth, rng.integers(3, size=200))
    found = leak_price._priced(truth, one, other, groups, "slide", 2000, 0)
    assert found.by_image == pytest.approx(balanced_accuracy_score(truth, one))
    assert found.by_group == pytest.approx(balanced_accuracy_score(truth, other))
    by_hand, names = [], sorted(set(groups))
    rows = {name: [at for at, g in enumerate(groups) if g == name] for name in names}
    for _ in range(400):
        drawn = [r for name in rng.choice(names, len(names)) for r in rows[name]]
        by_hand.append(
            balanced_accuracy_score(truth[drawn], one[drawn]) - balanced_accuracy_score(truth[drawn], other[drawn])
        )
    np.testing.assert_allclose(found.ci95, np.percentile(by_hand, [2.5, 97.5]), atol=0.03)


def test_the_same_seed_gives_the_same_price() -> None:
    assert price(*study(1, 1), seed=3) == price(*study(1, 1), seed=3)
