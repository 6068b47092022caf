"""`ingest`: SOURCE to DATASET. Ray Data reads and decodes, a row at a time; every row is accounted for."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import DataError, UsageError
from cluster.mirror import CONFIG
from cluster.outdir import OutDir
from cluster.progress import progress, say
from cluster.session import cores, session
from training import copies
from training.configs import IngestConfig, parse_size
from training.dataset import FORMAT, ROW_GROUP, Dataset, is_dataset, own_group
from training.device import accelerator
from training.images import ImagePath, UnreadableImage, content, decode_array, decode_bytes, grey64
from training.ingest_report import Found, Ingested, pair_table, pictures_of, write_copies, write_ingest_report
from training.sources import Listing, Reader, list_source

SHARDS = "shards"
PART_ROWS = 512
"""Rows per reading task, and at most per shard file."""

SHARD_SCHEMA = pa.schema([("image_id", pa.string()), ("pixels", pa.binary()), ("channels", pa.int8())])
RESULT_SCHEMA = pa.schema(
    [
        ("at", pa.int64()),
        ("sha256", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("channels", pa.int8()),
        ("grey", pa.binary()),
        ("sums", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True)
class Decoded:
    """One row after reading: its pixels, or the reason why it has none."""

    sha256: str
    reason: str
    pixels: np.ndarray | None = None
    height: int = 0
    width: int = 0


def read_row(reader: Reader, key: bytes, frame: int, path: ImagePath) -> Decoded:
    """Read and decode one row; whatever is wrong with it becomes its reason, never an exception."""
    try:
        raw = reader.read(key, frame)
    except FileNotFoundError:
        return Decoded("", "no such file")
    except IsADirectoryError:
        return Decoded("", "a folder, not a file")
    except OSError as error:
        return Decoded("", f"cannot be read: {error.strerror or type(error).__name__}")
    digest = hashlib.sha256(raw if isinstance(raw, bytes) else np.ascontiguousarray(raw).tobytes()).hexdigest()
    try:
        decoded = decode_bytes(raw, path) if isinstance(raw, bytes) else decode_array(raw, path)
    except UnreadableImage as error:
        return Decoded(digest, error.reason)
    return Decoded(digest, "", decoded.pixels, decoded.source_height, decoded.source_width)


@dataclass(frozen=True)
class PartWriter:
    """The Ray Data task: decodes a block of rows, writes one shard, returns what the manifest needs."""

    reader: Reader
    path: ImagePath
    folder: str
    """Where the shards go: any node writes its own there."""

    def __call__(self, block: pa.Table) -> pa.Table:
        first = block["at"][0].as_py()
        shard = f"part-{first // PART_ROWS:06d}.parquet"
        results: list[dict[str, Any]] = []
        kept: list[dict[str, Any]] = []
        for at, image_id, key, frame in zip(
            *(block[n].to_pylist() for n in ("at", "image_id", "key", "frame")), strict=True
        ):
            decoded = read_row(self.reader, key, frame, self.path)
            results.append(self._result(at, decoded, shard, len(kept)))
            if decoded.pixels is not None:
                channels = decoded.pixels.shape[2]
                kept.append({"image_id": image_id, "pixels": decoded.pixels.tobytes(), "channels": channels})
        if kept:
            file = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(kept, SHARD_SCHEMA), file, row_group_size=ROW_GROUP, compression="zstd")
            storage.write_bytes(storage.join(self.folder, shard), file.getvalue())
        return pa.Table.from_pylist(results, RESULT_SCHEMA)

    def _result(self, at: int, decoded: Decoded, shard: str, row: int) -> dict[str, Any]:
        result: dict[str, Any] = {"at": at, "sha256": decoded.sha256, "status": "ok", "reason": ""}
        if decoded.pixels is None:
            return {**result, "status": "quarantined", "reason": decoded.reason, "shard": "", "row": -1}
        picture = content(decoded.pixels, decoded.height, decoded.width, self.path)
        values = decoded.pixels.reshape(-1, decoded.pixels.shape[2]).astype(np.float64) / 255
        return {
            **result,
            "shard": shard,
            "row": row,
            "height": decoded.height,
            "width": decoded.width,
            "channels": decoded.pixels.shape[2],
            "grey": grey64(picture).tobytes(),
            "sums": [*values.mean(axis=0), *(values**2).mean(axis=0)],
        }


def ingest(config: IngestConfig) -> dict[str, Any]:
    """SOURCE has become a DATASET at `config.out`; returns its summary.

    Raises:
        UsageError: the source is none, or a flag cannot be right.
        DataError: more is unreadable, or welded into one group by copies, than was allowed.
    """
    size = ("256" if accelerator() else "128") if config.image_size == "auto" else config.image_size
    height, width = parse_size(size)
    path = ImagePath(height, width, config.fit, config.window, config.max_pixels)
    listing = list_source(config.source, seed=config.seed, size=max(height, width))
    with config.open_out("ingest", lazy=[SHARDS]) as out:
        if out.state == "done":
            return out.summary()
        started = time.monotonic()
        with session(cpus=cores() + 1, log=out.log):
            results = read_all(listing, path, storage.join(out.uri, SHARDS))
        seconds = time.monotonic() - started
        summary = _write(config, path, listing, results, out)
        summary |= {"seconds": seconds, "images_per_second": len(listing.rows) / seconds}
        out.finish(summary)
        _tell(config, summary, listing)
        return summary


def read_all(listing: Listing, path: ImagePath, shards: str) -> pa.Table:
    """The results of all rows in listing order; their shards stand in `shards`. Ray must be up."""
    import ray

    storage.remove(shards)  # an interrupted ingest starts again
    if storage.is_local(shards):
        storage.local_path(shards).mkdir(parents=True)
    rows = listing.rows.select(["key", "frame"])
    rows = rows.append_column("image_id", pa.array(listing.image_ids()))
    rows = rows.append_column("at", pa.array(np.arange(rows.num_rows)))
    blocks = [rows.slice(at, PART_ROWS).combine_chunks() for at in range(0, rows.num_rows, PART_ROWS)]
    writer = PartWriter(listing.reader, path, shards)
    found = []
    with progress("ingest", rows.num_rows, "images") as bar:
        data = ray.data.from_arrow(blocks).map_batches(
            writer, batch_size=None, batch_format="pyarrow", zero_copy_batch=True
        )
        tables: Any = data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
        for table in tables:
            found.append(table)
            bar.advance(table.num_rows)
    return pa.concat_tables(found).sort_by("at")


def _write(config: IngestConfig, path: ImagePath, listing: Listing, results: pa.Table, out: OutDir) -> dict[str, Any]:
    status, reason = results["status"].to_pylist(), results["reason"].to_pylist()
    paths = listing.rows["path"].to_pylist()
    _check_quarantine(config, paths, status, reason)
    sha = results["sha256"].to_pylist()
    ok = np.flatnonzero(np.asarray(status) == "ok")
    if not len(ok):
        raise DataError(f"{config.source}: no image could be read; the first: {paths[0]}: {reason[0]}")
    given = listing.rows["group"].to_pylist()
    ids = listing.image_ids()
    groups = [own_group(g, i) for g, i in zip(given, ids, strict=True)]
    found = _copy_pairs(results, sha, ok)
    labels_given = listing.rows["label"].to_pylist()
    labels, conflicts = _agree_labels(labels_given, found.merged, paths)
    merged = copies.merge_groups(groups, found.merged)
    for first, again in found.same:
        status[again], reason[again] = "duplicate", f"same bytes as {paths[first]}"

    table = listing.rows.drop_columns(["key", "label", "group"])
    extra = {n: table[n] for n in table.column_names if n not in {"path", "frame", "case"} | set(results.column_names)}
    manifest = pa.table(
        {
            "image_id": ids,
            "path": paths,
            "frame": table["frame"],
            "sha256": sha,
            "label": pa.array(labels, pa.string()),
            "group": pa.array(
                [g if s != "quarantined" else "" for g, s in zip(merged, status, strict=True)], pa.string()
            ),
            "group_given": pa.array(given, pa.string()),
            "case": table["case"],
            "status": status,
            "reason": reason,
            "shard": [s if t == "ok" else "" for s, t in zip(results["shard"].to_pylist(), status, strict=True)],
            "row": [r if t == "ok" else -1 for r, t in zip(results["row"].to_pylist(), status, strict=True)],
            "height": results["height"],
            "width": results["width"],
            "channels": results["channels"],
            **extra,
        }
    )
    info = _describe(config, path, manifest, results, conflicts)
    pairs = pair_table(found, ids, listing.rows, labels_given, merged)
    write_copies(out.path / "copies.parquet", pairs)
    pictures = pictures_of(Dataset(out.uri, info), manifest, found.same)
    told = Ingested(config.source, manifest, info, pairs, labels_given, pictures)
    write_ingest_report(out.path, told, images=config.images)
    _check_merged(config, groups, merged, np.asarray(status), paths, out.name("report.html"))
    partial = out.path / ".manifest.parquet"
    pq.write_table(manifest, partial)
    storage.publish_file(partial, out.path / "manifest.parquet")
    storage.write_json(out.path / "dataset.json", info)
    return dict(info["counts"]) | {"largest_group_fraction": info["counts"]["largest_group_fraction"]}


def _copy_pairs(results: pa.Table, sha: list[str], ok: np.ndarray) -> Found:
    first: dict[str, int] = {}
    same = [(first.setdefault(sha[at], int(at)), int(at)) for at in ok]
    pairs = np.asarray([p for p in same if p[0] != p[1]], dtype=np.int64).reshape(-1, 2)
    unique = np.asarray(sorted(first.values()))
    grey = results["grey"].take(pa.array(unique)).to_pylist()
    thumbnails = np.stack([np.frombuffer(g, np.uint8) for g in grey])
    near = copies.near_copies(thumbnails)
    place = {int(row): at for at, row in enumerate(unique)}
    return Found(pairs, replace(near, rows=unique[near.rows].reshape(-1, 2)), lambda row: thumbnails[place[row]])


def _agree_labels(labels: list[str], pairs: np.ndarray, paths: list[str]) -> tuple[list[str], list[list[str]]]:
    """Labels after copies were compared: a copy without one takes its twin's, conflicting ones lose theirs."""
    labels = list(labels)
    conflicts = []
    sets = copies.copy_sets(len(labels), pairs)
    for number in np.unique(sets[pairs[:, 0]]) if len(pairs) else []:
        members = np.flatnonzero(sets == number)
        known = sorted({labels[m] for m in members} - {""})
        for member in members:
            labels[member] = known[0] if len(known) == 1 else ""
        if len(known) > 1:
            conflicts.append([paths[m] for m in members])
    return labels, conflicts


def _check_quarantine(config: IngestConfig, paths: list[str], status: list[str], reason: list[str]) -> None:
    bad = [at for at, s in enumerate(status) if s == "quarantined"]
    if len(bad) <= config.max_quarantined * len(status):
        return
    common = Counter(reason[at] for at in bad).most_common(3)
    raise DataError(
        f"{config.source}: {len(bad)} of {len(status)} images cannot be read "
        f"({'; '.join(f'{n}x {r}' for r, n in common)}); the first is {paths[bad[0]]}\n"
        f"mend the source, or accept it with --max-quarantined {min(1.0, len(bad) / len(status) + 0.01):.2f}"
    )


def _check_merged(
    config: IngestConfig, given: list[str], merged: list[str], status: np.ndarray, paths: list[str], report: str
) -> None:
    """Stop where copies welded a large part of the data into one group: every split would be distorted by it."""
    joined: dict[str, set[str]] = {}
    for old, new in zip(given, merged, strict=True):
        joined.setdefault(new, set()).add(old)
    sizes = Counter(g for g, s in zip(merged, status, strict=True) if s == "ok" and len(joined[g]) > 1)
    if not sizes:
        return
    name, count = sizes.most_common(1)[0]
    total = int((status == "ok").sum())
    if count <= max(config.max_merged_group * total, 20):
        return
    examples = [p for p, g in zip(paths, merged, strict=True) if g == name][:3]
    raise DataError(
        f"{config.source}: copies join {len(joined[name])} groups into one of {count} of {total} images "
        f"(such as {', '.join(examples)})\n"
        f"look at them in {report}; if they are copies, accept them with --max-merged-group "
        f"{min(1.0, count / total + 0.01):.2f}"
    )


def _describe(
    config: IngestConfig, path: ImagePath, manifest: pa.Table, results: pa.Table, conflicts: list[list[str]]
) -> dict[str, Any]:
    status = manifest["status"].to_pylist()
    ok = np.flatnonzero(np.asarray(status) == "ok")
    kept = manifest.take(pa.array(ok))
    own = results["channels"].take(pa.array(ok)).to_pylist()
    channels = max(own) if config.channels == "auto" else int(config.channels)
    sizes = Counter(kept["group"].to_pylist())
    labelled = [label for label in kept["label"].to_pylist() if label]
    mean, std = _moments(results["sums"].take(pa.array(ok)).to_pylist(), channels)
    digest = hashlib.sha256(json.dumps([path.as_dict(), channels], sort_keys=True).encode())
    for name in ("image_id", "sha256", "label", "group", "status"):
        digest.update("\n".join(manifest[name].to_pylist()).encode("utf-8", "surrogateescape"))
    return {
        "format": FORMAT,
        "version": digest.hexdigest()[:16],
        "image_path": path.as_dict(),
        "channels": channels,
        "bit_depth": 8,
        "mean": mean,
        "std": std,
        "classes": dict(sorted(Counter(labelled).items())),
        "conflicting_copies": conflicts,
        "counts": {
            "images": len(status),
            "ok": len(ok),
            "duplicate": status.count("duplicate"),
            "quarantined": status.count("quarantined"),
            "labelled": len(labelled),
            "groups": len(sizes),
            "ungrouped": sum(
                bool(label) and not group
                for label, group in zip(kept["label"].to_pylist(), kept["group_given"].to_pylist(), strict=True)
            ),
            "largest_group_fraction": max(sizes.values()) / len(ok),
            "conflicting_copies": len(conflicts),
        },
    }


def _moments(sums: list[list[float]], channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each of the dataset's channels, in 0..1, over all pixels."""
    first = np.empty((len(sums), channels))
    second = np.empty((len(sums), channels))
    for at, values in enumerate(sums):
        half = len(values) // 2
        # a grey row counts for every channel, a colour row of a grey dataset by its mean
        first[at] = values[:half] if half == channels else np.mean(values[:half])
        second[at] = values[half:] if half == channels else np.mean(values[half:])
    mean = first.mean(axis=0)
    std = np.sqrt(np.maximum(second.mean(axis=0) - mean**2, 1e-8))
    return [float(v) for v in mean], [float(v) for v in std]


def _tell(config: IngestConfig, summary: dict[str, Any], listing: Listing) -> None:
    say(
        f"{summary['images']:,} rows: {summary['ok']:,} ok, {summary['duplicate']:,} copies, "
        f"{summary['quarantined']:,} quarantined; {summary['labelled']:,} labelled, {summary['groups']:,} groups, "
        f"the largest holds {summary['largest_group_fraction']:.1%}"
    )
    if listing.ignored:
        say(f"{listing.ignored:,} other files in the folder were left alone")
    if summary["conflicting_copies"]:
        say(f"warning: {summary['conflicting_copies']} sets of copies disagree on their label and were left unlabelled")
    if summary["ungrouped"]:
        say(
            f"warning: {summary['ungrouped']:,} labelled images have no group (patient, slide, …): "
            "each is its own, so a patient may stand on both sides of a split"
        )


def resolve_data(data: str, *, out: str, image_size: str = "auto", images: bool = True) -> Dataset:
    """The DATASET at `data`; any other SOURCE is ingested into a cache beside `out` first, whose report has pictures
    only with `images`."""
    if is_dataset(data):
        return Dataset.open(data)
    if CONFIG in storage.list_names(data):
        raise UsageError(f"{data}: not a finished DATASET; run its ingest again")
    name = storage.name_of(data).replace(":", "-") or "data"
    plain = "" if images else "\nno images"
    tag = hashlib.sha256(f"{data}\n{image_size}{plain}".encode()).hexdigest()[:8]
    cache = storage.sibling(out, f".{name}-{tag}.dataset")
    ingest(IngestConfig(data, out=cache, image_size=image_size, images=images))
    return Dataset.open(cache)
