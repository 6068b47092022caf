"""Self-distillation with no labels (DINO; Caron et al., ICCV 2021), for ViTs and for convolutional networks."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, Self

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from training.configs import PretrainConfig
from training.methods.heads import Centre, ProjectionHead, cross_entropy, head_width
from training.methods.method import Material, Method, Words, any_size, feature_width, pooled
from training.transform import Input
from training.views import Views

GLOBAL_VIEWS = 2
TURNOVERS = 10
"""How often a run's steps could replace the teacher at its first momentum, at least: as that rises to 1, exp(-5) of the
teacher's first weights are left at the end, under 1 %."""


class DINO(Method):
    """A student sees all crops of an image, a teacher the large ones; the student predicts the teacher's answers.

    The teacher is a running mean of the student, with a momentum that rises to 1 by a cosine over the run; its answers
    are centred over the global batch and sharpened; prototypes stand still in the first epoch (section 3 and
    appendices). The teacher is what a run leaves, as in the paper's evaluation.

    Against the paper: the momentum begins lower in runs of less than 2,500 steps, at 1 - 10 / steps, because at 0.996
    such a teacher would keep much of its random first weights (our choice); 6 small crops and 4,096 prototypes by
    default, crops from --min-crop and no blur or solarisation (other photometric changes are the augmentation's),
    weight decay and the teacher's temperature do not change over the run, pooled patch tokens stand for a ViT's class
    token. Batch norm works on the crops of one size that one rank has: with other numbers of workers its losses differ
    by more than rounding, and the running statistics are those of rank 0.

    Args:
        encoder: a timm model that takes any size, or a ViT, whose positions are interpolated; `features` long are its
            pooled features.
        local: input of the small crops; None for none.
        crop: least and largest share of the area of the small crops.
    """

    NAME = "dino"
    OPTIONS = frozenset(
        {"prototypes", "head_width", "teacher_temperature", "student_temperature", "teacher_momentum", "local_crops"}
    )

    def __init__(
        self,
        encoder: nn.Module,
        *,
        features: int,
        hidden: int,
        prototypes: int,
        temperatures: tuple[float, float] = (0.04, 0.1),
        momentum: float = 0.996,
        local: Views | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.local, self.first_momentum, self.momentum = local, momentum, momentum
        if local is not None:
            any_size(encoder, local.input, self.NAME)
        self.head = ProjectionHead(features, hidden, prototypes)
        teacher_temperature, self.student_temperature = temperatures
        self.centre = Centre(prototypes, "logits", teacher_temperature)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.frozen = ("teacher", "teacher_head")

    @classmethod
    def build(cls, material: Material) -> Self:
        config, wanted = material.config, material.input
        local = None
        if config.local_crops:
            # the paper's 0.05 to 0.4 where the large crops keep 0.4 to 1
            crop = (config.min_crop / 8, config.min_crop)
            local = Views(small_input(material.encoder, wanted), config.local_crops, crop)
        return cls(
            material.encoder,
            features=feature_width(material.encoder, wanted),
            hidden=head_width(config, material.preset),
            prototypes=config.prototypes,
            temperatures=(config.teacher_temperature, config.student_temperature),
            momentum=config.teacher_momentum,
            local=local,
        )

    @staticmethod
    def words(config: PretrainConfig) -> Words:
        small = f" and {config.local_crops} small" if config.local_crops else ""
        return Words(
            f"of each image it saw two large{small} cuttings, chosen anew every time, and it had to answer to each as "
            "its own slowly moving average did to another, large one (self-distillation, DINO)",
            "The loss says how far its answers are from that average's, which learns too: it need not fall steadily",
            f"; one answer for all images would give {math.log(config.prototypes):.2f}",
        )

    @property
    def kept(self) -> nn.Module:
        return self.teacher

    def views(self, wanted: Input) -> tuple[Views, ...]:
        large = Views(wanted, GLOBAL_VIEWS)
        return (large,) if self.local is None else (large, self.local)

    def seed(self, seed: int) -> None:
        super().seed(seed)
        self.teacher.load_state_dict(self.encoder.state_dict())
        self.teacher_head.load_state_dict(self.head.state_dict())

    def begin(self, step: int, total: int, epoch: int) -> None:
        self.head.still = epoch < 1
        first = min(self.first_momentum, max(0.0, 1 - TURNOVERS / total))
        self.momentum = 1 - (1 - first) * (math.cos(math.pi * step / total) + 1) / 2

    def forward(self, *inputs: Tensor) -> Tensor:
        """Cross-entropy of each image, float32 [B], mean over all pairs of a teacher's view and another one.

        Args:
            inputs: large views [2 B, C, H, W], small views [N B, C, h, w] where there are any, noise [B, 0].
        """
        *groups, noise = inputs
        with torch.no_grad():
            scores = self.teacher_head(pooled(self.teacher, groups[0])).unflatten(0, (GLOBAL_VIEWS, len(noise)))
            targets = self.centre(scores)
        self.observed = self.centre.observed(scores, targets).mean(dim=0)
        answers = [self.head(pooled(self.encoder, group)).unflatten(0, (-1, len(noise))) for group in groups]
        students = torch.cat(answers)
        losses = [
            cross_entropy(targets[large], students[view], self.student_temperature)
            for large in range(GLOBAL_VIEWS)
            for view in range(len(students))
            if view != large
        ]
        return torch.stack(losses).mean(dim=0)

    @torch.no_grad()
    def after_step(self, mean: Tensor | None) -> None:
        assert mean is not None
        self.centre.update(mean)
        for slow, fast in ((self.teacher, self.encoder), (self.teacher_head, self.head)):
            for own, other in zip(slow.parameters(), fast.parameters(), strict=True):
                own.mul_(self.momentum).add_(other, alpha=1 - self.momentum)


def small_input(encoder: nn.Module, wanted: Input) -> Input:
    """The input of small crops: 3/7 of the large ones' sides (96 of 224 px in the paper), in whole patches of a ViT; at
    least 32 px for other networks, or what the large ones have."""
    patch: Any = encoder.patch_embed.patch_size if isinstance(encoder, VisionTransformer) else None

    def side(whole: int, step: int | None) -> int:
        if step is None:
            return max(round(whole * 3 / 7), min(32, whole))
        return max(1, round(whole * 3 / 7 / step)) * step

    rows, columns = patch if patch is not None else (None, None)
    return replace(wanted, height=side(wanted.height, rows), width=side(wanted.width, columns))
