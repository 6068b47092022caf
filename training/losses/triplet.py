"""The triplet loss on the hardest pairs of a batch: the pair-wise yardstick of the losses with centres."""

from __future__ import annotations

import torch
from torch import Tensor

from training.losses.centre import SMALLEST, squared_distances


def batch_hard_triplet(embeddings: Tensor, members: Tensor, centres: Tensor, margin: float) -> Tensor:
    """Mean over images of max(0, margin + distance of the farthest relevant - that of the nearest other image).

    Args:
        embeddings: [B, d] of unit length.
        members: label sets bool [B, K]; relevant is who shares a label.
        centres: not looked at.

    Images that have no relevant one in the batch, or no other, are left out; of a batch without any it is 0. Source:
    Hermans, Beyer & Leibe, "In Defense of the Triplet Loss for Person Re-Identification", 2017, equation 5, with a hard
    margin; 0.2 is the margin of Schroff et al. (FaceNet, CVPR 2015), there of squared distances. Sharing a label as
    relevance is our choice.
    """
    distances = squared_distances(embeddings, embeddings).clamp(min=SMALLEST).sqrt()
    own = members.float()
    shared = own @ own.T > 0
    relevant = shared & ~torch.eye(len(own), dtype=torch.bool, device=own.device)
    farthest = torch.where(relevant, distances, -torch.inf).amax(dim=1)
    nearest = torch.where(shared, torch.inf, distances).amin(dim=1)
    asked = relevant.any(dim=1) & ~shared.all(dim=1)
    if not asked.any():
        return distances.sum() * 0
    return (margin + farthest[asked] - nearest[asked]).clamp(min=0).mean()
