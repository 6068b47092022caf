"""One fit of `--task hierarchical`: a fold, or the final refit. No Ray in here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from cluster.errors import UsageError
from training.domain import LARGEST, distances_to, sampled_rows
from training.fit import FOLD_REFERENCE, HELD_FRACTION, FoldResult, Labels
from training.splits import Fold, cross_validation, hold_out, require_inner
from training.tasks.chains import Hierarchy
from training.tasks.frozen import Inner
from training.tasks.inputs import Inputs
from training.tasks.learners import Learner
from training.tasks.stacking import META_LEARNERS, Meta, evidence_of, judge_inner
from training.tasks.structures import Chain, fit_chain

STACKING_FOLDS = {"features": 5, "network": 3}
"""Inner folds whose confidences a meta-learner is fitted on."""


@dataclass(frozen=True, eq=False)
class Ground:
    """What all fits of a run share."""

    learner: Learner
    labels: Labels
    inputs: Inputs
    classes: tuple[str, ...]
    structure: str
    kind: str
    """network or features: what `learner` is."""
    level_weights: tuple[float, ...]
    stack: str
    seed: int


@dataclass(frozen=True, eq=False)
class Fitted:
    hierarchy: Hierarchy
    judged: np.ndarray
    """int64 [I]: rows that neither a module nor the meta-learner was fitted on when they were judged."""
    probabilities: np.ndarray
    """float64 [I, K], not calibrated beyond what each node is."""


def hierarchical_fold(ground: Ground, fold: Fold) -> FoldResult:
    """The hierarchy of the fold's training rows; judges its test rows.

    `more` has the best epoch and the temperature of each node of each chain, [C, nodes]; NaN where it has no module.
    """
    fitted = fit_hierarchy(ground, fold.train, (fold.repeat, fold.fold), ground.seed + fold.repeat)
    hierarchy, learner = fitted.hierarchy, ground.learner
    known = fold.train[sampled_rows(len(fold.train), FOLD_REFERENCE)] if ground.kind == "network" else fold.train
    first = _first_module(hierarchy.chains)
    heads = np.asarray([[head.temperature for head in chain.heads] for chain in hierarchy.chains])
    epochs = np.asarray([chain.epochs for chain in hierarchy.chains], dtype=np.float64)
    there = np.asarray([[head.module >= 0 for head in chain.heads] for chain in hierarchy.chains])
    return FoldResult(
        repeat=fold.repeat,
        fold=fold.fold,
        test=fold.test,
        probabilities=judged_by(ground, hierarchy, fold.test),
        best_epoch=int(epochs[0, 0]),
        history=[],
        distances=distances_to(learner.seen(first, known), learner.seen(first, fold.test)),
        inner_rows=fitted.judged,
        inner_probabilities=fitted.probabilities,
        share=fold.share,
        more={"epochs": np.where(there, epochs, np.nan), "temperatures": np.where(there, heads, np.nan)},
    )


def refit_hierarchy(
    ground: Ground, rows: np.ndarray, epochs: np.ndarray, temperatures: np.ndarray
) -> tuple[bytes, dict[str, np.ndarray], np.ndarray]:
    """The hierarchy of `rows`, its modules trained for so many epochs [C, nodes] and at these temperatures.

    Returns its file (`Hierarchy.dumps`), the weights of its first network (none of frozen
    features), and the features of those of the rows that its domain keeps.
    """
    chains = fit_chains(ground, rows, rows[:0], ("refit",), epochs)
    chains = [chain.at_temperatures(own) for chain, own in zip(chains, temperatures, strict=True)]
    meta = stacked(ground, rows, ("refit",), ground.seed)[0] if ground.stack != "none" else None
    hierarchy = _hierarchy(ground, chains, meta)
    first = _first_module(chains[:1])
    kept = rows[sampled_rows(len(rows), LARGEST)] if ground.kind == "network" else rows
    weights = {name: tensor.numpy() for name, tensor in first.state_dict().items()} if ground.kind == "network" else {}
    return hierarchy.dumps(), weights, ground.learner.seen(first, kept)


def fit_hierarchy(ground: Ground, rows: np.ndarray, key: tuple[object, ...], seed: int) -> Fitted:
    """The hierarchy of `rows`, some of whose groups, the same for all nodes and inputs, only stop and calibrate it."""
    train, held = _sides(ground, rows, seed)
    hierarchy = _hierarchy(ground, fit_chains(ground, train, held, key))
    if ground.stack == "none":
        return Fitted(hierarchy, held, judged_by(ground, hierarchy, held))
    meta, probabilities = stacked(ground, rows, key, seed)
    return Fitted(replace(hierarchy, meta=meta), rows, probabilities)


def fit_chains(
    ground: Ground,
    train: np.ndarray,
    held: np.ndarray,
    key: tuple[object, ...],
    epochs: Sequence[Sequence[int]] | np.ndarray | None = None,
) -> list[Chain]:
    """A chain for each input, fitted on its own of the rows."""
    found = []
    for number in range(ground.inputs.count):
        own, own_held = (rows[ground.inputs.of_row[rows] == number] for rows in (train, held))
        chain = fit_chain(
            ground.structure,
            ground.learner,
            ground.classes,
            ground.labels.truth,
            own,
            own_held,
            (*key, ground.inputs.names[number]) if number else key,
            level_weights=ground.level_weights,
            epochs=None if epochs is None else [int(epoch) for epoch in epochs[number]],
        )
        found.append(chain)
    return found


def answers_of(ground: Ground, chains: Sequence[Chain], rows: np.ndarray) -> list[np.ndarray]:
    """Of each chain, what it says of the cases of rows [R]: [U, width], NaN where a case has no image of its input."""
    found = []
    for number, chain in enumerate(chains):
        own = rows[ground.inputs.of_row[rows] == number]
        said = chain.answers([ground.learner.logits(module, own) for module in chain.modules], len(own))
        found.append(ground.inputs.means(number, rows, said))
    return found


def judged_by(ground: Ground, hierarchy: Hierarchy, rows: np.ndarray) -> np.ndarray:
    """Probabilities [R, K] of rows, each that of its case."""
    said = hierarchy.probabilities(answers_of(ground, hierarchy.chains, rows))
    return np.asarray(said[np.searchsorted(ground.inputs.cases(rows), ground.inputs.case_of_row[rows])])


def stacked(ground: Ground, rows: np.ndarray, key: tuple[object, ...], seed: int) -> tuple[Meta, np.ndarray]:
    """(the meta-learner of the cases of `rows`, and probabilities [R, K] of rows by others that did not see them)."""
    inner = inner_folds(ground, rows, seed)
    evidence = out_of_fold(ground, rows, inner, key, seed)
    cases = ground.inputs.cases(rows)
    place = np.searchsorted(cases, ground.inputs.case_of_row[rows])
    truth = np.zeros(len(cases), dtype=np.int64)
    truth[place] = ground.labels.truth[rows]
    sides = [(np.unique(place[train]), np.unique(place[test])) for train, test in inner]
    meta = META_LEARNERS[ground.stack](evidence, truth, len(ground.classes), ground.seed)
    said = judge_inner(ground.stack, evidence, truth, sides, len(ground.classes), ground.seed)
    return meta, said[place]


def out_of_fold(ground: Ground, rows: np.ndarray, inner: Inner, key: tuple[object, ...], seed: int) -> np.ndarray:
    """Evidence [U, E] of the cases of `rows`, each by chains that were fitted without its group.

    `inner`: places within `rows`; the test sides cover each once. Those who stop a chain are of its training side.
    """
    cases, parts = ground.inputs.cases(rows), []
    for number, (train, test) in enumerate(inner):
        chains = fit_chains(ground, *_sides(ground, rows[train], seed), (*key, "inner", number))
        evidence = evidence_of(chains, answers_of(ground, chains, rows[test]))
        parts.append((np.searchsorted(cases, ground.inputs.cases(rows[test])), evidence))
    found = np.full((len(cases), parts[0][1].shape[1]), np.nan)
    for at, evidence in parts:
        found[at] = evidence
    return found


def require_stackable(labels: Labels, stack: str, sides: Iterable[np.ndarray]) -> None:
    """Raises UsageError where a meta-learner is asked for and a training side has no inner folds to fit it on."""
    if stack != "none":
        known: dict[str, str] = {"split": labels.split, "flag": f"--stack {stack}", "way_out": "leave --stack out"}
        require_inner(labels.names, labels.groups, sides, **known)


def inner_folds(ground: Ground, rows: np.ndarray, seed: int) -> Inner:
    """As many grouped folds of rows [R] as the rarest class allows, at most `STACKING_FOLDS`; places within them."""
    require_stackable(ground.labels, ground.stack, [rows])
    names, groups = ground.labels.take(rows)
    own = groups if ground.labels.split != "image" else [str(row) for row in rows]
    rarest = min(len({g for g, n in zip(own, names, strict=True) if n == name}) for name in set(names))
    count = min(STACKING_FOLDS[ground.kind], rarest)
    folds = cross_validation(names, own, folds=count, repeats=1, split="group", seed=seed)
    return [(fold.train, fold.test) for fold in folds]


def _sides(ground: Ground, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on, and those of the groups that only stop and calibrate."""
    names, groups = ground.labels.take(rows)
    own = groups if ground.labels.split != "image" else [str(row) for row in rows]
    train, held = hold_out(names, own, fraction=HELD_FRACTION, seed=seed)
    return rows[train], rows[held]


def _first_module(chains: Sequence[Chain]) -> nn.Module:
    found = next((module for chain in chains for module in chain.modules), None)
    if found is None:
        raise UsageError("--inputs: the first input's training images are of one class; name another input first")
    return found


def _hierarchy(ground: Ground, chains: Sequence[Chain], meta: Meta | None = None) -> Hierarchy:
    return Hierarchy(
        ground.classes, ground.structure, ground.kind, tuple(chains), ground.inputs.names, ground.stack, meta
    )
