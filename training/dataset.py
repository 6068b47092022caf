"""A DATASET on disk: its manifest, its shards, and how rows of pixels are read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import UsageError, nearest
from training.images import ImagePath, to_channels
from training.plan import Plan, window_for

FORMAT = 1
RESERVED = frozenset(
    {"image_id", "path", "frame", "status", "reason", "group", "case", "repeat", "fold", "truth", "label"}
    | {"unit", "images"}
)
"""Columns of prediction files: no class may be called so."""
ROW_GROUP = 64
"""Rows per Parquet row group: the unit that is read."""
UNGROUPED = "image:"
"""How the group of an image begins that was given none: the same name in another DATASET means nothing."""


@dataclass(frozen=True)
class Selection:
    """Some ok rows of a dataset, in manifest order: where their pixels lie and what is known of them."""

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> list[Any]:
        return list(self.table[name].to_pylist())

    def take(self, rows: np.ndarray | Sequence[int]) -> Selection:
        return Selection(self.table.take(pa.array(np.asarray(rows, dtype=np.int64))))

    @cached_property
    def row_groups(self) -> list[tuple[str, int, np.ndarray, np.ndarray]]:
        """(shard, row group, rows within it, places in this selection) for each row group that holds a row of it."""
        shards = np.asarray(self.column("shard"), dtype=object).astype(str)
        rows = np.asarray(self.column("row"), dtype=np.int64)
        order = np.lexsort((rows, shards))
        if not len(order):
            return []
        group = rows[order] // ROW_GROUP
        change = (shards[order][1:] != shards[order][:-1]) | (group[1:] != group[:-1])
        return [
            (str(shards[part[0]]), int(rows[part[0]] // ROW_GROUP), rows[part] % ROW_GROUP, part)
            for part in np.split(order, np.flatnonzero(change) + 1)
        ]


def own_group(group: str | None, image: object) -> str:
    """The group that an image was given, else one that it has for itself."""
    return group or f"{UNGROUPED}{image}"


def filter_rows(table: pa.Table, where: Sequence[str]) -> pa.Table:
    """The rows for which every COLUMN=VALUE of `where` holds.

    Raises:
        UsageError: a condition is not COLUMN=VALUE, or names no column.
    """
    for condition in where:
        name, sign, value = condition.partition("=")
        if not sign:
            raise UsageError(f"--where {condition}: give COLUMN=VALUE")
        if name not in table.column_names:
            raise UsageError(f"--where {condition}: no column {name!r}.{nearest(name, table.column_names)}")
        table = table.filter(pc.equal(pc.cast(table[name], pa.string()), value))
    return table


@dataclass(frozen=True)
class Dataset:
    """An ingested DATASET, in a folder or on an object store. `info` is its dataset.json."""

    uri: str
    """Where it is, as any process finds it: a URI or an absolute path."""
    info: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Raises UsageError where `path` is not a finished DATASET of a known format."""
        uri = storage.located(path)
        if not is_dataset(uri):
            raise UsageError(f"{path}: not a DATASET (no dataset.json); make one with: rayograph ingest SOURCE --out …")
        info = storage.read_json(storage.join(uri, "dataset.json"))
        if info.get("format", 0) > FORMAT:
            raise UsageError(
                f"{path}: dataset format {info['format']} is newer than this Rayograph's {FORMAT}; upgrade"
            )
        return cls(uri, info)

    @property
    def version(self) -> str:
        return str(self.info["version"])

    @property
    def channels(self) -> int:
        return int(self.info["channels"])

    @property
    def image_path(self) -> ImagePath:
        return ImagePath.from_dict(self.info["image_path"])

    @cached_property
    def manifest(self) -> pa.Table:
        return pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(self.uri, "manifest.parquet"))))

    def select(self, where: Sequence[str] = (), *, labelled: bool = False) -> Selection:
        """The ok rows for which every COLUMN=VALUE of `where` holds.

        Raises:
            UsageError: no such column, not COLUMN=VALUE, or no row is left.
        """
        table = self.manifest.filter(pc.equal(self.manifest["status"], "ok"))
        table = filter_rows(table, where)
        if labelled:
            table = table.filter(pc.not_equal(table["label"], ""))
        if not table.num_rows:
            what = "labelled image" if labelled else "image"
            raise UsageError(f"{self.uri}: no {what} is left" + (f" by --where {' '.join(where)}" if where else ""))
        return Selection(table)

    def plan(self, selection: Selection, *, batch_size: int, seed: int) -> Plan:
        path = self.image_path
        sizes = tuple(len(rows) for _, _, rows, _ in selection.row_groups)
        window = window_for(ROW_GROUP, path.height * path.width * self.channels)
        return Plan(sizes, batch_size, seed, self.version, window)

    def read_row_group(self, shard: str, row_group: int, rows: np.ndarray) -> np.ndarray:
        """Pixels uint8 [len(rows), height, width, channels] of the dataset's own number of channels."""
        uri = storage.join(self.uri, "shards", shard)
        with storage.explained(uri), _opened(uri, self.version) as file:
            table = file.read_row_group(row_group, columns=["pixels", "channels"])
        return self.unpack(table, rows)

    def unpack(self, table: pa.Table, rows: np.ndarray) -> np.ndarray:
        path, pixels, channels = self.image_path, table["pixels"], table["channels"].to_pylist()
        out = np.empty((len(rows), path.height, path.width, self.channels), dtype=np.uint8)
        for at, row in enumerate(rows):
            flat = np.frombuffer(pixels[int(row)].as_buffer(), dtype=np.uint8)
            image = flat.reshape(path.height, path.width, channels[int(row)])
            out[at] = image if channels[int(row)] == self.channels else to_channels(image, self.channels)
        return out

    def pixels(self, selection: Selection) -> np.ndarray:
        """All pixels of a selection, uint8 [N, height, width, channels], in its order. Held in memory at once."""
        path = self.image_path
        out = np.empty((len(selection), path.height, path.width, self.channels), dtype=np.uint8)
        for shard, row_group, rows, places in selection.row_groups:
            out[places] = self.read_row_group(shard, row_group, rows)
        return out


def is_dataset(uri: str | Path) -> bool:
    """Whether a DATASET is at `uri`; on an object store one that was finished, for parts of others show there."""
    if storage.is_local(uri):
        return (storage.local_path(uri) / "dataset.json").is_file()
    return {"dataset.json", storage.MANIFEST} <= set(storage.list_names(uri))


def _opened(uri: str, version: str) -> pq.ParquetFile:
    """A shard to read from; of a remote one only the ranges that are asked for travel, its footer once a process."""
    if storage.is_local(uri):
        return pq.ParquetFile(storage.local_path(uri))
    file, footer = _shard(uri, version)
    return pq.ParquetFile(file, metadata=footer, pre_buffer=True)


@lru_cache(maxsize=1024)
def _shard(uri: str, _version: str) -> tuple[pa.NativeFile, pq.FileMetaData]:
    """A remote shard, opened, and its footer."""
    files, path = storage.filesystem(uri)
    file = files.open_input_file(path)
    return file, pq.read_metadata(file)


def several_labels(labels: Sequence[str]) -> bool:
    """Whether a row names more than one class."""
    return any("|" in label for label in labels)


def leaves(labels: Sequence[str], order: Sequence[str] = (), *, several: bool = False) -> list[str]:
    """The classes of rows of one label, or with `several` of label sets such as `a|b`; sorted, or in `order`, which
    then names every one of them and no other.

    Raises:
        UsageError: a row has several labels where one is asked for, fewer than two classes remain, a class is also
            another's parent, a label set's class is on every row, or `order` names other classes.
    """
    multi = next((label for label in labels if "|" in label), None)
    if multi is not None and not several:
        raise UsageError(f"label {multi!r} names several classes, but one for each image is asked for here")
    classes = sorted({name for label in labels for name in label.split("|")})
    reserved = next((c for c in classes if c in RESERVED), None)
    if reserved is not None:
        raise UsageError(f"class {reserved!r}: the name of a column of predictions.parquet; rename the class")
    if len(classes) < 2:
        raise UsageError(f"needs images of at least two classes; found {', '.join(classes) or 'none'}")
    for name in classes:
        child = next((c for c in classes if c.startswith(name + "/")), None)
        if child is not None:
            raise UsageError(f"class {name!r} is also the parent of {child!r}; give its images a leaf of their own")
    if several:
        _require_some_without(labels, classes)
    return _ordered(classes, order) if order else classes


def truth_of(labels: Sequence[str], classes: Sequence[str], *, several: bool) -> np.ndarray:
    """Class numbers int64 [N], or with `several` label sets bool [N, K]."""
    place = {name: at for at, name in enumerate(classes)}
    if not several:
        return np.asarray([place[label] for label in labels])
    sets = np.zeros((len(labels), len(classes)), dtype=bool)
    for row, label in enumerate(labels):
        sets[row, [place[name] for name in label.split("|")]] = True
    return sets


def label_of(truth: Any, classes: Sequence[str]) -> str:
    """The label of a class number, or of a label set bool [K]: `a|b`, empty where it holds nothing."""
    if np.ndim(truth) == 0:
        return classes[int(truth)]
    return "|".join(name for name, has in zip(classes, truth, strict=True) if has)


def _require_some_without(labels: Sequence[str], classes: Sequence[str]) -> None:
    everywhere = truth_of(labels, classes, several=True).all(axis=0)
    if everywhere.any():
        name = classes[int(everywhere.argmax())]
        raise UsageError(f"class {name!r} is on every labelled image, so there is nothing to tell apart; drop it")


def _ordered(classes: list[str], order: Sequence[str]) -> list[str]:
    missing, strange = sorted(set(classes) - set(order)), [name for name in order if name not in classes]
    parts = [f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("names", strange)) if names]
    if parts:
        rule = "give every class of the labelled images, from lowest to highest"
        raise UsageError(f"--order {' '.join(order)}: {' and '.join(parts)}{', no class' if strange else ''}; {rule}")
    return list(order)
