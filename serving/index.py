"""The verb `index`: build, search, check. FAISS runs apart from torch, see `serving.apart` and
`serving.neighbours`."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.errors import DataError, UsageError
from cluster.progress import say
from serving import snapshot as snapshots
from serving.apart import apart
from serving.configs import IndexBuildConfig, IndexCheckConfig, IndexSearchConfig
from serving.neighbours import allowed_rows, build_files, hits, recall_of, search_snapshot
from serving.snapshot import Snapshot
from training.artifact import load_model, located_model, read_card, run_name
from training.images import UnreadableImage, decode, to_channels

SCRATCH = ".build-"
Gallery = Callable[..., tuple[Path, dict[str, Any]]]
"""`training.gallery.gallery`: handed in, because serving knows a model but not how datasets are read."""


def build(config: IndexBuildConfig, *, gallery: Gallery) -> dict[str, Any]:
    """The INDEX at `config.out` holds the dataset's images under the model; returns its summary.

    Raises:
        UsageError: no such model or data, or no image is left.
    """
    _, hashes = read_card(config.model)
    digest = hashes["model.safetensors"]
    with config.open_out("index-build") as out:
        if out.state == "done":
            return _same(config, out.summary(), digest)
        started = time.monotonic()
        folder, facts = gallery(
            config.model,
            config.data,
            out=config.out,
            where=config.where,
            labelled=config.labelled,
            device=config.device,
            log=out.log,
        )
        for leftover in out.path.glob(f"{SCRATCH}*"):  # of a build that was killed
            storage.remove(leftover)
        manifest = {
            "model": {
                "name": run_name(config.model),
                "path": located_model(config.model),
                "sha256": digest,
            },
            **facts,
        }
        with tempfile.TemporaryDirectory(dir=out.path, prefix=SCRATCH) as scratch, apart() as other:
            measured = other.call(build_files, str(folder), scratch, config.kind, config.queries_per_second)
            made = sorted(p for p in Path(scratch).iterdir() if p.is_file())
            files = [folder / snapshots.VECTORS, folder / snapshots.ROWS, *made]
            size = sum(p.stat().st_size for p in files if p.name != snapshots.ROWS)
            measured["bytes_per_vector"] = size / measured["vectors"]
            name = snapshots.publish(out.path, files, manifest | measured)
        summary = measured | {"snapshot": name, "model_sha256": digest, "build_seconds": time.monotonic() - started}
        out.finish(summary)
        say(
            f"done: {summary['vectors']:,} vectors, {summary['kind']}, recall of the ten nearest "
            f"{summary['recall_at_10']:.3f}, {summary['search_ms']:.2f} ms a search: {config.out}"
        )
        return summary


def _same(config: IndexBuildConfig, summary: dict[str, Any], digest: str) -> dict[str, Any]:
    if summary["model_sha256"] != digest:
        raise UsageError(
            f"--out {config.out}: was built under what {config.model} held before; use --overwrite or another --out"
        )
    return summary


def search(config: IndexSearchConfig) -> dict[str, Any]:
    """The nearest images of the INDEX are printed; returns them as `/v1/search` would, without pictures.

    Raises:
        UsageError: the image cannot be read, the model is another one, or the query's group is not known.
    """
    snapshot = snapshots.current(config.index)
    run = config.model or str(snapshot.manifest["model"].get("path", ""))
    if not run or not storage.exists(run):
        raise UsageError(f"{config.index}: its model is no longer at {run or 'a known place'}; give it with --model")
    model = load_model(run)
    snapshots.same_model(snapshot, model.sha256, run)
    content = storage.read_bytes(config.image)
    try:
        pixels = to_channels(decode(content, model.card.image_path), model.card.input.channels)
    except UnreadableImage as error:
        raise UsageError(f"{config.image}: {error.reason}") from error
    group = _group(config, snapshot, content) if config.not_same_group else None
    allowed = allowed_rows(snapshot, group, config.labelled)
    with apart() as other:
        scores, rows = other.call(search_snapshot, str(snapshot.folder), model.embed(pixels[None]), config.k, allowed)
    found = hits(snapshot, scores[0], rows[0])
    _show(found, as_json=config.json)
    return {"hits": found}


def check(config: IndexCheckConfig) -> dict[str, Any]:
    """The INDEX is whole: hashes, counts and recall are those of its build.

    Raises:
        DataError: a file is missing or changed, or recall fell short.
    """
    snapshot = snapshots.current(config.index)
    with apart() as other:
        recall = other.call(recall_of, str(snapshot.folder))
    if recall < config.min_recall:
        raise DataError(
            f"{config.index}: recall of the ten nearest is {recall:.3f}, below {config.min_recall}; "
            "build it again with --kind flat"
        )
    found = {"snapshot": snapshot.name, "vectors": len(snapshot.vectors), "recall_at_10": recall}
    files = len(snapshot.manifest["sha256"])
    print(
        f"{config.index}: whole. Snapshot {snapshot.name}, {found['vectors']:,} vectors, "
        f"{snapshot.manifest['kind']}, {files} files with the right sha256, recall of the ten nearest {recall:.3f}"
    )
    return found


def _group(config: IndexSearchConfig, snapshot: Snapshot, content: bytes) -> str:
    if config.group:
        return config.group
    group = snapshot.group_of(hashlib.sha256(content).hexdigest())
    if group is None:
        raise UsageError(f"{config.image}: not an image of this index, so its group is not known; give it with --group")
    return group


def _show(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"hits": found}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "score", "label", "group", box=None, pad_edge=False)
    for hit in found:
        table.add_row(hit["id"], f"{hit['score']:.4f}", hit["label"] or "–", hit["group"])
    Console(soft_wrap=True, markup=False, highlight=False).print(table)
