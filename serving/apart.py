"""FAISS in a process of its own: its OpenMP runtime and torch's must not meet."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Apart:
    """Calls of module-level functions, one after another, in one other process, which keeps its state between them."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The function's result; what it raises is raised here."""
        return self._pool.submit(function, *args, **kwargs).result()


@contextlib.contextmanager
def apart() -> Iterator[Apart]:
    """A fresh process, spawned and not forked: a fork would carry torch's threads along. It ends with the block."""
    context: Any = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield Apart(pool)
