"""Whether an image resembles what a model was trained on: how far it lies from the nearest training images, in the
model's features and in plain picture statistics, both calibrated.

Source: Sun et al., "Out-of-distribution Detection with Deep Nearest Neighbors", ICML 2022 (distances of normalised
penultimate features). Ours: the mean over the nearest few instead of the k-th; a second distance of brightness, colour
and sharpness, since features learnt for one task are blind to much that sets other pictures apart; and a conformal
p-value in place of a fixed quantile, from distances measured out of fold: each image by a network that was not trained
on its group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
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
GRID = 64
"""Lines of an image that are looked at each way."""
LARGEST = 10_000
"""Vectors kept; a larger training set is sampled."""


@dataclass(frozen=True)
class Domain:
    """What is kept of a training set of M images: unit features [M, D] and looks [M, S]; and of its Q images measured
    out of fold, the distances to the others' features [Q] and looks [Q]."""

    vectors: np.ndarray
    looks: np.ndarray
    distances: np.ndarray
    look_distances: np.ndarray
    limit: ClassVar[float] = LIMIT

    def judge(self, features: np.ndarray, looks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(typicality [N], feature distance [N]) of images by features [N, D] and looks [N, S].

        Typicality, in 0..1, is the share of known images that are at least as odd: a conformal p-value of the odder of
        the two distances. With Q known images it is never below 1 / (Q + 1), so fewer than 100 can refuse nothing.
        """
        distance = distances_to(self.vectors, features)
        return self.judge_distances(distance, look_distances_to(self.looks, looks)), distance

    def judge_distances(self, distance: np.ndarray, look_distance: np.ndarray) -> np.ndarray:
        """Typicality [N] of images at these distances [N]."""
        rank = np.searchsorted(self._known, self._oddness(distance, look_distance), side="right")
        return np.asarray((rank + 1) / (len(self._known) + 1))

    def _oddness(self, distance: np.ndarray, look_distance: np.ndarray) -> np.ndarray:
        """The smaller share, over both distances, of known images that lie at least as far out: small is odd."""
        shares = [
            1 - np.searchsorted(known, found, side="left") / len(known)
            for known, found in ((self._sorted[0], distance), (self._sorted[1], look_distance))
        ]
        return np.asarray(np.minimum(*shares))

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        return np.sort(self.distances), np.sort(self.look_distances)

    @cached_property
    def _known(self) -> np.ndarray:
        """Oddness of the known images themselves, sorted."""
        return np.sort(self._oddness(self.distances, self.look_distances))

    def dumps(self) -> bytes:
        names = ("vectors", "looks", "distances", "look_distances")
        return bytes(save({n: np.ascontiguousarray(getattr(self, n), dtype=np.float32) for n in names}))


def learn(features: np.ndarray, looks: np.ndarray, distances: np.ndarray, look_distances: np.ndarray) -> Domain:
    """The domain of a training set of these features [M, D] and looks [M, S], and its out-of-fold distances [Q]."""
    rows = sampled_rows(len(features), LARGEST)
    return Domain(
        _unit(features[rows]),
        looks[rows].astype(np.float32),
        *(d.astype(np.float32) for d in (distances, look_distances)),
    )


def load_domain(content: bytes) -> Domain:
    """The inverse of `Domain.dumps`.

    Raises:
        UsageError: it is damaged.
    """
    try:
        return Domain(**load(content))
    except (SafetensorError, TypeError) as error:
        raise UsageError(f"{REFERENCE}: damaged ({error})") from error


def look_of(pixels: np.ndarray) -> np.ndarray:
    """Looks float32 [N, S] of stored pixels uint8 [N, H, W, C], in 0..1: per channel five quantiles, standard deviation
    and mean slope along both axes, and the mean saturation; of a grid of about `GRID` lines where there are more."""
    return np.stack([_look(image) for image in pixels])


def _look(image: np.ndarray) -> np.ndarray:
    """By histograms, integers and a grid: a served request pays for this."""
    step = max(1, min(image.shape[:2]) // GRID)
    grid = np.ascontiguousarray(image[::step, ::step].transpose(2, 0, 1))
    count, levels = grid[0].size, np.arange(256)
    histograms = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in grid])
    sums = histograms.cumsum(axis=1)
    quantiles = [(sums >= q * count).argmax(axis=1) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
    mean, square = histograms @ levels / count, histograms @ levels**2 / count
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    slopes = [_slope(image[:, ::step], 0), _slope(image[::step], 1)]
    saturation = (grid.max(axis=0) - grid.min(axis=0)).mean(dtype=np.float64)
    return np.concatenate([*quantiles, spread, *slopes, [saturation]]).astype(np.float32) / 255


def _slope(image: np.ndarray, axis: int) -> np.ndarray:
    """Mean difference [C] of neighbours along an axis."""
    lines = np.ascontiguousarray(image.transpose(2, 0, 1))
    a, b = (lines[:, 1:], lines[:, :-1]) if axis == 0 else (lines[:, :, 1:], lines[:, :, :-1])
    return np.asarray((np.maximum(a, b) - np.minimum(a, b)).reshape(len(lines), -1).mean(axis=1, dtype=np.float64))


def distances_to(reference: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Mean cosine distance float32 [N] of features [N, D] to their `NEAREST` of reference [M, D]."""
    return _nearest(1 - _unit(features) @ _unit(reference).T)


def look_distances_to(reference: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """Mean Euclidean distance float32 [N] of looks [N, S] to their `NEAREST` of reference [M, S], each statistic in
    units of its spread over the reference."""
    centre, spread = reference.mean(axis=0), reference.std(axis=0) + 1e-3
    a, b = (np.asarray((x - centre) / spread, dtype=np.float64) for x in (looks, reference))
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return _nearest(np.sqrt(np.maximum(squares, 0)))


def sampled_rows(count: int, largest: int) -> np.ndarray:
    """At most `largest` of `count` row numbers, always the same ones, in order."""
    if count <= largest:
        return np.arange(count)
    return np.sort(keyed.generator("reference", count).choice(count, largest, replace=False))


def _nearest(distances: np.ndarray) -> np.ndarray:
    """Mean [N] of the `NEAREST` smallest of distances [N, M]; of all where there are fewer."""
    count = min(NEAREST, distances.shape[1])
    return np.asarray(np.partition(distances, count - 1, axis=1)[:, :count].mean(axis=1), dtype=np.float32)


def _unit(features: np.ndarray) -> np.ndarray:
    values = np.asarray(features, dtype=np.float32)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))
