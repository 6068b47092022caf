"""What a split that leaks is worth: the same classifier on the same features, judged by image and by group.

A linear probe is enough to see it, and quick; what a fine-tuned network would gain from the leak is usually more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.sparse import csr_array

from training import metrics
from training.bootstrap import Floats, Units
from training.splits import cross_validation, hold_out
from training.tasks.frozen import logistic

STRENGTHS = (1e-3, 1e-2, 1e-1)
"""What C is chosen from: the linear probe's own grid without its upper end, whose fits are slow."""
HELD_FRACTION = 1 / 3
"""Share of a fold's training side that chooses C."""

Split = Literal["group", "image"]


@dataclass(frozen=True)
class Price:
    """Balanced accuracies of the same rows under both splits; `difference` is by image less by group."""

    by_image: float
    by_group: float
    difference: float
    ci95: tuple[float, float]
    """Of the difference: both splits judge the same rows, so groups are drawn once for both (paired)."""
    sentence: str


def price(
    features: np.ndarray,
    truth: np.ndarray,
    names: Sequence[str],
    groups: Sequence[str],
    *,
    seed: int = 0,
    folds: int = 5,
    unit: str = "group",
    resamples: int = 1000,
) -> Price | None:
    """The price of a split by image: `logistic` cross-validated by image and by group on the same rows.

    Args:
        features: [N, D], under an encoder that no fold changes.
        truth, names, groups: [N] class numbers, their names, and groups; an empty group is its row's own.
        unit: what a group is, for the sentence: `patient`, `slide`, ….

    Returns None where all groups are single images, or a class has one group only. Fewer groups of a class than
    `folds` lower the number of folds, for both splits. C is chosen on a part of each fold's training side, cut off
    by the split that is judged: so would its user have done. The interval is of a bootstrap over groups with the fits
    held fixed; what other shuffles would change is not in it.
    """
    own = [group or f"\x00row {row}" for row, group in enumerate(groups)]
    fewest = min(len({g for g, n in zip(own, names, strict=True) if n == name}) for name in set(names))
    if len(set(own)) == len(own) or fewest < 2 or len(set(names)) < 2:
        return None
    values = features.astype(np.float32)
    image, group = (_out_of_fold(values, truth, list(names), own, min(folds, fewest), split, seed) for split in _SPLITS)
    return _priced(truth, image, group, own, unit, resamples, seed)


_SPLITS: tuple[Split, Split] = ("image", "group")


def _out_of_fold(
    features: np.ndarray, truth: np.ndarray, names: list[str], groups: list[str], folds: int, split: Split, seed: int
) -> np.ndarray:
    """Classes [N] that a classifier names which has not seen the row, nor, split by group, its group."""
    predicted = np.empty(len(truth), dtype=np.int64)
    for fold in cross_validation(names, groups, folds=folds, repeats=1, split=split, seed=seed):
        units = [groups[r] if split == "group" else str(r) for r in fold.train]
        chosen = _strength(features[fold.train], truth[fold.train], [names[r] for r in fold.train], units, seed)
        predicted[fold.test] = (
            logistic(chosen).fit(features[fold.train], truth[fold.train]).predict(features[fold.test])
        )
    return predicted


def _strength(features: np.ndarray, truth: np.ndarray, names: list[str], units: list[str], seed: int) -> float:
    """The C that does best on held units; the smaller of equals."""
    train, held = hold_out(names, units, fraction=HELD_FRACTION, seed=seed)
    classes = int(truth.max()) + 1
    scores = []
    for strength in STRENGTHS:
        predicted = logistic(strength).fit(features[train], truth[train]).predict(features[held])
        scores.append(float(metrics.balanced_accuracy(metrics.confusion(truth[held], predicted, classes))))
    return STRENGTHS[int(np.argmax(scores))]


def _priced(
    truth: np.ndarray, image: np.ndarray, group: np.ndarray, groups: list[str], unit: str, resamples: int, seed: int
) -> Price:
    classes, once = int(max(truth.max(), image.max(), group.max())) + 1, np.zeros(len(truth), dtype=np.int64)
    cells, rows = classes * classes, np.tile(np.arange(len(truth)), 2)
    column = np.concatenate([truth * classes + image, cells + truth * classes + group])
    counts = csr_array((np.ones(len(rows)), (rows, column)), shape=(len(truth), 2 * cells))

    def values(sums: Floats) -> Floats:
        """[...,3] of two confusion matrices [...,2 * cells]: by image, by group, and their difference."""
        both = metrics.balanced_accuracy(sums.reshape(*sums.shape[:-1], 2, classes, classes))
        return np.concatenate([both, both[..., :1] - both[..., 1:]], axis=-1)

    draws = Units.of(groups, once, once, resamples=resamples, seed=seed).draw(counts, values)
    by_image, by_group, difference = draws.values.tolist()
    low, high = draws.metrics()[2]["ci95"]
    assert low is not None and high is not None  # of each class there are two groups
    found = Price(by_image, by_group, difference, (low, high), "")
    return replace(found, sentence=_sentence(found, unit))


def _sentence(found: Price, unit: str) -> str:
    low, high = found.ci95
    gap = f"{found.difference:.2f} [{low:.2f}, {high:.2f}]"
    both = (
        f"Split by image, a linear probe of the same features would have been reported with a balanced accuracy of "
        f"{found.by_image:.2f}; by {unit} it is {found.by_group:.2f}"
    )
    if low > 0:
        return f"{both}: {gap} of it is the leak."
    if high < 0:
        return f"{both}: no leak is seen, the split by image is the harder one here (difference {gap})."
    return f"{both}: the difference, {gap}, is not told from none."
