"""The life of an `--out`: claimed under a lock, resumed or already done, finished by a summary written last.

Knows files and plain values only; what a verb computes, and how it resumes, is the verb's.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml
from filelock import FileLock, Timeout

from cluster import storage
from cluster.errors import LockedError, UsageError

FORMAT = 1
"""Format version of `config.yaml` and of the sidecar beside a single-file result."""
CONFIG, SUMMARY, LOG, LOCK = "config.yaml", "summary.json", "run.log", ".lock"
_MARKER = re.compile(rb"verb: [a-z][a-z-]*\n")
_OWN_TEMPORARY = re.compile(r"\.(config\.yaml|summary\.json)\.[0-9a-f]{8}\.tmp")

Values = dict[str, Any]


class OutDir:
    """An `--out` folder held by this process: nobody else writes it until the `with` block ends.

    `state` is "new" (empty), "resume" (an unfinished run of the same config, or a finished one whose `raisable` fields
    grew) or "done" (nothing to do). A block left by a UsageError before it wrote anything leaves no folder behind.
    """

    path: Path
    state: Literal["new", "resume", "done"]

    def __init__(self, path: Path, state: Literal["new", "resume", "done"], lock: _Lock, created: Path | None) -> None:
        self.path = path
        self.state = state
        self._lock = lock
        self._created = created

    @classmethod
    def open(
        cls, path: str, *, verb: str, config: Values, identity: Values, raisable: Values, overwrite: bool
    ) -> OutDir:
        """The folder exists, is locked, and holds `config.yaml` and `run.log`; or, on an error, is as it was.

        Args:
            config: every field, written to `config.yaml`; plain values.
            identity: those that decide the result, compared with the ones of an existing folder.
            raisable: those that may have grown since, such as `epochs`, whether or not `identity` has them too.
            overwrite: throw away what is there, if it is empty or a result of ours.

        Raises:
            UsageError: the folder holds another config's result, or something that is not ours.
            LockedError: another process is writing it.
        """
        if not storage.is_local(path):
            raise UsageError(f"--out {path}: must be a folder of this machine")
        folder = storage.local_path(path)
        wanted = _Wanted(verb, _yaml_values(config), _yaml_values(identity), _yaml_values(raisable))
        with storage.explained(folder):
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"--out {storage.printable(folder)}: is a file, but a folder is needed")
            _refuse_foreign(folder, overwrite)
            created = _make(folder)
            try:
                lock = _Lock(folder / LOCK, folder)
            except BaseException:
                _unmake(folder, created)
                raise
            try:
                state = _claim(folder, wanted, overwrite)
            except BaseException:
                _unmake(folder, created)
                lock.release()
                raise
        if state == "done":
            print(f"already done: {storage.printable(folder)}")
        return cls(folder, state, lock, created)

    @property
    def log(self) -> Path:
        """The run's log, for whatever is too chatty for the terminal."""
        return self.path / LOG

    def summary(self) -> Values:
        """The summary of a finished folder."""
        return dict(storage.read_json(self.path / SUMMARY))

    def finish(self, summary: Values) -> None:
        """The folder is done: `summary.json` stands in it, whole. Everything else was written before."""
        storage.write_json(self.path / SUMMARY, summary)
        self.state = "done"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UsageError) and self.state == "new" and _untouched(self.path):
            _empty(self.path)
            _unmake(self.path, self._created)
        self._lock.release()


class OutFile:
    """A single-file `--out` held by this process; its config and summary lie beside it in `NAME.json`.

    `state` is "new" or "done". A block that ends without `finish` leaves what it found.
    """

    path: Path
    state: Literal["new", "done"]

    def __init__(self, path: Path, state: Literal["new", "done"], lock: _Lock, header: Values) -> None:
        self.path = path
        self.state = state
        self._lock = lock
        self._header = header

    @property
    def tmp(self) -> Path:
        """Where to write the file before `finish`: the same folder, so that publishing is one rename."""
        return self.path.with_name(f".{self.path.name}.tmp")

    @property
    def sidecar(self) -> Path:
        return _sidecar(self.path)

    def summary(self) -> Values:
        """The summary of a finished file."""
        return dict(storage.read_json(self.sidecar)["summary"])

    def finish(self, summary: Values) -> None:
        """`tmp` has become the result, and the sidecar says what it is."""
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


def claim_file(path: str, *, verb: str, identity: Values, overwrite: bool) -> OutFile:
    """The single-file result `path` is locked by this process and may be written, or is already done.

    Args:
        identity: the fields that decide the result, compared with the sidecar's.

    Raises:
        UsageError: another result or a foreign file is there and `overwrite` is off, or its folder is missing.
        LockedError: another process is writing it.
    """
    if not storage.is_local(path):
        raise UsageError(f"--out {path}: must be a file of this machine")
    file = storage.local_path(path)
    header = {"verb": verb, "format": FORMAT, "config": _yaml_values(identity)}
    with storage.explained(file):
        if file.is_dir():
            raise UsageError(f"--out {storage.printable(file)}: is a folder, but a file is needed")
        _make(file.parent)
        lock = _Lock(file.with_name(f".{file.name}.lock"), file)
        try:
            state = _claim_file(file, header, overwrite)
        except BaseException:
            lock.discard()
            raise
    if state == "done":
        print(f"already done: {storage.printable(file)}")
    return OutFile(file, state, lock, header)


def config_text(verb: str, config: Values) -> str:
    """The text of a `config.yaml`: the header keys `verb` and `format`, then the fields in their own order."""
    header = {"verb": verb, "format": FORMAT}
    return str(yaml.safe_dump(header | config, sort_keys=False, allow_unicode=True, width=1_000_000))


@dataclass(frozen=True)
class _Wanted:
    """The run that asks for an `--out`, its values as YAML gives them back."""

    verb: str
    config: Values
    identity: Values
    raisable: Values


class _Lock:
    """An operating-system lock (it dies with its process) on a file that names its holder."""

    def __init__(self, path: Path, subject: Path) -> None:
        self._path = path
        # the short wait covers a holder that is just deleting the folder it could not use
        self._lock = FileLock(path, timeout=0.3, poll_interval=0.05)
        try:
            self._lock.acquire()
        except Timeout:
            raise LockedError(
                f"{storage.printable(subject)}: another process is writing it ({_holder(path)}); "
                "wait for it or choose another --out"
            ) from None
        path.write_text(f"pid {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")

    def release(self) -> None:
        self._lock.release()

    def discard(self) -> None:
        """Released, and its file is gone; `filelock` notices an unlinked file, so waiters cannot split."""
        self._path.unlink(missing_ok=True)
        self._lock.release()


def _holder(lock: Path) -> str:
    try:
        return storage.printable(lock.read_text(encoding="utf-8", errors="replace").strip()[:200]) or "unknown"
    except OSError:
        return "unknown"


def _claim(folder: Path, wanted: _Wanted, overwrite: bool) -> Literal["new", "resume", "done"]:
    """What the locked `folder` is to this run; on return it holds a `config.yaml` that says so."""
    _refuse_foreign(folder, overwrite)  # again, now that nobody else can change it
    if _is_empty(folder):
        _empty(folder)
        return _start(folder, wanted)
    if overwrite or _is_erased(folder):
        _erase(folder)
        return _start(folder, wanted)
    stored = _stored(folder)
    _refuse_other(folder, wanted, stored)
    raised = any(value != stored[name] for name, value in wanted.raisable.items())
    finished = (folder / SUMMARY).exists()
    if finished and not raised:
        return "done"
    if raised:
        # the summary goes first: a folder with the new config and the old summary would count as done
        storage.remove(folder / SUMMARY)
        storage.write_text(folder / CONFIG, config_text(wanted.verb, wanted.config))
    return "resume"


def _start(folder: Path, wanted: _Wanted) -> Literal["new"]:
    (folder / LOG).touch()
    try:
        storage.write_text(folder / CONFIG, config_text(wanted.verb, wanted.config))
    except BaseException:
        storage.remove(folder / LOG)
        raise
    return "new"


def _refuse_foreign(folder: Path, overwrite: bool) -> None:
    if _is_empty(folder) or _is_ours(folder):
        return
    advice = "it will not be overwritten; choose another --out" if overwrite else "choose another --out"
    raise UsageError(f"--out {storage.printable(folder)}: holds something that is not a result of rayograph; {advice}")


def _refuse_other(folder: Path, wanted: _Wanted, stored: Values) -> None:
    """Raises UsageError naming the first field in which the result in `folder` is another one."""
    where = f"--out {storage.printable(folder)}"
    advice = "use --overwrite or another --out"
    if stored.get("verb") != wanted.verb:
        raise UsageError(f"{where}: holds a result of `rayograph {stored.get('verb')}`; {advice}")
    version = stored.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise UsageError(f"{where}: was written by a newer rayograph (format {version}); {advice}")
    for name, new in (wanted.identity | wanted.raisable).items():
        if name not in stored:
            raise UsageError(f"{where}: its config.yaml is damaged or has no {name}; {advice}")
        old = stored[name]
        lowered = name in wanted.raisable and not _grew(old, new)
        if old != new and (name not in wanted.raisable or lowered):
            rule = f"{name} may grow but not shrink" if lowered else f"{name} differs"
            raise UsageError(f"{where}: {rule} ({_short(old)} there, {_short(new)} now); {advice}")


def _grew(old: object, new: object) -> bool:
    return isinstance(old, int | float) and isinstance(new, int | float) and new >= old


def _short(value: object) -> str:
    text = storage.printable(str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _stored(folder: Path) -> Values:
    try:
        values = yaml.safe_load(storage.read_bytes(folder / CONFIG).decode("utf-8", "surrogateescape"))
    except (yaml.YAMLError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise UsageError(
            f"--out {storage.printable(folder)}: its config.yaml is damaged; use --overwrite or another --out"
        )
    return values


def _yaml_values(values: Values) -> Values:
    """`values` as they come back from a YAML file, so that they compare equal to stored ones."""
    return dict(yaml.safe_load(yaml.safe_dump(values, sort_keys=False)) or {})


def _is_empty(folder: Path) -> bool:
    """Absent, empty, or left by a process that died before it wrote its config."""
    if not folder.exists():
        return True
    return all(p.name in {LOCK, LOG} or _OWN_TEMPORARY.fullmatch(p.name) for p in folder.iterdir())


def _is_ours(folder: Path) -> bool:
    """Whether `config.yaml` opens with our header; also true when the rest of it was cut off."""
    try:
        with (folder / CONFIG).open("rb") as stream:
            return _MARKER.match(stream.readline(100)) is not None
    except FileNotFoundError:
        return False


def _is_erased(folder: Path) -> bool:
    return (folder / CONFIG).read_bytes().endswith(b"erased: true\n")


def _erase(folder: Path) -> None:
    """Only the lock is left. Killed midway, the folder is known as half erased and the next run goes on erasing."""
    storage.write_text(folder / CONFIG, config_text("erase", {"erased": True}))
    _empty(folder, keep={CONFIG, LOCK})
    storage.remove(folder / CONFIG)


def _empty(folder: Path, keep: set[str] | frozenset[str] = frozenset({LOCK})) -> None:
    for entry in folder.iterdir():
        if entry.name not in keep:
            storage.remove(entry)


def _untouched(folder: Path) -> bool:
    """Whether the folder holds no file but those of `OutDir.open`."""
    files = [p for p in folder.rglob("*") if not p.is_dir()]
    return all(p.parent == folder and p.name in {CONFIG, LOCK, LOG} for p in files)


def _make(folder: Path) -> Path | None:
    """`folder` exists; returns the uppermost folder that had to be created for it."""
    missing = [p for p in [folder, *folder.parents] if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[-1] if missing else None


def _unmake(folder: Path, created: Path | None) -> None:
    """Whatever `_make` created is gone again, as far as nobody else uses it."""
    if created is None:
        return
    storage.remove(folder / LOCK)
    for path in [folder, *folder.parents]:
        try:
            path.rmdir()
        except OSError:
            return
        if path == created:
            return


def _claim_file(file: Path, header: Values, overwrite: bool) -> Literal["new", "done"]:
    if overwrite or not file.exists():
        return "new"
    where, advice = f"--out {storage.printable(file)}", "use --overwrite or another --out"
    if not _sidecar(file).exists():
        raise UsageError(f"{where}: exists, and nothing beside it says what it is; {advice}")
    stored = storage.read_json(_sidecar(file))
    if not isinstance(stored, dict) or stored.get("verb") != header["verb"] or "summary" not in stored:
        raise UsageError(f"{where}: is not a result of `rayograph {header['verb']}`; {advice}")
    for name, value in header["config"].items():
        if stored["config"].get(name) != value:
            old = stored["config"].get(name)
            raise UsageError(f"{where}: {name} differs ({_short(old)} there, {_short(value)} now); {advice}")
    return "done"


def _sidecar(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")
