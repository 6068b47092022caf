"""Proxy-Anchor (Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SHARPNESS = 32.0
"""The source's alpha."""


def proxy_anchor(embeddings: Tensor, members: Tensor, centres: Tensor, margin: float) -> Tensor:
    """1/|P+| sum over classes with images of log(1 + sum e^(-a (s - margin))) over their images
    + 1/|P| sum over all classes of log(1 + sum e^(a (s + margin))) over the others, s the cosine, a = 32.

    Args:
        embeddings: [B, d].
        members: label sets bool [B, K].
        centres: the proxies [K, d], learnt.

    The source's margin is 0.1. Ready for several labels as it is: each class sorts the images by itself.
    """
    cosine = F.normalize(embeddings.float()) @ F.normalize(centres.float()).T
    absent = torch.full_like(cosine, -torch.inf)
    pulled = torch.where(members, -SHARPNESS * (cosine - margin), absent)
    pushed = torch.where(members, absent, SHARPNESS * (cosine + margin))
    present = members.any(dim=0)
    pull = _log_one_plus_sum(pulled)[present].sum() / present.sum().clamp(min=1)
    return pull + _log_one_plus_sum(pushed).mean()


def _log_one_plus_sum(exponents: Tensor) -> Tensor:
    """log(1 + sum of e^x) of each column."""
    return torch.logsumexp(F.pad(exponents, (0, 0, 0, 1)), dim=0)
