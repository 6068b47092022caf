"""`predict` and `embed`: a model over any SOURCE. Ray Data reads and decodes in tasks, and runs the model in actors."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UsageError
from cluster.outfile import claim_file
from cluster.progress import progress, say
from cluster.session import cores, session
from training.artifact import WEIGHTS, Model, ModelCard, card_sha256, load_model, located_model, read_card
from training.configs import InferenceConfig
from training.dataset import ROW_GROUP, Dataset, filter_rows, is_dataset, label_of
from training.device import count_workers, device_in, require_room
from training.images import ImagePath, to_channels
from training.ingest import read_row
from training.probabilities import HALF
from training.sources import Listing, Reader, list_source
from training.tasks.nearness import METRIC

BLOCK_ROWS = 256


@lru_cache(maxsize=4)
def _stored(uri: str) -> Dataset:
    """A task's DATASET: opened once in each process of Ray Data's."""
    return Dataset.open(uri)


@dataclass(frozen=True)
class StoredReader:
    """Rows of a DATASET as raw stored pixels; a key is SHARD/ROW."""

    path: str

    def pixels(self, keys: list[bytes]) -> np.ndarray:
        dataset = _stored(self.path)
        places: dict[str, list[tuple[int, int]]] = {}
        for at, key in enumerate(keys):
            shard, _, row = key.decode().rpartition("/")
            places.setdefault(shard, []).append((int(row), at))
        path = dataset.image_path
        out = np.empty((len(keys), path.height, path.width, dataset.channels), dtype=np.uint8)
        for shard, rows in places.items():
            numbers = np.asarray([r for r, _ in rows])
            for group in np.unique(numbers // ROW_GROUP):
                mine = [(r, at) for r, at in rows if r // ROW_GROUP == group]
                wanted = np.asarray([r % ROW_GROUP for r, _ in mine])
                out[[at for _, at in mine]] = dataset.read_row_group(shard, int(group), wanted)
        return out


@dataclass(frozen=True)
class Decode:
    """The Ray Data task: rows in, stored pixels with a status per row out."""

    reader: Reader | StoredReader
    path: ImagePath
    channels: int

    def __call__(self, block: pa.Table) -> dict[str, Any]:
        keys, frames = block["key"].to_pylist(), block["frame"].to_pylist()
        at = block["at"].to_numpy()
        if isinstance(self.reader, StoredReader):
            pixels = self.reader.pixels(keys)
            return {"at": at, "reason": np.asarray([""] * len(keys), dtype=object), "image": pixels}
        decoded = [read_row(self.reader, k, f, self.path) for k, f in zip(keys, frames, strict=True)]
        pixels = np.zeros((len(keys), self.path.height, self.path.width, self.channels), dtype=np.uint8)
        for row, result in enumerate(decoded):
            if result.pixels is not None:
                pixels[row] = to_channels(result.pixels, self.channels)
        return {"at": at, "reason": np.asarray([d.reason for d in decoded], dtype=object), "image": pixels}


class RunModel:
    """The Ray Data actor: holds the model once, answers blocks of stored pixels."""

    def __init__(self, run: str, device: str, batch_size: int, threads: int, embed: bool) -> None:
        import torch

        torch.set_num_threads(threads)
        self.model: Model = load_model(run, device)
        self.batch_size, self.embed = batch_size, embed

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        model = self.model
        answer = model.embed if self.embed else model.probabilities
        values = answer(block["image"], self.batch_size)
        return {"at": block["at"], "reason": block["reason"], "values": values.astype(np.float64)}


def embedding_key(hashes: Mapping[str, str], dataset: Dataset, image_ids: Sequence[str]) -> str:
    """What features of these images under a model, by the sha256 of its files, are kept by."""
    images = hashlib.sha256("\n".join(image_ids).encode()).hexdigest()
    weights = "".join(hashes.get(name, "") for name in (WEIGHTS, METRIC))  # an embedding is part of what gives features
    known = f"{weights}\n{dataset.version}\n{images}"
    return hashlib.sha256(known.encode()).hexdigest()[:12]


def predict(config: InferenceConfig) -> dict[str, Any]:
    """`config.out` holds a row per image: status, the likeliest class (of a multi-label model the labels likelier than
    not), and a calibrated probability per leaf.

    Raises:
        UsageError: the model has no classes, or the source is none.
    """
    card, _ = read_card(config.model)
    if card.head == "none":
        raise UsageError(f"{config.model}: an encoder without classes; train one with: rayograph transfer --init RUN")
    if card.inputs:
        raise UsageError(
            f"{config.model}: judges cases of {', '.join(card.inputs)} together, not single images; "
            "rayograph evaluate --unit case does"
        )
    return _infer(config, card, embed=False)


def embed(config: InferenceConfig) -> dict[str, Any]:
    """`config.out` holds a row per image: status and its embedding, a list of float32."""
    card, _ = read_card(config.model)
    return _infer(config, card, embed=True)


def _infer(config: InferenceConfig, card: ModelCard, *, embed: bool) -> dict[str, Any]:
    verb = "embed" if embed else "predict"
    listing, reader, stored = _rows(config, card)
    identity = config.identity() | {"model_sha256": read_card(config.model)[1][WEIGHTS]}
    identity |= {"card_sha256": card_sha256(config.model)}  # classifiers and temperatures lie beside the weights
    with claim_file(config.out, verb=verb, identity=identity, overwrite=config.overwrite) as out:
        if out.state == "done":
            return out.summary()
        started = time.monotonic()
        with session(cpus=cores() + 2) as found:
            device = device_in(config.device, found)
            one = config.workers == "auto" and device != "cuda"  # it uses all cores
            workers = 1 if one else count_workers(config.workers, found, device)
            require_room(found, workers, device)
            values, reasons = _gather(config, card, listing, reader, stored, device, workers, embed)
        seconds = time.monotonic() - started
        pq.write_table(_table(listing, card, values, reasons, embed), out.tmp)
        bad = sum(bool(r) for r in reasons)
        summary = {
            "images": len(reasons),
            "ok": len(reasons) - bad,
            "quarantined": bad,
            "seconds": seconds,
            "images_per_second": len(reasons) / seconds,
        }
        out.finish(summary)
        say(f"{summary['ok']:,} of {summary['images']:,} images answered, {bad:,} unreadable: {config.out}")
        return summary


def _rows(config: InferenceConfig, card: ModelCard) -> tuple[pa.Table, Reader | StoredReader, bool]:
    """(rows with at, key, frame and what is known of them, their reader, whether they are stored pixels)."""
    if is_dataset(config.source):
        dataset = Dataset.open(config.source)
        table = dataset.select(config.where).table
        keys = [f"{s}/{r}".encode() for s, r in zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)]
        table = table.append_column("key", pa.array(keys, pa.binary()))
        if dataset.image_path != card.image_path:
            say(f"note: {config.source} was ingested with another size or window than the model's own images")
        reader: Reader | StoredReader = StoredReader(dataset.uri)
        stored = True
    else:
        listing: Listing = list_source(config.source, size=max(card.image_path.height, card.image_path.width))
        table = listing.rows.append_column("image_id", pa.array(listing.image_ids()))
        table = filter_rows(table, config.where)
        reader, stored = listing.reader, False
    return table.append_column("at", pa.array(np.arange(table.num_rows))), reader, stored


def _gather(
    config: InferenceConfig,
    card: ModelCard,
    rows: pa.Table,
    reader: Reader | StoredReader,
    stored: bool,
    device: str,
    workers: int,
    embed: bool,
) -> tuple[np.ndarray, list[str]]:
    """(values [N, D], reason per row) in the order of `rows`."""
    import ray.data

    small = rows.select(["at", "key", "frame"])
    blocks = [small.slice(at, BLOCK_ROWS).combine_chunks() for at in range(0, rows.num_rows, BLOCK_ROWS)]
    channels = Dataset.open(config.source).channels if stored else card.input.channels
    data = (
        ray.data.from_arrow(blocks)
        .map_batches(Decode(reader, card.image_path, channels), batch_size=None, batch_format="pyarrow")
        .map_batches(
            RunModel,
            fn_constructor_args=(
                located_model(config.model),
                device,
                config.batch_size,
                max(1, cores() // workers),
                embed,
            ),
            batch_size=None,
            batch_format="numpy",
            concurrency=workers,
            num_cpus=1,
            num_gpus=1 if device == "cuda" else 0,
        )
    )
    reasons = [""] * rows.num_rows
    values: np.ndarray | None = None
    with progress("embed" if embed else "predict", rows.num_rows, "images") as bar:
        for block in _batches(data):
            if values is None:
                values = np.full((rows.num_rows, block["values"].shape[1]), np.nan)
            values[block["at"]] = block["values"]
            for at, reason in zip(block["at"], block["reason"], strict=True):
                reasons[int(at)] = str(reason)
            bar.advance(len(block["at"]))
    assert values is not None
    return values, reasons


def _batches(data: Any) -> Iterator[dict[str, np.ndarray]]:
    yield from data.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)


def _table(rows: pa.Table, card: ModelCard, values: np.ndarray, reasons: list[str], embed: bool) -> pa.Table:
    bad = np.asarray([bool(r) for r in reasons])
    known = {name: rows[name] for name in ("image_id", "path", "frame", "group", "case")}
    known |= {"status": pa.array(np.where(bad, "quarantined", "ok")), "reason": pa.array(reasons, pa.string())}
    if embed:
        width = values.shape[1]
        flat = pa.array(values.astype(np.float32).ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(bad))
        return pa.table({**known, "embedding": vectors})
    best = [None if b else _said(card, v) for b, v in zip(bad, np.nan_to_num(values), strict=True)]
    leaves = {name: pa.array(values[:, at], mask=bad) for at, name in enumerate(card.classes)}
    return pa.table({**known, "truth": rows["label"], "label": pa.array(best, pa.string()), **leaves})


def _said(card: ModelCard, probabilities: np.ndarray) -> str:
    """The likeliest class, or the labels that are likelier than not: `a|b`, empty where none is."""
    if card.activation == "sigmoid":
        return label_of(probabilities >= HALF, card.classes)
    return card.classes[int(probabilities.argmax())]
