"""Which images a model has seen, and the refusal to judge it on them. Kept as hashes beside the model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from safetensors.numpy import load_file, save

from training.dataset import Selection
from training.nearby import nearby

SEEN = "seen.safetensors"
_BYTES = 16
"""Bytes kept of each image's sha256: enough that no two images share them."""


def own_images(selection: Selection) -> frozenset[str]:
    """Shortened sha256 of the images of a selection."""
    return frozenset(digests(selection))


def digests(selection: Selection) -> list[str]:
    """Shortened sha256 of each row of a selection, as `own_images` and `seen_by` hold them."""
    return [digest[: 2 * _BYTES] for digest in selection.column("sha256")]


def seen_by(run: str) -> frozenset[str]:
    """What the model of a RUN, or the weights file in it, has seen; nothing where `run` is neither, as `imagenet`."""
    given = nearby(run)
    for folder in (given / "model", given.parent if given.is_file() else given):
        if (folder / SEEN).is_file():
            return frozenset(bytes(row).hex() for row in load_file(folder / SEEN)["sha256"])
    return frozenset()


def dump(seen: Iterable[str]) -> bytes:
    """The file `SEEN`, in a canonical order."""
    rows = [np.frombuffer(bytes.fromhex(digest), dtype=np.uint8) for digest in sorted(seen)]
    return bytes(save({"sha256": np.stack(rows) if rows else np.empty((0, _BYTES), dtype=np.uint8)}))
