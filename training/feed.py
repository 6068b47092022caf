"""Feeds one rank: a Ray Data pipeline over plan items, put together into this rank's part of each global batch.

Ray Data's tasks read and decode on whatever CPU nodes the cluster has; the rank only gathers finished rows. What is
streamed, and in which order, is the plan's decision alone.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.dataset import Dataset, Selection
from training.plan import Epoch, Item, Plan, rank_slice

BURST_BYTES = 128 * 1024**2
"""Decoded bytes that one pipeline brings a rank; the next starts when half of them are used up.

A pipeline that is kept open but held back does not sleep: Ray 2.60's executor polls ready blocks in a busy loop, inside
the trainer's process, and took half of each core here. Short pipelines that run to their end cost nothing in between.
"""


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
    row_bytes: int
    """Bytes of one decoded image."""
    read_on: str | None = None
    """A custom resource of the nodes that can read `data`."""

    def task(self) -> dict[str, Any]:
        """Ray's arguments for a task that reads."""
        return {"num_cpus": 1} | ({"resources": {self.read_on: 0.001}} if self.read_on else {})


def source_of(
    dataset: Dataset,
    plan: Plan,
    where: tuple[str, ...] = (),
    *,
    labelled: bool = False,
    read_on: str | None = None,
) -> Source:
    path = dataset.image_path
    return Source(dataset.uri, where, labelled, plan, path.height * path.width * dataset.channels, read_on)


def image_ids(source: Source, rows: list[int]) -> list[str]:
    """Ids of rows of the selection, looked up where the data can be read."""
    import ray

    if not rows:
        return []
    task: Any = ray.remote(**source.task())(_image_ids)
    return list(ray.get(task.remote(source, rows)))


def _image_ids(source: Source, rows: list[int]) -> list[str]:
    _, selection = _opened(source)
    return [str(v) for v in selection.take(rows).column("image_id")]


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
        self._buffer = _Buffer(max(1, BURST_BYTES // source.row_bytes // 2))

    def __iter__(self) -> Iterator[Batch]:
        thread = threading.Thread(target=self._stream, name="feed", daemon=True)
        thread.start()
        try:
            yield from self._assemble()
        finally:
            self.close()

    def close(self) -> None:
        """The pipeline ends; batches not yet taken are lost."""
        self._buffer.close()

    def _bursts(self) -> Iterator[tuple[tuple[Item, int], ...]]:
        """Runs of items of about `BURST_BYTES`, over the ends of epochs."""
        burst: list[tuple[Item, int]] = []
        size = 0
        for number in range(self.start[0], self.epochs):
            first = self.start[1] if number == self.start[0] else 0
            epoch = self.source.plan.epoch(number)
            for item in epoch.items_of(self.rank, self.world, first):
                burst.append((item, first))
                size += int(epoch.owned(item, self.rank, self.world, first).sum()) * self.source.row_bytes
                if size >= BURST_BYTES:
                    yield tuple(burst)
                    burst, size = [], 0
        if burst:
            yield tuple(burst)

    def _stream(self) -> None:
        try:
            for burst in self._bursts():
                if not self._buffer.wait_until_low():
                    return
                for block in self._pipeline(burst):
                    self._buffer.put(block)
            self._buffer.end()
        except BaseException as error:  # handed to the trainer's thread, which raises it
            self._buffer.end(error)

    def _pipeline(self, burst: tuple[tuple[Item, int], ...]) -> Iterator[dict[str, np.ndarray]]:
        import ray.data

        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        with context.current(context):
            data: Any = ray.data.range(len(burst), override_num_blocks=len(burst)).map_batches(
                ReadItems(self.source, burst, self.rank, self.world),
                batch_size=None,
                batch_format="numpy",
                concurrency=self.tasks,
                **self.source.task(),
            )
        yield from data.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)

    def _assemble(self) -> Iterator[Batch]:
        plan = self.source.plan
        pending: dict[tuple[int, int], list[dict[str, np.ndarray]]] = {}
        counts: dict[tuple[int, int], int] = {}
        for epoch in range(self.start[0], self.epochs):
            for number in range(self.start[1] if epoch == self.start[0] else 0, plan.batches):
                rows, wait_s = plan.batch_rows(number), 0.0
                low, high = rank_slice(rows, self.rank, self.world)
                while counts.get((epoch, number), 0) < high - low:
                    began = time.monotonic()
                    block = self._buffer.take()
                    wait_s += time.monotonic() - began
                    if block is None:
                        raise RuntimeError(f"the feed ended before batch {number} of epoch {epoch} was complete")
                    _file(block, pending, counts)
                parts = pending.pop((epoch, number), [])
                counts.pop((epoch, number), None)
                self._buffer.used(high - low)
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


class _Buffer:
    """Blocks between the pipeline's thread and the trainer's; knows how many rows the trainer has not used yet."""

    def __init__(self, low: int) -> None:
        self._low = low
        self._blocks: deque[dict[str, np.ndarray]] = deque()
        self._rows = 0
        self._ended = self._closed = self._starving = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def wait_until_low(self) -> bool:
        """Returns when at most `low` rows are left unused, or what is here is not enough; False if it was closed.

        A global batch takes rows of every lane, and with large images a burst does not reach all of them.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._rows <= self._low or self._starving)
            return not self._closed

    def put(self, block: dict[str, np.ndarray]) -> None:
        with self._changed:
            self._blocks.append(block)
            self._rows += len(block["batch"])
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def take(self) -> dict[str, np.ndarray] | None:
        """The next block, or None after the last; raises what the pipeline raised."""
        with self._changed:
            self._starving = not self._blocks
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._blocks or self._ended or self._closed)
            self._starving = False
            if self._blocks:
                return self._blocks.popleft()
            if self._error is not None:
                raise self._error
            return None

    def used(self, rows: int) -> None:
        with self._changed:
            self._rows -= rows
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._blocks.clear()
            self._changed.notify_all()


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
