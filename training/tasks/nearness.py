"""From embeddings to classes: how near each class's mean embedding is. And the file that keeps it beside the network.

The same for every loss, also for those that train centres of their own: what is judged is where the images of a class
ended up, not where they were told to go. Our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cluster.errors import UsageError
from training.losses.centre import class_means, unit
from training.probabilities import from_logits

METRIC = "metric.safetensors"
SCALE = 6.0
"""Of squared distances, 0..4 on the sphere: raw probabilities stay above what calibration counts as 0, and within
reach of its temperatures."""
FARTHEST = 1e4
"""Counts as the squared distance to a class that was absent in training: its probability is 0."""


@dataclass(frozen=True, eq=False)
class Nearness:
    """Where the classes lie: means [K, d] of unit length (zeros where a class was absent) and, for label sets, the
    squared distance [K] at which a label is as likely as not."""

    means: Tensor
    halfway: Tensor
    several: bool

    def logits(self, embeddings: Tensor) -> Tensor:
        """[N, K] of embeddings [N, d] of unit length: minus the scaled squared distance, less its halfway for sets."""
        squares = (2 - 2 * embeddings.float() @ self.means.to(embeddings.device).T).clamp(min=0)
        absent = ~self.means.to(embeddings.device).any(dim=1)
        squares = torch.where(absent, FARTHEST, squares)
        return -SCALE * (squares - self.halfway.to(embeddings.device)) if self.several else -SCALE * squares

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """float64 [N, K] of embeddings [N, d], not calibrated: a softmax, of label sets a sigmoid of each."""
        return from_logits(self.logits(torch.from_numpy(features)).numpy(), several=self.several)


def learn_nearness(embeddings: np.ndarray, truth: np.ndarray, classes: int) -> Nearness:
    """The class means of embeddings [N, d] with class numbers [N], or label sets bool [N, K].

    For sets the halfway point lies between the mean squared distance of the images that have the label and of those
    that have not: a rule without anything to fit; how steep it is is calibrated with the temperature.
    """
    several = truth.ndim == 2
    found, members = torch.from_numpy(embeddings), torch.from_numpy(members_of(truth, classes))
    means, present = class_means(found, members)
    means = unit(means * present[:, None])
    squares = (2 - 2 * found @ means.T).clamp(min=0)
    own = members.float()
    halfway = torch.zeros(classes)
    if several:
        sides = [(squares * side).sum(dim=0) / side.sum(dim=0).clamp(min=1) for side in (own, 1 - own)]
        both = own.any(dim=0) & (1 - own).any(dim=0)
        halfway = torch.where(both, (sides[0] + sides[1]) / 2, sides[0] + sides[1])
    return Nearness(means, halfway, several)


def members_of(truth: np.ndarray, classes: int) -> np.ndarray:
    """Label sets bool [N, K] of class numbers [N]; sets are returned as they are."""
    return truth.astype(bool) if truth.ndim == 2 else np.eye(classes, dtype=bool)[truth]


def dump_metric(head: dict[str, Tensor], nearness: Nearness, steps: int) -> bytes:
    """The content of `METRIC`."""
    tensors = {f"head.{name}": t for name, t in head.items()}
    tensors |= {"means": nearness.means, "halfway": nearness.halfway, "steps": torch.tensor(steps)}
    return bytes(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))


def load_metric(content: bytes, classes: int, *, several: bool) -> tuple[dict[str, Tensor], Nearness, int]:
    """(weights of the head, the classes' places, steps): the inverse of `dump_metric`.

    Raises:
        UsageError: it is damaged, or of other classes.
    """
    try:
        tensors = load(content)
        nearness = Nearness(tensors.pop("means"), tensors.pop("halfway"), several)
        steps = int(tensors.pop("steps"))
    except (SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"{METRIC}: damaged ({error})") from error
    if nearness.means.shape[0] != classes or nearness.halfway.shape != (classes,):
        raise UsageError(f"{METRIC}: holds {nearness.means.shape[0]} classes, the model has {classes}")
    return {name.removeprefix("head."): t for name, t in tensors.items()}, nearness, steps
