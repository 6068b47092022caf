"""Which rows train and which rows judge: cross-validation and hold-out splits that keep a group on one side."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from cluster.errors import UsageError

Rows = NDArray[np.int64]

SHUFFLES = 20
"""Shuffles tried before a class is declared impossible to spread over the folds."""


@dataclass(frozen=True, eq=False)
class Fold:
    """One fit of a cross-validation: ascending row indices of the two sides, which share no row and no group."""

    repeat: int
    fold: int
    train: Rows
    test: Rows
    share: float = 1.0
    """Of the training groups that the protocol offers, how many `train` was cut down to."""


def cross_validation(
    labels: Sequence[str],
    groups: Sequence[str],
    *,
    folds: int,
    repeats: int,
    split: Literal["group", "image"],
    seed: int,
) -> list[Fold]:
    """All fits of a repeated, stratified, shuffled k-fold cross-validation; each row is tested once per repeat.

    `labels` and `groups` hold one entry per row, a label set such as `a|b` where a row has several; an empty group
    means that the row is its own group. `split="group"` keeps a group on one side (scikit-learn's
    `StratifiedGroupKFold`), `split="image"` ignores groups and so leaks between images of one patient. Each repeat
    shuffles with its own seed, derived from `(seed, repeat)`. With `split="group"` and no empty group the folds do not
    depend on the order of the rows; with `split="image"` only rows of equal group and label can trade places. Every
    class is in every training side, and so are, where rows have several, rows without it; label sets are stratified as
    `_strata` says.

    Raises:
        UsageError: a class has fewer groups (images for `split="image"`) than there are folds, or its groups, tied
            to other classes, all land in one fold.
    """
    y, g = np.asarray(labels, dtype=str), _own_groups(groups)
    if len(y) != len(g):
        raise ValueError(f"{len(y)} labels but {len(g)} groups: one of each per row")
    units, marks = g if split == "group" else np.arange(len(y)), _marks(y)
    _require_enough(marks, units, folds, "groups" if split == "group" else "images")
    strata = _strata(y, marks, units, folds)
    result = []
    for repeat in range(repeats):
        for fold, (train, test) in enumerate(_k_fold(strata, marks, g, folds, split, (seed, repeat))):
            result.append(Fold(repeat, fold, train, test))
            if split == "group":
                _require_apart(g, train, test)
    return result


def leave_one_site_out(labels: Sequence[str], groups: Sequence[str], sites: Sequence[str]) -> list[Fold]:
    """One fit per site, in the order of their names: judged on its rows, trained on those of all others.

    All arguments hold one entry per row; an empty group means that the row is its own. Rows of other sites whose group
    was also at the judged site take no part in that fit.

    Raises:
        UsageError: a row has no site, there is only one, or a class is known at one site alone.
    """
    marks = _marks(np.asarray(labels, dtype=str))
    g, s = _own_groups(groups), np.asarray(sites, dtype=str)
    if (s == "").any():
        raise UsageError(
            f"{int((s == '').sum())} of {len(s)} labelled images have no site: fill the column, or --where"
        )
    if len(names := np.unique(s)) < 2:
        raise UsageError(
            f"all labelled images are of one site, {str(names[0])!r}: leave-one-site-out needs at least two"
        )
    result = []
    for fold, site in enumerate(names):
        test = np.flatnonzero(s == site)
        train = np.flatnonzero((s != site) & ~np.isin(g, g[test]))
        absent = [name for name, rows in marks.items() if not rows[train].any()]
        if absent:
            raise UsageError(
                f"class {absent[0]!r} is known at site {str(site)!r} alone, so nothing can be trained for it "
                "without that site: merge or drop the class, or use --split group"
            )
        _require_apart(g, train, test)
        result.append(Fold(0, fold, train, test))
    return result


def hold_outs(labels: Sequence[str], groups: Sequence[str], *, fraction: float, repeats: int, seed: int) -> list[Fold]:
    """One fit per repeat, judged on a grouped, stratified `fraction` of the rows that each repeat draws anew.

    Raises:
        UsageError: nothing can be held out, or a class ends up on one side alone.
    """
    marks, result = _marks(np.asarray(labels, dtype=str)), []
    for repeat in range(repeats):
        absent = set[str]()
        for state in np.random.SeedSequence((seed, repeat)).generate_state(SHUFFLES):
            train, test = hold_out(labels, groups, fraction=fraction, seed=int(state))
            absent = {name for side in (train, test) for name, rows in marks.items() if not rows[side].any()}
            if not absent:
                result.append(Fold(repeat, 0, train, test))
                break
        else:
            raise UsageError(
                f"class {min(absent)!r}: its groups cannot be spread over both sides of a hold-out: try another "
                "--test-fraction, or merge or drop the class"
            )
    return result


def budget(labels: Sequence[str], groups: Sequence[str], rows: Rows, *, share: float, seed: int) -> Rows:
    """Those of `rows` that are left of a `share` (0 to 1] of their groups, whole groups only.

    `labels` and `groups` are of all rows. Groups are drawn class by class (a group counts for the rarest class it has,
    of label sets such as `a|b` also for what they lack), at least two of each where there are two. A smaller share of
    the same rows and seed lies within a larger one.
    """
    if share >= 1:
        return rows
    y, g = np.asarray(labels, dtype=str)[rows], _own_groups(groups)[rows]
    names, member = np.unique(g, return_inverse=True)
    owners = [np.unique(member[mark]) for mark in _marks(y).values()]
    rarest = np.full(len(names), -1)
    for label in sorted(range(len(owners)), key=lambda label: (-len(owners[label]), label)):
        rarest[owners[label]] = label  # the rarest comes last
    order = np.random.default_rng(seed).permutation(len(names))
    kept = np.zeros(len(names), dtype=bool)
    for label in np.unique(rarest):
        own = order[rarest[order] == label]
        kept[own[: max(2, round(share * len(own)))]] = True
    if any("|" in label for label in y):  # a class whose groups all have rarer ones too has none of its own above
        for own in owners:
            kept[order[np.isin(order, own)][:2]] = True
    return rows[kept[member]]


def hold_out(labels: Sequence[str], groups: Sequence[str], *, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """One grouped, stratified split into (train, held) rows, such as for the inner validation of early stopping.

    Groups are visited in a random order that `seed` decides, and held where that brings each class's held share
    closer to `fraction` (0 to 1, exclusive). Both sides are non-empty, no group is on both, and a class leaves the
    training side only where every single group would take a class with it. An empty group is its own group.

    Raises:
        UsageError: there are fewer than two groups, so nothing can be held out.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction}: must lie between 0 and 1")
    marks, (names, g) = _marks(np.asarray(labels, dtype=str)), np.unique(_own_groups(groups), return_inverse=True)
    if len(names) < 2:
        raise UsageError(
            f"all {len(labels)} training images are of one group: add images of other groups to hold some out"
        )
    counts = np.stack([np.bincount(g, rows, len(names)) for rows in marks.values()], axis=1)
    held_groups = _choose_held(counts / counts.sum(axis=0), fraction, np.random.default_rng(seed))
    held = np.isin(g, held_groups)
    train, held_rows = np.flatnonzero(~held), np.flatnonzero(held)
    _require_apart(g, train, held_rows)
    return train, held_rows


def require_inner(
    labels: Sequence[str], groups: Sequence[str], sides: Iterable[Rows], *, split: str, flag: str, way_out: str
) -> None:
    """Inner folds can be laid in each of the training `sides`: none has a class of which it has one group (image, of
    `split` image) alone. `labels` and `groups` are of all rows; `flag` is what asks for inner folds.

    Raises:
        UsageError: one has.
    """
    y, own = np.asarray(labels, dtype=str), _own_groups(groups if split != "image" else [""] * len(groups))
    for rows in sides:
        short = next((name for name, mark in _marks(y[rows]).items() if len(np.unique(own[rows][mark])) < 2), None)
        if short is not None:
            noun = "group" if split != "image" else "image"
            raise UsageError(
                f"{flag}: class {short!r} has one {noun} in the training side of a fold, but its inner folds need two: "
                f"merge or drop the class, or {way_out}"
            )


def _marks(labels: NDArray[np.str_]) -> dict[str, NDArray[np.bool_]]:
    """Of each class the rows [N] that have it; where rows have several, also those that lack it, as `no CLASS`."""
    if not any("|" in label for label in labels):
        return {str(name): labels == name for name in np.unique(labels)}
    sets = [set(label.split("|")) for label in labels]
    having = {name: np.asarray([name in own for own in sets]) for name in sorted(set().union(*sets))}
    return having | {f"no {name}": ~rows for name, rows in having.items() if not rows.all()}


def _strata(
    labels: NDArray[np.str_], marks: dict[str, NDArray[np.bool_]], units: NDArray[np.generic], folds: int
) -> NDArray[np.str_]:
    """What is stratified by: the label; of a label set the whole set, or its rarest class where fewer units than folds
    have that set; nothing at all where every stratum is that rare."""
    if not any("|" in label for label in labels):
        return labels
    common = {name: len(np.unique(units[rows])) for name, rows in marks.items()}
    strata = {}
    for label in map(str, np.unique(labels)):
        rarest = min(label.split("|"), key=lambda name: (common[name], name))
        strata[label] = label if len(np.unique(units[labels == label])) >= folds else rarest
    found = np.asarray([strata[str(label)] for label in labels])
    return found if np.unique(found, return_counts=True)[1].max() >= folds else np.full(len(labels), "")


def _k_fold(
    strata: NDArray[np.str_],
    marks: dict[str, NDArray[np.bool_]],
    groups: NDArray[np.str_],
    folds: int,
    split: str,
    seed: tuple[int, int],
) -> list[tuple[Rows, Rows]]:
    """The first of a few shuffles of a k-fold split in which every class is in every training side."""
    order, absent = np.lexsort((strata, groups)), set[str]()
    for state in np.random.SeedSequence(seed).generate_state(SHUFFLES):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class")  # of a stratum; classes are counted here
            if split == "group":
                grouped = StratifiedGroupKFold(folds, shuffle=True, random_state=int(state))
                sides = list(grouped.split(order, strata[order], groups[order]))
            else:
                plain = StratifiedKFold(folds, shuffle=True, random_state=int(state))
                sides = list(plain.split(order, strata[order]))
        fits = [(np.sort(order[train]), np.sort(order[test])) for train, test in sides]
        absent = {name for train, _ in fits for name, rows in marks.items() if not rows[train].any()}
        if not absent:
            return fits
    raise UsageError(
        f"class {min(absent)!r}: its groups cannot be spread, with --folds {folds} all of them land in one fold: "
        "try another --folds, or merge or drop the class"
    )


def _choose_held(shares: NDArray[np.float64], fraction: float, rng: np.random.Generator) -> list[int]:
    """Indices of the groups to hold; `shares` [G,C] is each group's share of each class."""
    target = np.full(shares.shape[1], fraction)
    held, chosen = np.zeros(shares.shape[1]), []
    visits = rng.permutation(len(shares))
    whole = 1 - 1e-9  # shares are sums of fractions: compare with a tolerance
    for i in visits:
        gain = ((held - target) ** 2).sum() - ((held + shares[i] - target) ** 2).sum()
        if gain > 0 and (held + shares[i] < whole).all():
            chosen.append(int(i))
            held = held + shares[i]
    if not chosen:  # every group overshoots: the smallest overshoot, and rather one that takes no class away
        chosen = [int(min(visits, key=lambda i: ((shares[i] >= whole).sum(), ((shares[i] - target) ** 2).sum())))]
    return chosen


def _own_groups(groups: Sequence[str]) -> NDArray[np.str_]:
    return np.asarray([group or f"\x00row {row}" for row, group in enumerate(groups)], dtype=str)


def _require_enough(marks: dict[str, NDArray[np.bool_]], units: NDArray[np.generic], folds: int, noun: str) -> None:
    """Every class has at least `folds` distinct `units`."""
    counts = {label: len(np.unique(units[rows])) for label, rows in marks.items()}
    short = {label: n for label, n in counts.items() if n < folds}
    if not short:
        return
    label, count = min(short.items(), key=lambda item: item[1])
    others = f" (and {len(short) - 1} other classes have too few)" if len(short) > 1 else ""
    lower = f"lower --folds to {count}, or " if count >= 2 else ""
    noun = noun if count != 1 else noun[:-1]
    raise UsageError(
        f"class {label!r} has {count} {noun}, fewer than --folds {folds}{others}: {lower}merge or drop the class"
    )


def _require_apart(groups: NDArray[np.generic], train: Rows, test: Rows) -> None:
    shared = np.intersect1d(groups[train], groups[test])
    if len(shared):  # not an `assert`: this must hold under `python -O` too
        raise RuntimeError(f"{len(shared)} groups are on both sides of a split, such as {shared[0]!r}")
