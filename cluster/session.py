"""The one place that starts or joins Ray, and ends what it started."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.errors import ResourceError, StoppedError
from cluster.nodes import check_code

STARTS = 3
"""How often a local Ray is tried: on a machine that is busy with something else its parts may miss each other."""
OBJECT_STORE_BYTES = 2 * 1024**3
"""Largest object store of a local session: Rayograph streams, it does not cache data there."""


@dataclass(frozen=True)
class Resources:
    """What the running session offers; `cpus` are logical where the session is local."""

    cpus: int
    gpus: int
    nodes: int
    local: bool


def in_cluster() -> bool:
    """Whether work goes to the cluster that `RAY_ADDRESS` names."""
    return "RAY_ADDRESS" in os.environ


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def prepare_environment() -> None:
    """Variables that Ray reads at import, or hands to its processes, are set; the user's own values win.

    Must run before `import ray`: later, this process and the ones it starts would disagree on token authentication.
    """
    if "ray" in sys.modules:
        return
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "300",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # glibc would return a step's temporary tensors to the kernel and fault them in again: a fifth of a CPU step
        "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
        "MALLOC_TRIM_THRESHOLD_": str(2 * 1024**3),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "RAY_ADDRESS" not in os.environ and os.environ["RAY_AUTH_MODE"] == "token":
        # A token of our own for each local session: ~/.ray/auth_token is created world-readable.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


prepare_environment()


def _quiet(log: Path | None) -> list[tuple[logging.Logger, logging.Handler]]:
    """Send Ray's chatter to `log` instead of the terminal; returns what to undo."""
    undo: list[tuple[logging.Logger, logging.Handler]] = []
    for name in ("ray", "ray.data", "ray.train", "ray.tune", "ray.serve"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = False
        handler: logging.Handler = (
            logging.FileHandler(log, encoding="utf-8", delay=True) if log else logging.NullHandler()
        )
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        undo.append((logger, handler))
    return undo


@contextlib.contextmanager
def _own_terminal(log: Path | None) -> Iterator[None]:
    """What Ray's C++ writes to file descriptor 2 goes to `log` inside the block; `sys.stderr` keeps the terminal.

    Each process of Ray's logs errors there beside its own files, whatever its level, and so tells of actors whose
    arguments lie in the object store, which those of Ray Data always do (ray 2.60).
    """
    ours = sys.stderr
    try:
        is_ours = ours.fileno() == 2
    except (AttributeError, OSError, ValueError):  # closed, or no file
        is_ours = False
    if not is_ours:  # somebody else, such as a notebook or pytest, decides what comes of it
        yield
        return
    ours.flush()
    terminal = os.dup(2)
    there = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(there, 2)
    os.close(there)
    sys.stderr = os.fdopen(terminal, "w", buffering=1, encoding=ours.encoding, errors=ours.errors)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        sys.stderr.close()
        sys.stderr = ours
        if log is not None and log.is_file() and not log.stat().st_size:
            log.unlink()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What Ray says of other nodes goes to its log inside the block; `log_to_driver` does not keep it from stdout."""
    from ray._private import worker

    said = worker.print_to_stdstream

    def log(data: dict[str, Any], ignore_prefix: bool) -> None:
        for line in data["lines"]:
            logging.getLogger("ray").error(line)

    worker.print_to_stdstream = log
    try:
        yield
    finally:
        worker.print_to_stdstream = said


def resources() -> Resources:
    """What the current session has. Ray must be up."""
    import ray

    total = ray.cluster_resources()
    nodes = [n for n in ray.nodes() if n["Alive"]]
    return Resources(int(total.get("CPU", 0)), int(total.get("GPU", 0)), len(nodes), not in_cluster())


@contextlib.contextmanager
def session(*, cpus: int = 0, log: Path | None = None) -> Iterator[Resources]:
    """Ray is up inside the block: the running one, the cluster of `RAY_ADDRESS`, or a local one.

    Args:
        cpus: logical CPUs that the work needs at once. A local session has at least this many, whatever the machine's
            cores: on small machines training workers would otherwise leave none to Ray Data, which then waits forever.
        log: file that takes Ray's messages.

    A session that this call started is ended with the block, also on Ctrl-C, and its folder under Ray's temporary
    directory is removed; one that was already there is left as it was.

    Raises:
        ResourceError: the cluster of `RAY_ADDRESS` cannot be joined, or one of its nodes does not answer.
        UsageError: one of its nodes runs other code than this process.
        StoppedError: SIGTERM came while this call's own session was up.
    """
    import ray

    if ray.is_initialized():
        yield resources()
        return
    undo = _quiet(log)
    folder: str | None = None
    try:
        with _own_terminal(log), _silent():
            try:
                if in_cluster():
                    _join()
                else:
                    folder = _start_local(max(cpus, cores()))
                import ray.data  # sets up loggers of its own, as ray.init does: silence them after both

                undo += _quiet(log)
                with _stoppable():
                    if in_cluster():
                        check_code()
                    yield resources()
            finally:
                ray.shutdown()
    finally:
        for logger, handler in undo:
            handler.close()
            logger.handlers = []
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM leaves the block as StoppedError, whatever Ray makes of it on its way.

    `ray.init` puts a C++ handler that prints a stack and aborts a process that has not ended after 3 seconds beneath a
    Python one that raises SystemExit, of which `ray.wait` makes one of another code. Must be entered when Ray is up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if not asked:  # once: another one must not interrupt the clean-up
            asked.append(number)
            raise SystemExit(number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SystemExit as error:
        if asked:
            raise StoppedError("stopped by SIGTERM") from error
        raise


def _join() -> None:
    import ray

    address = os.environ["RAY_ADDRESS"]
    _knock(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__  # a version mismatch is told over several lines
        raise ResourceError(f"RAY_ADDRESS={address}: cannot join this cluster ({said[:300]})") from error


def _knock(address: str) -> None:
    """Ray tries for minutes to join what does not answer, and chatters; a refused connection is known at once."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(
            f"RAY_ADDRESS={address}: no cluster answers there ({error}); start it, or unset RAY_ADDRESS to run locally"
        ) from error


def _start_local(cpus: int) -> str:
    import ray

    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else OBJECT_STORE_BYTES
    store = int(max(100 * 1024**2, min(OBJECT_STORE_BYTES, 0.8 * shm)))
    for left in reversed(range(STARTS)):
        try:
            context = _init_local(cpus, store)
            break
        except Exception as error:
            ray.shutdown()
            if not left:
                cause = type(error).__name__
                raise ResourceError(
                    f"Ray could not be started on this machine ({cause}); look at it with: rayograph doctor"
                ) from error
    return str(context.address_info["session_dir"])


def _init_local(cpus: int, store: int) -> Any:
    import ray

    return ray.init(
        address="local",  # else a cluster that `ray start` left running here would be joined, and refuse num_cpus
        num_cpus=cpus,
        object_store_memory=store,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        _temp_dir=os.environ.get("RAY_TMPDIR"),
        _system_config={
            "health_check_timeout_ms": 60_000,  # two busy cores must not look like a dead node
            "worker_maximum_startup_concurrency": cpus,  # by default the real cores, with a warning beyond
            "enable_metrics_collection": False,  # nobody scrapes a local session; its agent takes a tenth of a core
        },
    )
