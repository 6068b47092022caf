"""Which images a model has seen, with and without their labels, and of which groups. Kept as hashes beside the model.

A hash of a picture gives nothing away; one of a group's name does to whoever can list the names that it may be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from cluster import storage
from training.dataset import UNGROUPED, Selection
from training.nearby import CARD, nearby

SEEN = "seen.safetensors"
_BYTES = 16
"""Bytes kept of each sha256: enough that no two images share them."""


def own_images(selection: Selection) -> frozenset[str]:
    """Shortened sha256 of the images of a selection."""
    return frozenset(short_digests(selection))


def short_digests(selection: Selection) -> list[str]:
    """The same, one per row in order."""
    return [digest[: 2 * _BYTES] for digest in selection.column("sha256")]


def group_digests(groups: Iterable[str]) -> dict[str, str]:
    """Shortened sha256 of the name of each group that was given one."""
    names = {group for group in groups if group and not group.startswith(UNGROUPED)}
    return {name: hashlib.sha256(name.encode()).hexdigest()[: 2 * _BYTES] for name in names}


def own_groups(selection: Selection) -> frozenset[str]:
    """Those of the groups of a selection."""
    return frozenset(group_digests(selection.column("group")).values())


def seen_by(run: str) -> frozenset[str]:
    """What the model of a RUN, or the weights file in it, has seen; nothing where `run` is neither, as `imagenet`."""
    folder = _model_of(run)
    return _digests(load_file(folder / SEEN)["sha256"]) if folder else frozenset()


def labelled_by(run: str) -> frozenset[str]:
    """Those images of `seen_by` whose labels had a part in the network's weights: a head on frozen features has none.

    A model written before this was kept counts all of its images, if a stage of its lineage was trained with labels.
    """
    folder = _model_of(run)
    if folder is None:
        return frozenset()
    tensors = load_file(folder / SEEN)
    if "labelled" in tensors:
        return _digests(tensors["sha256"][tensors["labelled"].astype(bool)])
    lineage = storage.read_json(folder / CARD).get("lineage", {}) if (folder / CARD).is_file() else {}
    return _digests(tensors["sha256"]) if _used_labels(lineage) else frozenset()


def named_by(run: str) -> frozenset[str]:
    """As `group_digests`, of the groups of `seen_by`; nothing of a model written before these were kept."""
    folder = _model_of(run)
    tensors = load_file(folder / SEEN) if folder else {}
    return _digests(tensors["groups"]) if "groups" in tensors else frozenset()


def dump(seen: Iterable[str], labelled: Iterable[str] = (), groups: Iterable[str] = ()) -> bytes:
    """The file `SEEN`, in a canonical order: all images, for each whether its label was used, and their groups."""
    with_labels = frozenset(labelled)
    digests = sorted(frozenset(seen) | with_labels)
    flags = np.asarray([digest in with_labels for digest in digests], dtype=np.uint8)
    return bytes(save({"sha256": _rows(digests), "labelled": flags, "groups": _rows(sorted(frozenset(groups)))}))


def _rows(digests: list[str]) -> np.ndarray:
    """uint8 [N, 16]"""
    rows = [np.frombuffer(bytes.fromhex(digest), dtype=np.uint8) for digest in digests]
    return np.stack(rows) if rows else np.empty((0, _BYTES), dtype=np.uint8)


def _model_of(run: str) -> Path | None:
    """The folder that holds `SEEN`, if there is one."""
    given = nearby(run)
    folders = (given / "model", given.parent if given.is_file() else given)
    return next((folder for folder in folders if (folder / SEEN).is_file()), None)


def _digests(rows: np.ndarray) -> frozenset[str]:
    return frozenset(bytes(row).hex() for row in rows)


def _used_labels(lineage: dict[str, Any]) -> bool:
    """Whether the network of a lineage, or one before it, was trained with labels."""
    before = lineage.get("initial", {}).get("lineage")
    return lineage.get("task") in {"finetune", "metric"} or (before is not None and _used_labels(before))
