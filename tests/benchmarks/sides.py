"""What the parts of `make bench` share: rates, two sides as cells of a row, an environment for a while."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
