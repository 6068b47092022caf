"""Metrics of classes that are paths in a tree (`retinopathy/npdr`): near misses count in part, and each level alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from training import metrics
from training.bootstrap import Floats, Ints, Metric, Units, ratio

NAMES = ("hierarchical_precision", "hierarchical_recall", "hierarchical_f1")


def depth(classes: Sequence[str]) -> int:
    """Levels of the tree below its root: 1 for flat classes."""
    return max(len(name.split("/")) for name in classes)


def level_names(classes: Sequence[str], level: int) -> list[str]:
    """Each class cut to its first `level` parts; one that is not so deep stays whole."""
    return ["/".join(name.split("/")[:level]) for name in classes]


def at_level(
    classes: Sequence[str], truth: ArrayLike, probabilities: ArrayLike, level: int
) -> tuple[list[str], Ints, Floats]:
    """Classes, truth [M] and probabilities [M,L] at a level of the tree, those of children summed."""
    cut = level_names(classes, level)
    names = list(dict.fromkeys(cut))
    member = np.asarray([[name == own for name in names] for own in cut], dtype=np.float64)
    which = member.argmax(axis=1)
    return names, which[np.asarray(truth, dtype=np.int64)], np.asarray(probabilities, dtype=np.float64) @ member


def overlaps(classes: Sequence[str]) -> Ints:
    """Nodes that the paths of two classes share, root excluded, [K,K]; on the diagonal a class's own depth."""
    paths = [{"/".join(name.split("/")[: i + 1]) for i in range(name.count("/") + 1)} for name in classes]
    return np.asarray([[len(a & b) for b in paths] for a in paths], dtype=np.int64)


def summarise(
    classes: Sequence[str],
    truth: ArrayLike,
    probabilities: ArrayLike,
    *,
    group: ArrayLike,
    fold: ArrayLike,
    repeat: ArrayLike,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Metric]:
    """`hierarchical_precision`, `_recall`, `_f1` and `level_1/accuracy`, … up to the level above the leaves.

    Empty for flat classes. Arguments and intervals are those of `training.metrics.summarise`.
    With T the true class and its ancestors, P the predicted one (the most probable leaf) and its own, root excluded
    and summed over rows: precision |P ∩ T| / |P|, recall |P ∩ T| / |T|, F1 their harmonic mean. Source: Kiritchenko,
    Matwin & Famili, "Functional Annotation of Genes Using Hierarchical Text Categorization", 2005; Silla & Freitas,
    "A survey of hierarchical classification across different application domains", 2011, section 8.
    """
    if depth(classes) == 1:
        return {}
    t, p = np.asarray(truth, dtype=np.int64), np.asarray(probabilities, dtype=np.float64)
    shared, predicted = overlaps(classes), p.argmax(axis=1)
    columns = np.column_stack([shared[t, predicted], shared[predicted, predicted], shared[t, t]])
    units = Units.of(group, fold, repeat, resamples=resamples, seed=seed)
    found = dict(zip(NAMES, units.draw(columns, _precision_recall_f1).metrics(), strict=True))
    for level in range(1, depth(classes)):
        names, cut_truth, summed = at_level(classes, t, p, level)
        if len(names) < 2:
            continue
        values = metrics.summarise(
            cut_truth, summed, group=group, fold=fold, repeat=repeat, resamples=resamples, seed=seed
        )
        found |= {f"level_{level}/{name}": value for name, value in values.items()}
    return found


def _precision_recall_f1(sums: Floats) -> Floats:
    both, predicted, true = sums[..., 0], sums[..., 1], sums[..., 2]
    return np.stack([ratio(both, predicted), ratio(both, true), ratio(2 * both, predicted + true)], axis=-1)
