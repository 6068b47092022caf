"""Masked autoencoder with self-distillation: SD-MAE (Luo et al., arXiv 2203.16983), by its own words also the method of
SSSD-COVID (paper 4). Formulas from SD-MAE's public code; SSSD-COVID's own text was not had.

Differences from that code, so that p = 0 is our masked autoencoder: targets are normalised over a patch's channels
together, not channel by channel; positions are two-dimensional; there is a class token.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from training.configs import PretrainConfig
from training.encoder import seed_weights
from training.methods.heads import Centre, ProjectionHead, cross_entropy, head_width
from training.methods.mae import MAE
from training.methods.method import Material, Words

PARTS = ("student_head", "teacher_head", "centre")
"""What is not a masked autoencoder's."""


class SSSD(MAE):
    """The encoder's output on visible patches (student) learns the decoder's on the same patches (teacher).

    L = p L_SD + (1 - p) L_rec. With p = 0 nothing but a masked autoencoder is there, bit for bit. L_SD of an image is
    the cross-entropy of both means over its visible patches, each through a head of its own; the class token has no
    part in it. With `distilled="tokens"` (our choice, closest to the paper's words) it is one minus the cosine of each
    visible patch's tokens, the student's through a linear layer.

    With `teacher_stop_grad` (not in SD-MAE's code, whose loss also falls where the teacher merely sharpens) neither the
    decoder nor the teacher's head gets a gradient from L_SD; the head, which nothing else would train, stays a fixed
    random projection.

    Args:
        encoder, decoder_width, decoder_depth, mask_ratio, norm_pix: of the masked autoencoder.
        share: p, in [0, 1); 0.2 in the code.
        hidden, prototypes, temperatures (teacher's, student's): of heads as DINO's.
        centring: see `Centre`; `probabilities` in the code.
    """

    NAME = "sssd"
    OPTIONS = MAE.OPTIONS | {
        "distillation",
        "distilled",
        "teacher_stop_grad",
        "centring",
        "prototypes",
        "head_width",
        "teacher_temperature",
        "student_temperature",
    }

    def __init__(
        self,
        encoder: nn.Module,
        *,
        share: float = 0.2,
        distilled: Literal["image", "tokens"] = "image",
        stop_grad: bool = True,
        hidden: int = 2048,
        prototypes: int = 4096,
        temperatures: tuple[float, float] = (0.04, 0.1),
        centring: Literal["probabilities", "logits"] = "probabilities",
        **masked: Any,
    ) -> None:
        super().__init__(encoder, **masked)
        self.share, self.distilled, self.stop_grad = share, distilled, stop_grad
        if not share:
            return
        width, decoder_width = int(self.encoder.embed_dim), self.decoder_embed.out_features
        if distilled == "tokens":
            self.student_head: nn.Module = nn.Linear(width, decoder_width)
            return
        teacher_temperature, self.student_temperature = temperatures
        self.student_head = ProjectionHead(width, hidden, prototypes)
        self.teacher_head = ProjectionHead(decoder_width, hidden, prototypes)
        self.centre = Centre(prototypes, centring, teacher_temperature)
        if stop_grad:
            self.teacher_head.requires_grad_(False)
            self.frozen = ("teacher_head",)

    @classmethod
    def options(cls, material: Material) -> dict[str, Any]:
        config = material.config
        return super().options(material) | {
            "share": config.distillation,
            "distilled": config.distilled,
            "stop_grad": config.teacher_stop_grad,
            "hidden": head_width(config, material.preset),
            "prototypes": config.prototypes,
            "temperatures": (config.teacher_temperature, config.student_temperature),
            "centring": config.centring,
        }

    @staticmethod
    def words(config: PretrainConfig) -> Words:
        masked = MAE.words(config)
        return Words(
            f"{masked.task}; beside that, what it made of the squares it saw had to agree with what the part that "
            "fills in the rest made of them (self-distillation)",
            f"The loss is {1 - config.distillation:.0%} how far the filled-in squares are from the true ones, and "
            f"{config.distillation:.0%} how far both parts disagree, which need not fall to 0",
        )

    def seed(self, seed: int) -> None:
        super().seed(seed)
        if self.frozen:
            seed_weights(self.teacher_head, seed, f"{self.NAME}.teacher_head.")

    def seeded_as(self, name: str) -> str:
        return self.NAME if name in PARTS else MAE.NAME

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Loss of each image, float32 [B]; arguments as `MAE.forward`."""
        if not self.share:
            return super().forward(images, noise)
        pixels = self.patchify(images)
        order = noise.argsort(dim=1)
        tokens = self.encode(pixels, order[:, : self.visible])
        decoded = self.decoded(tokens, order)
        reconstruction = self.reconstruction_loss(pixels, self.predict(decoded), order)
        prefix = self.encoder.num_prefix_tokens
        student = tokens[:, prefix:]
        teacher = self.decoder_norm(decoded[:, prefix : prefix + self.visible])
        return self.share * self.distillation_loss(student, teacher) + (1 - self.share) * reconstruction

    def distillation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """L_SD of each image, float32 [B], of the tokens [B, V, D] and [B, V, D'] of its visible patches."""
        if self.stop_grad:
            teacher = teacher.detach()
        if self.distilled == "tokens":
            return (1 - F.cosine_similarity(self.student_head(student).float(), teacher.float(), dim=-1)).mean(dim=1)
        scores = self.mean_score(self.teacher_head, teacher)
        targets = self.centre(scores)
        self.observed = self.centre.observed(scores, targets)
        return cross_entropy(targets, self.mean_score(self.student_head, student), self.student_temperature)

    @staticmethod
    def mean_score(head: Any, tokens: Tensor) -> Tensor:
        """Mean over tokens of a head's scores [B, K]; its last layer is linear, so it is spent on the mean alone."""
        scores: Tensor = head.score(head.embed(tokens).mean(dim=1))
        return scores

    def after_step(self, mean: Tensor | None) -> None:
        if mean is not None:
            self.centre.update(mean)
