"""A tree of classes as classifiers see it: one question per parent, answers multiplied down the path, one loss of all.

Source: An et al., "Hierarchical deep learning models using transfer learning for disease detection and classification
based on small number of medical images", 2021 (normal or diseased first, then which disease). Deviations: any depth;
confidences are multiplied by the chain rule, so that those of a level sum to one (the paper concatenates them, which
`training.tasks.stacking` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax

from training.calibration import best_temperature
from training.tasks.objective import class_weights


@dataclass(frozen=True, eq=False)
class Node:
    """A parent of the tree that has at least two children: a question with as many answers."""

    path: str
    """"" is the root."""
    level: int
    """Place of its children's depth among the depths at which questions are asked; 0 is the highest."""
    parent: int
    """Number of the nearest question above it; -1 for the first."""
    children: tuple[str, ...]
    branch: np.ndarray
    """int64 [K]: the child under which, or at which, each class lies; -1 where it is not below this node."""

    @property
    def width(self) -> int:
        return len(self.children)

    @property
    def leaves(self) -> list[int]:
        """How many classes lie below each child, or are it."""
        return [int(n) for n in np.bincount(self.branch[self.branch >= 0], minlength=self.width)]


@dataclass(frozen=True, eq=False)
class Tree:
    """The questions that lead to K classes, parents before their children. A single child is no question."""

    classes: tuple[str, ...]
    nodes: tuple[Node, ...]

    @property
    def levels(self) -> int:
        return 1 + max(node.level for node in self.nodes)

    @property
    def columns(self) -> list[slice]:
        """Where each node's answers stand when all are laid side by side."""
        ends = np.cumsum([node.width for node in self.nodes]).tolist()
        return [slice(end - node.width, end) for node, end in zip(self.nodes, ends, strict=True)]

    @property
    def width(self) -> int:
        """Answers of all nodes together."""
        return sum(node.width for node in self.nodes)


def tree_of(classes: Sequence[str]) -> Tree:
    """The tree of classes that are paths such as `retinopathy/npdr`, at whatever depths; none is another's parent."""
    found: list[Node] = []
    _grow(tuple(classes), "", -1, found)
    depths = sorted({node.level for node in found})
    return Tree(tuple(classes), tuple(replace(node, level=depths.index(node.level)) for node in found))


def flat_tree(classes: Sequence[str]) -> Tree:
    """The tree in which every class is a child of the root: the paper's flat approach."""
    return Tree(tuple(classes), (Node("", 0, -1, tuple(classes), np.arange(len(classes))),))


def _grow(classes: tuple[str, ...], path: str, parent: int, found: list[Node]) -> None:
    below = [name if not path or name.startswith(path + "/") else "" for name in classes]
    depth = path.count("/") + 1 if path else 0
    cut = ["/".join(name.split("/")[: depth + 1]) for name in below]
    children = tuple(dict.fromkeys(name for name in cut if name))
    if len(children) > 1:
        branch = np.asarray([children.index(name) if name else -1 for name in cut], dtype=np.int64)
        found.append(Node(path, depth, parent, children, branch))
        parent = len(found) - 1
    for child in children:
        if child not in classes:
            _grow(classes, child, parent, found)


def chain_rule(tree: Tree, conditionals: Sequence[np.ndarray]) -> np.ndarray:
    """Probabilities float64 [N, K] of the classes: the product of the answers on the path to each.

    `conditionals`: of each node [N, width], each row's sum 1; so those of the classes sum to 1 as well, and those of
    every level, where a parent's is the sum of its children's.
    """
    found = np.ones((len(conditionals[0]), len(tree.classes)))
    for node, answers in zip(tree.nodes, conditionals, strict=True):
        below = node.branch >= 0
        found[:, below] *= answers[:, node.branch[below]]
    return found


def paths(tree: Tree) -> np.ndarray:
    """bool [`tree.width`, K]: which answers lie on the path to each class. The chain rule in logarithms: their sum."""
    found = np.zeros((tree.width, len(tree.classes)), dtype=bool)
    for node, columns in zip(tree.nodes, tree.columns, strict=True):
        below = np.flatnonzero(node.branch >= 0)
        found[columns.start + node.branch[below], below] = True
    return found


def side_by_side(tree: Tree, laid: np.ndarray) -> list[np.ndarray]:
    """The answers [N, width] of each node out of [N, `tree.width`]."""
    return [laid[:, columns] for columns in tree.columns]


def guess(answers: np.ndarray, width: int) -> np.ndarray:
    """float64 [width]: the shares of answers [M], each counted once more (Laplace): rare is not impossible."""
    counts = np.bincount(answers, minlength=width) + 1.0
    return np.asarray(counts / counts.sum())


def node_temperature(logits: np.ndarray, answers: np.ndarray) -> float:
    """The temperature in [0.05, 20] that fits logits [M, C] best to answers [M], 1 where there are none.

    As Guo et al. 2017, against targets that allow for how few they are: (M + 1) / (M + C) for the answer, the rest
    evenly (Platt, "Probabilistic Outputs for Support Vector Machines", 1999, section 2.2, for any C). A node may have a
    handful of rows, all answered rightly, and that is no reason to be certain.
    """
    if not len(answers):
        return 1.0
    z, count, width = np.asarray(logits, dtype=np.float64), len(answers), logits.shape[1]
    target = np.full(z.shape, 1 / (count + width))
    target[np.arange(count), answers] = (count + 1) / (count + width)
    return best_temperature(lambda temperature: -float((target * log_softmax(z / temperature, axis=1)).sum()))


def answered(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Conditional probabilities float64 [N, width] of logits [N, width]."""
    return np.asarray(softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1))


@dataclass(frozen=True, eq=False)
class JointObjective:
    """The loss of logits [B, `tree.width`] of all nodes at once, against class numbers [B].

    The sum over levels of the level's weight times the mean, weighted by class, of the cross-entropies that rows have
    at the level's nodes; a row has none at nodes that do not lead to its class. A level that no row of a batch reaches
    adds nothing; where none is reached, there is nothing to learn, and `plain` judges NaN, as one classifier would.
    """

    tree: Tree
    weights: tuple[torch.Tensor, ...]
    """Of each node float32 [width]: of its children."""
    levels: tuple[float, ...]
    smoothing: float = 0.0
    judges: bool = False

    def __call__(self, logits: torch.Tensor, truth: np.ndarray) -> torch.Tensor:
        total, reached = logits.sum() * 0.0, False
        for level, weight in enumerate(self.levels):
            summed, shares = logits.new_zeros(()), logits.new_zeros(())
            for node, columns, classes in zip(self.tree.nodes, self.tree.columns, self.weights, strict=True):
                answers = node.branch[truth]
                rows = np.flatnonzero(answers >= 0)
                if node.level != level or not len(rows):
                    continue
                own = classes.to(logits.device)
                target = torch.as_tensor(answers[rows], device=logits.device)
                at = torch.as_tensor(rows, device=logits.device)
                said = logits[at, columns].float()
                summed = summed + F.cross_entropy(
                    said, target, weight=own, label_smoothing=self.smoothing, reduction="sum"
                )
                shares = shares + own[target].sum()
            total = total + weight * summed / shares.clamp(min=1e-12)
            reached = reached or (self.judges and weight * float(shares) > 0)  # asked of the device only to judge
        return total if reached or not self.judges else torch.full_like(total, torch.nan)

    def plain(self) -> JointObjective:
        """Without smoothing: what judges."""
        return replace(self, smoothing=0.0, judges=True)


def joint_objective(tree: Tree, truth: np.ndarray, levels: Sequence[float], smoothing: float) -> JointObjective:
    """The joint loss of rows of class numbers [N]: the leaves weigh alike, so a child as much as it has.

    `levels`: the weight of each level's loss from the highest down, the last for all deeper ones; all 1 where empty.
    """
    given = list(levels) or [1.0]
    every = tuple(given[min(level, len(given) - 1)] for level in range(tree.levels))
    own = [node.branch[truth] for node in tree.nodes]
    pairs = zip(own, tree.nodes, strict=True)
    weights = [class_weights(found[found >= 0], node.width, node.leaves) for found, node in pairs]
    return JointObjective(tree, tuple(weights), every, smoothing)
