"""The life of a single-file `--out`: claimed under a lock, already done, or published whole with a sidecar."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from cluster import storage
from cluster.errors import UsageError
from cluster.lease import Lease, Lock, Pace
from cluster.outdir import FORMAT, Values, short, yaml_values


class OutFile:
    """A single-file `--out` held by this process; its config and summary lie beside it in `NAME.json`.

    `state` is "new" or "done". A block that ends without `finish` leaves what it found.
    """

    path: str
    tmp: Path
    """Where to write the file before `finish`."""
    state: Literal["new", "done"]

    def __init__(self, path: str, tmp: Path, state: Literal["new", "done"], lock: Lock | Lease, header: Values) -> None:
        self.path = path
        self.tmp = tmp
        self.state = state
        self._lock = lock
        self._header = header

    @property
    def sidecar(self) -> str:
        return _sidecar(self.path)

    def summary(self) -> Values:
        """The summary of a finished file."""
        return dict(storage.read_json(self.sidecar)["summary"])

    def finish(self, summary: Values) -> None:
        """`tmp` has become the result, and the sidecar says what it is."""
        if isinstance(self._lock, Lease):
            self._lock.check()
        storage.remove(self.sidecar)
        storage.publish_file(self.tmp, self.path)
        storage.write_json(self.sidecar, {**self._header, "summary": summary})
        self.state = "done"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        storage.remove(self.tmp)
        self._lock.discard()


def claim_file(path: str, *, verb: str, identity: Values, overwrite: bool, pace: Pace | None = None) -> OutFile:
    """The single-file result `path` is locked by this process and may be written, or is already done.

    Args:
        path: a file, or a URI.
        identity: the fields that decide the result, compared with the sidecar's.
        pace: how long the lease of a URI lives.

    Raises:
        UsageError: another result or a foreign file is there and `overwrite` is off, or its folder is missing.
        LockedError: another process is writing it.
    """
    for value in identity.values():
        storage.refuse_credentials(str(value))
    header = {"verb": verb, "format": FORMAT, "config": yaml_values(identity)}
    lock, tmp = _hold_file(path, pace)
    try:
        with storage.explained(path):
            state = _claim_file(path, header, overwrite)
    except BaseException:
        lock.discard()
        raise
    if state == "done":
        print(f"already done: {storage.printable(path)}")
    return OutFile(path, tmp, state, lock, header)


def _hold_file(path: str, pace: Pace | None) -> tuple[Lock | Lease, Path]:
    """The lock on a single-file result, and where to write the file: locally in the folder of its target."""
    name = storage.name_of(path)
    if not storage.is_local(path):
        lock, scratch = storage.sibling(path, f".{name}.lock"), storage.scratch(path)
        with storage.explained(scratch):
            scratch.mkdir(parents=True, exist_ok=True)
        return Lease(lock, storage.printable(path), pace), scratch / f".{name}.tmp"
    file = storage.local_path(path)
    with storage.explained(file):
        if file.is_dir():
            raise UsageError(f"--out {storage.printable(file)}: is a folder, but a file is needed")
        file.parent.mkdir(parents=True, exist_ok=True)
        return Lock(file.with_name(f".{file.name}.lock"), storage.printable(file)), file.with_name(f".{name}.tmp")


def _claim_file(path: str, header: Values, overwrite: bool) -> Literal["new", "done"]:
    if overwrite or not storage.exists(path):
        return "new"
    where, advice = f"--out {storage.printable(path)}", "use --overwrite or another --out"
    if not storage.exists(_sidecar(path)):
        raise UsageError(f"{where}: exists, and nothing beside it says what it is; {advice}")
    stored = storage.read_json(_sidecar(path))
    if not isinstance(stored, dict) or stored.get("verb") != header["verb"] or "summary" not in stored:
        raise UsageError(f"{where}: is not a result of `rayograph {header['verb']}`; {advice}")
    for name, value in header["config"].items():
        if stored["config"].get(name) != value:
            old = stored["config"].get(name)
            raise UsageError(f"{where}: {name} differs ({short(old)} there, {short(value)} now); {advice}")
    return "done"


def _sidecar(path: str) -> str:
    return storage.sibling(path, f"{storage.name_of(path)}.json")
