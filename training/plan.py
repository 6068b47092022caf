"""The order of the data: a pure function of (seed, epoch, dataset version), never of the number of workers.

An epoch permutes the row groups, lays their rows out in that order and cuts the line into `lanes` of equal length.
A lane is shuffled within windows of whole row groups. A global batch takes the next rows of every lane, so that it
mixes rows from far apart, and a rank that owns a slice of the batch reads only the lanes of its slice.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from training import keyed

MAX_LANES = 8
WINDOW_BYTES = 32 * 1024**2
MAX_WINDOW = 16


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of the selected rows of one row group."""

    row_group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Item:
    """One window of one lane: what one reading task does, shuffled by its own key."""

    epoch: int
    lane: int
    window: int
    offset: int
    """Place in the lane of the window's first row."""
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(p.stop - p.start for p in self.pieces)


@dataclass(frozen=True)
class Rows:
    """The rows of an item in training order. All arrays have one entry per row."""

    row_group: np.ndarray
    row: np.ndarray
    """Index among the selected rows of the row group."""
    batch: np.ndarray
    """Number of the global batch within the epoch."""
    place: np.ndarray
    """Place within the global batch."""


@dataclass(frozen=True)
class Plan:
    """The order of every epoch over some row groups.

    sizes: selected rows of each row group; `window` is in row groups.
    """

    sizes: tuple[int, ...]
    batch_size: int
    seed: int
    version: str
    window: int = MAX_WINDOW

    @cached_property
    def total(self) -> int:
        return int(sum(self.sizes))

    @property
    def batches(self) -> int:
        """Global batches of an epoch; the last may be short."""
        return -(-self.total // self.batch_size)

    def batch_rows(self, batch: int) -> int:
        return min(self.batch_size, self.total - batch * self.batch_size)

    @cached_property
    def digest(self) -> str:
        """Tells orders apart: two plans of the same digest show the same samples in the same order."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    @property
    def lanes(self) -> int:
        """The largest power of two that divides the global batch and leaves each lane a row group of its own."""
        lanes = 1
        while lanes * 2 <= min(MAX_LANES, len(self.sizes)) and self.batch_size % (lanes * 2) == 0:
            lanes *= 2
        return lanes

    def epoch(self, epoch: int) -> Epoch:
        return Epoch(self, epoch)


def window_for(row_group_rows: int, row_bytes: int) -> int:
    """Row groups per window so that a decoded window stays near 32 MiB."""
    return int(np.clip(WINDOW_BYTES // max(1, row_group_rows * row_bytes), 1, MAX_WINDOW))


def rank_slice(rows: int, rank: int, world: int) -> tuple[int, int]:
    """Places [start, stop) of a global batch of `rows` that belong to `rank` of `world`."""
    return rank * rows // world, (rank + 1) * rows // world


class Epoch:
    """One epoch of a plan."""

    def __init__(self, plan: Plan, epoch: int) -> None:
        self.plan = plan
        self.number = epoch
        key = ("row groups", plan.seed, epoch, plan.version)
        self._groups = keyed.generator(*key).permutation(len(plan.sizes))
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(plan.sizes)[self._groups])])
        full, rest = divmod(plan.total, plan.batch_size)
        self._full_batches = full
        self._per_lane = plan.batch_size // plan.lanes
        self._rest = np.diff(np.arange(plan.lanes + 1) * rest // plan.lanes)
        self._lane_ends = np.cumsum(full * self._per_lane + self._rest)

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """All windows of all lanes, in the order in which their first row is needed."""
        found = [item for lane in range(self.plan.lanes) for item in self._lane_items(lane)]
        return tuple(sorted(found, key=lambda item: (item.offset // max(1, self._per_lane), item.lane)))

    def _lane_items(self, lane: int) -> list[Item]:
        start = int(self._lane_ends[lane - 1]) if lane else 0
        stop = int(self._lane_ends[lane])
        pieces = []
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        for at in range(first, len(self._groups)):
            low, high = max(start, int(self._starts[at])), min(stop, int(self._starts[at + 1]))
            if low >= stop:
                break
            if high > low:
                base = int(self._starts[at])
                pieces.append(Piece(int(self._groups[at]), low - base, high - base))
        items, offset = [], 0
        for window, at in enumerate(range(0, len(pieces), self.plan.window)):
            item = Item(self.number, lane, window, offset, tuple(pieces[at : at + self.plan.window]))
            items.append(item)
            offset += item.rows
        return items

    def rows(self, item: Item) -> Rows:
        """The rows of `item`, shuffled, with their places in the global batches."""
        groups = np.concatenate([np.full(p.stop - p.start, p.row_group) for p in item.pieces])
        rows = np.concatenate([np.arange(p.start, p.stop) for p in item.pieces])
        key = ("window", self.plan.seed, self.number, self.plan.version, item.lane, item.window)
        order = keyed.generator(*key).permutation(len(rows))
        along = item.offset + np.arange(len(rows))
        batch = np.minimum(along // max(1, self._per_lane), self._full_batches)
        in_full = along < self._full_batches * self._per_lane
        place = np.where(
            in_full,
            item.lane * self._per_lane + along % max(1, self._per_lane),
            int(self._rest[: item.lane].sum()) + along - self._full_batches * self._per_lane,
        )
        batch = np.where(in_full, batch, self._full_batches)
        return Rows(groups[order], rows[order], batch, place)

    def owned(self, item: Item, rank: int, world: int, first_batch: int = 0) -> np.ndarray:
        """Mask over `rows(item)`: those of `rank`'s slices in global batches from `first_batch` on."""
        rows = self.rows(item)
        size = np.where(rows.batch < self._full_batches, self.plan.batch_size, int(self._rest.sum()))
        mine = (rows.place >= rank * size // world) & (rows.place < (rank + 1) * size // world)
        return np.asarray(mine & (rows.batch >= first_batch))

    def items_of(self, rank: int, world: int, first_batch: int = 0) -> tuple[Item, ...]:
        """The items that hold a row of `rank` from `first_batch` on: nothing else is read.

        Where the lanes cannot be dealt out evenly, ranks next to each other share one, and each reads all of its row
        groups for its own rows. All ranks together read each row group 1 + (world - gcd(world, lanes)) / lanes times:
        with 8 lanes once for 1, 2, 4 or 8 ranks, 1.25 times for 3, 1.5 for 5 or 6, 1.75 for 7. On top come at most
        `lanes` - 1 row groups that lie across the end of a lane, which counts only where there are few.
        """
        return tuple(item for item in self.items if self.owned(item, rank, world, first_batch).any())

    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """(row_group, row) of every sample of the epoch in training order; for tests and receipts."""
        parts = [self.rows(item) for item in self.items]
        batch = np.concatenate([p.batch for p in parts])
        place = np.concatenate([p.place for p in parts])
        at = np.lexsort((place, batch))
        return np.concatenate([p.row_group for p in parts])[at], np.concatenate([p.row for p in parts])[at]
