"""A rank's line to the desk: rows out, the word to end in, and a heartbeat, none of which a step waits for."""

from __future__ import annotations

import os
import platform
import threading
from typing import Any

import ray

from cluster.errors import RayographError
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
        self._ended, self._news = threading.Event(), threading.Event()
        self._place = Place(ray.get_runtime_context().get_node_id(), os.getpid(), born(os.getpid()))
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def begin(self, **start: Any) -> tuple[int, str | None]:
        """Rank 0's first word: a group starts. Its number, for `join`, and why it should not, if so."""
        answer = _answer(self._desk.begin.remote({**start, "pid": os.getpid(), "host": platform.node()}))
        return answer["group"], answer["refused"]

    def join(self, group: int) -> None:
        """This rank is one of that group."""
        self._group = group

    def now(self, phase: str, step: int | None = None) -> None:
        """What the rank is doing, for the heartbeat, which comes at once where it says how long a stop may take."""
        self._phase = phase
        self._step = self._step if step is None else step
        if phase == "save":
            self._news.set()

    def write(self, row: dict[str, Any]) -> None:
        """The row is on its way, together with those that waited for the one before to arrive."""
        self._rows.append(row)
        self._exchange()

    def stop(self) -> bool:
        """Whether the driver wanted a checkpoint and the group's end when it was last heard."""
        self._exchange()
        return self._stop

    def flush(self, step: int) -> None:
        """All rows written so far are durable. May be called in another thread than `write`.

        Raises:
            RayographError: they are not.
        """
        try:
            _answer(self._desk.flush.remote(self._group, step), FLUSH_S)
        except ray.exceptions.GetTimeoutError:
            raise RayographError(f"the metrics of step {step} were not durable within {FLUSH_S:.0f} s") from None

    def saved(self, step: int) -> None:
        """A checkpoint of that step is published."""
        self._desk.saved.remote(step)

    def say(self, text: str) -> None:
        """A line for the run's log, which does not have to arrive."""
        self._desk.say.remote(text)

    def push(self) -> None:
        """Rows that waited are on their way, too: a flush waits for them."""
        if self._rows:
            self._send()

    def fail(self, error: BaseException) -> None:
        ray.get(self._desk.fail.remote(type(error).__name__, str(error), self._group))

    def close(self) -> None:
        """The last rows have arrived."""
        self._ended.set()
        self._news.set()
        self.push()
        for reference in self._sent:
            _answer(reference)

    def _exchange(self) -> None:
        """Rows leave when those before them have arrived, and their answer, whether to end, is here."""
        ready, self._sent = ray.wait(self._sent, num_returns=len(self._sent), timeout=0) if self._sent else ([], [])
        if ready:
            self._stop = _answer(ready[-1])
        if self._rows and not self._sent:
            self._send()

    def _send(self) -> None:
        self._sent.append(self._desk.write.options(concurrency_group=ROWS).remote(self._group, self._rows))
        self._rows = []

    def _beat(self) -> None:
        sent: Any = None
        while True:
            self._news.wait(BEAT_S)
            self._news.clear()
            if self._ended.is_set():
                return
            if sent is None or ray.wait([sent], timeout=0)[0]:
                sent = self._desk.beat.remote(self._group, self._rank, self._place, self._phase, self._step)


def _answer(reference: Any, timeout: float | None = None) -> Any:
    """What the desk answers; what it raised on purpose comes out as it was, without the way that it took."""
    try:
        return ray.get(reference, timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RayographError):
            raise error.cause from None
        raise
