"""How many planted copies `training.copies` finds, and what it takes for a copy that is none.

`python -m tests.benchmarks.copies [NAME …]`: each kind of change is made to images of each real set (looked for as
`make results` does), encoded, and decoded and compared by the code of ingest. Prints Markdown: the share of planted
copies that are put together with their original / shown as alike, the pairs called copies that are none, the groups of
each set before and after, and the seconds that many images take.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks.results import DATA
from training import copies
from training.images import ImagePath, content, decode_bytes, grey64

PATH = ImagePath(128, 128)
PLANTED = 150
"""Images of each set to which every change is made."""
SETS = ("retina", "cervix", "chest_ct")

Picture = Image.Image
Change = Callable[[Picture, int], bytes]


def png(picture: Picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def jpeg(picture: Picture, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def resized(picture: Picture, factor: float) -> Picture:
    size = max(8, round(picture.width * factor)), max(8, round(picture.height * factor))
    return picture.resize(size, Image.Resampling.LANCZOS)


def turned(picture: Picture, number: int) -> Picture:
    """One of the seven quarter turns and mirrored forms, by `number`."""
    return picture.transpose(list(Image.Transpose)[number % 7])


def toned(picture: Picture, gain: float = 1.0, offset: float = 0.0, gamma: float = 1.0) -> Picture:
    """255 (gain (v / 255)^gamma) + offset, clipped."""
    table = 255 * gain * (np.arange(256) / 255) ** gamma + offset
    table = np.clip(np.rint(table), 0, 255).astype(int).tolist()
    return picture.point(table * len(picture.getbands()))


def tilted(picture: Picture, degrees: float) -> Picture:
    return picture.rotate(degrees, Image.Resampling.BICUBIC)


def cropped(picture: Picture, share: float) -> Picture:
    """Without `share` of each side at each of its ends."""
    x, y = picture.width * share, picture.height * share
    return picture.crop((round(x), round(y), round(picture.width - x), round(picture.height - y)))


KINDS: dict[str, Change] = {
    "JPEG, quality 95": lambda p, n: jpeg(p, 95),
    "JPEG, quality 75": lambda p, n: jpeg(p, 75),
    "JPEG, quality 60": lambda p, n: jpeg(p, 60),
    "resized to 50 %": lambda p, n: png(resized(p, 0.5)),
    "resized to 75 %, JPEG 75": lambda p, n: jpeg(resized(p, 0.75), 75),
    "resized to 150 %, JPEG 75": lambda p, n: jpeg(resized(p, 1.5), 75),
    "turned or mirrored": lambda p, n: png(turned(p, n)),
    "turned or mirrored, JPEG 75": lambda p, n: jpeg(turned(p, n), 75),
    "contrast x 0.8": lambda p, n: png(toned(p, gain=0.8)),
    "brighter, x 1.25, clipped": lambda p, n: png(toned(p, gain=1.25)),
    "brighter, + 25, clipped": lambda p, n: png(toned(p, offset=25)),
    "darker, - 25, clipped": lambda p, n: png(toned(p, offset=-25)),
    "gamma 0.7": lambda p, n: png(toned(p, gamma=0.7)),
    "gamma 1.4": lambda p, n: png(toned(p, gamma=1.4)),
    "turned, x 1.2, gamma 0.8, 75 %, JPEG 75": lambda p, n: jpeg(
        resized(toned(turned(p, n), gain=1.2, gamma=0.8), 0.75), 75
    ),
    "tilted by 0.5 degrees": lambda p, n: png(tilted(p, 0.5)),
    "tilted by 1 degree": lambda p, n: png(tilted(p, 1)),
    "tilted by 2 degrees": lambda p, n: png(tilted(p, 2)),
    "tilted by 5 degrees": lambda p, n: png(tilted(p, 5)),
    "1 % cut off each side": lambda p, n: png(cropped(p, 0.01)),
    "3 % cut off each side": lambda p, n: png(cropped(p, 0.03)),
}


def thumbnail(data: bytes) -> np.ndarray:
    """uint8 [4096]: what ingest compares."""
    decoded = decode_bytes(data, PATH)
    return grey64(content(decoded.pixels, decoded.source_height, decoded.source_width, PATH)).ravel()


@dataclass(frozen=True, eq=False)
class RealSet:
    """A real set without byte-identical copies: thumbnails [N, 4096], given groups (own ones where none) and files."""

    thumbnails: np.ndarray
    groups: list[str]
    files: list[Path]


def read_set(folder: Path) -> RealSet:
    index, first, groups = folder / "index.csv", dict[bytes, Path](), []
    with index.open(newline="", encoding="utf-8") as file:
        for at, row in enumerate(csv.DictReader(file)):
            path = index.parent / row["path"]
            data = path.read_bytes()
            if data not in first:
                first[data] = path
                groups.append(row["group"] or f"image:{at}")
    return RealSet(np.stack([thumbnail(data) for data in first]), groups, list(first.values()))


def chosen(real: RealSet) -> np.ndarray:
    """The rows that are changed: evenly spread, at most PLANTED."""
    return np.linspace(0, len(real.files) - 1, min(PLANTED, len(real.files))).astype(int)


def planted(real: RealSet, rows: np.ndarray, change: Change) -> np.ndarray:
    """Thumbnails [P, 4096] of changed copies of `rows`."""
    return np.stack([thumbnail(change(_picture(real.files[row]), at)) for at, row in enumerate(rows)])


def _picture(path: Path) -> Picture:
    with Image.open(path) as picture:
        return picture.convert("L" if picture.mode in {"1", "L", "I;16"} else "RGB")


def judged(real: RealSet, rows: np.ndarray, changed: np.ndarray, own: set[tuple[int, int]]) -> tuple[float, float, int]:
    """(share put together, share at least shown, false pairs) of thumbnails that were changed from `rows`.

    `own` are the pairs of the set itself: copies among those are not the planted ones' fault.
    """
    near = copies.near_copies(np.concatenate([real.thumbnails, changed]))
    first = len(real.thumbnails)
    wanted = {(int(row), first + at) for at, row in enumerate(rows)}
    every = {(int(i), int(j)) for i, j in near.rows}
    together = {(int(i), int(j)) for i, j in near.rows[near.copies]}
    origin = {first + at: int(row) for at, row in enumerate(rows)}
    plain = {tuple(sorted((origin.get(i, i), origin.get(j, j)))) for i, j in together - wanted}
    false = plain - own
    return len(together & wanted) / len(wanted), len(every & wanted) / len(wanted), len(false)


def seconds_for(count: int, real: RealSet) -> float:
    """How long the search takes among `count` images made from the set's by noise and shifts."""
    rng = np.random.default_rng(0)
    images = real.thumbnails[rng.integers(len(real.thumbnails), size=count)].reshape(-1, copies.SIDE, copies.SIDE)
    shifts = rng.integers(-6, 7, size=(count, 2))
    moved = np.stack([np.roll(image, shift, (0, 1)) for image, shift in zip(images, shifts.tolist(), strict=True)])
    began = time.perf_counter()
    copies.near_copies(moved.reshape(count, -1))
    return time.perf_counter() - began


def main() -> int:
    if not DATA.is_dir():
        print(f"{DATA}: no such folder; set RAYOGRAPH_DATA to the folder of the real images", file=sys.stderr)
        return 2
    sets = {name: read_set(DATA / name) for name in [a for a in sys.argv[1:] if a in SETS] or SETS}
    own, notes = {}, []
    for name, real in sets.items():
        near = copies.near_copies(real.thumbnails)
        own[name] = {(int(i), int(j)) for i, j in near.rows[near.copies]}
        merged = copies.merge_groups(real.groups, near.rows[near.copies])
        notes.append(
            f"{name}: {len(real.groups):,} images, {len(own[name])} near copies of its own, "
            f"{len(set(real.groups)):,} groups before and {len(set(merged)):,} after; "
            f"{len(near) - len(own[name]):,} pairs alike."
        )
    print("| change | " + " | ".join(sets) + " | false pairs |\n|---" + "|---" * (len(sets) + 1) + "|")
    for kind, change in KINDS.items():
        cells, false = [], 0
        for name, real in sets.items():
            rows = chosen(real)
            together, shown, wrong = judged(real, rows, planted(real, rows, change), own[name])
            cells.append(f"{together:.0%} / {shown:.0%}")
            false += wrong
        print(f"| {kind} | " + " | ".join(cells) + f" | {false} |", flush=True)
    print("\n" + "\n".join(notes))
    for name, real in sets.items():
        print(f"10,000 images like those of {name}: {seconds_for(10_000, real):.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
