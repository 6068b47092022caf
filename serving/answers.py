"""What the endpoints say: plain values from probabilities, distances and hits. No HTTP and no Ray."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

WORDS = {
    True: "This image resembles those of the training set.",
    False: "Nothing like this was in training: do not trust the classes below.",
    None: "This model keeps no training images to compare with, so it cannot tell an image that is unlike them.",
}


def in_domain(distance: float | None, typicality: float | None, limit: float) -> dict[str, Any]:
    """Whether an image is like the training set; see `training.domain`. All unknown where the model keeps none."""
    answer = None if typicality is None else typicality >= limit
    return {
        "answer": answer,
        "typicality": typicality,
        "distance": distance,
        "limit": limit,
        "message": WORDS[answer],
    }


def ranked(classes: Sequence[str], probabilities: Sequence[float]) -> list[dict[str, Any]]:
    """The leaves with their probabilities, likeliest first."""
    pairs = sorted(zip(classes, probabilities, strict=True), key=lambda pair: -pair[1])
    return [{"label": label, "probability": float(p)} for label, p in pairs]


def tree(classes: Sequence[str], probabilities: Sequence[float], *, several: bool = False) -> dict[str, Any]:
    """The class tree, children likeliest first. A node's probability is the sum of its children's.

    With `several` labels per image it is the largest of its children's: what holds below a node holds for it, so it
    is at least as likely, and how likely both of two labels are is not known.
    """
    join = max if several else operator.add
    root: dict[str, Any] = {"label": "", "probability": 0.0, "children": []}
    for label, probability in zip(classes, probabilities, strict=True):
        node = root
        node["probability"] = join(node["probability"], float(probability))
        parts = label.split("/")
        for depth in range(1, len(parts) + 1):
            node = _child(node, "/".join(parts[:depth]))
            node["probability"] = join(node["probability"], float(probability))
    return _sorted(root)


def _child(node: dict[str, Any], label: str) -> dict[str, Any]:
    children: list[dict[str, Any]] = node["children"]
    known = next((child for child in children if child["label"] == label), None)
    if known is None:
        known = {"label": label, "probability": 0.0, "children": []}
        children.append(known)
    return known


def _sorted(node: dict[str, Any]) -> dict[str, Any]:
    children = sorted((_sorted(child) for child in node["children"]), key=lambda c: -c["probability"])
    return {"label": node["label"], "probability": node["probability"], "children": children}
