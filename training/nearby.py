"""Models that lie on an object store, as files of this machine: fetched once, and known by their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from cluster import storage
from cluster.errors import UsageError

CARD = "model.json"


def nearby(run: str | Path) -> Path:
    """A RUN, a model folder or a weights file as a path of this machine; of a remote RUN, its model folder.

    Raises:
        UsageError: nothing of the kind is at a URI, or it is just being written.
    """
    if storage.is_local(run):
        return storage.local_path(run)
    uri = str(run)
    for folder in (storage.join(uri, "model"), uri):
        if CARD in storage.list_names(folder):
            return _model(folder)
    beside = storage.sibling(uri, "")
    if storage.name_of(uri).endswith(".safetensors") and storage.exists(uri):
        return _model(beside) / storage.name_of(uri) if CARD in storage.list_names(beside) else _file(uri)
    if "config.yaml" in storage.list_names(uri):
        raise UsageError(f"{run}: this run has not finished, so it has no model yet; run its command again")
    raise UsageError(f"{run}: not a RUN (no model/{CARD})")


def _model(uri: str) -> Path:
    """The model folder `uri`, by the sha256 of its card, which holds those of the other files."""
    content = storage.read_bytes(storage.join(uri, CARD))
    folder = storage.scratch(f"model {hashlib.sha256(content).hexdigest()}") / "model"
    if not (folder / CARD).is_file():
        storage.fetch(uri, folder)
        hashes = json.loads(content).get("sha256", {})
        wrong = [n for n in hashes if not (folder / n).is_file() or storage.sha256_file(folder / n) != hashes[n]]
        if wrong:
            storage.remove(folder)
            raise UsageError(f"{uri}: {wrong[0]} is missing or not the one of {CARD}; is it just being written?")
    return folder


def _file(uri: str) -> Path:
    """The single file `uri`, by its name, size and time."""
    files, path = storage.filesystem(uri)
    info = files.get_file_info(path)
    target = storage.scratch(f"{uri} {info.size} {info.mtime_ns}") / storage.name_of(uri)
    if not target.is_file():
        storage.fetch(uri, target)
    return target
