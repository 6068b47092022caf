"""FAISS in a process of its own: its OpenMP runtime and torch's must not meet."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

from cluster.errors import ResourceError

P = ParamSpec("P")
T = TypeVar("T")


class Apart:
    """Calls of module-level functions, one after another, in one other process, which keeps its state between them."""

    def __init__(self, link: Connection) -> None:
        self._link = link

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result; what it raises is raised here.

        Raises:
            ResourceError: the process was killed.
        """
        try:
            self._link.send((function, args, kwargs))
            fine, value = self._link.recv()
        except (EOFError, OSError) as error:
            raise ResourceError("the index's process was killed, perhaps for its memory; run it again") from error
        if not fine:
            raise value
        result: T = value
        return result


@contextlib.contextmanager
def apart() -> Iterator[Apart]:
    """A fresh process, spawned and not forked: a fork would carry torch's threads along. It ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Apart(ours)
    finally:
        ours.close()
        process.kill()  # also in the middle of a call, on Ctrl-C
        process.join()


def _answer(link: Connection) -> None:
    """Answers calls until the other end is gone, as when its process was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches both; the other end decides
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, args, kwargs = link.recv()
            try:
                answer = (True, function(*args, **kwargs))
            except Exception as error:
                answer = (False, error)
            link.send(answer)
