"""What `cluster.storage` does on object stores, or on any other file system of `pyarrow.fs`; others import `storage`.

There is no rename here: a file appears whole when its upload ends, a folder counts once its manifest is there. Who may
read and write comes from the environment alone. Failed requests are tried again by the stores' own clients, about ten
seconds long; what is left then comes out as one line.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from cluster import storage
from cluster.errors import RayographError, UsageError
from cluster.storage import Storage

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem, FileType

ATTEMPTS = 6
"""How often a request to S3 is made; the waits between double, 10 s at most together on average."""
PATIENCE_S = 20
"""How long Google's client repeats a request."""
CONNECT_S = 5
REGION_S = 15
"""How long the region of a bucket may be looked for."""
TRANSFERS = 8
"""Files that travel at the same time."""
SLICE_BYTES = 16 * 1024**2
FLAT = frozenset({"s3", "gcs"})
"""Stores of keys, not of folders: none has to be made, and an empty one does not count."""
ENVIRONMENT = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
)
"""What decides how a store is reached: a change of one opens it anew."""
KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for temporary ones AWS_SESSION_TOKEN too)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (the path of a key file)",
}
_SECRET = re.compile(r"key|secret|token|password|credential|sas", re.IGNORECASE)
_S3_OPTIONS = frozenset({"region", "scheme", "endpoint_override"})


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
        self._flat = files.type_name in FLAT

    def path(self, uri: str) -> str:
        """The file system's own name of `uri`."""
        return (self._base + unquote(self._named(uri))).rstrip("/")

    def join(self, uri: str, *parts: str) -> str:
        """`uri` with further names below it."""
        name = self._named(uri).rstrip("/")
        return self._prefix + "/".join([name, *map(quote, parts)]) + self._query

    def sibling(self, uri: str, name: str) -> str:
        """What is called `name` in the folder that holds `uri`."""
        folder, _, own = self._named(uri).rstrip("/").rpartition("/")
        if not own:
            raise UsageError(f"{uri}: name a folder in it")
        return f"{self._prefix}{folder}/{quote(name)}{self._query}"

    def name(self, uri: str) -> str:
        """The last part of `uri`."""
        return unquote(self._named(uri).rstrip("/").rpartition("/")[2])

    def _named(self, uri: str) -> str:
        return uri.removeprefix(self._prefix).removesuffix(self._query)

    def list_files(self, uri: str, *, recursive: bool = True) -> list[str]:
        from pyarrow.fs import FileSelector, FileType

        with explained(uri):
            kind = self.kind(uri)
            if kind == FileType.File:
                return [uri]
            if kind == FileType.NotFound:
                self._require_bucket(uri)
                raise UsageError(f"{uri}: no such file or folder")
            found = self.files.get_file_info(FileSelector(self.path(uri), recursive=recursive))
            names = sorted(info.path for info in found if info.type == FileType.File)
            return [self._prefix + quote(name.removeprefix(self._base)) + self._query for name in names]

    def list_names(self, uri: str) -> list[str]:
        from pyarrow.fs import FileSelector

        with explained(uri):
            found = self.files.get_file_info(FileSelector(self.path(uri), allow_not_found=True))
            if not found:
                self._require_bucket(uri)
            return sorted(info.base_name for info in found)

    def exists(self, uri: str) -> bool:
        from pyarrow.fs import FileSelector, FileType

        with explained(uri):
            kind = self.kind(uri)
            if kind == FileType.Directory and self._flat:  # it may be the mark that a deletion leaves
                return bool(self.files.get_file_info(FileSelector(self.path(uri))))
            if kind == FileType.NotFound:
                self._require_bucket(uri)
            return bool(kind != FileType.NotFound)

    def kind(self, uri: str) -> FileType:
        """What is at `uri`: File, Directory or NotFound."""
        with explained(uri):
            return self.files.get_file_info(self.path(uri)).type

    def read_bytes(self, uri: str) -> bytes:
        with explained(uri), self.files.open_input_stream(self.path(uri), compression=None) as stream:
            return bytes(stream.read())

    def write_bytes(self, uri: str, content: bytes) -> None:
        with explained(uri):
            self._put(content, self.path(uri))

    def publish_file(self, tmp: Path, target: str) -> None:
        with explained(target):
            self._each([partial(self._upload, tmp, self.path(target))])
            tmp.unlink()

    def publish_folder(self, tmp: Path, target: str, manifest: str) -> None:
        self.remove(target, manifest)
        self.upload(tmp, sorted(file for file in tmp.rglob("*") if file.is_file()), target, manifest)
        shutil.rmtree(tmp)

    def remove(self, uri: str, manifest: str) -> None:
        base = self.path(uri)
        with explained(uri):
            self._delete(f"{base}/{manifest}")
            self._delete(base)

    def fetch(self, uri: str, target: Path, skip: Collection[str]) -> None:
        tmp = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        base = self.path(uri)
        found = [(name, self.path(name)) for name in self.list_files(uri)]
        try:
            with explained(uri):
                if [path for _, path in found] == [base]:
                    self._download(base, tmp)
                else:
                    tmp.mkdir(parents=True)
                    below = [(path, path.removeprefix(f"{base}/")) for _, path in found]
                    wanted = [(path, _inside(tmp, name)) for path, name in below if name.split("/")[0] not in skip]
                    self._each([partial(self._download, path, file) for path, file in wanted])
            storage.replace(tmp, target)
        finally:
            storage.remove(tmp)

    def upload(self, root: Path, files: Sequence[Path], uri: str, manifest: str) -> None:
        base = self.path(uri)
        with explained(uri):
            for together in in_order(files, root, manifest):
                names = [(file, file.relative_to(root).as_posix()) for file in together]
                targets = [(file, base if name == "." else f"{base}/{name}") for file, name in names]
                self._each([partial(self._upload, file, target) for file, target in targets])

    def _require_bucket(self, uri: str) -> None:
        """Raises UsageError where it is the bucket of `uri` that is missing: the store itself would only say no."""
        from pyarrow.fs import FileType

        bucket = self._base.strip("/").partition("/")[0]
        if self._flat and bucket and self.files.get_file_info(bucket).type == FileType.NotFound:
            raise UsageError(f"{uri}: {_NO_BUCKET}")

    def _delete(self, path: str) -> None:
        from pyarrow.fs import FileType

        kind = self.files.get_file_info(path).type
        if kind == FileType.Directory:
            self.files.delete_dir(path)
        elif kind != FileType.NotFound:
            self.files.delete_file(path)

    def _upload(self, source: Path, path: str) -> None:
        import pyarrow as pa

        # Mapped, not read: an error while reading would end with the closing of the stream, which makes a half of a
        # file appear whole. For the same reason files travel in threads of their own, where no Ctrl-C arrives.
        size = source.stat().st_size
        self._put(pa.memory_map(str(source)).read_buffer() if size else b"", path)

    def _put(self, content: Any, path: str) -> None:
        import pyarrow as pa

        if not self._flat:
            self.files.create_dir(path.rpartition("/")[0], recursive=True)
        buffer = pa.py_buffer(content)
        with self.files.open_output_stream(path, compression=None) as writer:
            for at in range(0, buffer.size, SLICE_BYTES):
                writer.write(buffer.slice(at, min(SLICE_BYTES, buffer.size - at)))

    def _download(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.files.open_input_stream(path, compression=None) as reader, target.open("wb") as writer:
            shutil.copyfileobj(reader, writer, SLICE_BYTES)

    def _each(self, work: list[Callable[[], None]]) -> None:
        """All of it is done, some at a time; the first error is raised when what was under way has ended."""
        with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="transfer") as pool:
            futures = [pool.submit(one) for one in work]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def in_order(files: Iterable[Path], root: Path, manifest: str) -> Iterator[list[Path]]:
    """`files` below `root` in groups to upload one after the other: what names others comes after what it names.

    Deeper files come first, JSON after what lies beside it, the manifest last.
    """

    def rank(file: Path) -> tuple[bool, int, bool]:
        name = file.relative_to(root)
        return name.as_posix() == manifest, -len(name.parts), name.suffix == ".json"

    groups: dict[tuple[bool, int, bool], list[Path]] = {}
    for file in files:
        groups.setdefault(rank(file), []).append(file)
    yield from (groups[key] for key in sorted(groups))


def _inside(folder: Path, name: str) -> Path:
    """`name` below `folder`; a store may hold keys that would lead out of it."""
    if ".." in PurePosixPath(name).parts or name.startswith("/"):
        raise RayographError(f"{storage.printable(name)}: a name that leads out of its folder; it is not copied")
    return folder / name


def at(uri: str) -> RemoteStorage:
    """The store of `uri`.

    Raises:
        UsageError: unknown scheme, credentials in the URI, or an option that it does not have.
    """
    refuse_credentials(uri)
    parts = urlsplit(uri)
    query = f"?{parts.query}" if parts.query else ""
    return _opened(f"{parts.scheme}://{parts.netloc}", query, tuple(os.environ.get(name) for name in ENVIRONMENT))


def refuse_credentials(uri: str) -> None:
    """Raises UsageError where a URI carries credentials: it is kept in files that others read."""
    parts = urlsplit(uri)
    # a colon alone: the secret may hold a slash, which would end the host
    named = parts.scheme == "s3" and re.search("[@:]", parts.netloc)
    secret = any(_SECRET.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True))
    if named or parts.password is not None or secret:
        advice = KEYS.get(parts.scheme, "the variables of the store")
        raise UsageError(f"{parts.scheme}://…: credentials in a URI would be kept in config.yaml; set {advice} instead")


@cache
def _opened(prefix: str, query: str, _environment: tuple[str | None, ...]) -> RemoteStorage:
    from pyarrow import ArrowException

    parts = urlsplit(prefix)
    if not parts.netloc and parts.scheme in {"s3", "gs", "gcs"}:
        raise UsageError(f"{prefix}: names no bucket; give {parts.scheme}://BUCKET/FOLDER")
    try:
        files, base = _file_system(prefix, query)
    except (ArrowException, ValueError, NotImplementedError, OSError) as error:
        raise UsageError(f"{prefix}: cannot be opened: {storage.first_line(error)}") from error
    return RemoteStorage(files, prefix, base.rstrip("/"), query)


def _file_system(prefix: str, query: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem, GcsFileSystem

    parts, options = urlsplit(prefix), dict(parse_qsl(query.removeprefix("?")))
    if parts.scheme == "s3":
        return _s3(parts.netloc, options), parts.netloc
    if parts.scheme in {"gs", "gcs"} and not options:
        patience, bucket = timedelta(seconds=PATIENCE_S), parts.netloc.removeprefix("anonymous@")
        return GcsFileSystem(retry_time_limit=patience, anonymous=bucket != parts.netloc), bucket
    files, base = FileSystem.from_uri(f"{prefix}/{query}")
    return files, base


def _s3(bucket: str, options: dict[str, str]) -> FileSystem:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    for name in options:
        if name not in _S3_OPTIONS:
            raise ValueError(f"no option {name!r}; there are {', '.join(sorted(_S3_OPTIONS))}")
    endpoint, scheme = options.get("endpoint_override"), options.get("scheme")
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint is None and given:
        url = urlsplit(given)
        endpoint, scheme = (url.netloc or given) + url.path.rstrip("/"), scheme or url.scheme
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return S3FileSystem(
        endpoint_override=endpoint,
        scheme=scheme or "https",
        region=region or ("us-east-1" if endpoint else _region(bucket)),
        connect_timeout=CONNECT_S,
        allow_delayed_open=True,  # small files in one request instead of three
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


def _region(bucket: str) -> str:
    """The region of a bucket of Amazon's, asked for in a thread: without a network the answer may take minutes."""
    from pyarrow.fs import resolve_s3_region

    found: list[str | BaseException] = []

    def ask() -> None:
        try:
            found.append(resolve_s3_region(bucket))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=ask, name="region", daemon=True)
    thread.start()
    thread.join(REGION_S)
    match found:
        case [str() as region]:
            return region
        case [OSError() as error] if "not found" in str(error):
            raise OSError(_NO_BUCKET)
    reason = f" ({storage.first_line(found[0])})" if found and isinstance(found[0], BaseException) else ""
    raise OSError(f"Amazon does not tell the region of this bucket{reason}; set AWS_REGION, or AWS_ENDPOINT_URL")


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """An error of the store comes out as one line that names `uri`, the cause and what to do."""
    from pyarrow import ArrowInvalid

    try:
        with storage.explained(uri):
            yield
    except ArrowInvalid as error:
        raise UsageError(f"{storage.printable(uri)}: {storage.first_line(error)}") from error


_NO_BUCKET = "no such bucket; create it, or mend the name"
_CAUSES: tuple[tuple[str, type[RayographError], str], ...] = (
    (r"NO_SUCH_BUCKET|bucket does not exist", UsageError, _NO_BUCKET),
    (r"metadata\.google\.internal|OAuth2|UNAUTHENTICATED|credentials", RayographError, "refused"),
    (
        r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE|TOKEN|UNRECOGNIZED_CLIENT|EXPIRED|HTTP status 40[13]"
        r"|PERMISSION_DENIED",
        RayographError,
        "refused",
    ),
    (
        r"HTTP status 301|PermanentRedirect|wrong region|configured region",
        UsageError,
        "the bucket lies in another region; set AWS_REGION to it",
    ),
    (
        r"NETWORK_CONNECTION|curlCode|Could not connect|REQUEST_TIMEOUT|UNAVAILABLE.*connect",
        RayographError,
        "cannot be reached; check the network, and AWS_ENDPOINT_URL for a store that is not Amazon's",
    ),
    (
        r"SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|HTTP status (5\d\d|429)|UNAVAILABLE|INTERNAL",
        RayographError,
        "the store kept failing; run the same command again later",
    ),
)


def explanation(uri: str, error: OSError) -> RayographError:
    """The error for people: one line with what to do."""
    text = " ".join(str(error).split())
    scheme = urlsplit(uri).scheme
    for pattern, kind, words in _CAUSES:
        if re.search(pattern, text):
            said = _refusal(scheme) if words == "refused" else words
            return kind(f"{storage.printable(uri)}: {said} ({_short(text)})")
    return RayographError(f"{storage.printable(uri)}: {storage.printable(storage.first_line(error))}")


def _refusal(scheme: str) -> str:
    scheme = "gs" if scheme == "gcs" else scheme
    names = KEYS.get(scheme, "the credentials of the store")
    known = os.environ.get({"s3": "AWS_ACCESS_KEY_ID", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}.get(scheme, ""))
    if known:
        return f"access refused with the credentials that are set; check {names}, and what they may do"
    return f"access refused, and no credentials are set; set {names}"


def _short(text: str) -> str:
    """The store's own words, without what names the place a second time."""
    text = text.rpartition("AWS Error ")[2]
    return text if len(text) <= 120 else f"{text[:117]}..."
