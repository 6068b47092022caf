"""Fits as Ray tasks: every fold of a cross-validation, and the final refit, run where there is a free core or GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def run_folds(
    fit: Any, shared: tuple[Any, ...], each: Sequence[tuple[Any, ...]], *, workers: int, gpu: bool
) -> Iterator[Any]:
    """Results of `fit(*shared, *own)` for every `own` of `each`, as they finish, at most `workers` at a time.

    Ray must be up. What is shared lies in the object store once, and tasks of one node read it without a copy.
    """
    import ray

    remote = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0, max_retries=1)(fit)
    stored = [ray.put(value) for value in shared]
    waiting = list(each)
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(remote.remote(*stored, *waiting.pop(0)))
            ready, running = ray.wait(running, num_returns=1)
            yield ray.get(ready[0])
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
