"""Everything that Rayograph raises on purpose, with the exit code each one becomes.

RayographError            1    the work failed; the message says what, where, what to do
├── UsageError            2    the command, the config or the input named cannot be right
├── DataError             1    the data itself is broken beyond what was allowed
├── ResourceError         1    the machine or cluster does not have what was asked for
├── LockedError           1    another process is writing the same `--out`
└── StoppedError         75    stopped on request; the same command again goes on
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RayographError(Exception):
    """Base of all deliberate errors; `str(error)` is one or two lines fit for stderr."""

    exit_code = 1


class UsageError(RayographError):
    exit_code = 2


class DataError(RayographError):
    pass


class ResourceError(RayographError):
    pass


class LockedError(RayographError):
    pass


class StoppedError(RayographError):
    exit_code = 75


def nearest(name: str, valid: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest valid name, or an empty string."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
