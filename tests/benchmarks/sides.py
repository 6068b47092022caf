"""What the parts of `make bench` share: rates, two sides as cells of a row, an environment for a while."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.session import cores

Row = tuple[str, str, str, str, str]
"""What is compared, ours, the peer's, their ratio, the aim."""


def rate_of(count: int, work: Callable[[], object]) -> float:
    """`count` by the seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def pair(a: float, b: float, digits: int = 2) -> tuple[str, str, str]:
    """Both and their ratio."""
    return f"{a:.0f}", f"{b:.0f}", f"{a / b:.{digits}f}"


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def taken_beside(run: Path) -> Iterator[list[float]]:
    """Filled, at the end, with the share of the machine's CPU time that others than the run's ranks took while it
    trained: from its 6th step to the end of its ranks."""
    seen: list[tuple[float, int, dict[int, int]]] = []
    found: list[float] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            metrics = run / "metrics.jsonl"
            ranks = _ticks_of("ray::RayTrainWorker")
            if ranks and metrics.exists() and metrics.read_text().count('"step"') > 5:
                seen.append((time.monotonic(), _busy_ticks(), ranks))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
    if len(seen) < 2:
        raise RuntimeError(f"{run}: no ranks were seen to train for a second on this machine")
    seen = [moment for moment in seen if moment[2].keys() == seen[0][2].keys()]  # the last of them end one by one
    (began, busy, ranks), (last, more, further) = seen[0], seen[-1]
    ticks = (last - began) * os.sysconf("SC_CLK_TCK") * cores()
    found.append((more - busy - (sum(further.values()) - sum(ranks.values()))) / ticks)


def _busy_ticks() -> int:
    """Ticks in which a CPU of this machine did something."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return user + nice + system + irq + softirq


def _ticks_of(title: str) -> dict[int, int]:
    """Ticks that the living processes so called have used, by process id."""
    found = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(title.encode()):
                found[int(folder.name)] = sum(map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:13]))
    return found
