"""A phantom of label sets: two findings, a spot and stripes, drawn into a noisy picture independently of each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.hostile import encoded

CLASSES = ("plain", "spot", "stripes")
SIZE = 32


def findings(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [N, 32, 32, 1], and bool [N, 3] which of `CLASSES` each has: plain is what has neither finding.

    Spots and stripes are each in a half of the pictures, at any place, of any phase, and strong or faint.
    """
    rng = np.random.default_rng(seed)
    has = rng.random((count, 2)) < 0.5
    y, x = np.mgrid[:SIZE, :SIZE]
    pictures = rng.normal(110, 18, (count, SIZE, SIZE))
    for at in range(count):
        if has[at, 0]:
            centre = rng.uniform(6, SIZE - 6, 2)
            pictures[at] += rng.uniform(70, 120) * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 18)
        if has[at, 1]:
            pictures[at] += rng.uniform(18, 35) * np.sin(x * 1.3 + rng.uniform(0, 6))
    sets = np.column_stack([~has.any(axis=1), has])
    return np.clip(pictures, 0, 255).astype(np.uint8)[..., None], sets


def labels_of(sets: np.ndarray) -> list[str]:
    return ["|".join(name for name, has in zip(CLASSES, own, strict=True) if has) for own in sets]


def write_findings(folder: Path, count: int, seed: int = 0, patient: int = 4) -> Path:
    """A folder of PNG files with an index.csv of path, label and group: `patient` pictures of each patient."""
    folder.mkdir(parents=True)
    pictures, sets = findings(count, seed)
    lines = ["path,label,group"]
    for at, (picture, label) in enumerate(zip(pictures, labels_of(sets), strict=True)):
        (folder / f"{at:04d}.png").write_bytes(encoded(picture[..., 0], "PNG"))
        lines.append(f"{at:04d}.png,{label},patient {at // patient}")
    (folder / "index.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
