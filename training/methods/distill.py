"""Distillation: the encoder learns to give the features of a frozen teacher, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import UsageError
from training.configs import PretrainConfig
from training.methods.method import Material, Method, Words, feature_width, pooled
from training.transform import Input
from training.views import Views


class Frozen(nn.Module):
    """A network that is only looked at: in evaluation mode always, without gradients. Of it a `state_dict` holds the
    sha256 and the (height, width) that it is shown alone; whoever builds the module anew brings the same weights along.

    Raises:
        UsageError: on loading a state that belongs to other weights, or to another size.
    """

    sha256: Tensor
    size: Tensor

    def __init__(self, network: nn.Module, sha256: str, size: tuple[int, int]) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.register_buffer("sha256", torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.uint8))
        self.register_buffer("size", torch.tensor(size))
        self.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_put_own)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, local: object) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}network.")]:
        del state[name]


def _put_own(module: Frozen, state: dict[str, Any], prefix: str, *_: object) -> None:
    known = state.get(f"{prefix}sha256")
    if known is not None and known.tolist() != module.sha256.tolist():
        raise UsageError(
            f"--teacher: its weights (sha256 {_hex(module.sha256)}) are not those that the run began with "
            f"({_hex(known)}); bring those back, or start again with --overwrite"
        )
    size: Tensor = state.setdefault(f"{prefix}size", module.size)  # a checkpoint of before has none
    if size.tolist() != module.size.tolist():
        here, there = ("x".join(map(str, sides.tolist())) for sides in (module.size, size))
        raise UsageError(
            f"--teacher: would be shown images of {here}, the run began with {there}, which follows from the device; "
            "go on with the --device it began with, or start again with --overwrite"
        )
    own: Mapping[str, Tensor] = module.network.state_dict()
    state.update({f"{prefix}network.{name}": tensor for name, tensor in own.items()})


def _hex(sha256: Tensor) -> str:
    return bytes(sha256.tolist()).hex()[:12]


class Distill(Method):
    """The pooled features of the student, through one linear layer, match those of the teacher for the same view.

    The teacher sees the view at its own size and by its own normalisation. Its weights are neither in checkpoints nor
    in the encoder that is left.

    Args:
        encoder: any timm model, the student; `features` long are its pooled features.
        teacher: a network of pooled features.
        teacher_input, teacher_sha256: what the teacher takes, and what its weights are known by.
        matching: `cosine`: one minus the cosine of both features (AM-RADIO, Ranzinger et al., CVPR 2024, section 3.4,
            for summary features). `smooth_l1`: against the teacher's features normalised to mean 0 and variance 1, with
            beta = 2 (feature distillation, Wei et al. 2022, arXiv 2205.14141, section 3). One linear layer in place of
            AM-RADIO's two is our choice: what it cannot undo, the encoder has to learn.
    """

    NAME = "distill"
    NEEDS_TEACHER = True
    OPTIONS = frozenset({"teacher", "matching"})

    def __init__(
        self,
        encoder: nn.Module,
        teacher: nn.Module,
        *,
        features: int,
        teacher_input: Input,
        teacher_sha256: str,
        matching: Literal["cosine", "smooth_l1"],
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.teacher_input, self.matching = teacher_input, matching
        self.projection = nn.Linear(features, feature_width(teacher, teacher_input))
        self.teacher = Frozen(teacher, teacher_sha256, (teacher_input.height, teacher_input.width))
        self.frozen = ("teacher",)

    @classmethod
    def build(cls, material: Material) -> Self:
        assert material.teacher is not None
        return cls(
            material.encoder,
            material.teacher.network,
            features=feature_width(material.encoder, material.input),
            teacher_input=material.teacher.input,
            teacher_sha256=material.teacher.provenance["sha256"],
            matching=material.config.matching,
        )

    @staticmethod
    def words(config: PretrainConfig) -> Words:
        unit = "; 0 is the same direction, 1 a right angle" if config.matching == "cosine" else ""
        return Words(
            f"it learnt to describe each image as another network does, which does not change (a teacher: "
            f"{config.teacher})",
            "The loss says how far its descriptions are from the teacher's; lower is better",
            unit,
        )

    def views(self, wanted: Input) -> tuple[Views, ...]:
        return Views(wanted), Views(self.teacher_input, again=True)

    def forward(self, images: Tensor, shown: Tensor, noise: Tensor) -> Tensor:
        """Distance of each image's features, float32 [B].

        Args:
            images: for the student, [B, C, H, W].
            shown: the same views for the teacher, [B, C', H', W'].
            noise: [B, 0].
        """
        target = self.teacher(shown).float()
        features = self.projection(pooled(self.encoder, images)).float()
        if self.matching == "cosine":
            return 1 - F.cosine_similarity(features, target, dim=1)
        whitened = F.layer_norm(target, target.shape[1:])
        return F.smooth_l1_loss(features, whitened, beta=2.0, reduction="none").mean(dim=1)
