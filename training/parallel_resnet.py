"""`parallel_resnet`: a convolutional network of parallel branches, residual by projection, with dense links, as timm
would have it.

Source: Alzubaidi et al., Cancers 13:1590, 2021, and its predecessors (Electronics 9:445 and Appl Sci 10:4523, 2020),
of which only the parts are public: traditional convolutions, then parallel ones, concatenation, residual links, batch
norm, dropout, fully connected layers. All sizes here are our choice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import Tensor, nn

KERNELS = (1, 3, 5, 7)
"""Sides of the parallel convolutions."""


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and, but for projections, ReLU; the size is kept, or halved and rounded up."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True) if relu else nn.Identity()


class ParallelBlock(nn.Module):
    """[B, inputs, H, W] -> [B, outputs, H, W]: ReLU(concatenated branches of 1, 3, 5 and 7 px + projected input)."""

    def __init__(self, inputs: int, outputs: int, drop_path: float = 0.0) -> None:
        super().__init__()
        share = outputs // len(KERNELS)
        self.branches = nn.ModuleList(ConvNorm(inputs, share, kernel) for kernel in KERNELS)
        self.project = ConvNorm(inputs, outputs, 1, relu=False)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        parallel = torch.cat([branch(images) for branch in self.branches], dim=1)
        return F.relu(self.drop_path(parallel) + self.project(images))


class ParallelResNet(nn.Module):
    """Stem of 3 and 5 px, blocks of parallel convolutions with pooling between them, two hidden layers, a classifier.

    A block sees what the block before it made and, by the dense link, what that one's predecessor made. Images may
    have any size. `forward_features` gives maps [B, num_features, h, w]; `forward_head(..., pre_logits=True)` gives
    [B, head_hidden_size], after both hidden layers: a new task replaces the last layer alone, as in the paper.

    Our choices beside the sizes: batch norm in the projection; max-pooling; and dropout only while there is a
    classifier to train, so that the pretraining of an encoder has no randomness but its method's.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        stem: tuple[int, int] = (32, 64),
        widths: tuple[int, ...] = (64, 128, 192, 256),
        hidden: tuple[int, int] = (512, 128),
    ) -> None:
        """widths: channels of each block, multiples of 4. hidden: widths of the layers before the classifier."""
        super().__init__()
        if global_pool != "avg":
            raise ValueError(f"global_pool {global_pool!r}: this network averages ('avg')")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features, self.head_hidden_size = widths[-1], hidden[-1]
        self.stem = nn.Sequential(ConvNorm(in_chans, stem[0], 3), ConvNorm(stem[0], stem[1], 5, stride=2))
        entering, previous, blocks = stem[1], stem[1], []
        for number, width in enumerate(widths):
            blocks.append(ParallelBlock(entering, width, drop_path_rate * number / max(1, len(widths) - 1)))
            entering, previous = width + previous, width
        self.blocks = nn.ModuleList(blocks)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.hidden = nn.ModuleList([nn.Linear(widths[-1], hidden[0]), nn.Linear(hidden[0], hidden[1])])
        self.classifier = self._classifier(num_classes)
        made = [(stem[1], 2, "stem"), *((width, 2 ** (at + 1), f"blocks.{at}") for at, width in enumerate(widths))]
        self.feature_info = [{"num_chs": c, "reduction": r, "module": name} for c, r, name in made]

    def _classifier(self, classes: int) -> nn.Module:
        return nn.Linear(self.head_hidden_size, classes) if classes > 0 else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm counts layers, for layer-wise decay."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^hidden", (99999,))]}

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes, self.classifier = num_classes, self._classifier(num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        before: Tensor = self.stem(images)
        made: Tensor = self.blocks[0](before)
        for block in self.blocks[1:]:
            before, made = self.pool(before), self.pool(made)
            before, made = made, block(torch.cat([made, before], dim=1))
        return made

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        features = maps.mean(dim=(2, 3))
        for layer in self.hidden:
            features = F.relu(layer(features))
            features = F.dropout(features, self.drop_rate, training=self.training and self.num_classes > 0)
        if pre_logits:
            return features
        logits: Tensor = self.classifier(features)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def parallel_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The widths of `ParallelResNet`: 3.3 million parameters."""
    return _built("parallel_resnet", pretrained, kwargs)


def parallel_resnet_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A quarter of the widths, and of hidden layers about that: 0.2 million parameters, for a CPU."""
    small = {"stem": (8, 16), "widths": (16, 32, 48, 64), "hidden": (128, 64)}
    return _built("parallel_resnet_tiny", pretrained, small | kwargs)


NETWORKS = (parallel_resnet, parallel_resnet_tiny)
"""timm's entry points, registered in `training.encoder`; their names are the networks'."""

default_cfgs = generate_default_cfgs(
    {
        build.__name__: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (14, 14),
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stem.0.conv",
            "classifier": "classifier",
        }
        for build in NETWORKS
    }
)
"""What timm asks a module of models for; there are no weights to download."""


def _built(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    maps = {"feature_cls": "hook", "no_rewrite": True}
    network: nn.Module = build_model_with_cfg(ParallelResNet, name, pretrained, feature_cfg=maps, **kwargs)
    return network
