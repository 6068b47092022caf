"""What the worker loop knows of a pretraining method, and what methods share about encoders."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster.errors import UsageError
from training import keyed
from training.configs import PretrainConfig
from training.encoder import Preset, seed_weights
from training.transform import Input
from training.views import Views
from training.weights import Initial


@dataclass(frozen=True)
class Material:
    """What a method is built from."""

    encoder: nn.Module
    """With its first weights; the method trains it in place."""
    input: Input
    """Of the encoder."""
    config: PretrainConfig
    preset: Preset
    teacher: Initial | None = None
    """Where the method needs one."""


@dataclass(frozen=True)
class Words:
    """How a report tells of a method."""

    task: str
    """What the encoder did, to follow `without using any label:`."""
    loss: str
    """What the loss says, as a sentence without its full stop."""
    unit: str = ""
    """What the loss is measured in, or what guessing would reach; empty where neither helps."""


class Method(nn.Module):
    """An encoder and what trains it without labels. Its whole state is in its `state_dict`, but for foreign teachers.

    In each step the loop calls `begin`, the module itself on the views of this rank's samples, and, once the optimiser
    has moved the weights, `after_step` with what all ranks observed: ranks stay equal because each does the same.
    """

    NAME: ClassVar[str]
    NEEDS_VIT: ClassVar[bool] = False
    """Whether it hands the encoder single patches, so that no convolutional network will do."""
    NEEDS_TEACHER: ClassVar[bool] = False
    """Whether it learns from the weights that `--teacher` names."""
    OPTIONS: ClassVar[frozenset[str]] = frozenset()
    """Fields of PretrainConfig that not every method reads, and this one does."""

    encoder: nn.Module
    """What is trained, a timm model."""
    noise: int = 0
    """Keyed uniform numbers that it wants with each sample."""
    frozen: tuple[str, ...] = ()
    """Child modules that no gradient trains: teachers."""
    observed: Tensor | None = None
    """After a forward pass: what `after_step` wants the mean of, [B, K], detached; None: nothing."""

    @classmethod
    def build(cls, material: Material) -> Self:
        """The method around `material.encoder`; its own weights are whatever torch gave them, until `seed`.

        Raises:
            UsageError: it cannot train this encoder, or not with these options.
        """
        raise NotImplementedError

    @staticmethod
    def words(config: PretrainConfig) -> Words:
        """How the report of a run of this config tells of the method."""
        raise NotImplementedError

    @property
    def kept(self) -> nn.Module:
        """The encoder that a run leaves."""
        return self.encoder

    def views(self, wanted: Input) -> tuple[Views, ...]:
        """The views of each sample that `forward` takes, `wanted` being the encoder's input."""
        return (Views(wanted),)

    def seed(self, seed: int) -> None:
        """All weights that are the method's own are a function of (seed, name)."""
        for name, child in self.named_children():
            if name != "encoder" and name not in self.frozen:
                seed_weights(child, seed, f"{self.seeded_as(name)}.{name}.")
        for name, parameter in self.named_parameters(recurse=False):
            prefix = f"{self.seeded_as(name)}.{name}"
            generator = torch.Generator().manual_seed(keyed.number("weights", seed, prefix) % 2**63)
            with torch.no_grad():
                parameter.normal_(0, 0.02, generator=generator)

    def seeded_as(self, name: str) -> str:
        """The method whose first weights the part called `name` has."""
        return self.NAME

    def begin(self, step: int, total: int, epoch: int) -> None:
        """Step `step` of `total`, in epoch `epoch`, comes next; all count from 0. Schedules follow from these alone."""

    def after_step(self, mean: Tensor | None) -> None:
        """What is no parameter follows the step: `mean` [K] of `observed` over the whole global batch."""

    def pictures(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor] | None:
        """(what the encoder was shown, what was made of it) [B, C, H, W], for methods that make pictures."""
        return None


def feature_width(encoder: nn.Module, wanted: Input) -> int:
    """Length of the encoder's pooled features, found by a forward pass without numbers."""
    shadow = copy.deepcopy(encoder).to("meta").eval()
    features: Tensor = shadow(torch.empty(1, wanted.channels, wanted.height, wanted.width, device="meta"))
    return int(features.shape[-1])


def pooled(encoder: nn.Module, images: Tensor) -> Tensor:
    """Pooled features [B, D] of images [B, C, h, w] of any size that the encoder can be made to take.

    A ViT's positions are interpolated to the size (Caron et al. 2021, section 3.1); see `any_size`. A single image is
    shown twice to networks with batch norm, which refuse it where their maps are one pixel.
    """
    if len(images) == 1 and encoder.training and any(isinstance(part, _BatchNorm) for part in encoder.modules()):
        return pooled(encoder, images.expand(2, -1, -1, -1))[:1]
    if not isinstance(encoder, VisionTransformer) or encoder.pos_embed is None:
        features: Tensor = encoder(images)
        return features
    patch: Any = encoder.patch_embed
    old = (int(patch.grid_size[0]), int(patch.grid_size[1]))
    new = (images.shape[2] // patch.patch_size[0], images.shape[3] // patch.patch_size[1])
    if new == old or encoder.dynamic_img_size:
        whole: Tensor = encoder(images)
        return whole
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    positions = resample_abs_pos_embed(encoder.pos_embed, list(new), list(old), num_prefix_tokens=prefix)
    called: Tensor = torch.func.functional_call(encoder, {"pos_embed": positions}, (images,))
    return called


def any_size(encoder: nn.Module, wanted: Input, method: str) -> None:
    """The encoder takes images of `wanted`'s size through `pooled`, beside those of its own.

    Raises:
        UsageError: this network cannot.
    """
    if isinstance(encoder, VisionTransformer):
        encoder.patch_embed.strict_img_size = False
    shadow = copy.deepcopy(encoder).to("meta").eval()
    try:
        pooled(shadow, torch.empty(2, wanted.channels, wanted.height, wanted.width, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"--method {method}: {type(encoder).__name__} takes images of one size only, so no small crops of "
            f"{wanted.height}x{wanted.width}; use --local-crops 0, or another --model"
        ) from error
