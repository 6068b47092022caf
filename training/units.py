"""What is judged together: the images of a case, or of a group, whose probabilities are pooled into one answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cluster.errors import UsageError
from training.configs import Unit
from training.splits import Fold


@dataclass(frozen=True, eq=False)
class Units:
    """Rows of a selection cut into U units, in order of their first rows."""

    kind: Unit
    names: list[str]
    """Of each unit: its case or group, empty where an image stands alone."""
    of_row: np.ndarray
    """int64 [N]: the unit of each row."""
    first: np.ndarray
    """int64 [U]: the first row of each unit, which stands for it."""
    conflicting: np.ndarray
    """bool [U]: its images do not agree on their label, so it has none and is left out."""

    def __len__(self) -> int:
        return len(self.first)

    @property
    def judged(self) -> np.ndarray:
        """int64: the units that have a label."""
        return np.flatnonzero(~self.conflicting)


class Pooled(NamedTuple):
    """Predictions of units: `rows` [P] stand for them, the others are of the same length."""

    rows: np.ndarray
    truth: np.ndarray
    probabilities: np.ndarray
    fold: np.ndarray
    repeat: np.ndarray
    images: np.ndarray
    """How many rows were pooled."""


def units_of(kind: Unit, labels: Sequence[str], cases: Sequence[str], groups: Sequence[str]) -> Units:
    """The units of N rows by label, case and group of each; an image without a case, or group, is a unit of its own.

    Raises:
        UsageError: there are no cases, one lies in two groups, or its images disagree on their label. Images of a
            group may: it is `conflicting`.
    """
    if kind == "case" and not any(cases):
        raise UsageError(
            "--unit case: no labelled image has a case; name cases in the column `case`, or use --unit group"
        )
    given: Sequence[str] = {"image": [""] * len(labels), "case": cases, "group": groups}[kind]
    keys = [name or f"\x00row {row}" for row, name in enumerate(given)]
    number = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    of_row = np.asarray([number[key] for key in keys], dtype=np.int64)
    _, first = np.unique(of_row, return_index=True)
    names = [given[row] or "" for row in first]
    if kind == "case":
        _require_one(names, of_row, groups, "lies in the groups", "a case must be of one patient: rename one of them")
        way_out = "correct the labels, or judge by --unit image"
        _require_one(names, of_row, labels, "has images of the labels", way_out)
    conflicting = np.asarray([len(found) > 1 for found in _values(of_row, labels)], dtype=bool)
    return Units(kind, names, of_row, first.astype(np.int64), conflicting)


def pooled(
    units: Units,
    rows: np.ndarray,
    truth: np.ndarray,
    probabilities: np.ndarray,
    fold: np.ndarray,
    repeat: np.ndarray,
) -> Pooled:
    """The mean of the probabilities [M, K] of each unit's rows, per repeat; units in conflict are left out.

    `rows` [M] are rows of the units' selection, `truth` is [M] or [M, K]. Sorted by repeat, fold and unit.
    """
    keep = ~units.conflicting[units.of_row[rows]]
    keys = np.stack([repeat[keep], fold[keep], units.of_row[rows[keep]]], axis=1)
    found, at, place, images = np.unique(keys, axis=0, return_index=True, return_inverse=True, return_counts=True)
    if len(np.unique(found[:, [0, 2]], axis=0)) < len(found):
        raise ValueError(f"a {units.kind} has images in two folds of one repeat: its unit cannot be judged as one")
    sums = np.zeros((len(found), probabilities.shape[1]))
    np.add.at(sums, place.ravel(), probabilities[keep])
    first = units.first[found[:, 2]]
    return Pooled(first, truth[keep][at], sums / images[:, None], found[:, 1], found[:, 0], images)


def fold_of_units(units: Units, fold: Fold) -> Fold:
    """The same fold over the rows that stand for the units with a label."""
    standing = units.first[units.judged]
    return replace(fold, train=np.intersect1d(fold.train, standing), test=np.intersect1d(fold.test, standing))


def _values(of_row: np.ndarray, texts: Sequence[str]) -> list[set[str]]:
    """The distinct texts of each unit's rows."""
    found: list[set[str]] = [set() for _ in range(int(of_row.max(initial=-1)) + 1)]
    for unit, text in zip(of_row, texts, strict=True):
        found[unit].add(text)
    return found


def _require_one(names: Sequence[str], of_row: np.ndarray, texts: Sequence[str], what: str, way_out: str) -> None:
    """Each unit's rows have one text, as far as they have a name."""
    wrong = [(name, seen) for name, seen in zip(names, _values(of_row, texts), strict=True) if name and len(seen) > 1]
    if wrong:
        name, seen = wrong[0]
        more = f" (and {len(wrong) - 1:,} more cases)" if len(wrong) > 1 else ""
        raise UsageError(f"case {name!r} {what} {', '.join(sorted(seen))}{more}: {way_out}")
