"""The losses of `--task metric`, by name. A loss is one file and one entry in `LOSSES`.

Each is a function of embeddings [B, d] of unit length, label sets bool [B, K], centres [K, d] and a margin. It is
computed in float32, whatever the embeddings are in. Names are those of `training.configs.MetricLoss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from training.configs import MetricLoss
from training.losses.centre import centre_contrastive, centre_ranking
from training.losses.proxy_anchor import proxy_anchor
from training.losses.triplet import batch_hard_triplet


@dataclass(frozen=True)
class Loss:
    """A loss, the margin that it has where none is given, and how it comes by its centres."""

    function: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    margin: float
    centres: str | None
    """The update of `training.losses.centres` where none is chosen; None for a loss that has no centres."""


LOSSES: dict[MetricLoss, Loss] = {
    "centre_contrastive": Loss(centre_contrastive, 1.0, "rule"),
    "centre_ranking": Loss(centre_ranking, 0.5, "rule"),
    "proxy_anchor": Loss(proxy_anchor, 0.1, "learnt"),
    "triplet": Loss(batch_hard_triplet, 0.2, None),
}
