"""Which features of an image a model is about, and how they come from stored pixels: one way for training and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from training.layers import LAST, layer_features, resolved
from training.transform import Input, evaluation_view, over_views


@dataclass(frozen=True)
class Features:
    """Layers of the network, see `training.layers`, then radiomics; the default is what every network has."""

    layers: tuple[str, ...] = (LAST,)
    """None of them where the network has no say."""
    radiomic: bool = False

    @property
    def plain(self) -> bool:
        """Whether they are what the network's own classifier would get."""
        return self == PLAIN

    @property
    def tag(self) -> str:
        """What tells files of these features apart; empty for plain ones."""
        return "" if self.plain else "".join(f"-{part}" for part in (*self.layers, *(["radiomic"] * self.radiomic)))

    def as_dict(self) -> dict[str, Any]:
        return {"layers": list(self.layers), "radiomic": self.radiomic}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Features:
        return cls(tuple(map(str, values["layers"])), bool(values["radiomic"]))


PLAIN = Features()


def chosen(kind: str, layers: Sequence[str], network: nn.Module) -> Features:
    """What `--features` and `--layers` mean for a network; errors of `resolved`."""
    return Features(resolved(layers, network) if kind != "radiomic" else (), radiomic=kind != "deep")


def described(
    features: Features,
    network: nn.Module,
    wanted: Input,
    stored: tuple[int, int],
    pixels: np.ndarray,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
) -> np.ndarray:
    """Features float32 [N, D] of pixels uint8 [N, H, W, 1|3], under a timm network in evaluation mode.

    Args:
        stored: (height, width) of the model's own stored images, the size at which radiomics are measured.
    """
    parts = []
    if features.layers:
        parts.append(np.concatenate(list(deep(features, network, wanted, pixels, device, batch_size))))
    if features.radiomic:
        parts.append(radiomic(pixels, stored))
    return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def deep(
    features: Features,
    network: nn.Module,
    wanted: Input,
    pixels: np.ndarray,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
) -> Iterator[np.ndarray]:
    """The network's part of `described`, batch by batch."""
    for at in range(0, len(pixels), batch_size):
        with torch.inference_mode():
            images = evaluation_view(pixels[at : at + batch_size], wanted, device)
            found = over_views(lambda view: layer_features(network, view, features.layers), images, wanted.tta)
        yield found.float().cpu().numpy()


def radiomic(pixels: np.ndarray, stored: tuple[int, int]) -> np.ndarray:
    """The radiomics' part of `described`, of which all columns together have about the length of a layer."""
    from training.radiomics import COLUMNS, radiomics

    if pixels.shape[1:3] != stored:
        images = evaluation_view(pixels, Input(*stored, channels=1, mean=(0.0,), std=(1.0,)))
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return np.asarray(radiomics(pixels) / np.float32(np.sqrt(len(COLUMNS))))


def radiomic_columns() -> int:
    """How many of the features, the last ones, are radiomics where there are any."""
    from training.radiomics import COLUMNS

    return len(COLUMNS)
