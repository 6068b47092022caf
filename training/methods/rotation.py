"""Rotation (RotNet; Gidaris, Singh and Komodakis, ICLR 2018): name the quarter turn that an image was given."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import UsageError
from training.configs import PretrainConfig
from training.methods.method import Material, Method, Words, feature_width, pooled
from training.transform import Input
from training.views import Views


class Rotation(Method):
    """Encoder, a linear layer of four classes, cross-entropy.

    Against the paper, which shows all four turns of each image in one batch, each image is turned once per epoch, by a
    keyed draw: a batch of N images has N views. Means nothing where pictures have no upright (cells on a slide), and is
    easy where letterbox bars tell the turn.

    Args:
        encoder: any timm model of square images; `features` long are its pooled features.
    """

    NAME = "rotation"

    def __init__(self, encoder: nn.Module, *, features: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.noise = 1
        self.head = nn.Linear(features, 4)

    @classmethod
    def build(cls, material: Material) -> Self:
        wanted = material.input
        if wanted.height != wanted.width:
            raise UsageError(
                f"--method {cls.NAME}: a quarter turn of {wanted.height}x{wanted.width} has another shape; give a "
                f"square --image-size, such as {min(wanted.height, wanted.width)}"
            )
        return cls(material.encoder, features=feature_width(material.encoder, wanted))

    @staticmethod
    def words(config: PretrainConfig) -> Words:
        return Words(
            "each image was turned by 0, 90, 180 or 270 degrees, drawn anew every time, and it had to tell by how much",
            "The loss says how far it is from naming the turn with certainty; lower is better",
            "; guessing would give 1.386",
        )

    def views(self, wanted: Input) -> tuple[Views, ...]:
        return (Views(wanted, upright=True),)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Cross-entropy of each image, float32 [B].

        Args:
            images: normalised, [B, C, S, S].
            noise: [B, 1] in [0, 1): the turn, in quarters of the range.
        """
        turns = self.turns(noise)
        scores = self.head(pooled(self.encoder, self.turned(images, turns)))
        return F.cross_entropy(scores.float(), turns, reduction="none")

    @staticmethod
    def turns(noise: Tensor) -> Tensor:
        """Quarter turns int64 [B] in 0..3."""
        return (noise[:, 0] * 4).long().clamp(max=3)

    @staticmethod
    def turned(images: Tensor, turns: Tensor) -> Tensor:
        """Images [B, C, S, S], each turned counter-clockwise by its number of quarters."""
        every = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])
        return every[turns, torch.arange(len(images), device=images.device)]
