"""Labels that look wrong: confident learning over probabilities that were made without the label they judge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 20
TEMPERATURE = 0.07
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Doubts:
    """Rows whose label looks wrong, the least believable first, as [S] each."""

    rows: np.ndarray
    rivals: np.ndarray
    """The class that each looks like instead."""
    margins: np.ndarray
    """Probability of the given label less that of the likeliest other class, -1..1."""


def doubts(probabilities: np.ndarray, labels: np.ndarray) -> Doubts:
    """The rows that confident learning counts as mislabelled, by their normalised margin.

    Args:
        probabilities: [M, K] of each row's classes, by a model that the row's own label did not reach.
        labels: [M] class indices as given.

    A row is counted where its probability of some other class reaches that class's threshold, the mean probability of
    the class among the rows that carry it: off the diagonal of the confident joint of Northcutt, Jiang and Chuang,
    JAIR 2021, equations 1 and 2; where several do, the likeliest. Ranked by their normalised margin (section 3.2).
    Deviation: rows are neither pruned nor counted back to a noise rate; a person looks at them.
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if p.ndim != 2 or y.shape != (len(p),):
        raise ValueError(f"probabilities {p.shape} and labels {y.shape}: must be [M, K] and [M]")
    confident = np.where(p >= thresholds(p, y), p, -1.0)
    reached = confident.argmax(axis=1)
    wrong = np.flatnonzero((confident.max(axis=1, initial=-1.0) >= 0) & (reached != y))
    others = p[wrong]
    others[np.arange(len(wrong)), y[wrong]] = -1.0
    margins = p[wrong, y[wrong]] - others.max(axis=1, initial=-1.0)
    order = np.argsort(margins, kind="stable")
    return Doubts(wrong[order], reached[wrong][order], margins[order])


def thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[K] mean probability of each class among the rows that carry its label; infinite for a class that none does."""
    classes = probabilities.shape[1]
    counts = np.bincount(labels, minlength=classes)
    own = np.bincount(labels, probabilities[np.arange(len(labels)), labels], minlength=classes)
    return np.where(counts > 0, own / np.maximum(counts, 1), np.inf)


def neighbour_probabilities(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, classes: int, asked: np.ndarray | None = None
) -> np.ndarray:
    """float64 [Q, K] of rows `asked` (default all) from the labels of their 20 nearest rows of *other groups*.

    Args:
        features: [M, D]; compared by cosine, votes weigh exp(similarity / 0.07) as in Wu et al., CVPR 2018.
        labels: [M] class indices.
        groups: [M] numbers or names of what must not judge itself.

    One pseudo-neighbour is shared among the classes, so that none is impossible; a row without any other group has
    equal probabilities.
    """
    unit = features.astype(np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    rows = np.arange(len(unit)) if asked is None else np.asarray(asked)
    count = min(NEIGHBOURS, len(unit))
    out = np.empty((len(rows), classes))
    for at in range(0, len(rows), _CHUNK):
        part = rows[at : at + _CHUNK]
        similarity = unit[part] @ unit.T
        similarity[groups[part][:, None] == groups[None, :]] = -np.inf
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
        weights = np.exp((np.take_along_axis(similarity, nearest, axis=1).astype(np.float64) - 1) / TEMPERATURE)
        votes = np.zeros((len(part), classes))
        np.add.at(votes, (np.arange(len(part))[:, None], labels[nearest]), weights)
        total = votes.sum(axis=1, keepdims=True)
        shares = np.divide(votes, total, out=np.full_like(votes, 1 / classes), where=total > 0)
        out[at : at + len(part)] = (shares * count + 1 / classes) / (count + 1)
    return out
