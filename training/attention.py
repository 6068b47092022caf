"""Where a network looks: a map per image over what its answer was made of. Attention rollout for ViTs, Grad-CAM for
convolutional networks with a linear classifier, Eigen-CAM for those whose classifier has no gradient.

The maps are of one network and explain no mistake by themselves: a bright spot says where the evidence lay, not that
it was read rightly (Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer
from timm.utils.attention_extract import AttentionExtract
from torch import Tensor, nn

from training.transform import Input, evaluation_view

BATCH = 16
"""Images per pass: all attention matrices of a batch are held at once."""
WORDS = {
    "rollout": "attention rollout: from which squares of the image the network gathered what it knows, for all classes "
    "alike",
    "grad_cam": "Grad-CAM: which places spoke for the class that was said",
    "eigen_cam": "Eigen-CAM: which places the network responded to most, for all classes alike",
}
"""What the colours of each method mean."""


@dataclass(frozen=True)
class Looker:
    """A network in evaluation mode, the input it takes, and the linear layer on its pooled features that says the
    classes: its own classifier or an estimator's; None where there is none."""

    network: nn.Module
    input: Input
    head: nn.Module | None = None

    @property
    def method(self) -> str:
        """A key of `WORDS`, or "" for a network that is neither a ViT nor has feature maps."""
        if isinstance(self.network, VisionTransformer):
            return "rollout"
        wanted = self.input
        blank = torch.zeros(1, wanted.channels, wanted.height, wanted.width, device=_device(self.network))
        with torch.inference_mode():
            found: Tensor = self.network.forward_features(blank)  # type: ignore[operator]
        if found.ndim != 4 or found.shape[1] != self.network.num_features:
            return ""
        return "eigen_cam" if self.head is None else "grad_cam"

    def maps(self, pixels: np.ndarray, classes: np.ndarray | None = None) -> np.ndarray:
        """Maps float32 [N, H, W] in 0..1 of stored pixels uint8 [N, H, W, C], each stretched over the whole range.

        `classes` [N] are the class indices that Grad-CAM asks about; without them it is Eigen-CAM. The others ignore
        them. An image of which nothing speaks for the class has a map of zeros.

        Raises:
            ValueError: the network has no maps, see `method`.
        """
        method = self.method
        if not method:
            raise ValueError(f"{type(self.network).__name__}: neither a ViT nor a network with feature maps")
        if method == "grad_cam" and classes is None:
            method = "eigen_cam"
        rollout = _Rollout(self.network) if method == "rollout" else None
        parts = []
        for at in range(0, len(pixels), BATCH):
            images = evaluation_view(pixels[at : at + BATCH], self.input, _device(self.network))
            if rollout is not None:
                coarse = rollout(images)
            elif method == "grad_cam" and classes is not None and self.head is not None:
                coarse = grad_cam(self.network, self.head, images, torch.as_tensor(classes[at : at + BATCH]))
            else:
                coarse = eigen_cam(self.network, images)
            parts.append(_stretched(coarse, pixels.shape[1:3], from_zero=method == "grad_cam"))
        return np.concatenate(parts) if parts else np.zeros(pixels.shape[:3], dtype=np.float32)


def maps(network: nn.Module, wanted: Input, pixels: np.ndarray, classes: np.ndarray | None = None) -> np.ndarray:
    """`Looker.maps` of a timm network, asked through its own classifier where it has one."""
    return looker_of(network, wanted).maps(pixels, classes)


def looker_of(network: nn.Module, wanted: Input, estimator: Any = None, classes: int = 0) -> Looker:
    """The `Looker` of a timm network, from now on in evaluation mode, whose features its own classifier judges or,
    where one is given, a fitted scikit-learn `estimator` of `classes`, or a list of those of each label."""
    own: nn.Module = network.eval().get_classifier()  # type: ignore[operator]
    if estimator is not None:
        return Looker(network, wanted, linear_head(estimator, classes))
    return Looker(network, wanted, None if isinstance(own, nn.Identity) else own)


def linear_head(estimator: Any, classes: int) -> nn.Linear | None:
    """The layer [D -> classes] that says what a pipeline of standardisation and logistic regression says; None for
    any other estimator. A class that was absent in training has a constant score. A list holds such pipelines, or
    constants, of each of several labels."""
    if isinstance(estimator, list):
        return _label_head(estimator, classes)
    if not (isinstance(estimator, Pipeline) and len(estimator) == 2):
        return None
    scale, last = estimator[0], estimator[1]
    if not (isinstance(scale, StandardScaler) and isinstance(last, LogisticRegression)):
        return None
    weight, bias = last.coef_ / scale.scale_, last.intercept_ - last.coef_ @ (scale.mean_ / scale.scale_)
    if len(last.classes_) == 2:  # one row of coefficients, of the second class against the first
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    head = nn.Linear(weight.shape[1], classes)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.weight[last.classes_] = torch.as_tensor(weight, dtype=torch.float32)
        head.bias[last.classes_] = torch.as_tensor(bias, dtype=torch.float32)
    return head.requires_grad_(False)


def _label_head(estimators: list[Any], classes: int) -> nn.Linear | None:
    """Each label's own layer, stacked; None where one of them is not linear."""
    rows = [None if isinstance(one, float) else linear_head(one, 2) for one in estimators]
    linear = [row for row in rows if row is not None]
    if len(rows) != classes or not linear or len(linear) < sum(not isinstance(one, float) for one in estimators):
        return None
    head = nn.Linear(linear[0].in_features, classes)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        for at, row in enumerate(rows):
            if row is not None:  # the label against its absence
                head.weight[at], head.bias[at] = row.weight[1] - row.weight[0], row.bias[1] - row.bias[0]
    return head.requires_grad_(False)


# The three methods, each giving coarse maps [B, h, w]


def rollout_of(attentions: list[Tensor]) -> Tensor:
    """How much each token holds of each input token, [B, T, T], rows summing to 1, from the attention matrices
    [B, heads, T, T] of the blocks, first to last.

    Source: Abnar & Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, section 3: heads averaged, half of
    each block's output counted to the residual connection, blocks multiplied.
    """
    rolled = torch.eye(attentions[0].shape[-1], device=attentions[0].device).expand_as(attentions[0][:, 0])
    for attention in attentions:
        mean = attention.float().mean(dim=1)
        mixed = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        rolled = (mixed / mixed.sum(dim=-1, keepdim=True)) @ rolled
    return rolled


class _Rollout:
    """Rollout of a copy of a ViT, in which attention is computed step by step, so that its matrices can be read.

    Deviation from the source: it follows the class token alone; where the classifier reads the mean of all patch
    tokens, as in this project's ViTs, so does the map.
    """

    def __init__(self, network: nn.Module) -> None:
        copied: Any = copy.deepcopy(network)
        for block in copied.blocks:
            block.attn.fused_attn = False
        self.extract = AttentionExtract(copied, names=["blocks.*.attn.attn_drop"], method="hook")
        self.prefix, self.grid = int(copied.num_prefix_tokens), tuple(copied.patch_embed.grid_size)
        self.token = copied.global_pool == "token"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        rolled = rollout_of(list(self.extract(images).values()))
        read = rolled[:, 0] if self.token else rolled[:, self.prefix :].mean(dim=1)
        return read[:, self.prefix :].reshape(len(images), *self.grid)


class _Trunk(nn.Module):
    """The part of a timm network that ends in feature maps, as one layer that captum can watch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network.forward_features(images)  # type: ignore[operator]
        return features


def grad_cam(network: nn.Module, head: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Grad-CAM [B, h, w] of the logits of `classes` [B] over the last feature maps (Selvaraju et al., ICCV 2017,
    equations 1 and 2; by captum)."""
    trunk = _Trunk(network)
    head = head.to(images.device)

    def logits(batch: Tensor) -> Tensor:
        features: Tensor = network.forward_head(trunk(batch), pre_logits=True)  # type: ignore[operator]
        found: Tensor = head(features)
        return found

    # a loaded model's weights take no gradient, so the images must
    watched = images.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        found: Any = LayerGradCam(logits, trunk).attribute(
            watched, target=classes.to(images.device), relu_attributions=True
        )
    return torch.as_tensor(found).detach().squeeze(1)


@torch.inference_mode()
def eigen_cam(network: nn.Module, images: Tensor) -> Tensor:
    """Eigen-CAM [B, h, w]: feature maps projected on their first right singular vector (Muhammad & Yeasin, IJCNN
    2020). A singular vector has no sign; the one with the larger response is taken, and what lies against it is 0."""
    features: Tensor = network.forward_features(images)  # type: ignore[operator]
    rows = features.flatten(2).transpose(1, 2).float()
    _, _, right = torch.linalg.svd(rows, full_matrices=False)
    found: Tensor = (rows @ right[:, 0, :, None]).squeeze(-1)
    found = found * torch.sign(found.sum(dim=1, keepdim=True))
    return found.clamp(min=0).reshape(len(images), *features.shape[2:])


def _stretched(coarse: Tensor, size: tuple[int, ...], *, from_zero: bool) -> np.ndarray:
    """Maps [N, *size] in 0..1; the lowest value becomes 0 unless 0 has a meaning of its own."""
    fine = F.interpolate(coarse[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0]
    if not from_zero:
        fine = fine - fine.amin(dim=(1, 2), keepdim=True)
    top = fine.amax(dim=(1, 2), keepdim=True)
    return np.asarray(torch.where(top > 0, fine / top, 0).cpu().numpy(), dtype=np.float32)


def _device(network: nn.Module) -> torch.device:
    tensors: Iterator[Tensor] = network.parameters()
    return next(tensors).device
