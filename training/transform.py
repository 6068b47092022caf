"""From stored pixels to what a network takes: the second half of the image path, the same in training's evaluation,
prediction, indexing and serving; and the random views of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training import keyed
from training.images import to_channels

TTA = Literal["none", "flip", "turns"]
"""Test-time augmentation: no other view, the mirrored one too, or also each of them turned by quarter turns."""
VIEWS: dict[TTA, int] = {"none": 1, "flip": 2, "turns": 8}
"""How many views each has, those of `over_views`."""
VIEWS_CODE: dict[TTA, str] = {
    "none": "",
    "flip": "# features are the mean over x and x.flip(3)",
    "turns": "# features are the mean over torch.rot90(y, k, (2, 3)) for k in range(4), of y = x and y = x.flip(3)",
}
"""For those who load the network elsewhere."""


def _tta(name: str) -> TTA:
    if name not in VIEWS:
        raise ValueError(f"tta {name!r}")
    return name


@dataclass(frozen=True)
class Input:
    """What a network takes: size, channels and normalisation (of values in 0..1)."""

    height: int
    width: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tta: TTA = "none"
    """In which views of an image, see `over_views`, features are taken and averaged."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "height": self.height,
            "width": self.width,
            "channels": self.channels,
            "mean": list(self.mean),
            "std": list(self.std),
            **({} if self.tta == "none" else {"tta": self.tta}),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Input:
        return cls(
            int(values["height"]),
            int(values["width"]),
            int(values["channels"]),
            tuple(map(float, values["mean"])),
            tuple(map(float, values["std"])),
            _tta(values.get("tta", "none")),
        )

    @property
    def told(self) -> str:
        """A sentence on the views, for reports; empty where there is one."""
        if self.tta == "none":
            return ""
        how = {"flip": "as it is and mirrored", "turns": "as it is, mirrored, and both in all quarter turns"}
        return f"Features are the mean over {VIEWS[self.tta]} views of an image: {how[self.tta]}."

    def normalise(self, images: Tensor) -> Tensor:
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images - mean) / std

    def restore(self, images: Tensor) -> np.ndarray:
        """uint8 [B, H, W, C] for looking at; the inverse of `normalise`, clipped."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        values = ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        return np.asarray(values.permute(0, 2, 3, 1).cpu().numpy())


def to_tensor(pixels: np.ndarray, channels: int, device: str | torch.device = "cpu") -> Tensor:
    """Stored pixels uint8 [B, H, W, 1|3] -> float [B, channels, H, W] in 0..1; a fresh tensor, never an alias."""
    if channels == 1:
        pixels = to_channels(pixels, 1)  # on integers, as where a file is decoded for this network: equal tensors
    plain = np.require(pixels, requirements=["C", "W"])
    images = torch.as_tensor(plain).to(device).permute(0, 3, 1, 2).float().div_(255)
    return images if images.shape[1] == channels else images.expand(-1, 3, -1, -1)


def evaluation_view(pixels: np.ndarray, wanted: Input, device: str | torch.device = "cpu") -> Tensor:
    """The evaluation transform: stored pixels uint8 [B, H, W, 1|3] -> normalised float [B, C, h, w]."""
    images = _resize(to_tensor(pixels, wanted.channels, device), wanted.height, wanted.width)
    return wanted.normalise(images)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    resized = F.interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp_(0, 1)


def over_views(look: Callable[[Tensor], Tensor], images: Tensor, tta: TTA) -> Tensor:
    """The mean of `look` over the views of images [B, C, h, w]: as they are; and mirrored left to right (flip); and all
    that also turned by 90, 180 and 270 degrees (turns), eight in all, for which h must be w."""
    mirrored = (images, images.flip(3)) if tta != "none" else (images,)
    views = [torch.rot90(one, turn, (2, 3)) for one in mirrored for turn in range(4 if tta == "turns" else 1)]
    if len(views) == 1:
        return look(images)
    return torch.stack([look(view).float() for view in views]).mean(dim=0)


VIEW, LOOK = 8, 9
"""Numbers of `Augmentation.draw` and of `Augmentation.draw_look`."""
TILE = 256
"""Side of the noise that is laid over images, each at a place of its own."""


@dataclass(frozen=True)
class Augmentation:
    """Random views: a crop of at least `min_crop` of the area, mirroring, quarter turns, brightness and contrast; and
    what `training.augment` knows to be safe for a kind of image. Strengths are the largest change; 0 is none."""

    min_crop: float
    flip: bool = True
    turns: bool = False
    jitter: float = 0.0
    aspect: float = 4 / 3
    """Largest ratio by which a crop is stretched."""
    tilt: float = 0.0
    """Degrees."""
    gamma: float = 0.0
    """Of the logarithm of the exponent of all channels: 0.2 is v ** 0.82 to v ** 1.22."""
    stain: float = 0.0
    """The same for each channel by itself. By Beer and Lambert a channel's exponent scales the density of what absorbs
    it, and clear glass stays white."""
    saturation: float = 0.0
    blur: float = 0.0
    """Share of a mean over 3x3 pixels; as much sharpening."""
    noise: float = 0.0
    """Standard deviation, of values in 0..1."""

    @property
    def looks(self) -> bool:
        """Whether samples need `draw_look` too."""
        return any((self.tilt, self.gamma, self.stain, self.saturation, self.blur, self.noise))

    def draw_look(self, generator: np.random.Generator) -> np.ndarray:
        """One sample's tilt, exponents of three channels, saturation, blur, noise and the noise's place, float64 [9]:
        always the same numbers, whatever is switched on."""
        u = generator.random(LOOK + 1)
        even = 2 * u - 1
        exponents = np.exp(self.gamma * even[1] + self.stain * even[2:5])
        rest = [
            1 + self.saturation * even[5],
            self.blur * even[6],
            self.noise * u[7],
            int(u[8] * TILE),
            int(u[9] * TILE),
        ]
        return np.array([math.radians(self.tilt) * even[0], *exponents, *rest])

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """One sample's draw, float64 [8]: always the same numbers, whatever is switched on."""
        u = generator.random(VIEW)
        area = self.min_crop + (1 - self.min_crop) * u[0]
        aspect = math.exp((2 * u[1] - 1) * math.log(self.aspect))
        height, width = min(1.0, math.sqrt(area / aspect)), min(1.0, math.sqrt(area * aspect))
        if 1.0 in (height, width):  # a side was cut short: the other one keeps the promise
            height, width = max(height, self.min_crop), max(width, self.min_crop)
        flip = -1.0 if self.flip and u[4] < 0.5 else 1.0
        turn = float(int(u[5] * 4)) if self.turns else 0.0
        gain, shift = 1 + self.jitter * (2 * u[6] - 1), self.jitter * (2 * u[7] - 1)
        # centre of the crop in the [-1, 1] coordinates of affine_grid
        return np.array(
            [height, width, (2 * u[2] - 1) * (1 - height), (2 * u[3] - 1) * (1 - width), flip, turn, gain, shift]
        )


def training_view(
    pixels: np.ndarray, wanted: Input, draws: np.ndarray, device: str | torch.device = "cpu", *, zoom: float = 1.0
) -> Tensor:
    """Random views by `draws` [B, 8], or [B, 17] with looks: stored pixels uint8 [B, H, W, 1|3] -> normalised float
    [B, C, h, w].

    One bilinear sampling does crop, mirror, turn and tilt; where the stored size is far above the network's, an
    antialiased reduction comes first, to no less than a crop whose side is a share `zoom` of the image's needs. What no
    sample of the batch has is not computed.
    """
    images = to_tensor(pixels, wanted.channels, device)
    limit = 1.5 / zoom
    if images.shape[2] > limit * wanted.height or images.shape[3] > limit * wanted.width:
        images = _resize(images, math.ceil(limit * wanted.height), math.ceil(limit * wanted.width))
    plain = torch.as_tensor(draws[:, :VIEW], dtype=torch.float32, device=images.device)
    height, width, y, x, flip, turn, gain, shift = plain.unbind(dim=1)
    cos, sin = torch.cos(turn * math.pi / 2), torch.sin(turn * math.pi / 2)
    theta = torch.stack(
        [
            torch.stack([width * flip * cos, -width * sin, x], dim=1),
            torch.stack([height * flip * sin, height * cos, y], dim=1),
        ],
        dim=1,
    )
    looks = draws[:, VIEW:]
    if looks.any():
        theta[:, :, :2] = _tilts(looks[:, 0], images) @ theta[:, :, :2]
    grid = F.affine_grid(theta, [len(images), images.shape[1], wanted.height, wanted.width], align_corners=False)
    views = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if looks.any():
        views = _looked(views, looks)
    if (gain != 1).any() or (shift != 0).any():
        mean = views.mean(dim=(1, 2, 3), keepdim=True)
        views = ((views - mean) * gain.view(-1, 1, 1, 1) + mean + 0.5 * shift.view(-1, 1, 1, 1)).clamp_(0, 1)
    return wanted.normalise(views)


def _tilts(angles: np.ndarray, images: Tensor) -> Tensor:
    """Rotations [B, 2, 2] in the coordinates of affine_grid that are rotations in pixels, whatever the shape."""
    cos, sin = np.cos(angles), np.sin(angles)
    height, width = images.shape[2:]
    rotations = np.stack([cos, -sin * height / width, sin * width / height, cos], axis=1).reshape(-1, 2, 2)
    return torch.as_tensor(rotations, dtype=torch.float32, device=images.device)


def _looked(views: Tensor, looks: np.ndarray) -> Tensor:
    """Views [B, C, h, w] in 0..1 with the looks [B, 9] of `Augmentation.draw_look`, but for the tilt."""
    _, *exponents, saturation, blur, noise, row, column = torch.as_tensor(
        looks, dtype=torch.float32, device=views.device
    ).unbind(dim=1)
    channels = views.shape[1]
    if looks[:, 5].any():
        near = F.avg_pool2d(views, 3, stride=1, padding=1, count_include_pad=False)
        views = torch.lerp(views, near, blur.view(-1, 1, 1, 1)).clamp_(0, 1)
    if (looks[:, 1:4] != 1).any():
        views = views.pow(torch.stack(exponents[:channels], dim=1).view(-1, channels, 1, 1))
    if channels == 3 and (looks[:, 4] != 1).any():
        luma = views.mean(dim=1, keepdim=True)
        views = torch.lerp(luma, views, saturation.view(-1, 1, 1, 1)).clamp_(0, 1)
    if looks[:, 6].any():
        high, wide = (torch.arange(side, device=views.device) for side in views.shape[2:])
        rows, columns = (row[:, None] + high).long() % TILE, (column[:, None] + wide).long() % TILE
        grain = _grain().to(views.device)[rows[:, :, None], columns[:, None, :]]
        views = (views + noise.view(-1, 1, 1, 1) * grain[:, None]).clamp_(0, 1)
    return views


@cache
def _grain() -> Tensor:
    """Gaussian noise [TILE, TILE], the same on every device: drawing it for each image would cost more than a step."""
    return torch.from_numpy(keyed.generator("grain").standard_normal((TILE, TILE), dtype=np.float32))


def sample_draws(
    augmentation: Augmentation, noise: int, *key: object, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(view draws [B, 8], or [B, 17] where the augmentation has looks, noise [B, noise]) of the samples at `positions`,
    each keyed by (key, position) alone. Looks have a stream of their own: they move no other number."""
    draws = np.empty((len(positions), VIEW + LOOK if augmentation.looks else VIEW))
    extra = np.empty((len(positions), noise), dtype=np.float32)
    for at, position in enumerate(positions):
        generator = keyed.generator("sample", *key, int(position))
        draws[at, :VIEW] = augmentation.draw(generator)
        extra[at] = generator.random(noise, dtype=np.float32)
        if augmentation.looks:
            draws[at, VIEW:] = augmentation.draw_look(keyed.generator("look", *key, int(position)))
    return draws, extra
