"""The desk of a training run: one actor beside the driver that writes the run's metrics, carries the driver's requests
to the ranks, and knows when each rank was last alive. Ranks need no folder in common with the driver for any of it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cluster import storage
from cluster.errors import RayographError
from cluster.mirror import WRITER
from cluster.parts import Parts

METRICS = "metrics.jsonl"
WRITER_PATIENCE_S = 60.0
IDLE_STARTS = 5
"""A run that started this often without one new step is not going to."""
ARRIVAL_S = 60.0
"""How long a flush waits for rows that are on their way."""
PLOTTED = ("loss", "lr", "images_per_second", "grad_norm", "data_wait_s")


@dataclass(frozen=True)
class Place:
    """A process of the cluster."""

    node: str
    pid: int
    born: str
    """When it was started, as the operating system tells; a pid alone may have passed to another process."""


@dataclass
class Pulse:
    """What a rank said of itself last."""

    place: Place
    phase: str
    step: int
    at: float


@dataclass
class Group:
    """The ranks as they were last started."""

    number: int = 0
    world: int = 0
    began: float = 0.0
    stepped: float = 0.0
    """When the last step was reported, or the group began."""
    steps: int = 0
    longest: float = 0.0
    """The longest time between two steps of it."""
    pulses: dict[int, Pulse] = field(default_factory=dict)


@dataclass
class Coming:
    """Ranks of a group that has not begun."""

    began: float
    pulses: dict[int, Pulse] = field(default_factory=dict)


class Desk:
    """Serves the ranks and the driver of one run. Its methods may be called at the same time.

    Nobody else writes the run's metrics: their file is locked for the life of this object, for an actor outlives a
    driver that was killed by a moment, and the same command again must not write beside it.
    """

    def __init__(self) -> None:  # no arguments: Ray would print a warning about them
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)
        self._parts: Parts | None = None
        self._unpublished: list[str] = []
        self._publishing = threading.Lock()
        self._group = Group()
        self._coming: Coming | None = None
        self._highest = self._saved = 0
        self._idle = 0
        self._samples, self._loss, self._last = 0, float("nan"), 0
        self._failure: dict[str, str] | None = None
        self._orders = {"stop": False, "regroup": False}
        self._file: Any = None
        self._board: Any = None

    def open(self, scratch: str, uri: str, highest: int, saved: int | None = None) -> bool:
        """Whether it holds the run now; False where another desk still does, of a driver that was killed perhaps.

        Args:
            scratch: the local folder of the run.
            uri: where it is published; the same where that is local.
            highest: the step that it stands at.
            saved: the step of its newest checkpoint; `highest`, if not given.
        """
        self._path = Path(scratch)
        self._writer = FileLock(str(self._path / WRITER), thread_local=False)
        try:
            self._writer.acquire(timeout=WRITER_PATIENCE_S)
        except Timeout:
            return False
        self._parts = None if storage.is_local(uri) else Parts(uri, METRICS)
        self._highest, self._saved = highest, highest if saved is None else saved
        return True

    # Called by ranks

    def begin(self, start: dict[str, Any]) -> dict[str, Any]:
        """A group starts from step `start["from_step"]`: rows of later steps are dropped. Returns its number, and why
        it should not go on, if so.

        It starts from step 0 where it found no checkpoint; `start["host"]` is where it looked.
        """
        with self._lock:
            now = time.monotonic()
            self._group = Group(self._group.number + 1, start["workers"], now, now)
            self._coming = None
            self._orders["regroup"] = False
            self._idle += 1
            if self._saved and not start["from_step"]:
                self._refuse_beginning(start["host"])
            if self._failure is None and self._idle > IDLE_STARTS:
                self._give_up(start["from_step"])
            if self._failure is not None:
                return {"group": self._group.number, "refused": self._failure["message"]}
            with storage.explained(self._path / METRICS):
                self._reopen(start["from_step"])
                self._write([{"event": "start", **start, "time": time.time()}])
            self._last = start["from_step"]
            self._arrived.notify_all()
            return {"group": self._group.number, "refused": None}

    def write(self, group: int, rows: list[dict[str, Any]]) -> bool:
        """The rows stand in the metrics, visible to a reader. Whether the ranks shall end, after a checkpoint."""
        with self._lock:
            if group != self._group.number:
                return True
            try:
                with storage.explained(self._path / METRICS):
                    self._write(rows)
            except RayographError as error:
                self.fail(type(error).__name__, str(error))
                return True
            for row in rows:
                if "step" in row:
                    self._stepped(row)
            return any(self._orders.values())

    def flush(self, group: int, step: int) -> None:
        """Every row up to `step` is durable: what a checkpoint of that step may rely on.

        Raises:
            RayographError: they are not; or they are those of a group that has ended, whose checkpoint would stand
                for rows that are not there.
        """
        with self._publishing:  # not under the lock: a slow store must not hold up the ranks' rows
            with self._arrived:
                self._arrived.wait_for(lambda: group != self._group.number or self._last >= step, ARRIVAL_S)
                if group != self._group.number:
                    raise RayographError(f"group {group} has ended: its checkpoint of step {step} is not published")
                if self._last < step:
                    raise RayographError(f"the metrics of step {step} did not arrive")
                with storage.explained(self._path / METRICS):
                    self._file.flush()
                    os.fsync(self._file.fileno())
                text, self._unpublished = "".join(self._unpublished), []
            if self._parts is not None and text:
                try:
                    self._parts.append(text)
                except BaseException:
                    with self._lock:
                        self._unpublished.insert(0, text)
                    raise

    def beat(self, group: int, rank: int, place: Place, phase: str, step: int) -> None:
        """Rank `rank` of a group lives, is in `phase` of `step`; group 0 is one that has not begun."""
        with self._lock:
            pulse = Pulse(place, phase, step, time.monotonic())
            if group == 0:
                self._coming = self._coming or Coming(pulse.at)
                self._coming.pulses[rank] = pulse
            elif group == self._group.number:
                self._group.pulses[rank] = pulse
                if self._coming and self._coming.pulses.pop(rank, None) and not self._coming.pulses:
                    self._coming = None

    def saved(self, step: int) -> None:
        """A checkpoint of that step is published."""
        with self._lock:
            self._saved = max(self._saved, step)

    def fail(self, kind: str, message: str, group: int | None = None) -> None:
        """A deliberate error: the run ends with it, and is not tried again.

        group: of the rank that raised it, where it is one's; that of an ended group changes nothing any more.
        """
        with self._lock:
            if self._failure is None and group in {None, 0, self._group.number}:
                self._failure = {"kind": kind, "message": message}

    def say(self, text: str) -> None:
        """A line for the run's log."""
        with (self._path / "run.log").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def note(self, rows: list[dict[str, Any]]) -> None:
        """Rows that belong to no step, such as what a probe found."""
        with self._lock:
            if self._file is not None:
                self._write(rows)

    # Called by the driver

    def order(self, name: str) -> None:
        """`stop` or `regroup`: the ranks write a checkpoint and end, for good or until another group starts."""
        with self._lock:
            self._orders[name] = True

    def look(self) -> dict[str, Any]:
        """How the run stands: plain values, times as seconds ago. Of ranks, those that are coming up, if any are."""
        with self._lock:
            now, group, coming = time.monotonic(), self._group, self._coming
            pulses = coming.pulses if coming else group.pulses
            return {
                "group": group.number,
                "world": group.world,
                "since_step": now - (coming.began if coming else group.stepped),
                "steps": 0 if coming else group.steps,
                "longest": group.longest,
                "pulses": {r: (p.place, p.phase, p.step, now - p.at) for r, p in pulses.items()},
                "samples": self._samples,
                "step": self._highest,
                "saved": self._saved,
                "loss": self._loss,
                "failure": self._failure,
            }

    def close(self) -> None:
        """The metrics are closed, and published where they are not local."""
        if self._file is not None:
            self.flush(self._group.number, self._last)
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            if self._board is not None:
                self._board.close()
                self._board = None
            self._writer.release()

    # Inside

    def _stepped(self, row: dict[str, Any]) -> None:
        now = time.monotonic()
        if self._group.steps:  # the first one also waited for the first data
            self._group.longest = max(self._group.longest, now - self._group.stepped)
        self._group.steps += 1
        self._group.stepped = now
        if row["step"] > self._highest:
            self._highest, self._idle = row["step"], 0
        self._samples, self._loss, self._last = row["samples"], row["loss"], row["step"]
        self._arrived.notify_all()

    def _give_up(self, step: int) -> None:
        message = (
            f"training was started {self._idle} times and did not get beyond step {max(step, self._highest)}; "
            f"what ended it is in {self._path / 'run.log'}"
        )
        self.fail(RayographError.__name__, message)

    def _refuse_beginning(self, host: str) -> None:
        self.fail(
            RayographError.__name__,
            f"{host} found no intact checkpoint, but one of step {self._saved} was written: does that host see --out, "
            "and is what lies there whole? nothing was changed; the same command goes on once it is there again",
        )

    def _reopen(self, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()
        _truncate(self._path / METRICS, from_step)
        self._file = (self._path / METRICS).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self._path / "tensorboard"), purge_step=from_step + 1)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        lines = [json.dumps(row) + "\n" for row in rows]
        self._file.write("".join(lines))
        self._file.flush()
        if self._parts is not None:
            self._unpublished += lines
        for row in rows:
            step = row.get("step", row.get("probed_step"))
            if step is None:
                continue
            kept = PLOTTED if "step" in row else tuple(k for k, v in row.items() if isinstance(v, float))
            for name in kept:
                self._board.add_scalar(name, row[name], step)


def born(pid: int) -> str:
    """When process `pid` was started, in ticks since boot; empty where the system does not tell, or it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def read_metrics(text: str) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, whole lines only; each start drops what came after the step it starts from."""
    rows: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a last line that a kill cut off
            continue
        if row.get("event") == "start":
            rows = [r for r in rows if r.get("step", r.get("probed_step", 0)) <= row["from_step"]]
        rows.append(row)
    return rows


def _truncate(path: Path, last_step: int) -> None:
    """Drop the rows of steps after `last_step`, and a last line cut off by a kill."""
    if not path.exists():
        return
    rows = [
        row
        for row in read_metrics(path.read_text(encoding="utf-8"))
        if row.get("step", row.get("probed_step", 0)) <= last_step
    ]
    storage.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
