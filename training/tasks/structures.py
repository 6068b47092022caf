"""The structures in which the questions of a class tree are learnt: by itself each, handed down, or all at once.

Source: An et al. 2021, figure 2: `flat` is its approach 1, `independent` its approach 2, `transferred` its approach 3,
the proposal. `joint` is ours: one module with a classifier per question. On frozen features (`--learner features`) each
module of `flat` and `independent` starts from random weights, where the paper's networks start from ImageNet's. Each
question has the whole number of passes over its rows, so a tree takes more steps than `flat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from training.tasks.hierarchy import (
    Node,
    Tree,
    answered,
    chain_rule,
    flat_tree,
    guess,
    joint_objective,
    node_temperature,
    side_by_side,
    tree_of,
)
from training.tasks.learners import Answer, Learner, Question
from training.tasks.objective import objective_for


@dataclass(frozen=True)
class Head:
    """How a node is answered: by columns `first` to `first + width` of a module's logits, or always by the same."""

    module: int
    """-1: no module, the rows it was to be fitted on had fewer than two answers."""
    first: int
    temperature: float
    guess: tuple[float, ...]
    """What was true of the rows that it was fitted on, smoothed."""


@dataclass(frozen=True, eq=False)
class Chain:
    """The fitted modules of a tree, of which the first is that of the first question, or answers all."""

    tree: Tree
    modules: tuple[nn.Module, ...]
    heads: tuple[Head, ...]
    """Of each node."""
    epochs: tuple[int, ...]
    """The best epoch of each node's module; 0 where it has none."""

    def answers(self, logits: Sequence[np.ndarray], count: int) -> np.ndarray:
        """Calibrated conditionals float64 [`count`, `tree.width`], the nodes side by side; `logits` of each module."""
        parts = [_said(node, head, logits, count) for node, head in zip(self.tree.nodes, self.heads, strict=True)]
        return np.concatenate(parts, axis=1)

    @property
    def guess(self) -> np.ndarray:
        """float64 [`tree.width`]: the answers where there is nothing to judge by."""
        return np.concatenate([head.guess for head in self.heads])

    def at_temperatures(self, temperatures: Sequence[float]) -> Chain:
        heads = [replace(head, temperature=float(t)) for head, t in zip(self.heads, temperatures, strict=True)]
        return replace(self, heads=tuple(heads))


def probabilities_of(tree: Tree, laid: np.ndarray) -> np.ndarray:
    """Class probabilities float64 [N, K] of conditionals [N, `tree.width`]."""
    return chain_rule(tree, side_by_side(tree, laid))


def tree_for(structure: str, classes: Sequence[str]) -> Tree:
    return flat_tree(classes) if structure == "flat" else tree_of(classes)


def fit_chain(
    structure: str,
    learner: Learner,
    classes: Sequence[str],
    truth: np.ndarray,
    train: np.ndarray,
    held: np.ndarray,
    key: tuple[object, ...],
    *,
    level_weights: Sequence[float] = (),
    epochs: Sequence[int] | None = None,
) -> Chain:
    """The modules of a structure fitted on rows `train`, each stopped, and calibrated, on its own of the rows `held`.

    A node is fitted on the rows whose class lies below it. Where these have fewer than two answers it has no module,
    and says what was true of them.

    Args:
        truth: [N] class numbers of all rows.
        key: separates the randomness of folds.
        epochs: of each node, after which its module ends where none are held; the learner's own where None or 0.
    """
    tree = tree_for(structure, classes)
    asked = _Asked(learner, tree, truth, train, held, key, epochs or [0] * len(tree.nodes))
    if structure == "joint":
        return _all_at_once(asked, level_weights)
    return _one_by_one(asked, from_parents=structure == "transferred")


@dataclass(frozen=True, eq=False)
class _Asked:
    """What is to be fitted, as in `fit_chain`; `epochs` are those of each node, 0 where the learner decides."""

    learner: Learner
    tree: Tree
    truth: np.ndarray
    train: np.ndarray
    held: np.ndarray
    key: tuple[object, ...]
    epochs: Sequence[int]


def _all_at_once(asked: _Asked, level_weights: Sequence[float]) -> Chain:
    learner, tree, truth, train, held = asked.learner, asked.tree, asked.truth, asked.train, asked.held
    if len(np.unique(truth[train])) < 2:
        heads = [Head(-1, 0, 1.0, _guess(node, truth[train])) for node in tree.nodes]
        return Chain(tree, (), tuple(heads), (0,) * len(heads))
    objective = joint_objective(tree, truth[train], level_weights, learner.smoothing)
    stop_after = max(asked.epochs) or None
    answer = learner.fit(Question(tree.width, objective, truth, train, held, asked.key, stop_after=stop_after))
    logits = learner.logits(answer.module, held)
    heads = []
    for node, columns in zip(tree.nodes, tree.columns, strict=True):
        own = node.branch[truth[held]]
        temperature = node_temperature(logits[own >= 0, columns], own[own >= 0])
        heads.append(Head(0, columns.start, temperature, _guess(node, truth[train])))
    return Chain(tree, (answer.module,), tuple(heads), tuple(answer.best_epoch for _ in tree.nodes))


def _one_by_one(asked: _Asked, *, from_parents: bool) -> Chain:
    learner, tree, truth, train, held = asked.learner, asked.tree, asked.truth, asked.train, asked.held
    found: dict[int, Answer] = {}
    heads = []
    for number, node in enumerate(tree.nodes):
        answers = node.branch[truth]
        shown, judged = train[answers[train] >= 0], held[answers[held] >= 0]
        own_guess = _guess(node, truth[train])
        if len(np.unique(answers[shown])) < 2:
            heads.append(Head(-1, 0, 1.0, own_guess))
            continue
        start = _weights_above(tree, number, found) if from_parents else None
        objective = objective_for(answers[shown], node.width, learner.smoothing, node.leaves)
        more: Any = {"start": start, "stop_after": asked.epochs[number] or None}
        place = (*asked.key, number) if number else asked.key  # the first question is fitted as `finetune` would fit it
        found[number] = learner.fit(Question(node.width, objective, answers, shown, judged, place, **more))
        temperature = node_temperature(learner.logits(found[number].module, judged), answers[judged])
        heads.append(Head(len(found) - 1, 0, temperature, own_guess))
    best = [found[number].best_epoch if number in found else 0 for number in range(len(tree.nodes))]
    return Chain(tree, tuple(answer.module for answer in found.values()), tuple(heads), tuple(best))


def _weights_above(tree: Tree, number: int, found: dict[int, Answer]) -> Any:
    """The weights of the nearest node above that has a module; None where none has."""
    above = tree.nodes[number].parent
    while above >= 0 and above not in found:
        above = tree.nodes[above].parent
    return found[above].module.state_dict() if above >= 0 else None


def _guess(node: Node, truth: np.ndarray) -> tuple[float, ...]:
    answers = node.branch[truth]
    return tuple(guess(answers[answers >= 0], node.width).tolist())


def _said(node: Node, head: Head, logits: Sequence[np.ndarray], count: int) -> np.ndarray:
    if head.module < 0:
        return np.tile(np.asarray(head.guess), (count, 1))
    return answered(logits[head.module][:, head.first : head.first + node.width], head.temperature)
