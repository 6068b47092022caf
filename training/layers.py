"""Features of a network from chosen depths: its stages or blocks, each pooled, beside what its classifier would get."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from cluster.errors import UsageError

LAST, ALL = "last", "all"
"""The pooled features that a classifier would get; and those with every stage or block before."""


def pooled(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Pooled features [B, D] of a timm network."""
    tokens = network.forward_features(images)  # type: ignore[operator]
    features: torch.Tensor = network.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
    return features


def resolved(names: Sequence[str], network: nn.Module) -> tuple[str, ...]:
    """The layers of a timm network that `--layers` names, from the input on: "1" to "N", then "last".

    Numbers count the stages of a convolutional network and the blocks of a ViT, as timm does; -1 is the last of them.

    Raises:
        UsageError: the network has no such layer, or does not show those it has.
    """
    if tuple(names) == (LAST,):
        return (LAST,)
    depth = _depth(network)
    numbers = {number for name in names if name not in {LAST, ALL} for number in [int(name)]}
    strange = sorted(number for number in numbers if not 1 <= abs(number) <= depth)
    if strange:
        raise UsageError(f"--layers {strange[0]}: this network has layers 1 to {depth}, and last")
    chosen = set(range(1, depth + 1)) if ALL in names else {n if n > 0 else depth + 1 + n for n in numbers}
    end = (LAST,) if {LAST, ALL} & set(names) else ()
    return (*map(str, sorted(chosen)), *end)


def _depth(network: nn.Module) -> int:
    if not callable(getattr(network, "forward_intermediates", None)):
        raise UsageError(f"--layers: timm shows no layers of {type(network).__name__} but last; leave --layers out")
    return len(network.feature_info)  # type: ignore[arg-type]


def layer_features(network: nn.Module, images: torch.Tensor, layers: Sequence[str]) -> torch.Tensor:
    """Features [B, D] of a timm network: its `resolved` layers side by side.

    "last" alone is as `pooled`. Of several, or of others, each is the mean over all positions (of a ViT: patches),
    divided by its length. Source: Huynh, Li & Giger (J Med Imaging 3(3), 2016) compare layers; pooling and
    normalisation are our choice.
    """
    if tuple(layers) == (LAST,):
        return pooled(network, images)
    chosen = [int(name) - 1 for name in layers if name != LAST]
    end, maps = network.forward_intermediates(images, indices=chosen)  # type: ignore[operator]
    parts = [one.mean(dim=(2, 3)) for one in maps]
    if LAST in layers:
        parts.append(network.forward_head(end, pre_logits=True))  # type: ignore[operator]
    return torch.cat([F.normalize(part.float(), dim=1) for part in parts], dim=1)
