"""Scratch on this machine for an `--out` on an object store: filled from it, held under a lease, published to it."""

from __future__ import annotations

import shutil
from collections.abc import Collection

from cluster import storage
from cluster.errors import RayographError, UsageError
from cluster.lease import Lease, Pace
from cluster.progress import say

CONFIG, SUMMARY, LOG, LOCK = "config.yaml", "summary.json", "run.log", ".lock"
"""Files of every result: its config, what marks it as finished, its log, and the lock on it."""
WRITER = ".writer"
"""The lock of a process that writes on for whoever holds `LOCK`, and may outlive it."""
LOCKS = frozenset({LOCK, WRITER})
"""What emptying a folder leaves: a lock on a file that was unlinked locks nobody else out."""


class Mirror:
    """The folder `path` of this machine and the folder `uri` of a store. Hidden files stay on their own side."""

    def __init__(self, uri: str, pace: Pace | None = None) -> None:
        """The lease on `uri` is this process's; `path` exists.

        Raises:
            UsageError: `uri` is a whole bucket, or a file.
            LockedError: another process writes it.
        """
        storage.sibling(uri, LOCK)  # a bucket has none: refused
        if not storage.list_names(uri) and storage.exists(uri):
            raise UsageError(f"--out {storage.printable(uri)}: is a file, but a folder is needed")
        self.uri = uri
        self.path = storage.scratch(uri)
        self._known: dict[str, tuple[int, int]] = {}
        with storage.explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lease = Lease(storage.join(uri, LOCK), storage.printable(uri), pace)

    def is_empty(self, besides: Collection[str]) -> bool:
        """Whether the store holds nothing but hidden files and the names in `besides`."""
        return all(name in besides or name.startswith(".") for name in storage.list_names(self.uri))

    def pull(self, names: Collection[str]) -> None:
        """Those of the files `names` that the store holds stand in `path`."""
        for name in set(storage.list_names(self.uri)) & set(names):
            storage.fetch(storage.join(self.uri, name), self.path / name)
        self._known = self._files()

    def pull_rest(self, lazy: Collection[str]) -> None:
        """All that the store holds stands in `path`, but for `lazy`, and what was pulled before."""
        there = {LOCK, *(entry.name for entry in self.path.iterdir()), *(name.split("/")[0] for name in self._known)}
        hidden = {name for name in storage.list_names(self.uri) if name.startswith(".")}
        pulled = self.path / ".pulled"
        storage.fetch(self.uri, pulled, skip={*there, *hidden, *lazy})
        for entry in sorted(pulled.iterdir()):
            entry.replace(self.path / entry.name)
        pulled.rmdir()
        self._known |= {name: state for name, state in self._files().items() if name.split("/")[0] not in there}

    def push(self) -> None:
        """The store holds what `path` holds: removed is what is gone here, then changes are uploaded, the summary last.

        Raises:
            LockedError: another process has taken over.
        """
        self._lease.check()
        now = self._files()
        for name in sorted(self._known.keys() - now.keys(), key=lambda name: (name != SUMMARY, name)):
            storage.remove(storage.join(self.uri, *name.split("/")))
            del self._known[name]
        changed = {name for name, state in now.items() if self._known.get(name) != state}
        if changed:
            storage.upload(self.path, self.uri, only=changed)
            self._known |= {name: now[name] for name in changed}

    def refuse_if_taken(self) -> None:
        """Raises LockedError where another process was seen to have taken over; asks no store."""
        self._lease.refuse_if_taken()

    def erase(self, mark: str) -> None:
        """The store holds nothing but the lease. Killed midway, `config.yaml` is `mark`, and the next run goes on."""
        storage.remove(storage.join(self.uri, SUMMARY))
        storage.write_text(storage.join(self.uri, CONFIG), mark)
        for name in storage.list_names(self.uri):
            if name not in {LOCK, CONFIG}:
                storage.remove(storage.join(self.uri, name))
        storage.remove(storage.join(self.uri, CONFIG))
        self._known = {}

    def end(self, error: BaseException | None, unused: bool) -> None:
        """All is pushed and the lease is free; or, where nothing came of it, the store is as it was before.

        error: why the work ends early, if it does; it is not hidden by another one of the store's.
        """
        try:
            if unused:
                self._lease.check()
                storage.remove(self.uri)
            else:
                self.push()
            self._clear()
        except RayographError as failed:
            if error is None:
                raise
            say(f"warning: the last of it is not in the store: {failed}")
        finally:
            self.release()

    def release(self) -> None:
        """The lease is free."""
        self._lease.discard()

    def _clear(self) -> None:
        """What is in the store needs no second copy here."""
        for entry in self.path.iterdir():
            if entry.name not in LOCKS:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _files(self) -> dict[str, tuple[int, int]]:
        """Modification time and size of every file in `path` that is not hidden."""
        found = {}
        for file in self.path.rglob("*"):
            name = file.relative_to(self.path)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                state = file.stat()
                found[name.as_posix()] = (state.st_mtime_ns, state.st_size)
        return found
