"""What an index is built of: the unit feature vectors of a dataset under a model, its labels, and small pictures.

Ray Data computes it; kept by model and data, so that another index of the same images costs no second pass.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import save_file

from cluster import storage
from cluster.progress import progress, say
from cluster.session import cores, session
from training.artifact import read_card
from training.configs import Device, InferenceConfig
from training.dataset import Dataset
from training.inference import BLOCK_ROWS, StoredReader, embed, embedding_key
from training.ingest import resolve_data

VECTORS, ROWS = "vectors.safetensors", "rows.arrow"
THUMBNAIL_SIDE = 128
COLUMNS = ("image_id", "sha256", "label", "group", "case")


@dataclass(frozen=True)
class Thumbnails:
    """The Ray Data task: stored rows to JPEGs of at most `THUMBNAIL_SIDE` pixels a side."""

    reader: StoredReader

    def __call__(self, block: pa.Table) -> dict[str, Any]:
        pixels = self.reader.pixels(block["key"].to_pylist())
        return {"at": block["at"].to_numpy(), "jpeg": np.asarray([_jpeg(p) for p in pixels], dtype=object)}


def gallery(
    model: str, data: str, *, out: str, where: tuple[str, ...], labelled: bool, device: Device, log: Path
) -> tuple[Path, dict[str, Any]]:
    """(folder with vectors.safetensors and rows.arrow, what is known of the images), kept beside `out`.

    `vectors` float32 [N, D] of unit length and the N rows (image_id, sha256, label, group, case, thumbnail) agree.

    Raises:
        UsageError: no such model or data, or no image is left.
    """
    card, hashes = read_card(model)
    size = f"{card.image_path.height}x{card.image_path.width}"
    dataset = resolve_data(data, out=out, image_size=size)
    if dataset.image_path != card.image_path:
        say(f"note: {data} was ingested with another size or window than the model's own images")
    table = dataset.select(where, labelled=labelled).table
    key = embedding_key(hashes, dataset, table["image_id"].to_pylist())
    folder = storage.workplace(out) / f".{storage.name_of(data)}-{key}.gallery"
    facts = {"dataset": dataset.version, "images": table.num_rows, "image_path": dataset.image_path.as_dict()}
    if (folder / ROWS).is_file():
        say(f"features of {table.num_rows:,} images: kept from before")
        return folder, facts
    asked = hashlib.sha256(repr((dataset.uri, where)).encode()).hexdigest()[:6]  # what `embed` resumes by
    partial = folder.with_name(f"{folder.name}.{asked}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with session(cpus=cores() + 2, log=log):
        embed(
            InferenceConfig(
                dataset.uri, model=model, out=str(partial / "embeddings.parquet"), where=where, device=device
            )
        )
        thumbnails = _thumbnails(dataset, table)
    _write(partial, table, thumbnails)
    storage.publish_folder(partial, folder)
    return folder, facts


def _thumbnails(dataset: Dataset, table: pa.Table) -> list[bytes]:
    import ray.data

    keys = [f"{s}/{r}".encode() for s, r in zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)]
    rows = pa.table({"at": np.arange(len(keys)), "key": pa.array(keys, pa.binary())})
    blocks = [rows.slice(at, BLOCK_ROWS).combine_chunks() for at in range(0, len(keys), BLOCK_ROWS)]
    task = Thumbnails(StoredReader(dataset.uri))
    found = [b""] * len(keys)
    data = ray.data.from_arrow(blocks).map_batches(task, batch_size=None, batch_format="pyarrow")
    tables: Any = data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    with progress("thumbnails", len(keys), "images") as bar:
        for part in tables:
            for at, jpeg in zip(part["at"].to_pylist(), part["jpeg"].to_pylist(), strict=True):
                found[at] = jpeg
            bar.advance(part.num_rows)
    return found


def _jpeg(pixels: np.ndarray) -> bytes:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()


def _write(folder: Path, table: pa.Table, thumbnails: list[bytes]) -> None:
    """Vectors and rows, both in the order of `table`; the embeddings file, which held more, is gone."""
    embedded = pq.read_table(folder / "embeddings.parquet", columns=["image_id", "embedding"])
    order = pc.index_in(table["image_id"], embedded["image_id"].combine_chunks())
    lists = embedded["embedding"].take(order).combine_chunks()
    vectors = lists.flatten().to_numpy().reshape(len(lists), -1).astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    save_file({"vectors": np.ascontiguousarray(vectors)}, folder / VECTORS)
    columns = {name: pc.cast(table[name], pa.string()) for name in COLUMNS}
    rows = pa.table({**columns, "thumbnail": pa.array(thumbnails, pa.binary())})
    with pa.OSFile(str(folder / ROWS), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=1024)
    for leftover in folder.glob("*embeddings.parquet*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
