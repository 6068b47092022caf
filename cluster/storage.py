"""The one storage seam: listing, reading and publishing, on local paths and on any `pyarrow.fs` URI.

A result appears whole or not at all: a finished file or folder is renamed into place locally, and uploaded with its
manifest last where there is no rename. Nothing here knows what is inside the files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import numbers
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from cluster.errors import RayographError, UsageError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem, FileType

MANIFEST = "summary.json"
"""Uploaded last by object stores: a folder without it does not count as published."""

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


class Storage(ABC):
    """Where files are found and results are published; get the right one with `at(uri)`."""

    @abstractmethod
    def list_files(self, uri: str, *, recursive: bool = True) -> list[str]:
        """Every file at or below `uri`, as paths that `read_bytes` takes, in byte order of their names."""

    @abstractmethod
    def read_bytes(self, uri: str) -> bytes:
        """The whole content of one file."""

    @abstractmethod
    def publish_file(self, tmp: Path, target: str) -> None:
        """The local file `tmp` has become `target`, whole; `tmp` is gone."""

    @abstractmethod
    def publish_folder(self, tmp: Path, target: str) -> None:
        """The local folder `tmp` has become `target`, whole, replacing what was there; `tmp` is gone."""

    @abstractmethod
    def remove(self, uri: str) -> None:
        """Nothing is left at `uri`, whether it was a file, a folder or absent."""


class LocalStorage(Storage):
    """Plain paths and `file://` URIs; names that are not UTF-8 survive, as Python's surrogate escapes."""

    def list_files(self, uri: str, *, recursive: bool = True) -> list[str]:
        path = local_path(uri)
        with explained(path):
            if path.is_file():
                return [str(path)]
            if not path.is_dir():
                raise UsageError(f"{printable(path)}: no such file or folder")
            return sorted(_walk(path, recursive), key=os.fsencode)

    def read_bytes(self, uri: str) -> bytes:
        path = local_path(uri)
        with explained(path):
            return path.read_bytes()

    def publish_file(self, tmp: Path, target: str) -> None:
        path = local_path(target)
        with explained(path):
            _fsync(tmp)
            tmp.replace(path)
            _fsync(path.parent)

    def publish_folder(self, tmp: Path, target: str) -> None:
        path = local_path(target)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
        with explained(path):
            _fsync_tree(tmp)
            replaced = path.exists()
            if replaced:
                path.rename(aside)
            try:
                tmp.rename(path)
            except OSError:
                if replaced:
                    aside.rename(path)
                raise
            _fsync(path.parent)
            if replaced:
                _delete(aside)

    def remove(self, uri: str) -> None:
        path = local_path(uri)
        with explained(path):
            _delete(path)


class RemoteStorage(Storage):
    """An object store or network file system behind a `pyarrow.fs.FileSystem`.

    Every URI it takes is `prefix` (scheme and host or bucket), a percent-encoded path and `query`; `base` is what the
    file system itself calls `prefix`.
    """

    def __init__(self, files: FileSystem, prefix: str, base: str, query: str = "") -> None:
        self.files = files
        self._prefix = prefix
        self._base = base
        self._query = query

    def path(self, uri: str) -> str:
        """The file system's own name of `uri`."""
        name = uri.removeprefix(self._prefix).removesuffix(self._query)
        return (self._base + unquote(name)).rstrip("/")

    def list_files(self, uri: str, *, recursive: bool = True) -> list[str]:
        from pyarrow.fs import FileSelector, FileType

        with explained(uri):
            kind = self.kind(uri)
            if kind == FileType.File:
                return [uri]
            if kind == FileType.NotFound:
                raise UsageError(f"{uri}: no such file or folder")
            found = self.files.get_file_info(FileSelector(self.path(uri), recursive=recursive))
            names = sorted(info.path for info in found if info.type == FileType.File)
            return [self._prefix + quote(name.removeprefix(self._base)) + self._query for name in names]

    def kind(self, uri: str) -> FileType:
        """What is at `uri`: File, Directory or NotFound."""
        with explained(uri):
            return self.files.get_file_info(self.path(uri)).type

    def read_bytes(self, uri: str) -> bytes:
        with explained(uri), self.files.open_input_stream(self.path(uri), compression=None) as stream:
            return bytes(stream.read())

    def publish_file(self, tmp: Path, target: str) -> None:
        with explained(target):
            self._upload(tmp, self.path(target))
            tmp.unlink()

    def publish_folder(self, tmp: Path, target: str) -> None:
        base = self.path(target)
        with explained(target):
            self._delete(f"{base}/{MANIFEST}")
            self._delete(base)
            parts = sorted(p for p in tmp.rglob("*") if p.is_file())
            for part in sorted(parts, key=lambda p: p == tmp / MANIFEST):
                self._upload(part, f"{base}/{part.relative_to(tmp).as_posix()}")
            shutil.rmtree(tmp)

    def remove(self, uri: str) -> None:
        with explained(uri):
            self._delete(self.path(uri))

    def _delete(self, path: str) -> None:
        from pyarrow.fs import FileType

        kind = self.files.get_file_info(path).type
        if kind == FileType.Directory:
            self.files.delete_dir(path)
        elif kind != FileType.NotFound:
            self.files.delete_file(path)

    def _upload(self, source: Path, path: str) -> None:
        self.files.create_dir(path.rpartition("/")[0], recursive=True)
        with source.open("rb") as reader, self.files.open_output_stream(path, compression=None) as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)


def is_local(uri: str | Path) -> bool:
    """Whether `uri` is a path of this machine: no scheme, or `file://`."""
    text = str(uri)
    return text.startswith("file://") or not _SCHEME.match(text)


def local_path(uri: str | Path) -> Path:
    """The path of a local URI.

    Raises:
        UsageError: `uri` lies elsewhere.
    """
    if isinstance(uri, Path):
        return uri
    if not is_local(uri):
        raise UsageError(f"{uri}: must be a path of this machine")
    return Path(unquote(uri.removeprefix("file://"))) if uri.startswith("file://") else Path(uri)


def filesystem(uri: str | Path) -> tuple[FileSystem, str]:
    """The `pyarrow.fs` file system of `uri` and the path in it, for readers that want one; local paths are absolute.

    Raises:
        UsageError: unknown scheme, or nothing at `uri`.
    """
    from pyarrow.fs import FileType, LocalFileSystem

    if is_local(uri):
        path = local_path(uri)
        if not path.exists():
            raise UsageError(f"{printable(path)}: no such file or folder")
        return LocalFileSystem(), str(path.absolute())
    text = str(uri)
    remote = _remote(*_split(text))
    if remote.kind(text) == FileType.NotFound:
        raise UsageError(f"{text}: no such file or folder")
    return remote.files, remote.path(text)


def at(uri: str | Path) -> Storage:
    """The storage that holds `uri`.

    Raises:
        UsageError: unknown scheme.
    """
    return LocalStorage() if is_local(uri) else _remote(*_split(str(uri)))


def _split(uri: str) -> tuple[str, str]:
    """Scheme with host or bucket, and the query with its question mark."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc}", f"?{parts.query}" if parts.query else ""


@cache
def _remote(prefix: str, query: str) -> RemoteStorage:
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    try:
        files, base = FileSystem.from_uri(f"{prefix}/{query}")
    except (ArrowException, ValueError, NotImplementedError, OSError) as error:
        raise UsageError(f"{prefix}: cannot be opened: {_first_line(error)}") from error
    return RemoteStorage(files, prefix, base.rstrip("/"), query)


def list_files(uri: str | Path, recursive: bool = True) -> list[str]:
    """Every file at or below `uri` in byte order of their names, each a path or URI that `read_bytes` takes.

    Links to folders are not followed. Raises UsageError when there is nothing at `uri`.
    """
    return at(uri).list_files(str(uri), recursive=recursive)


def read_bytes(uri: str | Path) -> bytes:
    """The whole content of one file, local or remote."""
    return at(uri).read_bytes(str(uri))


def publish_file(tmp: Path, target: Path | str) -> None:
    """`target` is the finished file `tmp`, durably and in one step; locally both lie on one file system."""
    at(target).publish_file(tmp, str(target))


def publish_folder(tmp: Path, target: Path | str) -> None:
    """`target` is the finished folder `tmp`, durably; a folder that was there is swapped away first, then deleted."""
    at(target).publish_folder(tmp, str(target))


def remove(path: Path | str) -> None:
    """Nothing is left at `path`, whether it was a file, a folder or absent; links are removed, not followed."""
    at(path).remove(str(path))


def write_bytes(target: Path | str, content: bytes) -> None:
    """`target` holds exactly `content`, or what it held before: never a part. Its folder exists already."""
    path = local_path(target)
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with explained(path):
        try:
            tmp.write_bytes(content)
            publish_file(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)


def write_text(target: Path | str, text: str) -> None:
    """As `write_bytes`, in UTF-8; names that are not UTF-8 keep their bytes."""
    write_bytes(target, text.encode("utf-8", "surrogateescape"))


def write_json(target: Path | str, obj: object) -> None:
    """`target` holds `obj` as strict, indented JSON; NaN and infinities become null, NumPy scalars plain numbers."""
    write_text(target, json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """The content of a JSON file.

    Raises:
        UsageError: there is no such file.
        RayographError: it is not JSON, for example because it was cut off.
    """
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RayographError(f"{printable(path)}: not valid JSON ({_first_line(error)}); was it cut off?") from error


def sha256_file(path: Path | str) -> str:
    """The hex SHA-256 of a local file's content."""
    file = local_path(path)
    with explained(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def printable(path: Path | str) -> str:
    """`path` on one line of valid UTF-8, whatever bytes its name holds."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """An `OSError` of the body comes out as one line that names `path`, the cause and what to do."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{printable(path)}: no such file or folder") from error
    except OSError as error:
        raise RayographError(f"{printable(path)}: {_cause(error)}") from error


def _cause(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full; free some space and run the same command again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "permission denied; choose another place or change its permissions"
        case errno.EXDEV:
            return "the temporary file lies on another file system than its target"
    return error.strerror or _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _walk(folder: Path, recursive: bool) -> Iterator[str]:
    def stop(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=stop):
        yield from (os.path.join(parent, name) for name in names)  # noqa: PTH118 - Path normalises and is 10x slower
        if not recursive:
            folders.clear()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            if not file.is_symlink():
                _fsync(file)
        _fsync(Path(parent))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _plain(obj: object) -> object:
    """`obj` in JSON's own types."""
    match obj:
        case None | bool() | str():
            return obj
        case numbers.Integral():
            return int(obj)
        case numbers.Real():
            value = float(obj)
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): _plain(value) for key, value in obj.items()}
        case list() | tuple():
            return [_plain(value) for value in obj]
        case Path():
            return str(obj)
    raise TypeError(f"{type(obj).__name__} cannot be written as JSON")
