"""INDEX on disk: immutable snapshots, each with the sha256 of its files, and the pointer that names the current one.

    INDEX/CURRENT                    the name of the snapshot that counts; swapped by rename
    INDEX/snapshots/NAME/manifest.json, vectors.safetensors, rows.arrow and what the kind of index keeps

Knows no FAISS and no torch. Rows are memory-mapped, so that thumbnails of a large index stay on disk.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cluster import storage
from cluster.errors import DataError, RayographError, UsageError

FORMAT = 1
CURRENT, MANIFEST, VECTORS, ROWS = "CURRENT", "manifest.json", "vectors.safetensors", "rows.arrow"
_NAME = re.compile(r"[0-9]{6}")


@dataclass(frozen=True)
class Snapshot:
    """A snapshot whose files are those that were written: every sha256 agrees."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def model_sha256(self) -> str:
        return str(self.manifest["model"]["sha256"])

    @cached_property
    def vectors(self) -> np.ndarray:
        """float32 [N, D] of unit length."""
        return np.asarray(load_file(self.folder / VECTORS)["vectors"])

    @cached_property
    def rows(self) -> pa.Table:
        """image_id, sha256, label, group, case, thumbnail (JPEG bytes) of the N vectors."""
        return pa.ipc.open_file(pa.memory_map(str(self.folder / ROWS))).read_all()

    @cached_property
    def groups(self) -> np.ndarray:
        return np.asarray(self.rows["group"].to_pylist(), dtype=object)

    @cached_property
    def labelled(self) -> np.ndarray:
        """bool [N]"""
        return np.asarray([bool(label) for label in self.rows["label"].to_pylist()])

    def group_of(self, sha256: str) -> str | None:
        """The group of the image with these bytes; None where it is not in the index."""
        return self._groups_by_sha.get(sha256)

    @cached_property
    def _groups_by_sha(self) -> dict[str, str]:
        return dict(zip(self.rows["sha256"].to_pylist(), self.rows["group"].to_pylist(), strict=True))


def publish(index: Path, files: Iterable[Path], manifest: dict[str, Any]) -> str:
    """A new snapshot of `files` stands in INDEX and the pointer names it; returns its name.

    Files are linked where the disk can, else copied: they are never written again. Killed anywhere before the pointer
    is swapped, INDEX is what it was.
    """
    snapshots = index / "snapshots"
    snapshots.mkdir(parents=True, exist_ok=True)
    for leftover in snapshots.glob(".*.partial"):
        shutil.rmtree(leftover)
    taken = [int(p.name) for p in snapshots.iterdir() if _NAME.fullmatch(p.name)]
    name = f"{max(taken, default=0) + 1:06d}"
    partial = snapshots / f".{name}.partial"
    partial.mkdir()
    with storage.explained(index):
        for file in files:
            _link(file, partial / file.name)
    hashes = {p.name: storage.sha256_file(p) for p in sorted(partial.iterdir())}
    storage.write_json(partial / MANIFEST, {"format": FORMAT, **manifest, "sha256": hashes})
    storage.publish_folder(partial, snapshots / name)
    storage.write_text(index / CURRENT, name + "\n")
    return name


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def current(index: str | Path) -> Snapshot:
    """The snapshot that the pointer names, checked.

    Raises:
        UsageError: not an INDEX, or one of a newer format.
        DataError: a file is missing or changed.
    """
    pointer = storage.join(index, CURRENT)
    if not storage.exists(pointer):
        raise UsageError(f"{index}: not an INDEX (no {CURRENT}); make one with: rayograph index build")
    name = storage.read_bytes(pointer).decode(errors="replace").strip()
    if not _NAME.fullmatch(name):
        raise DataError(f"{pointer}: damaged; build the index again")
    place = storage.join(index, "snapshots", name)
    return read(Path(place)) if storage.is_local(place) else _fetched(place)


def _fetched(place: str) -> Snapshot:
    """The snapshot at a URI, copied to this machine once: known by the sha256 of its manifest."""
    if MANIFEST not in storage.list_names(place):
        raise DataError(f"{place}: the snapshot is missing or incomplete; build the index again")
    digest = hashlib.sha256(storage.read_bytes(storage.join(place, MANIFEST))).hexdigest()
    folder = storage.scratch(f"index {digest}") / storage.name_of(place)
    if not (folder / MANIFEST).is_file():
        storage.fetch(place, folder)
    try:
        return read(folder)
    except DataError:
        storage.remove(folder)  # else a mended index would not be fetched
        raise


def read(folder: Path) -> Snapshot:
    """One snapshot, checked; errors as `current`."""
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: the snapshot is missing or incomplete; build the index again")
    try:
        manifest = storage.read_json(folder / MANIFEST)
        hashes, version = manifest["sha256"].items(), int(manifest["format"])
    except (RayographError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / MANIFEST}: damaged; build the index again") from error
    if version > FORMAT:
        raise UsageError(f"{folder}: index format {manifest['format']} is newer than this Rayograph's; upgrade")
    for name, digest in hashes:
        file = folder / Path(name).name
        if not file.is_file() or storage.sha256_file(file) != digest:
            raise DataError(f"{file}: missing or changed since the index was built (sha256 differs); build it again")
    if not {VECTORS, ROWS} <= {name for name, _ in hashes}:
        raise DataError(f"{folder / MANIFEST}: names no vectors or rows; build the index again")
    snapshot = Snapshot(folder, manifest)
    try:
        counts = (len(snapshot.vectors), snapshot.rows.num_rows, int(manifest["vectors"]))
        _ = snapshot.model_sha256, snapshot.manifest["kind"]
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, pa.ArrowException) as error:
        raise DataError(f"{folder}: damaged ({error}); build the index again") from error
    if len(set(counts)) != 1:
        raise DataError(f"{folder}: vectors, rows and manifest disagree ({counts}); build the index again")
    return snapshot


def same_model(snapshot: Snapshot, sha256: str, model: str) -> None:
    """Raises UsageError where the vectors are another model's."""
    if snapshot.model_sha256 != sha256:
        raise UsageError(
            f"{model} is not the model of this index: it was built under {snapshot.manifest['model']['name']} "
            f"(sha256 {snapshot.model_sha256[:12]}), this one is {sha256[:12]}\n"
            "build an index under it with: rayograph index build"
        )
