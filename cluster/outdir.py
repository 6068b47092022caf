"""The life of an `--out`: claimed under a lock, resumed or already done, finished by a summary written last.

Knows files and plain values only; what a verb computes, and how it resumes, is the verb's.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml

from cluster import storage
from cluster.errors import UsageError
from cluster.lease import Lock, Pace
from cluster.mirror import CONFIG, LOCK, LOCKS, LOG, SUMMARY, Mirror

FORMAT = 1
"""Format version of `config.yaml` and of the sidecar beside a single-file result."""
_MARKER = re.compile(rb"verb: [a-z][a-z-]*\n")
_OWN_TEMPORARY = re.compile(r"\.(config\.yaml|summary\.json)\.[0-9a-f]{8}\.tmp")

Values = dict[str, Any]


class OutDir:
    """An `--out` folder held by this process: nobody else writes it until the `with` block ends.

    `state` is "new" (empty), "resume" (an unfinished run of the same config, or a finished one whose `raisable` fields
    grew) or "done" (nothing to do). A block left by a UsageError before it wrote anything leaves no folder behind.

    `path` is where files are written: the folder itself, or scratch of this machine for one on an object store, which
    has them when `push` or `finish` returns, or the block ends, however it ends. `uri` is what others know it by.
    """

    path: Path
    uri: str
    state: Literal["new", "resume", "done"]

    def __init__(
        self,
        path: Path,
        state: Literal["new", "resume", "done"],
        lock: Lock,
        created: Path | None,
        mirror: Mirror | None = None,
    ) -> None:
        self.path = path
        self.uri = mirror.uri if mirror else str(path.absolute())
        self.state = state
        self._lock = lock
        self._created = created
        self._mirror = mirror

    @classmethod
    def open(
        cls,
        path: str,
        *,
        verb: str,
        config: Values,
        identity: Values,
        raisable: Values,
        overwrite: bool,
        defaults: Values | None = None,
        lazy: Collection[str] = (),
        pace: Pace | None = None,
    ) -> OutDir:
        """The folder exists, is locked, and holds `config.yaml` and `run.log`; or, on an error, is as it was.

        Args:
            path: a folder, or a URI below which files are published.
            config: every field, written to `config.yaml`; plain values.
            identity: those that decide the result, compared with the ones of an existing folder.
            raisable: those that may have grown since, such as `epochs`, whether or not `identity` has them too.
            overwrite: throw away what is there, if it is empty or a result of ours.
            defaults: of fields that the version which began the result may not have had; it did as they say.
            lazy: names in it that are not fetched to scratch, because whoever needs them reads them at `uri`.
            pace: how long the lease of a URI lives.

        Raises:
            UsageError: the folder holds another config's result, or something that is not ours, or a value carries
                credentials.
            LockedError: another process is writing it.
        """
        for value in config.values():
            for text in value if isinstance(value, list | tuple) else [value]:
                storage.refuse_credentials(str(text))
        wanted = _Wanted(
            verb,
            yaml_values(config),
            yaml_values(identity),
            yaml_values(raisable),
            yaml_values(defaults or {}),
            f"--out {storage.printable(path)}",
        )
        out = cls._remote(path, wanted, overwrite, lazy, pace) if not storage.is_local(path) else None
        out = out or cls._local(storage.local_path(path), wanted, overwrite)
        if out.state == "done":
            print(f"already done: {storage.printable(path)}")
        return out

    @classmethod
    def _local(cls, folder: Path, wanted: _Wanted, overwrite: bool) -> OutDir:
        with storage.explained(folder):
            if folder.exists() and not folder.is_dir():
                raise UsageError(f"{wanted.where}: is a file, but a folder is needed")
            _refuse_foreign(folder, wanted, overwrite)
            created = _make(folder)
            try:
                lock = Lock(folder / LOCK, storage.printable(folder))
            except BaseException:
                _unmake(folder, created)
                raise
            try:
                state = _claim(folder, wanted, overwrite)
            except BaseException:
                _unmake(folder, created)
                lock.release()
                raise
        return cls(folder, state, lock, created)

    @classmethod
    def _remote(cls, uri: str, wanted: _Wanted, overwrite: bool, lazy: Collection[str], pace: Pace | None) -> OutDir:
        mirror = Mirror(uri, pace)
        try:
            with storage.explained(mirror.path):
                lock = Lock(mirror.path / LOCK, storage.printable(uri))
                try:
                    _empty(mirror.path)
                    mirror.pull([CONFIG, SUMMARY])
                    if not mirror.is_empty({LOG}):
                        _refuse_foreign(mirror.path, wanted, overwrite, empty=False)
                    if overwrite or (_is_ours(mirror.path) and _is_erased(mirror.path)):
                        mirror.erase(config_text("erase", {"erased": True}))
                        _empty(mirror.path)
                    state = _claim(mirror.path, wanted, overwrite=False)
                    if state == "resume":
                        mirror.pull_rest(lazy)
                    mirror.push()
                except BaseException:
                    lock.release()
                    raise
        except BaseException:
            mirror.release()
            raise
        return cls(mirror.path, state, lock, None, mirror)

    @property
    def log(self) -> Path:
        """The run's log, for whatever is too chatty for the terminal."""
        return self.path / LOG

    def name(self, *parts: str) -> str:
        """What people call a file of the result: where it is, or will be, and not the scratch of this machine."""
        return storage.join(self.uri, *parts) if self._mirror else str(self.path.joinpath(*parts))

    def summary(self) -> Values:
        """The summary of a finished folder."""
        return dict(storage.read_json(self.path / SUMMARY))

    def push(self) -> None:
        """What was written so far survives this machine.

        Raises:
            LockedError: another process has taken over; it must be left alone.
        """
        if self._mirror:
            self._mirror.push()

    def refuse_if_taken(self) -> None:
        """Asks no store; what is known is a few seconds old.

        Raises:
            LockedError: another process has taken over.
        """
        if self._mirror:
            self._mirror.refuse_if_taken()

    def finish(self, summary: Values) -> None:
        """The folder is done: `summary.json` stands in it, whole. Everything else was written before."""
        self.push()
        storage.write_json(self.path / SUMMARY, summary)
        self.push()
        self.state = "done"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            unused = isinstance(error, UsageError) and self.state == "new" and _untouched(self.path)
            if self._mirror:
                self._mirror.end(error, unused and self._mirror.is_empty({CONFIG, LOG}))
            elif unused:
                _empty(self.path)
                _unmake(self.path, self._created)
        finally:
            self._lock.release()


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
    defaults: Values
    where: str
    """How errors begin."""


def _claim(folder: Path, wanted: _Wanted, overwrite: bool) -> Literal["new", "resume", "done"]:
    """What the locked `folder` is to this run; on return it holds a `config.yaml` that says so."""
    _refuse_foreign(folder, wanted, overwrite)  # again, now that nobody else can change it
    if _is_empty(folder):
        _empty(folder)
        return _start(folder, wanted)
    if overwrite or _is_erased(folder):
        _erase(folder)
        return _start(folder, wanted)
    stored = wanted.defaults | _stored(folder, wanted.where)
    _refuse_other(wanted, stored)
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


def _refuse_foreign(folder: Path, wanted: _Wanted, overwrite: bool, *, empty: bool | None = None) -> None:
    """Raises UsageError where something else is there. empty: whether nothing is, where `folder` does not show it."""
    if (_is_empty(folder) if empty is None else empty) or _is_ours(folder):
        return
    advice = "it will not be overwritten; choose another --out" if overwrite else "choose another --out"
    raise UsageError(f"{wanted.where}: holds something that is not a result of rayograph; {advice}")


def _refuse_other(wanted: _Wanted, stored: Values) -> None:
    """Raises UsageError naming the first field in which the result that is there is another one."""
    where = wanted.where
    advice = "use --overwrite or another --out"
    if stored.get("verb") != wanted.verb:
        raise UsageError(f"{where}: holds a result of `rayograph {stored.get('verb')}`; {advice}")
    version = stored.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise UsageError(f"{where}: was written by a newer rayograph (format {version}); {advice}")
    for name, new in (wanted.identity | wanted.raisable).items():
        if name not in stored:
            raise UsageError(f"{where}: its config.yaml names no {name}: damaged, or of another version; {advice}")
        old = stored[name]
        lowered = name in wanted.raisable and not _grew(old, new)
        if old != new and (name not in wanted.raisable or lowered):
            rule = f"{name} may grow but not shrink" if lowered else f"{name} differs"
            raise UsageError(f"{where}: {rule} ({short(old)} there, {short(new)} now); {advice}")


def _grew(old: object, new: object) -> bool:
    return isinstance(old, int | float) and isinstance(new, int | float) and new >= old


def short(value: object) -> str:
    """A value as a part of one line."""
    text = storage.printable(str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _stored(folder: Path, where: str) -> Values:
    try:
        values = yaml.safe_load(storage.read_bytes(folder / CONFIG).decode("utf-8", "surrogateescape"))
    except (yaml.YAMLError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise UsageError(f"{where}: its config.yaml is damaged; use --overwrite or another --out")
    return values


def yaml_values(values: Values) -> Values:
    """`values` as they come back from a YAML file, so that they compare equal to stored ones."""
    return dict(yaml.safe_load(yaml.safe_dump(values, sort_keys=False)) or {})


def _is_empty(folder: Path) -> bool:
    """Absent, empty, or left by a process that died before it wrote its config."""
    if not folder.exists():
        return True
    return all(p.name in {*LOCKS, LOG} or _OWN_TEMPORARY.fullmatch(p.name) for p in folder.iterdir())


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
    _empty(folder, keep=[CONFIG])
    storage.remove(folder / CONFIG)


def _empty(folder: Path, keep: Collection[str] = ()) -> None:
    for entry in folder.iterdir():
        if entry.name not in {*LOCKS, *keep}:
            storage.remove(entry)


def _untouched(folder: Path) -> bool:
    """Whether the folder holds no file but those of `OutDir.open`."""
    files = [p for p in folder.rglob("*") if not p.is_dir()]
    return all(p.parent == folder and p.name in {CONFIG, *LOCKS, LOG} for p in files)


def _make(folder: Path) -> Path | None:
    """`folder` exists; returns the uppermost folder that had to be created for it."""
    missing = [p for p in [folder, *folder.parents] if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[-1] if missing else None


def _unmake(folder: Path, created: Path | None) -> None:
    """Whatever `_make` created is gone again, as far as nobody else uses it."""
    if created is None:
        return
    for name in LOCKS:
        storage.remove(folder / name)
    for path in [folder, *folder.parents]:
        try:
            path.rmdir()
        except OSError:
            return
        if path == created:
            return
