"""Progressive features: a whole image, the part of it that a network responds to, and that part seen with attention.

Source: none to be had. The paper (Medical Physics 50:3560, 2023) says "gradually extracts combined (global + local)
features" and "attention module screens target information after initial positioning"; each part below is the closest
published one, put together by our choice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cluster.errors import UsageError
from training.encoder import seed_weights
from training.losses.centre import unit

STEPS = 3
EARLIER = 2
"""Stages before the last whose pooled maps the first step takes, too."""
SMALLEST = 0.3
"""Smallest side of a crop, as a share of the image's: less would be more blur than picture."""
REDUCTION = 16
"""Of channels inside the channel attention, as in its source."""


class Attention(nn.Module):
    """Maps [B, C, h, w] weighed by channel, then by place (CBAM: Woo et al., ECCV 2018, equations 1 to 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(8, channels // REDUCTION)
        self.channel = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.place = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, maps: Tensor) -> Tensor:
        by_channel = torch.sigmoid(self.channel(maps.mean(dim=(2, 3))) + self.channel(maps.amax(dim=(2, 3))))
        weighed = maps * by_channel[:, :, None, None]
        looks = torch.cat([weighed.mean(dim=1, keepdim=True), weighed.amax(dim=1, keepdim=True)], dim=1)
        found: Tensor = weighed * torch.sigmoid(self.place(looks))
        return found


class Progressive(nn.Module):
    """A timm network without a classifier, and an embedding of unit length after each of `steps` steps.

    1: the network's pooled features and the mean maps of the two stages before (blocks of a ViT), each of unit length
    (several stages as in PMG, Du et al., ECCV 2020). 2: also the pooled features of the crop that `boxes_of` finds,
    through the same weights (SCDA: Wei et al., TIP 2017). 3: also the mean and maximum of the crop's maps under
    attention. What is there after a step is concatenated, of unit length, and mapped to the embedding.

    Raises:
        UsageError: a crop is asked of a network without feature maps.
    """

    def __init__(self, network: nn.Module, blank: Tensor, embedding: int, steps: int) -> None:
        """`blank` [1, C, H, W] is any picture of the size that the network takes."""
        super().__init__()
        self.network = network
        self.stages = _earlier_stages(network)
        was = network.training
        with torch.inference_mode():
            parts, last = self._encode(blank, network.eval())
            maps = self._maps(last) if steps > 1 else last
        network.train(was)
        whole, pooled = sum(part.shape[1] for part in parts), parts[0].shape[1]
        self.attention = Attention(maps.shape[1]) if steps == STEPS else None
        widths = [whole, whole + pooled, whole + pooled + 2 * maps.shape[1]][:steps]
        self.embeddings = nn.ModuleList(nn.Linear(width, embedding) for width in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Embeddings [B, d] of unit length, one of each step, of images [B, C, H, W] as the network takes them."""
        return [unit(layer(x)) for layer, x in zip(self.embeddings, self.descriptors(images), strict=True)]

    def descriptors(self, images: Tensor) -> list[Tensor]:
        """What each step's embedding is made of, [B, D_t] of unit length."""
        parts, last = self._encode(images)
        found = [self._joined(parts)]
        if len(self.embeddings) > 1:
            closer, last = self._encode(cropped(images, self.boxes(last)))
            parts = [*parts, closer[0]]
            found.append(self._joined(parts))
        if self.attention is not None:
            seen = self.attention(self._maps(last))
            parts = [*parts, torch.cat([seen.mean(dim=(2, 3)), seen.amax(dim=(2, 3))], dim=1)]
            found.append(self._joined(parts))
        return found

    def boxes(self, last: Tensor) -> np.ndarray:
        """`boxes_of` the responses of the network's last output: the sum over its maps, as SCDA has it. Tokens of a
        ViT are normalised each, so theirs is the product with their mean: how much a place speaks for the whole."""
        maps = self._maps(last.detach()).float()
        response = maps.sum(dim=1) if last.ndim == 4 else (maps * maps.mean(dim=(2, 3), keepdim=True)).sum(dim=1)
        return boxes_of(response.cpu().numpy())

    def _encode(self, images: Tensor, network: Any = None) -> tuple[list[Tensor], Tensor]:
        """(pooled features and means of the earlier stages, the last output)."""
        network, between = self.network if network is None else network, []
        if self.stages:
            last, between = network.forward_intermediates(images, indices=self.stages)
        else:
            last = network.forward_features(images)
        pooled = network.forward_head(last, pre_logits=True)
        return [pooled, *(stage.mean(dim=(2, 3)) for stage in between)], last

    def _maps(self, last: Tensor) -> Tensor:
        """The last output as maps [B, C, h, w]."""
        network: Any = self.network
        if last.ndim == 4:
            return last.permute(0, 3, 1, 2) if last.shape[-1] == network.num_features != last.shape[1] else last
        if isinstance(network, VisionTransformer):
            rows, columns = network.patch_embed.grid_size
            return last[:, network.num_prefix_tokens :].transpose(1, 2).reshape(len(last), -1, rows, columns)
        raise UsageError(f"--steps: {type(network).__name__} has no feature maps to crop by; use --steps 1")

    @staticmethod
    def _joined(parts: list[Tensor]) -> Tensor:
        return unit(torch.cat([unit(part.float()) for part in parts], dim=1))

    def head(self) -> dict[str, Tensor]:
        """Weights by name of all but the network."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith("network.")}

    def load_head(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `head`; raises RuntimeError where they are another one's."""
        own = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        self.load_state_dict(own | tensors)

    def seed(self, seed: int) -> None:
        """Weights of all but the network, by the seed and their names."""
        for name, part in (("embeddings.", self.embeddings), ("attention.", self.attention)):
            if part is not None:
                seed_weights(part, seed, name)

    @torch.no_grad()
    def centre(self, descriptors: list[Tensor]) -> None:
        """The biases put the mean of descriptors [N, D_t] at 0: embeddings of images that have much in common would
        all lie on one side of the sphere. Our choice."""
        for layer, x in zip(self.embeddings, descriptors, strict=True):
            assert isinstance(layer, nn.Linear)
            layer.bias.copy_(-layer.weight @ x.mean(dim=0))


def _earlier_stages(network: nn.Module) -> list[int]:
    """Two stages before the last of a timm network, or blocks at half and three quarters of a ViT's depth; none where
    timm does not give them out."""
    if isinstance(network, VisionTransformer):
        depth = len(network.blocks)
        return sorted({depth // 2, 3 * depth // 4})
    told = vars(network).get("feature_info")
    if not told or "forward_intermediates" not in dir(network):
        return []
    count = len(told)
    return list(range(max(0, count - 1 - EARLIER), count - 1))


def boxes_of(responses: np.ndarray) -> np.ndarray:
    """Boxes float64 [B, 4] as (top, left, bottom, right) in 0..1 around what stands out of responses [B, h, w].

    The largest connected part (corners connect) of what is above the mean; the whole image where nothing is. A side of
    less than 0.3 is widened about its middle, within the image.
    """
    return np.stack([_box(response) for response in responses])


def _box(response: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(response > response.mean(), structure=np.ones((3, 3)))
    if not count:
        return np.asarray([0.0, 0.0, 1.0, 1.0])
    largest = 1 + int(np.bincount(parts.ravel())[1:].argmax())
    (rows, columns), shape = ndimage.find_objects(parts)[largest - 1], response.shape
    top, bottom = _widened(rows.start / shape[0], rows.stop / shape[0])
    left, right = _widened(columns.start / shape[1], columns.stop / shape[1])
    return np.asarray([top, left, bottom, right])


def _widened(start: float, stop: float) -> tuple[float, float]:
    if stop - start >= SMALLEST:
        return start, stop
    middle = min(max((start + stop) / 2, SMALLEST / 2), 1 - SMALLEST / 2)
    return middle - SMALLEST / 2, middle + SMALLEST / 2


def cropped(images: Tensor, boxes: np.ndarray) -> Tensor:
    """Images [B, C, H, W] of the same size that show only their box, bilinear; boxes as `boxes_of` has them."""
    top, left, bottom, right = torch.as_tensor(boxes, dtype=torch.float32, device=images.device).unbind(dim=1)
    nothing = torch.zeros_like(top)
    theta = torch.stack(
        [
            torch.stack([right - left, nothing, left + right - 1], dim=1),
            torch.stack([nothing, bottom - top, top + bottom - 1], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
