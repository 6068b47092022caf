"""A rank's line to the desk: rows out, the word to end in, and a heartbeat, none of which a step waits for."""

from __future__ import annotations

import os
import threading
from typing import Any

import ray

from training.desk import Place, born

BEAT_S = 1.0
ROWS = "rows"
"""The desk's concurrency group of its own for rows: they arrive in their order."""
FLUSH_S = 600.0
"""How long the desk's store may take to make rows durable, its retries included."""


class Line:
    """One rank's side of the desk."""

    def __init__(self, desk: str, rank: int) -> None:
        """desk: how its names start; a group that starts again finds the one that is there now."""
        names = [str(name) for name in ray.util.list_named_actors() if str(name).startswith(desk)]
        self._desk: Any = ray.get_actor(max(names))
        self._rank = rank
        self._group = 0
        self._rows: list[dict[str, Any]] = []
        self._sent: list[Any] = []
        self._stop = False
        self._phase, self._step = "start", 0
        self._ended = threading.Event()
        self._place = Place(ray.get_runtime_context().get_node_id(), os.getpid(), born(os.getpid()))
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def begin(self, **start: Any) -> tuple[int, str | None]:
        """Rank 0's first word: a group starts. Its number, for `join`, and why it should not, if so."""
        answer = ray.get(self._desk.begin.remote({**start, "pid": os.getpid()}))
        return answer["group"], answer["refused"]

    def join(self, group: int) -> None:
        """This rank is one of that group."""
        self._group = group

    def now(self, phase: str, step: int | None = None) -> None:
        """What the rank is doing, for the heartbeat."""
        self._phase = phase
        self._step = self._step if step is None else step

    def write(self, row: dict[str, Any]) -> None:
        """The row is on its way, together with those that waited for the one before to arrive."""
        self._rows.append(row)
        self._exchange()

    def stop(self) -> bool:
        """Whether the driver wanted a checkpoint and the group's end when it was last heard."""
        self._exchange()
        return self._stop

    def flush(self, step: int) -> None:
        """All rows written so far are durable. May be called in another thread than `write`."""
        ray.get(self._desk.flush.remote(self._group, step), timeout=FLUSH_S)

    def say(self, text: str) -> None:
        """A line for the run's log, which does not have to arrive."""
        self._desk.say.remote(text)

    def push(self) -> None:
        """Rows that waited are on their way, too: a flush waits for them."""
        if self._rows:
            self._send()

    def fail(self, error: BaseException) -> None:
        ray.get(self._desk.fail.remote(type(error).__name__, str(error)))

    def close(self) -> None:
        """The last rows have arrived."""
        self._ended.set()
        self.push()
        ray.get(self._sent)

    def _exchange(self) -> None:
        """Rows leave when those before them have arrived, and their answer, whether to end, is here."""
        ready, self._sent = ray.wait(self._sent, num_returns=len(self._sent), timeout=0) if self._sent else ([], [])
        if ready:
            self._stop = ray.get(ready[-1])
        if self._rows and not self._sent:
            self._send()

    def _send(self) -> None:
        self._sent.append(self._desk.write.options(concurrency_group=ROWS).remote(self._group, self._rows))
        self._rows = []

    def _beat(self) -> None:
        sent: Any = None
        while not self._ended.wait(BEAT_S):
            if sent is None or ray.wait([sent], timeout=0)[0]:
                sent = self._desk.beat.remote(self._group, self._rank, self._place, self._phase, self._step)
