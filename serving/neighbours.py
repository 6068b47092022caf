"""What the process with FAISS does to files: build, search, measure. It imports no torch, so nothing here may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import DataError, UsageError
from serving import snapshot as snapshots
from serving.snapshot import Snapshot


def build_files(gallery: str, out: str, kind: str, queries_per_second: float) -> dict[str, Any]:
    """What an index of that kind keeps lies in `out`; returns what was measured. Runs apart."""
    from safetensors.numpy import load_file

    from serving import indexes

    vectors = load_file(Path(gallery) / snapshots.VECTORS)["vectors"]
    index, measured = indexes.choose(vectors, kind, queries_per_second)
    index.write(Path(out))
    recall = indexes.recall_at_10(index, vectors)
    return {
        "kind": index.kind,
        "vectors": len(vectors),
        "dimensions": int(vectors.shape[1]),
        "recall_at_10": recall,
        **measured,
    }


def search_snapshot(
    folder: str, queries: np.ndarray, k: int, allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(scores, rows) of a checked snapshot. Runs apart."""
    index = open_index(snapshots.read(Path(folder)))
    found: tuple[np.ndarray, np.ndarray] = index.search(queries, k, allowed)
    return found


def open_index(snapshot: Snapshot) -> Any:
    """The FAISS index of a snapshot; call it only in a process without torch.

    Raises:
        DataError: the index file does not belong to the vectors.
    """
    from serving.indexes import INDEXES

    kind = snapshot.manifest["kind"]
    if kind not in INDEXES:
        raise UsageError(f"{snapshot.folder}: an index of kind {kind!r}, which this Rayograph does not know; upgrade")
    try:
        return INDEXES[kind].read(snapshot.folder, snapshot.vectors)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{snapshot.folder}: cannot be read ({error}); build the index again") from error


def allowed_rows(snapshot: Snapshot, group: str | None, labelled: bool) -> np.ndarray | None:
    """bool [N]: the rows outside of `group` and, if asked, with a label; None where that is all of them."""
    if group is None and not labelled:
        return None
    allowed = np.ones(len(snapshot.vectors), dtype=bool)
    if group is not None:
        allowed &= snapshot.groups != group
    if labelled:
        allowed &= snapshot.labelled
    return allowed


def hits(snapshot: Snapshot, scores: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
    """id, cosine score, label and group of found rows, best first."""
    found = [(float(s), int(r)) for s, r in zip(scores, rows, strict=True) if r >= 0]
    table = snapshot.rows.take([r for _, r in found])
    columns = {name: table[name].to_pylist() for name in ("image_id", "label", "group")}
    return [
        {
            "id": columns["image_id"][at],
            "score": score,
            "label": columns["label"][at],
            "group": columns["group"][at],
        }
        for at, (score, _) in enumerate(found)
    ]


def recall_of(folder: str) -> float:
    """Recall of a snapshot's index against exact search. Runs apart."""
    from serving.indexes import recall_at_10

    snapshot = snapshots.read(Path(folder))
    return recall_at_10(open_index(snapshot), snapshot.vectors)
