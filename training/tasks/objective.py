"""What a network is trained to: cross-entropy of one class per row, or of each label by itself; classes weigh alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

LARGEST_WEIGHT = 20.0
"""Largest weight of a rare label's rows against the rest, and inverse of the smallest: 1 row in 1,000 is no reason to
take steps a thousand times as long."""


@dataclass(frozen=True)
class Objective:
    """The loss of logits [B, K] against class numbers [B], or with `several` against label sets [B, K]."""

    weight: torch.Tensor
    """float32 [K]: of each class, or of the rows that have a label against those that have not."""
    several: bool
    smoothing: float = 0.0

    def __call__(self, logits: torch.Tensor, truth: np.ndarray) -> torch.Tensor:
        weight = self.weight.to(logits.device)
        targets = torch.as_tensor(truth, device=logits.device)
        if not self.several:
            return F.cross_entropy(logits.float(), targets, weight=weight, label_smoothing=self.smoothing)
        soft = targets.float() * (1 - self.smoothing) + self.smoothing / 2
        return F.binary_cross_entropy_with_logits(logits.float(), soft, pos_weight=weight)

    def plain(self) -> Objective:
        """Without smoothing: what judges."""
        return replace(self, smoothing=0.0)


def objective_for(
    truth: np.ndarray, classes: int, smoothing: float = 0.0, shares: Sequence[int] | None = None
) -> Objective:
    """The objective for class numbers [N], or for label sets bool [N, K]; `shares` as in `class_weights`."""
    several = truth.ndim == 2
    weight = label_weights(truth) if several else class_weights(truth, classes, shares)
    return Objective(weight, several, smoothing)


def class_weights(truth: np.ndarray, classes: int, shares: Sequence[int] | None = None) -> torch.Tensor:
    """Weights float32 [K] that give every class its share of the say, the same one where no `shares` [K] are given:
    N / (K n_k), or N s_k / (sum of s) n_k; 0 for a class without rows, which counts for neither sum."""
    counts = np.bincount(truth, minlength=classes).astype(np.float64)
    wanted = np.where(counts > 0, np.ones(classes) if shares is None else np.asarray(shares, dtype=np.float64), 0.0)
    weights = len(truth) * wanted / (max(1.0, wanted.sum()) * np.maximum(counts, 1))
    return torch.tensor(weights, dtype=torch.float32)


def label_weights(truth: np.ndarray) -> torch.Tensor:
    """Weights float32 [K] of the rows that have each label: those without it over those with it, within 1/20 to 20."""
    having = truth.sum(axis=0).astype(np.float64)
    ratio = (len(truth) - having) / np.maximum(having, 1)
    return torch.tensor(np.clip(ratio, 1 / LARGEST_WEIGHT, LARGEST_WEIGHT), dtype=torch.float32)
