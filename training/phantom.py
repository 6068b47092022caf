"""`phantom:N`: generated head-like slices of patients, with lesions whose truth is known. No data is needed to begin.

In the manner of Shepp and Logan, "The Fourier reconstruction of a head section" (1974), but with an anatomy drawn per
patient, slices through it, texture, a bias field and noise. Every image is a pure function of (seed, index).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from training.keyed import generator

Plane = NDArray[np.float64]

LEAVES = ("healthy", "disease/nodule", "disease/cyst", "disease/diffuse")
SLICES = (3, 4, 5, 6)
BLOCK = sum(SLICES)
"""Images come in blocks of one patient per leaf: any two blocks have each leaf once labelled and once not."""

CONTRAST = {"disease/nodule": 0.3, "disease/cyst": 0.26, "disease/diffuse": 0.15}
RADIUS = {"disease/nodule": (0.035, 0.055), "disease/cyst": (0.04, 0.07), "disease/diffuse": (0.09, 0.14)}
"""Lesion radius as a fraction of the side."""
NOISE = 0.028


@dataclass(frozen=True)
class PhantomRow:
    """One image. `truth` is its leaf, also where `label` is empty.

    `lesion_x`, `lesion_y` (from the left and the top) and `lesion_radius` are fractions of the side, NaN if healthy.
    """

    index: int
    path: str
    label: str
    group: str
    truth: str
    lesion_x: float
    lesion_y: float
    lesion_radius: float


def rows(n: int, seed: int) -> list[PhantomRow]:
    """The first `n` images of `seed`: whole patients of 3 to 6 slices (the last may be cut), about half labelled.

    Any two blocks of 18 images hold four labelled and four unlabelled patients, one of each leaf.
    """
    return [row for patient in _patients(n, seed) for row in _rows_of(patient, n)]


def render(index: int, n: int, seed: int, size: int = 128) -> NDArray[np.uint8]:
    """Image `index` of `rows(n, seed)`: uint8 [size, size], grey. It depends on neither `n` nor any other image.

    Raises:
        IndexError: `index` is not one of `n`.
    """
    return draw(index, n, seed, size)


def draw(index: int, n: int, seed: int, size: int = 128, *, lesion: bool = True) -> NDArray[np.uint8]:
    """`render`, or with `lesion=False` the same slice, noise included, as it would be without its lesion."""
    if not 0 <= index < n:
        raise IndexError(f"image {index} of {n} phantoms")
    patient = _patient_of(index, seed)
    level = patient.levels[index - patient.first]
    anatomy = _Anatomy(patient, size, level)
    plane = anatomy.tissue()
    if lesion and patient.truth != "healthy":
        plane = _with_lesion(plane, patient, level, size)
    return _scanned(plane, seed, index, anatomy.bias)


# Who is in the images


class _Patient(NamedTuple):
    number: int
    first: int
    levels: tuple[float, ...]
    """Heights of the slices in the head, between -1 and 1."""
    labelled: bool
    truth: str
    x: float
    y: float
    radius: float
    """Lesion centre and radius where the lesion is widest, as fractions of the side."""
    sway: tuple[tuple[float, float, float], ...]
    """What each slice adds to the centre, and multiplies the radius by."""
    seed: int

    def lesion(self, level: float) -> tuple[float, float, float]:
        at = self.levels.index(level)
        dx, dy, scale = self.sway[at]
        return self.x + dx, self.y + dy, self.radius * scale


def _patients(n: int, seed: int) -> list[_Patient]:
    blocks = -(-n // BLOCK)
    return [patient for block in range(blocks) for patient in _block(block, seed) if patient.first < n]


def _patient_of(index: int, seed: int) -> _Patient:
    patients = _block(index // BLOCK, seed)
    return next(p for p in reversed(patients) if p.first <= index)


def _block(block: int, seed: int) -> list[_Patient]:
    """Four patients: one of each leaf, one of each number of slices, two labelled."""
    pair = generator("phantom pair", seed, block // 2)
    known = pair.permutation(len(LEAVES))[:2]
    rng = generator("phantom block", seed, block)
    leaves, sizes = rng.permutation(len(LEAVES)), rng.permutation(SLICES)
    first = block * BLOCK + np.cumsum(sizes) - sizes
    labelled = [bool(leaf in known) == (block % 2 == 0) for leaf in leaves]
    return [
        _patient(seed, 4 * block + at, (int(first[at]), int(sizes[at])), LEAVES[leaves[at]], labelled[at])
        for at in range(4)
    ]


def _patient(seed: int, number: int, span: tuple[int, int], truth: str, labelled: bool) -> _Patient:
    rng = generator("phantom patient", seed, number)
    first, slices = span
    gaps = rng.uniform(0.13, 0.2, slices)
    levels = np.cumsum(gaps) - gaps.sum() / 2 + rng.uniform(-0.1, 0.1)
    angle, distance, side = rng.uniform(-1.1, 1.1), rng.uniform(0.17, 0.25), rng.choice((-1, 1))
    low, high = RADIUS.get(truth, (0.0, 0.0))
    sway = np.column_stack([rng.normal(0, 0.006, (slices, 2)), rng.uniform(0.85, 1.0, slices)])
    return _Patient(
        number=number,
        first=first,
        levels=tuple(levels.tolist()),
        labelled=labelled,
        truth=truth,
        x=0.5 + side * distance * math.cos(angle),
        y=0.5 + 1.2 * distance * math.sin(angle),
        radius=rng.uniform(low, high),
        sway=tuple(tuple(row) for row in sway.tolist()),
        seed=seed,
    )


def _rows_of(patient: _Patient, n: int) -> list[PhantomRow]:
    healthy = patient.truth == "healthy"
    return [
        PhantomRow(
            patient.first + at,
            f"phantom/{patient.first + at:06d}.png",
            patient.truth if patient.labelled else "",
            f"p{patient.number:05d}",
            patient.truth,
            *((math.nan,) * 3 if healthy else patient.lesion(level)),
        )
        for at, level in enumerate(patient.levels)
        if patient.first + at < n
    ]


# What the images show. Coordinates run from -1 to 1; intensities from 0 to 1, before noise.


class _Ellipse(NamedTuple):
    """Centre, semi-axes and turn; its rim may run in `waves` of relative `depth`."""

    x: float
    y: float
    a: float
    b: float
    turn: float = 0.0
    waves: int = 0
    depth: float = 0.0


class _Anatomy:
    """One slice through a patient's head; all its structures change smoothly with the level."""

    def __init__(self, patient: _Patient, size: int, level: float) -> None:
        self.rng = generator("phantom anatomy", patient.seed, patient.number)
        self.level = level
        self.size = size
        at = (np.arange(size) + 0.5) / size * 2 - 1
        self.y, self.x = np.meshgrid(at, at, indexing="ij")
        self.bias = self._bias()
        self._bend()

    def tissue(self) -> Plane:
        """[size, size] without lesion, bias and noise."""
        rng, girth = self.rng, math.sqrt(1 - 0.6 * self.level**2)
        width, height = rng.uniform(0.66, 0.76) * girth, rng.uniform(0.82, 0.92) * girth
        skull, brain, rim = rng.uniform(0.75, 0.95), rng.uniform(0.4, 0.5), rng.uniform(0.06, 0.1)
        plane = self._blend(np.zeros_like(self.x), skull, _Ellipse(0, 0, width, height))
        plane = self._blend(plane, 0.12, _Ellipse(0, 0, width - rim, height - rim))
        plane = self._blend(
            plane, brain, _Ellipse(0, 0, width - rim - 0.04, height - rim - 0.04, waves=11, depth=0.035)
        )
        white = brain + rng.uniform(0.08, 0.14)
        plane = self._blend(plane, white, _Ellipse(0, 0, width * 0.66, height * 0.68, waves=7, depth=0.12))
        grey = rng.uniform(0.9, 1.05) * brain
        for side in (-1, 1):
            dx, dy = rng.uniform(-0.02, 0.02, 2)
            opened = max(0.2, 1 + 1.1 * self.level) * rng.uniform(0.8, 1.2)
            nucleus = _Ellipse(side * 0.2 + dx, 0.12 + dy, 0.1, 0.15 * girth, side * 0.4)
            ventricle = _Ellipse(side * 0.1, -0.1 + dy, 0.055 * opened, 0.2 * opened, side * -0.35)
            plane = self._blend(self._blend(plane, grey, nucleus), 0.16, ventricle)
        plane = self._spots(plane, width, height)
        return plane + self._texture(plane)

    def _spots(self, plane: Plane, width: float, height: float) -> Plane:
        """Vessels, perivascular spaces: what a reader must not take for a lesion. Each is in some levels only."""
        for _ in range(9):
            away, level, delta = self.rng.uniform((0.15, -0.7, 0.04), (0.8, 0.7, 0.14))
            around, turn = self.rng.uniform(0, 2 * math.pi, 2)
            radius, stretch = self.rng.uniform((0.012, 1), (0.035, 2.5))
            delta *= self.rng.choice((-1, 1)) * math.exp(-(((self.level - level) / 0.25) ** 2))
            if abs(delta) > 0.004:  # one grey level
                at = away * width * math.cos(around), away * height * math.sin(around)
                plane = plane + delta * self._inside(_Ellipse(*at, radius, radius * stretch, turn))
        return plane

    def _texture(self, plane: Plane) -> Plane:
        """Fine tissue structure; half of it runs through all levels, half belongs to this one."""
        own = generator("phantom texture", int(1e6 * (1 + self.level)), int(self.rng.integers(2**32)))
        sigma = self.size * 0.018
        fields = [gaussian_filter(r.standard_normal(plane.shape), sigma) * sigma * 3.5 for r in (self.rng, own)]
        return np.asarray(0.02 * (fields[0] + fields[1]) * (plane > 0.25))

    def _bias(self) -> Plane:
        a, b, c = self.rng.uniform(-0.12, 0.12, 3)
        return np.asarray(1 + a * self.x + b * self.y + c * self.x * self.y)

    def _bend(self) -> None:
        """Shifts, turns and warps the head."""
        rng = self.rng
        turn, (dx, dy) = rng.normal(0, 0.12), rng.uniform(-0.05, 0.05, 2)
        x, y = self.x - dx, self.y - dy
        x, y = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        for _ in range(3):
            fx, fy = rng.uniform(1, 3.5, 2)
            phase, (sx, sy) = rng.uniform(0, 2 * math.pi) + self.level, rng.normal(0, 0.018, 2)
            wave = np.sin(fx * x + fy * y + phase)
            x, y = x + sx * wave, y + sy * wave
        self.x, self.y = x, y

    def _inside(self, shape: _Ellipse) -> Plane:
        """[size, size] in 0..1: the share of each pixel that lies inside."""
        u, v = self.x - shape.x, self.y - shape.y
        cos, sin = math.cos(shape.turn), math.sin(shape.turn)
        u, v = (u * cos + v * sin) / shape.a, (v * cos - u * sin) / shape.b
        r = np.hypot(u, v)
        if shape.waves:
            phase = self.rng.uniform(0, 2 * math.pi) + 4 * self.level
            r = r * (1 + shape.depth * np.sin(shape.waves * np.arctan2(v, u) + phase))
        return _soft((1 - r) * min(shape.a, shape.b) * self.size / 2)

    def _blend(self, plane: Plane, value: float, shape: _Ellipse) -> Plane:
        return plane + self._inside(shape) * (value - plane)


def _with_lesion(plane: Plane, patient: _Patient, level: float, size: int) -> Plane:
    x, y, radius = patient.lesion(level)
    at = (np.arange(size) + 0.5) / size
    distance = np.hypot(at[None, :] - x, at[:, None] - y) / radius
    rng = generator("phantom lesion", patient.seed, patient.number)
    contrast = CONTRAST[patient.truth] * rng.uniform(0.7, 1.3)
    if patient.truth == "disease/nodule":
        change = np.exp(-1.5 * distance**2)
    elif patient.truth == "disease/cyst":
        rim = np.exp(-(((distance - 1.05) * radius * size / 1.1) ** 2))
        change = 0.7 * rim - _soft((1 - distance) * radius * size)
    else:
        sigma = size * 0.012
        change = gaussian_filter(rng.standard_normal(plane.shape), sigma) * sigma * 3.5
        change *= np.exp(-((distance / 1.1) ** 4))
    return np.asarray(plane + contrast * change)


def _soft(pixels: Plane) -> Plane:
    """A step of about one pixel, of a signed distance in pixels."""
    return np.asarray(np.clip(pixels + 0.5, 0, 1))


def _scanned(plane: Plane, seed: int, index: int, bias: Plane) -> NDArray[np.uint8]:
    """Magnitude image: bias field, gain, and Rician noise (Gudbjartsson and Patz 1995)."""
    rng = generator("phantom scan", seed, index)
    gain = rng.uniform(0.9, 1.1)
    noise = rng.normal(0, NOISE, (2, *plane.shape))
    signal = np.hypot(np.clip(plane, 0, None) * bias * gain + noise[0], noise[1])
    return np.asarray(np.rint(np.clip(signal, 0, 1) * 255), dtype=np.uint8)
