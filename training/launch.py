"""Ray Train around the worker loop: starts it, follows its metrics, passes on stop requests, explains its failures."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster import errors, storage
from cluster.errors import RayographError, StoppedError
from cluster.progress import Bar, progress
from training import checkpoint
from training.loop import FAILURE, STOP, Job, train

MAX_RESTARTS = 3
STOP_PATIENCE_S = 7.0
"""How long a stopped run may take to write its checkpoint before it is ended without one."""


def launch(job: Job, workers: int, device: str) -> None:
    """The worker loop has come to its end on every rank, or an error says why not. Ray must be up.

    Raises:
        StoppedError, KeyboardInterrupt: stopped on request, with a checkpoint where there was time for one.
        RayographError: what a worker raised on purpose, or why training failed for good.
    """
    outcome: list[BaseException | None] = []

    def fit() -> None:
        try:
            _trainer(job, workers, device).fit()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=fit, name="train", daemon=True)
    thread.start()
    total = job.config.epochs * job.source.plan.total
    done = _samples_before(job)
    with _stopping(job) as stopped, progress("pretrain", total, "images", done=done) as bar:
        tail = _Tail(Path(job.out) / "metrics.jsonl", bar, done)
        while thread.is_alive():
            thread.join(0.5)
            tail.read()
            if stopped() and time.monotonic() - stopped() > STOP_PATIENCE_S:
                break
        tail.read()
    _raise_failure(job, outcome, bool(stopped()))


def _trainer(job: Job, workers: int, device: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        train,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo", timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=device == "cuda", resources_per_worker={"CPU": 1} if device != "cuda" else None
        ),
        run_config=RunConfig(
            name=f"rayograph-{uuid.uuid4().hex[:12]}",  # an old name would resume Ray's state of an old run
            storage_path=str(Path(job.out) / ".ray"),
            failure_config=FailureConfig(max_failures=MAX_RESTARTS, controller_failure_limit=0),  # type: ignore[call-arg]
        ),
    )


@contextlib.contextmanager
def _stopping(job: Job) -> Iterator[Callable[[], float]]:
    """Ctrl-C and SIGTERM ask the ranks for a checkpoint; yields the time of the request, 0.0 before it."""
    asked = [0.0]
    kind = [0]

    def ask(number: int, _frame: object) -> None:
        if asked[0] and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        asked[0], kind[0] = time.monotonic(), number
        (Path(job.out) / STOP).touch()

    if threading.current_thread() is not threading.main_thread():
        yield lambda: asked[0]
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if kind[0] == signal.SIGINT:
        raise KeyboardInterrupt


def _samples_before(job: Job) -> int:
    """Samples consumed before this launch, by the newest checkpoint."""
    state, _ = checkpoint.newest(job.checkpoints)
    return state.position.samples if state else 0


class _Tail:
    """Follows `metrics.jsonl` for the progress bar."""

    def __init__(self, path: Path, bar: Bar, done: int) -> None:
        self.path, self.bar, self.offset, self.samples = path, bar, 0, done

    def read(self) -> None:
        if not self.path.exists():
            return
        if self.path.stat().st_size < self.offset:  # cut back by a restart
            self.offset = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read()
        lines = content[: content.rfind(b"\n") + 1]
        self.offset += len(lines)
        rows = [json.loads(line) for line in lines.splitlines()]
        steps = [row for row in rows if "step" in row]
        if steps and steps[-1]["samples"] > self.samples:
            self.bar.advance(steps[-1]["samples"] - self.samples, f"loss {steps[-1]['loss']:.4f}")
            self.samples = steps[-1]["samples"]


def _raise_failure(job: Job, outcome: list[BaseException | None], stopped: bool) -> None:
    if stopped:
        raise StoppedError("stopped; the same command again goes on from its last checkpoint")
    failure = Path(job.out) / FAILURE
    if failure.exists():
        values = storage.read_json(failure)
        raise getattr(errors, values["kind"], RayographError)(values["message"])
    error = outcome[0] if outcome else None
    if error is not None:
        raise RayographError(f"training failed: {_cause(error)}; details in {job.out}/run.log") from error


def _cause(error: BaseException) -> str:
    """The innermost message of Ray's nested errors, in one line."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return lines[-1] if lines else type(inner).__name__
