"""Which timm model a run uses, built with weights that depend on (seed, name) alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cluster.errors import UsageError, nearest
from training import keyed
from training.configs import parse_size
from training.parallel_resnet import NETWORKS

OWN = frozenset(build.__name__ for build in NETWORKS)
"""Networks of this project: timm elsewhere does not know their names."""
for _build in NETWORKS:  # whoever builds a network, in whatever process, imports this module
    if not timm.is_model(_build.__name__):
        register_model(_build)


@dataclass(frozen=True)
class Preset:
    model: str
    patch: int
    size: int
    decoder_width: int
    decoder_depth: int


PRESETS = {
    "tiny": Preset("vit_tiny_patch16_224", 12, 96, 96, 2),
    "small": Preset("vit_small_patch16_224", 16, 224, 256, 4),
    "base": Preset("vit_base_patch16_224", 16, 224, 512, 8),
    "large": Preset("vit_large_patch16_224", 16, 224, 512, 8),
}


@dataclass(frozen=True)
class Architecture:
    """A timm model with its input; `build()` gives the network, `snippet()` the lines that load it elsewhere."""

    name: str
    height: int
    width: int
    channels: int
    patch: int | None = None
    """Patch side in pixels; None for convolutional networks."""

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments of `timm.create_model`. ViTs average the normalised patch tokens (He et al. 2022, fine-tuning)."""
        if self.patch is None:
            known = timm.get_pretrained_cfg(self.name)  # Swin and others are built for one size
            sized = {"img_size": (self.height, self.width)} if known and known.fixed_input_size else {}
            return {**sized, "in_chans": self.channels}
        return {
            "img_size": (self.height, self.width),
            "patch_size": self.patch,
            "in_chans": self.channels,
            "global_pool": "avg",
            "fc_norm": False,
        }

    def build(self, num_classes: int = 0, **extra: Any) -> nn.Module:
        """The network with whatever weights timm gives it; `extra` are further arguments of its constructor."""
        model: nn.Module = timm.create_model(self.name, num_classes=num_classes, **self.kwargs, **extra)
        return model

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "height": self.height,
            "width": self.width,
            "channels": self.channels,
            "patch": self.patch,
        }

    def snippet(self, weights: str, num_classes: int = 0) -> str:
        arguments = "".join(f", {k}={v!r}" for k, v in self.kwargs.items())
        own = "\nimport training.encoder  # rayograph's: tells timm the name" if self.name in OWN else ""
        return (
            f"import timm\nfrom safetensors.torch import load_file\n{own}\n"
            f'model = timm.create_model("{self.name}", num_classes={num_classes}{arguments})\n'
            f'model.load_state_dict(load_file("{weights}"))\nmodel.eval()'
        )


def is_vit(name: str) -> bool:
    """Whether a timm name is a plain ViT, by its constructor and not by its spelling."""
    with torch.device("meta"):
        return isinstance(timm.create_model(name), VisionTransformer)


def check_model(name: str) -> None:
    if not timm.is_model(name):
        raise UsageError(f"--model {name}: timm has no such model.{nearest(name, timm.list_models())}")


def choose_preset(preset: str, device: str) -> str:
    return ("tiny" if device == "cpu" else "base") if preset == "auto" else preset


def architecture_for(
    *, preset: str, model: str | None, image_size: str, channels: int, device: str = "cpu"
) -> Architecture:
    """The architecture that `--preset`, `--model` and `--image-size` mean.

    Raises:
        UsageError: unknown model, or an image size that the patch does not divide.
    """
    chosen = PRESETS[choose_preset(preset, device)]
    name = chosen.model
    patch: int | None = chosen.patch
    if model is not None:
        check_model(model)
        name = model
        patch = _native_patch(model)
    height, width = (chosen.size, chosen.size) if image_size == "auto" else parse_size(image_size)
    if patch is not None:
        check_divides(height, width, patch)
    found = Architecture(name, height, width, channels, patch)
    if model is not None:
        _check_takes(found)
    return found


def _check_takes(architecture: Architecture) -> None:
    """Raises UsageError where the network cannot be built for its input, or fails on it; nothing is computed."""
    try:
        with torch.device("meta"):
            images = torch.empty(1, architecture.channels, architecture.height, architecture.width)
            architecture.build().eval()(images)
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        known = timm.get_pretrained_cfg(architecture.name)
        advice = (
            f"--image-size {'x'.join(map(str, known.input_size[1:]))}, or another model" if known else "another model"
        )
        raise UsageError(
            f"--model {architecture.name}: takes no images of {architecture.height}x{architecture.width} with "
            f"{architecture.channels} channels ({said[:160]}); try {advice}"
        ) from error


def _native_patch(model: str) -> int | None:
    with torch.device("meta"):
        network = timm.create_model(model)
    return int(network.patch_embed.patch_size[0]) if isinstance(network, VisionTransformer) else None


def check_divides(height: int, width: int, patch: int) -> None:
    if height % patch or width % patch:
        near = "x".join(str(max(1, round(side / patch)) * patch) for side in (height, width))
        raise UsageError(f"--image-size {height}x{width}: the patch of {patch} px does not divide it; try {near}")


def seed_weights(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill every parameter and buffer of `module` by (seed, its own name), never by call order.

    Linear layers: Xavier uniform (as MAE). Convolutions: normal, fan-out. Norms: one and zero. Tokens: normal 0.02.
    ViT positions: fixed 2-D sine-cosine (He et al. 2022, appendix A.1), zero for the class token.
    """
    for name, part in module.named_modules():
        full = f"{prefix}{name}."
        if isinstance(part, VisionTransformer):
            _sincos(part)
        for key, tensor in part.named_parameters(recurse=False):
            _fill(tensor, part, key, _torch_generator(seed, full + key))
        for key, buffer in part.named_buffers(recurse=False):
            if key == "running_mean":
                buffer.zero_()
            elif key == "running_var":
                buffer.fill_(1)


def _torch_generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(keyed.number("weights", seed, name) % 2**63)


@torch.no_grad()
def _fill(tensor: nn.Parameter, owner: nn.Module, key: str, generator: torch.Generator) -> None:
    if key == "pos_embed" and isinstance(owner, VisionTransformer):
        return
    if key.endswith("bias"):  # also q_bias and v_bias
        tensor.zero_()
    elif tensor.ndim == 1 or key == "gain":  # the gain of scaled convolutions has four dimensions
        tensor.fill_(1)
    elif isinstance(owner, nn.Conv2d) and owner.kernel_size == owner.stride and owner.kernel_size != (1, 1):
        bound = math.sqrt(6 / (tensor.shape[0] + tensor[0].numel()))  # patch embedding, as a linear layer
        tensor.uniform_(-bound, bound, generator=generator)
    elif isinstance(owner, nn.Conv2d):
        fan_out = owner.out_channels * math.prod(owner.kernel_size) // owner.groups
        tensor.normal_(0, math.sqrt(2 / fan_out), generator=generator)
    elif isinstance(owner, nn.Linear):
        bound = math.sqrt(6 / (tensor.shape[0] + tensor.shape[1]))
        tensor.uniform_(-bound, bound, generator=generator)
    else:
        tensor.normal_(0, 0.02, generator=generator)


@torch.no_grad()
def _sincos(model: VisionTransformer) -> None:
    if model.pos_embed is None:
        return
    grid, dim = list(model.patch_embed.grid_size), model.embed_dim
    positions = sincos(grid, dim)
    prefix = model.pos_embed.shape[1] - positions.shape[0]
    model.pos_embed.zero_()
    model.pos_embed[0, prefix:] = positions


def sincos(grid: list[int], dim: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions [rows * columns, dim], row-major."""
    return build_sincos2d_pos_embed(grid, dim=dim, interleave_sin_cos=False).float()


def layer_of(model: nn.Module, name: str) -> int:
    """Depth of a parameter for layer-wise decay: 0 for the stem, the last for the head. By timm's own grouping."""
    from timm.models import group_parameters

    groups: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    return groups[name]
