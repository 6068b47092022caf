"""The head, the centre and the loss of self-distillation (Caron et al., ICCV 2021, section 3), as SD-MAE takes them
over, too."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.configs import PretrainConfig
from training.encoder import Preset

BOTTLENECK = 256


class ProjectionHead(nn.Module):
    """Features [..., D] to scores of prototypes [..., K]: three layers, unit length, cosine with each prototype.

    Caron et al. 2021, appendix C: weight normalisation of the last layer with its gain fixed to one, no batch norm.
    """

    def __init__(self, features: int, hidden: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, BOTTLENECK),
        )
        self.prototypes = nn.Linear(BOTTLENECK, prototypes, bias=False)
        self.still = False
        """Whether prototypes stand still: their gradient is zero, and decay of their length changes nothing."""

    def embed(self, features: Tensor) -> Tensor:
        """Unit vectors float32 [..., 256]."""
        return F.normalize(self.layers(features).float(), dim=-1)

    def score(self, embedded: Tensor) -> Tensor:
        """Scores float32 [..., K] of `embed`'s vectors, or of means of them."""
        weight = self.prototypes.weight
        if self.still:
            weight = weight.detach() + 0 * weight  # a parameter without any gradient would stop DDP
        return F.linear(embedded, F.normalize(weight, dim=-1)).float()

    def forward(self, features: Tensor) -> Tensor:
        return self.score(self.embed(features))


class Centre(nn.Module):
    """A teacher's scores to sharpened probabilities, less a running mean over global batches (section 3.1).

    Args:
        of: what the mean is taken of. `logits`: of the scores, as in the paper; `probabilities`: of what comes out, as
            in SD-MAE's code, where the centre has entries of about 1/K, and hence little effect.
    """

    mean: Tensor

    def __init__(self, prototypes: int, of: Literal["logits", "probabilities"], temperature: float) -> None:
        super().__init__()
        self.of, self.temperature = of, temperature
        self.register_buffer("mean", torch.zeros(prototypes))

    def forward(self, scores: Tensor) -> Tensor:
        return ((scores - self.mean) / self.temperature).softmax(dim=-1)

    def observed(self, scores: Tensor, probabilities: Tensor) -> Tensor:
        return (scores if self.of == "logits" else probabilities).detach()

    @torch.no_grad()
    def update(self, mean: Tensor) -> None:
        """Momentum 0.9, in both sources."""
        self.mean.mul_(0.9).add_(mean.to(self.mean.device, self.mean.dtype), alpha=0.1)


def cross_entropy(targets: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """- sum_k targets[k] log softmax(scores / temperature)[k], float32 [...]."""
    return -(targets * (scores / temperature).log_softmax(dim=-1)).sum(dim=-1)


def head_width(config: PretrainConfig, preset: Preset) -> int:
    """Hidden width of a head: 2048 as in both sources; 512 with the small images of `tiny`, our choice, where the
    paper's head would cost more than the encoder."""
    return config.head_width or (2048 if preset.size >= 224 else 512)
