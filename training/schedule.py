"""Learning rates as pure functions of the step, and the parameter groups they act on."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def warmup_cosine(step: int, total: int, warmup: float, floor: float = 0.0) -> float:
    """Share of the peak learning rate at `step` (0 is the first) of `total`: linear rise, then half a cosine."""
    rising = warmup * total
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(1.0, total - rising)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter: not on biases, norms and tokens (He et al. 2022)."""
    return parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token", "mask_token", "reg_token"))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: with and without weight decay."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
