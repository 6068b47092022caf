"""What a person sees while work runs: a bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

PLAIN_EVERY_S = 15.0


class Bar(Protocol):
    def advance(self, amount: int, note: str = "") -> None: ...


def say(text: str) -> None:
    """One line for the user, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """`1 epoch`, `2,000 epochs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class _Plain:
    def __init__(self, name: str, total: int, unit: str) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done, self._started, self._said = 0, time.monotonic(), time.monotonic()

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said >= PLAIN_EVERY_S:
            self._said = now
            rate = self._done / max(1e-9, now - self._started)
            left = (self._total - self._done) / rate if rate else float("inf")
            say(
                f"{self._name}: {self._done:,}/{self._total:,} {self._unit}, {rate:,.1f}/s, "
                f"{left:,.0f} s left{' ' + note if note else ''}"
            )


@contextlib.contextmanager
def progress(name: str, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
    """A bar over `total` units with rate and time left, of which `done` were there before."""
    if not sys.stderr.isatty():
        yield _Plain(name, total - done, unit)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    class _Rich:
        def __init__(self, bars: Progress, task: TaskID) -> None:
            self._bars, self._task = bars, task
            self._started, self._new = time.monotonic(), 0

        def advance(self, amount: int, note: str = "") -> None:
            self._new += amount
            rate = self._new / max(1e-9, time.monotonic() - self._started)
            self._bars.update(self._task, advance=amount, note=f"{rate:,.1f} {unit}/s {note}")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _Rich(bars, bars.add_task(name, total=total, completed=done, note=""))
