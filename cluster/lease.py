"""One writer at a time for a result: a lock of the operating system's, or a lease where there is none to keep one."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cluster import storage
from cluster.errors import LockedError, RayographError, UsageError

WATCH_BEATS = 3
"""How long a lease that looks stale is watched, in beats: the clock that it was written by may be another."""


class Lock:
    """An operating-system lock (it dies with its process) on a local file that names its holder."""

    def __init__(self, path: Path, subject: str) -> None:
        self._path = path
        # the short wait covers a holder that is just deleting the folder it could not use
        self._lock = FileLock(path, timeout=0.3, poll_interval=0.05)
        try:
            self._lock.acquire()
        except Timeout:
            raise LockedError(
                f"{subject}: another process is writing it ({_holder(path)}); wait for it or choose another --out"
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


@dataclass(frozen=True)
class Pace:
    """Seconds."""

    beat: float = 10.0
    """Between two signs of life."""
    stale: float = 60.0
    """Without one, until the holder counts as dead."""
    settle: float = 1.0
    """Between writing a lease and reading it back: of two who write at once, the later one has it."""


@dataclass(frozen=True)
class _Holder:
    """Who holds a lease, as its object says."""

    holder: str
    host: str
    machine: str
    pid: int
    beat: float

    def __str__(self) -> str:
        return f"pid {self.pid} on {storage.printable(self.host)}"


class Lease:
    """The right to write below a URI, kept alive by a thread until `discard`.

    A store without conditional writes cannot promise more: who holds it asks `check` before each publishing step, and
    so stops at the latest there once somebody else has taken over.
    """

    def __init__(self, uri: str, subject: str, pace: Pace | None = None) -> None:
        """The lease object `uri` names this process.

        Raises:
            LockedError: another live process holds it.
            RayographError: the store cannot be written.
        """
        self._uri, self._subject, self._pace = uri, subject, pace or Pace()
        self._me = secrets.token_hex(8)
        self._taken: str | None = None
        self._renewed = _clock()
        self._ended = threading.Event()
        self._renewing = threading.Lock()
        held = self._read()
        if held is not None and not self._is_dead(held):
            raise self._locked(held)
        self._write()
        time.sleep(self._pace.settle)
        held = self._read()
        if held is None or held.holder != self._me:
            raise self._locked(held)
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """The lease is this process's now.

        Raises:
            LockedError: somebody else has taken over, or may have, and ended, while the store could not be reached.
            RayographError: the store cannot be reached.
        """
        self._renew()
        self.refuse_if_taken()

    def refuse_if_taken(self) -> None:
        """Raises LockedError where `check`, or the last sign of life, found it so; asks no store."""
        if self._taken is not None:
            raise LockedError(f"{self._subject}: {self._taken}; this run stops, and leaves what is there to the other")

    def discard(self) -> None:
        """The lease is free and its object gone, unless it is somebody else's by now."""
        self._ended.set()
        self._thread.join()
        with suppress(RayographError):
            held = self._read()
            if held is not None and held.holder == self._me:
                storage.remove(self._uri)

    def _beat(self) -> None:
        while not self._ended.wait(self._pace.beat):
            with suppress(RayographError):  # out of reach: the next one tries again, and others wait `stale` seconds
                self._renew()

    def _renew(self) -> None:
        """A sign of life is written, if the lease is still ours.

        After a time in which others could take it for a dead one's, its object tells: it still names this process if
        nobody has.
        """
        with self._renewing:
            held = self._read() if self._taken is None else None
            if held is not None and held.holder != self._me:
                self._taken = f"another process has taken over ({held})"
            elif held is None and _clock() - self._renewed > self._pace.stale:
                self._taken = "its lease was gone after the store was out of reach for too long"
            if self._taken is None:
                self._write()

    def _is_dead(self, held: _Holder) -> bool:
        """Whether the holder has ended, or its signs of life have: clocks may differ, so one is waited for."""
        if held.machine == _machine() and not _is_alive(held.pid):
            return True
        if abs(time.time() - held.beat) <= self._pace.stale:
            return False
        time.sleep(WATCH_BEATS * self._pace.beat)
        return self._read() == held

    def _locked(self, held: _Holder | None) -> LockedError:
        who = f" ({held})" if held else ""
        return LockedError(
            f"{self._subject}: another process is writing it{who}; wait for it or choose another --out\n"
            f"if it was killed on another machine, try again in {self._pace.stale:.0f} seconds"
        )

    def _write(self) -> None:
        mine = _Holder(self._me, socket.gethostname(), _machine(), os.getpid(), time.time())
        storage.write_json(self._uri, asdict(mine))
        self._renewed = _clock()

    def _read(self) -> _Holder | None:
        """The holder; None where there is none, or what is there is no lease."""
        try:
            return _Holder(**json.loads(storage.read_bytes(self._uri)))
        except (UsageError, TypeError, ValueError):
            return None


def _clock() -> float:
    """Seconds, those included in which this machine was asleep, where it can tell."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _machine() -> str:
    """This machine, and on it the space in which process ids are told apart: containers share a kernel."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return " ".join(parts)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
