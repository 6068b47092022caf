"""What a SOURCE holds: its rows, and the reader that fetches one row's bytes or pixels. Nothing is decoded here."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from cluster import storage
from cluster.errors import UsageError, nearest
from training import phantom

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pnm", ".jp2", ".mpo")
)
UNLABELLED_FOLDERS = frozenset({"unlabelled", "unlabeled"})


class Reader(Protocol):
    """Fetches what one row names; shipped to Ray Data's tasks."""

    def read(self, key: bytes, frame: int) -> bytes | np.ndarray:
        """Encoded bytes of an image file, or raw pixels [H, W] or [H, W, 1|3].

        Raises:
            OSError: it is not there or cannot be read.
        """


@dataclass(frozen=True)
class Listing:
    """The rows of a SOURCE, in its own order.

    rows: `key` (binary, what the reader takes), `path` (for people, valid UTF-8), `frame`, `label`, `group`, `case`,
    and every extra column of the index, as strings.
    """

    rows: pa.Table
    reader: Reader
    ignored: int = 0

    def image_ids(self) -> list[str]:
        """One stable id per row: a hash of its source-relative path and frame."""
        keys, frames = self.rows["key"].to_pylist(), self.rows["frame"].to_pylist()
        return [hashlib.sha256(k + b"\0" + str(f).encode()).hexdigest()[:20] for k, f in zip(keys, frames, strict=True)]


@dataclass(frozen=True)
class FileReader:
    """Files below a local folder, or below a path of a `pyarrow.fs` URI."""

    root: str

    def read(self, key: bytes, frame: int) -> bytes:
        try:
            if storage.is_local(self.root):
                return Path(os.fsdecode(os.path.join(os.fsencode(self.root), key))).read_bytes()  # noqa: PTH118 (bytes)
            filesystem, base = _filesystem(self.root)
            with filesystem.open_input_file(posixpath.join(base, key.decode())) as file:
                return bytes(file.read())
        except ValueError as error:  # a null byte, or a name that the file system cannot spell
            raise FileNotFoundError(str(error)) from error


@dataclass(frozen=True)
class NpzReader:
    """Splits of a MedMNIST-like .npz; a key is the name of the images' array."""

    path: str

    def read(self, key: bytes, frame: int) -> np.ndarray:
        return np.asarray(_npz_arrays(self.path)[key.decode()][frame])


@dataclass(frozen=True)
class PhantomReader:
    count: int
    seed: int
    size: int

    def read(self, key: bytes, frame: int) -> np.ndarray:
        return phantom.render(int(key), self.count, self.seed, self.size)


@functools.lru_cache(maxsize=1)
def _npz_arrays(path: str) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


@functools.lru_cache(maxsize=8)
def _filesystem(uri: str) -> tuple[Any, str]:
    return storage.filesystem(uri)


def list_source(source: str, *, seed: int = 0, size: int = 128) -> Listing:
    """All rows of SOURCE.

    Raises:
        UsageError: there is no such source, it holds no image, or its index is not one.
    """
    if source.startswith("file://"):
        source = str(storage.local_path(source))
    if source.startswith("phantom:"):
        return _phantoms(source, seed, size)
    if source.startswith("medmnist:"):
        return _npz(_download_medmnist(source.removeprefix("medmnist:")))
    if storage.is_local(source):
        source = str(storage.local_path(source))
    name = storage.name_of(source).lower()
    if name.endswith(".npz"):
        return _npz(source)
    if name.endswith((".csv", ".tsv", ".parquet")):
        return _index(source)
    return _folder(source)


def _table(columns: dict[str, list[Any]]) -> pa.Table:
    count = len(columns["path"])
    base = {name: columns.get(name, [""] * count) for name in ("label", "group", "case")}
    table = pa.table(
        {
            "key": pa.array(columns["key"], pa.binary()),
            "path": pa.array(columns["path"], pa.string()),
            "frame": pa.array(columns.get("frame", [0] * count), pa.int32()),
            **{name: pa.array(values, pa.string()) for name, values in base.items()},
        }
    )
    for name, values in columns.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.array(values, pa.string()))
    return table


def _display(key: bytes) -> str:
    return key.decode("utf-8", "backslashreplace")


def _shown(text: str) -> str:
    """`text` as valid UTF-8: its surrogate escapes written out."""
    return text if text.isascii() else _display(os.fsencode(text))


def _phantoms(source: str, seed: int, size: int) -> Listing:
    digits = source.removeprefix("phantom:")
    if not digits.isdecimal() or int(digits) < 1:
        raise UsageError(f"{source}: give a count, such as phantom:600")
    rows = phantom.rows(int(digits), seed)
    columns: dict[str, list[Any]] = {
        "key": [str(r.index).encode() for r in rows],
        "path": [r.path for r in rows],
        "label": [r.label for r in rows],
        "group": [r.group for r in rows],
        "truth": [r.truth for r in rows],
        "lesion_x": [str(r.lesion_x) for r in rows],
        "lesion_y": [str(r.lesion_y) for r in rows],
        "lesion_radius": [str(r.lesion_radius) for r in rows],
    }
    return Listing(_table(columns), PhantomReader(int(digits), seed, size))


def _download_medmnist(name: str) -> str:
    try:
        import medmnist
    except ImportError:
        raise UsageError(f"medmnist:{name}: needs the medmnist package; pip install 'rayograph[medmnist]'") from None
    info = medmnist.INFO.get(name)
    if info is None:
        raise UsageError(f"medmnist:{name}: no such set.{nearest(name, medmnist.INFO)}")
    root = Path(medmnist.info.DEFAULT_ROOT)
    target = root / f"{name}.npz"
    if not target.exists():
        root.mkdir(parents=True, exist_ok=True)
        try:
            getattr(medmnist, info["python_class"])(split="train", download=True, root=str(root))
        except Exception as error:
            raise UsageError(
                f"medmnist:{name}: cannot be downloaded ({error}); give the path of {name}.npz instead"
            ) from error
    return str(target)


def _npz(source: str) -> Listing:
    if storage.is_local(source) and not Path(source).is_file():
        raise UsageError(f"{source}: no such file")
    try:
        arrays = _npz_arrays(source)
    except Exception as error:
        raise UsageError(f"{source}: not a readable .npz of plain arrays ({error})") from error
    columns: dict[str, list[Any]] = {name: [] for name in ("key", "path", "frame", "label", "split")}
    for name in sorted(arrays):
        if not name.endswith("_images"):
            continue
        if np.ndim(arrays[name]) < 3:
            raise UsageError(f"{source}: {name} holds no images (N x height x width)")
        split, count = name.removesuffix("_images"), len(arrays[name])
        labels = arrays.get(f"{split}_labels")
        columns["key"] += [name.encode()] * count
        columns["path"] += [f"{Path(source).name}/{split}"] * count
        columns["frame"] += list(range(count))
        columns["label"] += (
            [""] * count if labels is None else _npz_labels(np.asarray(labels), count, f"{source}: {split}_labels")
        )
        columns["split"] += [split] * count
    if not columns["key"]:
        raise UsageError(f"{source}: no array named *_images; MedMNIST form has train_images, train_labels, …")
    return Listing(_table(columns), NpzReader(storage.located(source)))


def _npz_labels(labels: np.ndarray, count: int, what: str) -> list[str]:
    if not labels.ndim or len(labels) != count:
        raise UsageError(f"{what}: {count} images but {len(labels) if labels.ndim else 'no'} labels")
    if labels.dtype.kind not in "biuf" or not np.array_equal(labels, np.floor(labels)):
        raise UsageError(f"{what}: class numbers must be whole numbers")
    matrix = labels.reshape(count, -1)
    if matrix.shape[1] == 1:
        return [str(int(v)) for v in matrix[:, 0]]
    return ["|".join(str(i) for i in np.flatnonzero(row)) for row in matrix]


def _folder(source: str) -> Listing:
    if storage.is_local(source):
        root = Path(source)
        if not root.exists():
            raise UsageError(f"{source}: no such folder or file")
        if not root.is_dir():
            raise UsageError(f"{source}: not a folder, .csv, .parquet or .npz")
        if (root / "index.csv").is_file():
            return _index(str(root / "index.csv"))
        keys = list(_walk(os.fsencode(root)))
    else:
        filesystem, base = _filesystem(source)
        found = [f.path for f in filesystem.get_file_info(pafs.FileSelector(base, recursive=True)) if f.is_file]
        keys = sorted(os.path.relpath(p, base).encode() for p in found)
        if b"index.csv" in keys:
            return _index(storage.join(source, "index.csv"))
    images = [k for k in keys if os.path.splitext(os.fsdecode(k))[1].lower() in IMAGE_SUFFIXES]  # noqa: PTH122
    if not images:
        raise UsageError(f"{source}: no image in this folder (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    labels = [_folder_label(_display(k)) for k in images]
    rows = _table({"key": images, "path": [_display(k) for k in images], "label": labels})
    return Listing(rows, FileReader(storage.located(source)), ignored=len(keys) - len(images))


def _walk(root: bytes) -> Iterator[bytes]:
    """Files below `root`, relative, sorted, as bytes: a name need not be valid UTF-8. Hidden ones are left out."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if not n.startswith(b".")]
        found += [os.path.relpath(os.path.join(folder, f), root) for f in files if not f.startswith(b".")]  # noqa: PTH118
    yield from sorted(found)


def _folder_label(path: str) -> str:
    label = path.rpartition("/")[0]
    return "" if UNLABELLED_FOLDERS & set(label.lower().split("/")) else label


def _index(source: str) -> Listing:
    columns = _parquet_columns(source) if storage.name_of(source).lower().endswith(".parquet") else _csv_columns(source)
    if "path" not in columns:
        hint = nearest("path", columns)
        raise UsageError(f"{source}: no column 'path' (found: {', '.join(columns) or 'none'}).{hint}")
    if not columns["path"]:
        raise UsageError(f"{source}: has no rows")
    twice = next((path for path, count in Counter(columns["path"]).items() if count > 1), None)
    if twice is not None:
        raise UsageError(f"{source}: the path {_shown(twice)!r} stands in it twice")
    keys = [os.fsencode(p) for p in columns["path"]]
    columns["label"] = [_clean_label(text) for text in columns.get("label", [""] * len(keys))]
    root = source.rpartition("/")[0] or "." if storage.is_local(source) else storage.sibling(source, "")
    reserved = {"key", "frame"}
    extras = {_shown(k): list(map(_shown, v)) for k, v in columns.items() if k not in reserved}
    rows = _table({"key": keys, **extras})
    return Listing(rows, FileReader(storage.located(root)))


def _clean_label(text: str) -> str:
    """Blanks and empty levels away; of several labels each one once, sorted, so that equal sets read alike."""
    parts = ("/".join(p.strip() for p in part.split("/") if p.strip()) for part in text.split("|"))
    return "|".join(sorted({part for part in parts if part}))


def _csv_columns(source: str) -> dict[str, list[str]]:
    try:
        text = storage.read_bytes(source).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror or error}") from error
    reader = csv.reader(io.StringIO(text), delimiter="\t" if storage.name_of(source).lower().endswith(".tsv") else ",")
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) != len(header):
            raise UsageError(f"{source}: a column name stands twice in its header")
        rows = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UsageError(f"{source}:{reader.line_num}: {len(row)} fields where the header has {len(header)}")
            rows.append(row)
    except csv.Error as error:
        raise UsageError(f"{source}:{reader.line_num}: not CSV ({error})") from error
    return {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}


def _parquet_columns(source: str) -> dict[str, list[str]]:
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(source)))
        if len(set(table.column_names)) != len(table.column_names):
            raise UsageError(f"{source}: a column name stands twice")
        plain = {n: c for n, c in zip(table.column_names, table.columns, strict=True) if not pa.types.is_nested(c.type)}
        return {n: [_plain(v) for v in c.to_pylist()] for n, c in plain.items()}
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UsageError(f"{source}: not a readable Parquet manifest ({str(error).splitlines()[0]})") from error


def _plain(value: Any) -> str:
    """A cell as text; bytes may be a name that is not UTF-8."""
    if value is None:
        return ""
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)
