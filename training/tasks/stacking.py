"""Meta-learners: confidences of base models, made out of fold, to one answer. Fitted by scikit-learn, kept as arrays.

Source: An et al. 2021, figure 2: the confidences of all models side by side, for the flat approach and the hierarchical
ones alike. Which meta-learner the paper took is not known: `forest` is that of the group's paper of 2019, `logistic`
the second option. Deviation: of its first model the paper hands on the confidence in `normal` alone, ours is shown all
answers of every question, for a root may have more than two. Our choices: several images of an input are averaged, an
input that a case lacks says what was true of the training rows, and a column per input tells that it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import numpy as np
from scipy.special import softmax
from sklearn.ensemble import RandomForestClassifier

from training.tasks import frozen
from training.tasks.frozen import Inner
from training.tasks.structures import Chain, probabilities_of

TREES, SMALLEST_LEAF = 100, 3


class Meta(Protocol):
    """A fitted meta-learner."""

    def probabilities(self, evidence: np.ndarray) -> np.ndarray:
        """float64 [U, K] of evidence [U, E]; a class that was absent in training gets 0."""
        ...

    def tensors(self) -> dict[str, np.ndarray]:
        """All that it is."""
        ...


@dataclass(frozen=True, eq=False)
class Forest:
    """Trees laid end to end, a node's children after itself. skops does not trust scikit-learn's own: nodes that lead
    nowhere would have it read memory that is not its own."""

    roots: np.ndarray
    """int64 [T]"""
    left: np.ndarray
    """int64 [M]: taken where the feature is at most the threshold; -1 at a leaf."""
    right: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    value: np.ndarray
    """float64 [M, K]: shares of the classes."""

    @classmethod
    def fit(cls, evidence: np.ndarray, truth: np.ndarray, classes: int, seed: int) -> Self:
        """100 trees, balanced, whose leaves have 3 rows at least."""
        forest = RandomForestClassifier(
            TREES, min_samples_leaf=SMALLEST_LEAF, class_weight="balanced_subsample", random_state=seed
        ).fit(evidence, truth)
        trees = [tree.tree_ for tree in forest.estimators_]
        roots = np.cumsum([0, *(tree.node_count for tree in trees[:-1])])
        left, right = (
            np.concatenate([np.where(own >= 0, own + at, -1) for own, at in zip(sides, roots, strict=True)])
            for sides in ([tree.children_left for tree in trees], [tree.children_right for tree in trees])
        )
        value = np.zeros((len(left), classes))
        value[:, forest.classes_] = np.concatenate([tree.value[:, 0] for tree in trees])
        value /= value.sum(axis=1, keepdims=True)
        feature = np.maximum(np.concatenate([tree.feature for tree in trees]), 0)
        return cls(roots, left, right, feature, np.concatenate([tree.threshold for tree in trees]), value)

    def probabilities(self, evidence: np.ndarray) -> np.ndarray:
        shown = evidence.astype(np.float32)  # as scikit-learn compares
        rows = np.arange(len(shown))[:, None]
        at = np.tile(self.roots, (len(shown), 1))
        while (self.left[at] >= 0).any():
            lower = shown[rows, self.feature[at]] <= self.threshold[at]
            at = np.where(self.left[at] >= 0, np.where(lower, self.left[at], self.right[at]), at)
        return np.asarray(self.value[at].mean(axis=1))

    def tensors(self) -> dict[str, np.ndarray]:
        return {field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}

    def check(self) -> Self:
        """Raises ValueError where a walk might not end, or leave the trees."""
        inner = np.flatnonzero(self.left >= 0)
        for side in (self.left, self.right):
            if len(side) != len(self.value) or (side[inner] <= inner).any() or (side[inner] >= len(side)).any():
                raise ValueError("a forest whose nodes lead nowhere")
        if (self.roots < 0).any() or (self.roots >= len(self.left)).any() or (self.feature < 0).any():
            raise ValueError("a forest without roots")
        return self


@dataclass(frozen=True, eq=False)
class Lines:
    """Multinomial logistic regression: softmax of `weight` @ evidence + `bias`."""

    weight: np.ndarray
    """float64 [K, E]"""
    bias: np.ndarray
    """float64 [K]: minus infinity for a class that was absent in training."""

    @classmethod
    def fit(cls, evidence: np.ndarray, truth: np.ndarray, classes: int, seed: int) -> Self:
        """Balanced, on standardised confidences."""
        fitted: Any = frozen.logistic().fit(evidence, truth)
        scaler, lines = fitted[0], fitted[-1]
        own, offsets = lines.coef_, lines.intercept_
        if len(lines.classes_) == 2:  # scikit-learn keeps one row, whose sigmoid is the second class
            own, offsets = np.vstack([np.zeros_like(own), own]), np.concatenate([[0.0], offsets])
        weight, bias = np.zeros((classes, evidence.shape[1])), np.full(classes, -np.inf)
        weight[lines.classes_] = own / scaler.scale_
        bias[lines.classes_] = offsets - (own / scaler.scale_) @ scaler.mean_
        return cls(weight, bias)

    def probabilities(self, evidence: np.ndarray) -> np.ndarray:
        return np.asarray(softmax(evidence @ self.weight.T + self.bias, axis=1))

    def tensors(self) -> dict[str, np.ndarray]:
        return {"weight": self.weight, "bias": self.bias}


META_LEARNERS: dict[str, Callable[[np.ndarray, np.ndarray, int, int], Meta]] = {
    "forest": Forest.fit,
    "logistic": Lines.fit,
}
"""Of evidence [U, E], class numbers [U], how many classes there are, and the seed."""


def load_meta(name: str, tensors: Mapping[str, np.ndarray], classes: int) -> Meta:
    """The inverse of `Meta.tensors`.

    Raises:
        ValueError, KeyError, TypeError: it is damaged, or of other classes.
    """
    found = Forest(**tensors).check() if name == "forest" else Lines(**tensors)
    width = found.value.shape[1] if isinstance(found, Forest) else len(found.weight)
    if width != classes:
        raise ValueError(f"a meta-learner of {width} classes")
    return found


def evidence_of(chains: Sequence[Chain], answers: Sequence[np.ndarray]) -> np.ndarray:
    """What a meta-learner is shown, float64 [U, E], of each chain's answers [U, width], NaN where its input is missing.

    The conditionals of all nodes of all chains; with several chains also a column for each, 1 where it has answered.
    """
    there = [~np.isnan(said).any(axis=1) for said in answers]
    filled = [np.where(t[:, None], said, chain.guess) for chain, said, t in zip(chains, answers, there, strict=True)]
    if len(chains) == 1:
        return filled[0]
    return np.concatenate([*filled, np.stack(there, axis=1).astype(np.float64)], axis=1)


def averaged(chains: Sequence[Chain], answers: Sequence[np.ndarray]) -> np.ndarray:
    """Class probabilities float64 [U, K] without a meta-learner: the mean of the chains that have answered.

    Where none has, the mean of what was true of the training rows of each.
    """
    nothing = np.isnan(np.stack([said[:, 0] for said in answers], axis=1)).all(axis=1)
    parts, weights = [], []
    for chain, said in zip(chains, answers, strict=True):
        missing = np.isnan(said).any(axis=1)
        parts.append(probabilities_of(chain.tree, np.where(missing[:, None], chain.guess, said)))
        weights.append(np.where(nothing, 1.0, ~missing))
    share = np.stack(weights) / np.sum(weights, axis=0)
    return np.asarray(np.einsum("cu,cuk->uk", share, np.stack(parts)))


def judge_inner(
    meta_learner: str, evidence: np.ndarray, truth: np.ndarray, inner: Inner, classes: int, seed: int
) -> np.ndarray:
    """float64 [U, K]: each row judged by a meta-learner whose inner fold did not train on it."""
    found = np.zeros((len(evidence), classes))
    for train, test in inner:
        own = META_LEARNERS[meta_learner](evidence[train], truth[train], classes, seed)
        found[test] = own.probabilities(evidence[test])
    return found
