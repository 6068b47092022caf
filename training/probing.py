"""Probes of a run's checkpoints, made beside the training by a Ray task that takes what the ranks leave."""

from __future__ import annotations

import os
import time
from typing import Any

from cluster.errors import RayographError
from cluster.progress import say
from cluster.session import cores
from training import checkpoint, probe
from training.dataset import Dataset, Selection
from training.loop import Job, build

SHARE = 0.05
"""A probe of T seconds is not followed by another within T / SHARE: what it takes from the ranks on a full machine."""
NICENESS = 19


class Probing:
    """Called now and then; probes the newest checkpoint when the last probe is long enough ago.

    The call itself asks no store, which might keep the driver waiting: the task finds the checkpoint.
    """

    def __init__(self, job: Job, dataset: Dataset, selection: Selection) -> None:
        import ray

        self._job = job
        self._data = probe.probe_data(dataset, selection, job.config.seed)
        self.sentence = self._data.sentence
        self._shared = ray.put(self._data)
        self._running: Any = None
        self._probed = 0
        self._next = time.monotonic()
        self._began = 0.0
        self._told = False

    def __call__(self, desk: Any, saved: int) -> None:
        """desk: the run's. saved: the step of its newest checkpoint, 0 before the first."""
        import ray

        if self._running is not None:
            if not ray.wait([self._running], timeout=0)[0]:
                return
            self._ended(desk)
        if saved <= self._probed or time.monotonic() < self._next:
            return
        self._probed, self._began = saved, time.monotonic()
        # its process is made nice, and must not go on to read for the ranks: hence one call each
        task: Any = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(probe_newest)
        self._running = task.remote(self._job, self._shared)

    def close(self) -> None:
        """No probe is left running."""
        import ray

        if self._running is not None:
            ray.cancel(self._running, force=True)

    def last(self, network: Any, wanted: Any, step: int) -> dict[str, Any]:
        """The row of the finished encoder."""
        return probe.row_of(step, probe.probe(network, wanted, self._data))

    def _ended(self, desk: Any) -> None:
        import ray

        reference, self._running = self._running, None
        self._next = time.monotonic() + (time.monotonic() - self._began) / SHARE
        try:
            row = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self._failed(desk, error)
            return
        except ray.exceptions.RayError:  # it was killed: the next one tells as much
            return
        if row is None:
            return
        desk.note.remote([row])
        warning = probe.alarm(row)
        if warning:
            say(f"warning: {warning}")

    def _failed(self, desk: Any, error: Any) -> None:
        """An error of the probe's own code stands in the log, and is said once: every checkpoint may bring it again."""
        desk.say.remote(f"a probe of step {self._probed} ended:\n{error}")
        if not self._told:
            self._told = True
            cause = next(iter(str(error.cause).splitlines()), "")
            say(
                f"warning: the encoder could not be probed ({type(error.cause).__name__}: {cause}); training goes on, "
                "details in run.log"
            )


def probe_newest(job: Job, data: probe.ProbeData) -> dict[str, Any] | None:
    """The row of `metrics.jsonl` for the newest intact checkpoint; None where there is none, or the store is out of
    reach: the next one is probed then. Gives way to whatever else runs there."""
    import torch

    os.nice(NICENESS - os.nice(0))
    torch.set_num_threads(max(1, cores() // 2))
    began = time.monotonic()
    try:
        state, _ = checkpoint.newest(job.checkpoints)
    except (RayographError, FileNotFoundError):  # the latter: removed in favour of newer ones while it was read
        return None
    if state is None:
        return None
    learner = build(job)
    module = learner.module
    module.load_state_dict({k.removeprefix("model."): v for k, v in state.tensors.items() if k.startswith("model.")})
    found = probe.probe(module.kept, learner.input, data)
    return probe.row_of(state.position.step, found, probe_seconds=time.monotonic() - began)
