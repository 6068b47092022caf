"""Losses of embeddings against class centres: N x K distances an epoch, where all pairs are N (N - 1) / 2.

The formula of CCLoss (Medical Physics 50:3560, 2023) could not be had. Both forms are readings of what its abstract
says, "parameters are updated by using the center point"; neither claims to be the published loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-12
"""Squared distances below count as this: the slope of a root at 0 is infinite."""


def squared_distances(embeddings: Tensor, others: Tensor) -> Tensor:
    """Squared Euclidean distances float32 [B, K] of [B, d] to [K, d], not below 0."""
    a, b = embeddings.float(), others.float()
    squares = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1) - 2 * a @ b.T
    return squares.clamp(min=0)


def centre_contrastive(embeddings: Tensor, members: Tensor, centres: Tensor, margin: float) -> Tensor:
    """Mean over images of d^2 to the centres of their classes and max(0, margin - d)^2 to those of the others.

    Args:
        embeddings: [B, d] of unit length.
        members: label sets bool [B, K]; an image without any label is only pushed, one with all only pulled.
        centres: [K, d] of unit length.

    Each sum is divided by its number of classes, so that one class per image and many labels weigh alike. Our reading:
    the contrastive loss (Hadsell, Chopra & LeCun, CVPR 2006) whose partner is a class centre in place of an image; its
    halves are left out. Margin 1 is our choice.
    """
    squares, own = squared_distances(embeddings, centres), members.float()
    short = (margin - squares.clamp(min=SMALLEST).sqrt()).clamp(min=0).square()
    return (_mean(squares, own) + _mean(short, 1 - own)).mean()


def centre_ranking(embeddings: Tensor, members: Tensor, centres: Tensor, margin: float) -> Tensor:
    """Mean over images of the sum over other classes k of max(0, margin + d_own^2 - d_k^2); arguments as above.

    With several labels: the mean over them. An image without a label costs nothing. The form is that of the centralized
    ranking loss (Zheng et al., IJCAI 2018), from its description; margin 0.5 and the mean over labels are our choice.
    """
    squares, own = squared_distances(embeddings, centres), members.float()
    short = (margin + squares[:, :, None] - squares[:, None, :]).clamp(min=0)  # own class, other class
    return _mean((short * (1 - own)[:, None, :]).sum(dim=2), own).mean()


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Means [B] of values [B, K] where `chosen` [B, K] is 1; 0 where it nowhere is."""
    return (values * chosen).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)


def class_means(embeddings: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """(mean embedding [K, d] of the images of each class, not of unit length; bool [K]: classes that have any)."""
    own = members.to(embeddings.dtype)
    counts = own.sum(dim=0)
    return own.T @ embeddings / counts.clamp(min=1)[:, None], counts > 0


def unit(vectors: Tensor) -> Tensor:
    """Rows divided by their length; zeros stay zeros."""
    return torch.nn.functional.normalize(vectors, dim=-1)
