"""Feeds one rank: a Ray Data pipeline over plan items, put together into this rank's part of each global batch.

Ray Data's tasks read and decode on whatever CPU nodes the cluster has; the rank only gathers finished rows. What is
streamed, and in which order, is the plan's decision alone.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.dataset import Dataset, Selection
from training.plan import Epoch, Item, Plan, rank_slice

SPAN_ITEMS = 256
"""Items per pipeline: starting a pipeline costs a moment, so small epochs share one."""
QUEUE_BLOCKS = 4


@dataclass(frozen=True)
class Batch:
    """A rank's part of one global batch. `images` may alias Ray's read-only memory: do not write into it."""

    epoch: int
    number: int
    """Global batch within the epoch."""
    rows: int
    """Samples of the whole global batch."""
    positions: np.ndarray
    """Place in the epoch's order, int64 [b]; b is 0 where a short batch leaves this rank nothing."""
    samples: np.ndarray
    """Row of the selection, int64 [b]."""
    images: np.ndarray
    """uint8 [b, height, width, channels]."""
    wait_s: float
    """Seconds the rank waited for this batch."""
    decoder_pids: frozenset[int]
    """Processes that decoded it."""


@dataclass(frozen=True)
class Source:
    """What a reading task needs; small enough to ship with the pipeline."""

    data: str
    where: tuple[str, ...]
    labelled: bool
    plan: Plan


@functools.lru_cache(maxsize=4)
def _opened(source: Source) -> tuple[Dataset, Selection]:
    dataset = Dataset.open(source.data)
    selection = dataset.select(source.where, labelled=source.labelled)
    if dataset.plan(selection, batch_size=source.plan.batch_size, seed=source.plan.seed) != source.plan:
        raise RuntimeError(f"{source.data}: the dataset changed while it was being read")
    return dataset, selection


@functools.lru_cache(maxsize=4)
def _epoch(plan: Plan, number: int) -> Epoch:
    return plan.epoch(number)


@dataclass(frozen=True)
class ReadItems:
    """The Ray Data task: item numbers in, decoded rows of one rank out, in training order."""

    source: Source
    items: tuple[tuple[Item, int], ...]
    """(item, first global batch wanted)."""
    rank: int
    world: int

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        parts = [self._read(*self.items[int(number)]) for number in block["id"]]
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def _read(self, item: Item, first_batch: int) -> dict[str, np.ndarray]:
        dataset, selection = _opened(self.source)
        epoch = _epoch(self.source.plan, item.epoch)
        rows = epoch.rows(item)
        mine = np.flatnonzero(epoch.owned(item, self.rank, self.world, first_batch))
        path = dataset.image_path
        images = np.empty((len(mine), path.height, path.width, dataset.channels), dtype=np.uint8)
        samples = np.empty(len(mine), dtype=np.int64)
        for number in np.unique(rows.row_group[mine]):
            shard, row_group, within, places = selection.row_groups[int(number)]
            at = np.flatnonzero(rows.row_group[mine] == number)
            chosen = rows.row[mine][at]
            images[at] = dataset.read_row_group(shard, row_group, within[chosen])
            samples[at] = places[chosen]
        count = len(mine)
        return {
            "epoch": np.full(count, item.epoch),
            "batch": rows.batch[mine],
            "place": rows.place[mine],
            "sample": samples,
            "pid": np.full(count, os.getpid()),
            "image": images,
        }


class Feed:
    """Batches of one rank from (epoch, batch) to the end of the last epoch.

    Iterating starts a background thread that keeps the pipeline ahead of the trainer; `close` ends it.
    """

    def __init__(
        self, source: Source, *, rank: int, world: int, start: tuple[int, int], epochs: int, tasks: int = 2
    ) -> None:
        self.source, self.rank, self.world = source, rank, world
        self.start, self.epochs, self.tasks = start, epochs, tasks
        self._queue: queue.Queue[dict[str, np.ndarray] | BaseException | None] = queue.Queue(QUEUE_BLOCKS)
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[Batch]:
        thread = threading.Thread(target=self._stream, name="feed", daemon=True)
        thread.start()
        try:
            yield from self._assemble()
        finally:
            self.close()

    def close(self) -> None:
        self._closed.set()
        while not self._queue.empty():
            self._queue.get_nowait()

    def _spans(self) -> Iterator[tuple[tuple[Item, int], ...]]:
        span: list[tuple[Item, int]] = []
        for number in range(self.start[0], self.epochs):
            first = self.start[1] if number == self.start[0] else 0
            epoch = self.source.plan.epoch(number)
            span += [(item, first) for item in epoch.items_of(self.rank, self.world, first)]
            if len(span) >= SPAN_ITEMS:
                yield tuple(span)
                span = []
        if span:
            yield tuple(span)

    def _stream(self) -> None:
        try:
            for span in self._spans():
                for block in self._pipeline(span):
                    self._put(block)
                    if self._closed.is_set():
                        return
            self._put(None)
        except BaseException as error:  # handed to the trainer's thread, which raises it
            self._put(error)

    def _put(self, value: dict[str, np.ndarray] | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(value, timeout=0.5)
            except queue.Full:
                continue
            return

    def _pipeline(self, span: tuple[tuple[Item, int], ...]) -> Iterator[dict[str, np.ndarray]]:
        import ray.data

        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        with context.current(context):
            data: Any = ray.data.range(len(span), override_num_blocks=len(span)).map_batches(
                ReadItems(self.source, span, self.rank, self.world),
                batch_size=None,
                batch_format="numpy",
                num_cpus=1,
                concurrency=self.tasks,
            )
        yield from data.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)

    def _assemble(self) -> Iterator[Batch]:
        plan = self.source.plan
        pending: dict[tuple[int, int], list[dict[str, np.ndarray]]] = {}
        counts: dict[tuple[int, int], int] = {}
        ended = False
        for epoch in range(self.start[0], self.epochs):
            for number in range(self.start[1] if epoch == self.start[0] else 0, plan.batches):
                rows, wait_s = plan.batch_rows(number), 0.0
                low, high = rank_slice(rows, self.rank, self.world)
                while counts.get((epoch, number), 0) < high - low:
                    if ended:
                        raise RuntimeError(f"the feed ended before batch {number} of epoch {epoch} was complete")
                    began = time.monotonic()
                    block = self._queue.get()
                    wait_s += time.monotonic() - began
                    if isinstance(block, BaseException):
                        raise block
                    ended = block is None
                    if block is not None:
                        _file(block, pending, counts)
                parts = pending.pop((epoch, number), [])
                counts.pop((epoch, number), None)
                yield self._batch(epoch, number, rows, parts, wait_s)

    def _batch(self, epoch: int, number: int, rows: int, parts: list[dict[str, np.ndarray]], wait_s: float) -> Batch:
        first = number * self.source.plan.batch_size
        if not parts:
            empty = np.empty(0, dtype=np.int64)
            return Batch(epoch, number, rows, empty, empty, np.empty((0, 1, 1, 1), np.uint8), wait_s, frozenset())
        place = np.concatenate([p["place"] for p in parts])
        order = np.argsort(place)
        return Batch(
            epoch=epoch,
            number=number,
            rows=rows,
            positions=first + place[order],
            samples=np.concatenate([p["sample"] for p in parts])[order],
            images=np.concatenate([p["image"] for p in parts])[order],
            wait_s=wait_s,
            decoder_pids=frozenset(int(v) for p in parts for v in np.unique(p["pid"])),
        )


def _file(
    block: dict[str, np.ndarray],
    pending: dict[tuple[int, int], list[dict[str, np.ndarray]]],
    counts: dict[tuple[int, int], int],
) -> None:
    """Sort a block's rows under the global batches that they belong to."""
    keys = np.stack([block["epoch"], block["batch"]], axis=1)
    for epoch, batch in np.unique(keys, axis=0):
        at = np.flatnonzero((keys[:, 0] == epoch) & (keys[:, 1] == batch))
        key = (int(epoch), int(batch))
        pending.setdefault(key, []).append({name: values[at] for name, values in block.items()})
        counts[key] = counts.get(key, 0) + len(at)
