"""Class centres on the unit sphere, and the three ways in which they follow the images of their class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.losses.centre import class_means, unit

ALPHA = 0.5
"""Step of the rule of Center Loss (Wen et al., ECCV 2016)."""
KEPT = 0.5
"""What a centre keeps of itself when it moves to the mean of an epoch; our choice."""
UPDATES = ("rule", "means", "learnt")


class Centres(nn.Module):
    """Centres [K, d]; calling it gives them at unit length.

    rule: after each batch c_k moves by alpha * the sum of (f_i - c_k) over its images, divided by 1 + their number
    (Wen et al., ECCV 2016, equation 4). means: after each epoch to the mean of the embeddings that its images had
    in the epoch, half of the way. learnt: by the gradient of the loss. Rule and means are at unit length at all times,
    and the loss's gradient does not reach them. Which of them the published loss does is not known; the default of
    the losses with centres, `rule`, is our choice. A class without images stays where it is.
    """

    points: Tensor

    def __init__(self, start: Tensor, update: str) -> None:
        super().__init__()
        if update not in UPDATES:
            raise ValueError(f"update {update!r}: one of {', '.join(UPDATES)}")
        self.update = update
        if update == "learnt":
            self.points = nn.Parameter(start.clone())
        else:
            self.register_buffer("points", start.clone())
        self.register_buffer("sums", torch.zeros_like(start), persistent=False)
        self.register_buffer("counts", torch.zeros(len(start), device=start.device), persistent=False)

    sums: Tensor
    counts: Tensor

    def forward(self) -> Tensor:
        return unit(self.points)

    @torch.no_grad()
    def after_batch(self, embeddings: Tensor, members: Tensor) -> None:
        """What a batch of embeddings [B, d] with label sets bool [B, K] does to them."""
        found, own = embeddings.detach().float(), members.float()
        if self.update == "rule":
            counts = own.sum(dim=0)[:, None]
            step = (own.T @ found - counts * self.points) / (1 + counts)
            self.points.copy_(unit(self.points + ALPHA * step))
        elif self.update == "means":
            self.sums += own.T @ found
            self.counts += own.sum(dim=0)

    @torch.no_grad()
    def after_epoch(self) -> None:
        """What the end of an epoch does to them."""
        if self.update == "means":
            means = unit(self.sums)
            moved = unit(KEPT * self.points + (1 - KEPT) * means)
            self.points.copy_(torch.where(self.counts[:, None] > 0, moved, self.points))
            self.sums.zero_()
            self.counts.zero_()


def start_at(embeddings: Tensor, members: Tensor) -> Tensor:
    """Where centres start: at the mean of their class's embeddings [N, d], of unit length. A class without images
    starts opposite the mean of all."""
    means, present = class_means(embeddings, members)
    return unit(torch.where(present[:, None], means, -embeddings.mean(dim=0)))
