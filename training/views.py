"""Which random views of each image a method is shown: drawn by key, one sample at a time, and rendered together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from training import keyed
from training.transform import Augmentation, Input, training_view


@dataclass(frozen=True)
class Views:
    """A group of views of every image, all rendered for one input."""

    input: Input
    count: int = 1
    crop: tuple[float, float] | None = None
    """Least and largest share of the image's area that a view keeps; None: what the augmentation says."""
    upright: bool = False
    """Whether quarter turns are left out of the augmentation, because the method turns images itself."""
    again: bool = False
    """Whether these are the draws of the group before, rendered for another input."""

    @property
    def zoom(self) -> float:
        """Side of a typical crop as a share of the image's, where crops are small by intention."""
        return 1.0 if self.crop is None else math.sqrt(math.sqrt(self.crop[0] * self.crop[1]))

    def draw(self, augmentation: Augmentation, generator: np.random.Generator) -> np.ndarray:
        """One view's draw, as `Augmentation.draw` gives it; the crop is placed anew where its size is the group's."""
        chosen = replace(augmentation, turns=False) if self.upright else augmentation
        if self.crop is None:
            return chosen.draw(generator)
        least, most = self.crop
        draw = replace(chosen, min_crop=least / most).draw(generator)
        draw[:2] *= math.sqrt(most)
        draw[2:4] = (2 * generator.random(2) - 1) * (1 - draw[:2])
        return draw


def draw_views(
    groups: Sequence[Views], augmentation: Augmentation, noise: int, *key: object, positions: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """(draws [count * B, 8 or 17] of each group, noise [B, noise]) of the samples at `positions`, B at least 1.

    Each sample's are keyed by (key, position) alone; of a group, the first views of all samples come first. A single
    group of one view draws what `transform.sample_draws` does.
    """
    drawn: list[list[list[np.ndarray]]] = []
    extra = np.empty((len(positions), noise), dtype=np.float32)
    for at, position in enumerate(positions):
        generator = keyed.generator("sample", *key, int(position))
        sample: list[list[np.ndarray]] = []
        look = keyed.generator("look", *key, int(position)) if augmentation.looks else None
        for group in groups:
            own = sample[-1] if group.again else [group.draw(augmentation, generator) for _ in range(group.count)]
            if look is not None and not group.again:
                own = [np.concatenate([draw, augmentation.draw_look(look)]) for draw in own]
            sample.append(own)
        drawn.append(sample)
        extra[at] = generator.random(noise, dtype=np.float32)
    draws = [
        np.stack([sample[number][view] for view in range(group.count) for sample in drawn])
        for number, group in enumerate(groups)
    ]
    return draws, extra


def render(
    pixels: np.ndarray, groups: Sequence[Views], draws: Sequence[np.ndarray], device: str | torch.device = "cpu"
) -> list[Tensor]:
    """The views of each group, normalised float [count * B, C, h, w], of stored pixels uint8 [B, H, W, 1|3]."""
    return [
        torch.cat(
            [training_view(pixels, group.input, part, device, zoom=group.zoom) for part in np.split(own, group.count)]
        )
        for group, own in zip(groups, draws, strict=True)
    ]
