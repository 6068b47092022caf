"""Whether an image resembles what a model was trained on: its distance to the nearest training images, calibrated.

Source: Sun et al., "Out-of-distribution Detection with Deep Nearest Neighbors", ICML 2022 (distances of normalised
penultimate features). Ours: the mean over the nearest few instead of the k-th, and a conformal p-value in place of
their fixed quantile, from distances measured out of fold: each image by a network that was not trained on its group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cluster.errors import UsageError
from training import keyed

REFERENCE = "reference.safetensors"
NEAREST = 5
"""Training images whose distance is averaged."""
LIMIT = 0.01
"""Typicality below which an image counts as unlike the training set: about this share of its own kind is refused."""
LARGEST = 10_000
"""Vectors kept; a larger training set is sampled."""


@dataclass(frozen=True)
class Domain:
    """Unit feature vectors [M, D] of the training set, and distances [Q] of its images measured out of fold, sorted."""

    vectors: np.ndarray
    distances: np.ndarray
    limit: ClassVar[float] = LIMIT

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Mean cosine distance [N] of features [N, D] to their nearest training images."""
        return distances_to(self.vectors, features)

    def typicality(self, distance: np.ndarray) -> np.ndarray:
        """[N] in 0..1: the share of known images that lie at least as far out, a conformal p-value."""
        farther = len(self.distances) - np.searchsorted(self.distances, distance, side="left")
        return np.asarray((farther + 1) / (len(self.distances) + 1))

    @property
    def threshold(self) -> float:
        """The distance beyond which typicality falls below `LIMIT`; infinite where too few images are known for that.

        With n known images no typicality is below 1 / (n + 1), so fewer than 100 can refuse nothing.
        """
        allowed = int(np.floor(LIMIT * (len(self.distances) + 1)))
        return float(self.distances[-allowed]) if allowed else float("inf")

    def dumps(self) -> bytes:
        return bytes(save({"vectors": self.vectors, "distances": self.distances}))


def learn(features: np.ndarray, out_of_fold: np.ndarray) -> Domain:
    """The domain of a training set with these features [N, D] and out-of-fold distances [Q]."""
    rows = sampled_rows(len(features), LARGEST)
    return Domain(_unit(features[rows]), np.sort(out_of_fold).astype(np.float32))


def load_domain(content: bytes) -> Domain:
    """The inverse of `Domain.dumps`.

    Raises:
        UsageError: it is damaged.
    """
    try:
        values = load(content)
        return Domain(values["vectors"], values["distances"])
    except (SafetensorError, KeyError) as error:
        raise UsageError(f"{REFERENCE}: damaged ({error})") from error


def distances_to(reference: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Mean cosine distance float32 [N] of features [N, D] to their `NEAREST` of reference [M, D]."""
    similar = _unit(features) @ _unit(reference).T
    count = min(NEAREST, similar.shape[1])
    nearest = np.partition(similar, similar.shape[1] - count, axis=1)[:, -count:]
    return np.asarray(1 - nearest.mean(axis=1), dtype=np.float32)


def sampled_rows(count: int, largest: int) -> np.ndarray:
    """At most `largest` of `count` row numbers, always the same ones, in order."""
    if count <= largest:
        return np.arange(count)
    return np.sort(keyed.generator("reference", count).choice(count, largest, replace=False))


def _unit(features: np.ndarray) -> np.ndarray:
    values = np.asarray(features, dtype=np.float32)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))
