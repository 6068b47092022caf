"""The one storage seam: listing, reading and publishing, on local paths and on any `pyarrow.fs` URI.

A result appears whole or not at all: a finished file or folder is renamed into place locally, and uploaded with its
manifest last where there is no rename (`cluster.remote`). Nothing here knows what is inside the files.
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
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from cluster.errors import RayographError, UsageError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

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
    def list_names(self, uri: str) -> list[str]:
        """The sorted names of the files and folders directly in `uri`; none where no folder is there."""

    @abstractmethod
    def exists(self, uri: str) -> bool:
        """Whether there is a file or folder at `uri`."""

    @abstractmethod
    def join(self, uri: str, *parts: str) -> str:
        """`uri` with further names below it."""

    @abstractmethod
    def sibling(self, uri: str, name: str) -> str:
        """What is called `name` in the folder that holds `uri`."""

    @abstractmethod
    def name(self, uri: str) -> str:
        """The last part of `uri`."""

    @abstractmethod
    def write_bytes(self, uri: str, content: bytes) -> None:
        """The file `uri` holds exactly `content`, or what it held before."""

    @abstractmethod
    def publish_file(self, tmp: Path, target: str) -> None:
        """The local file `tmp` has become `target`, whole; `tmp` is gone."""

    @abstractmethod
    def publish_folder(self, tmp: Path, target: str, manifest: str) -> None:
        """The local folder `tmp` has become `target`, whole, replacing what was there; `tmp` is gone."""

    @abstractmethod
    def remove(self, uri: str, manifest: str) -> None:
        """Nothing is left at `uri`, whether it was a file, a folder or absent."""

    @abstractmethod
    def fetch(self, uri: str, target: Path, skip: Collection[str]) -> None:
        """The local `target` is a copy of the file or folder `uri`, whole."""

    @abstractmethod
    def upload(self, root: Path, files: Sequence[Path], uri: str, manifest: str) -> None:
        """`uri` holds the local `files` under their names relative to `root`; they stay."""


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

    def list_names(self, uri: str) -> list[str]:
        path = local_path(uri)
        with explained(path):
            return sorted(os.listdir(path), key=os.fsencode) if path.is_dir() else []  # noqa: PTH208

    def exists(self, uri: str) -> bool:
        with explained(uri):
            return local_path(uri).exists()

    def join(self, uri: str, *parts: str) -> str:
        return str(local_path(uri).joinpath(*parts))

    def sibling(self, uri: str, name: str) -> str:
        return str(Path(os.path.abspath(local_path(uri))).parent / name)  # noqa: PTH100 - links stay what they are

    def name(self, uri: str) -> str:
        return local_path(uri.rstrip("/")).name

    def write_bytes(self, uri: str, content: bytes) -> None:
        path = local_path(uri)
        tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        with explained(path):
            try:
                tmp.write_bytes(content)
                self.publish_file(tmp, str(path))
            finally:
                tmp.unlink(missing_ok=True)

    def publish_folder(self, tmp: Path, target: str, manifest: str) -> None:
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

    def remove(self, uri: str, manifest: str) -> None:
        path = local_path(uri)
        with explained(path):
            _delete(path)

    def fetch(self, uri: str, target: Path, skip: Collection[str]) -> None:
        path = local_path(uri)
        tmp = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        with explained(path):
            try:
                if path.is_dir():
                    shutil.copytree(path, tmp, ignore=lambda folder, names: skip if Path(folder) == path else ())
                else:
                    shutil.copyfile(path, tmp)
                replace(tmp, target)
            finally:
                _delete(tmp)

    def upload(self, root: Path, files: Sequence[Path], uri: str, manifest: str) -> None:
        target = local_path(uri)
        with explained(target):
            for file in sorted(files, key=lambda f: f == root / manifest):
                place = target / file.relative_to(root)
                place.parent.mkdir(parents=True, exist_ok=True)
                tmp = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
                try:
                    shutil.copyfile(file, tmp)
                    self.publish_file(tmp, str(place))
                finally:
                    tmp.unlink(missing_ok=True)


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
    from cluster import remote

    text = str(uri)
    store = remote.at(text)
    if store.kind(text) == FileType.NotFound:
        raise UsageError(f"{text}: no such file or folder")
    return store.files, store.path(text)


def at(uri: str | Path) -> Storage:
    """The storage that holds `uri`.

    Raises:
        UsageError: unknown scheme, or credentials in the URI.
    """
    if is_local(uri):
        return LocalStorage()
    from cluster import remote

    return remote.at(str(uri))


def join(uri: str | Path, *parts: str) -> str:
    """`uri` with further names below it, as a local path or a URI."""
    return at(uri).join(str(uri), *parts)


def sibling(uri: str | Path, name: str) -> str:
    """What is called `name` in the folder that holds `uri`; local ones are absolute.

    Raises:
        UsageError: `uri` is a whole bucket.
    """
    return at(uri).sibling(str(uri), name)


def name_of(uri: str | Path) -> str:
    """The last part of a path or URI."""
    return at(uri).name(str(uri))


def located(uri: str | Path) -> str:
    """`uri` as it is found from any working directory: that of Ray's workers may be another one."""
    return str(local_path(uri).absolute()) if is_local(uri) else str(uri)


def refuse_credentials(uri: str) -> None:
    """Raises UsageError where a URI carries credentials, before it is written anywhere."""
    if not is_local(uri):
        from cluster import remote

        remote.refuse_credentials(uri)


def scratch(uri: str) -> Path:
    """The folder of this machine for what belongs to `uri`; it need not exist.

    Below `RAYOGRAPH_SCRATCH`, else below the user's cache folder.
    """
    home = os.environ.get("RAYOGRAPH_SCRATCH")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(home) if home else cache / "rayograph" / "scratch"
    return root.absolute() / hashlib.sha256(uri.rstrip("/").encode("utf-8", "surrogateescape")).hexdigest()[:24]


def workplace(out: str) -> Path:
    """Where what is made on the way to `out` is kept on this machine: beside it, or in scratch."""
    if is_local(out):
        return Path(sibling(out, "x")).parent
    folder = scratch(sibling(out, ""))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def exists(uri: str | Path) -> bool:
    """Whether there is a file or folder at `uri`; an empty folder of an object store is none."""
    return at(uri).exists(str(uri))


def list_names(uri: str | Path) -> list[str]:
    """The sorted names of the files and folders directly in `uri`; none where no folder is there.

    A folder of an object store that was emptied file by file may still be named.
    """
    return at(uri).list_names(str(uri))


def fetch(uri: str | Path, target: Path, skip: Collection[str] = ()) -> None:
    """The local `target` is a copy of the file or folder `uri`, whole, in place of what was there.

    skip: names at the top level of a folder that are left out. Raises UsageError where nothing is at `uri`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    at(uri).fetch(str(uri), target, skip)


def upload(path: Path, uri: str | Path, manifest: str = MANIFEST, only: Collection[str] | None = None) -> None:
    """`uri` holds every file of the local file or folder `path`, the manifest last; what else it held stays there.

    only: of a folder, the files to copy, by their names relative to it.
    """
    if path.is_file():
        files = [path]
    else:
        files = sorted(
            f for f in path.rglob("*") if f.is_file() and (only is None or f.relative_to(path).as_posix() in only)
        )
    at(uri).upload(path, files, str(uri), manifest)


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


def publish_folder(tmp: Path, target: Path | str, manifest: str = MANIFEST) -> None:
    """`target` is the finished folder `tmp`, durably; a folder that was there is swapped away first, then deleted.

    manifest: the file at its top level that is uploaded last to object stores, and deleted first: without it the folder
    does not count.
    """
    at(target).publish_folder(tmp, str(target), manifest)


def remove(path: Path | str, manifest: str = MANIFEST) -> None:
    """Nothing is left at `path`, whether it was a file, a folder or absent; links are removed, not followed.

    Where a folder cannot be removed at once, its manifest goes first.
    """
    at(path).remove(str(path), manifest)


def replace(tmp: Path, target: Path) -> None:
    """The local `tmp`, a file or a folder, stands at `target`; whoever is faster with the same folder wins."""
    if tmp.is_dir() and target.exists():
        _delete(target)
    try:
        tmp.rename(target)
    except OSError:
        if not target.exists():
            raise


def write_bytes(target: Path | str, content: bytes) -> None:
    """`target` holds exactly `content`, or what it held before: never a part. A local folder exists already."""
    at(target).write_bytes(str(target), content)


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
        raise RayographError(f"{printable(path)}: not valid JSON ({first_line(error)}); was it cut off?") from error


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
        if not is_local(path):
            from cluster import remote

            raise remote.explanation(str(path), error) from error
        raise RayographError(f"{printable(path)}: {_cause(error)}") from error


def _cause(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full; free some space and run the same command again"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return "permission denied; choose another place or change its permissions"
        case errno.EXDEV:
            return "the temporary file lies on another file system than its target"
    return error.strerror or first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
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
