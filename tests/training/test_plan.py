"""The order of the data: every row once, whatever the number of workers and wherever training takes it up again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training.plan import MAX_LANES, MAX_WINDOW, WINDOW_BYTES, Epoch, Plan, rank_slice, window_for

Place = tuple[int, int]
"""(batch, place within it)."""
Row = tuple[int, int]
"""(row group, row within it)."""


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=24))
    return Plan(
        sizes=tuple(sizes),
        batch_size=draw(st.one_of(st.integers(1, 20), st.sampled_from([8, 16, 32, 64]))),
        seed=draw(st.integers(0, 3)),
        version=draw(st.sampled_from(["v1", "v2"])),
        window=draw(st.integers(1, 5)),
    )


def read(epoch: Epoch, rank: int, world: int, first_batch: int = 0) -> dict[Place, Row]:
    """What a rank gets when it reads its items and keeps the rows it owns."""
    found: dict[Place, Row] = {}
    for item in epoch.items_of(rank, world, first_batch):
        rows, mine = epoch.rows(item), epoch.owned(item, rank, world, first_batch)
        for at in np.flatnonzero(mine):
            place = (int(rows.batch[at]), int(rows.place[at]))
            assert place not in found
            found[place] = (int(rows.row_group[at]), int(rows.row[at]))
    return found


def in_order(plan: Plan, number: int) -> list[Row]:
    groups, rows = plan.epoch(number).order()
    return list(zip(groups.tolist(), rows.tolist(), strict=True))


def places(plan: Plan) -> list[Place]:
    """The places of an epoch in training order, counted by hand."""
    return [(at // plan.batch_size, at % plan.batch_size) for at in range(sum(plan.sizes))]


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(0, 4))
def test_every_row_comes_exactly_once_per_epoch(plan: Plan, number: int) -> None:
    every_row = [(group, row) for group, size in enumerate(plan.sizes) for row in range(size)]
    assert sorted(in_order(plan, number)) == every_row
    assert plan.total == len(every_row)


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(1, 5))
def test_ranks_together_read_the_same_order_whatever_their_number(plan: Plan, world: int) -> None:
    epoch = plan.epoch(1)
    parts = [read(epoch, rank, world) for rank in range(world)]
    together = {place: row for part in parts for place, row in part.items()}
    assert sum(map(len, parts)) == len(together) == plan.total
    assert [together[place] for place in places(plan)] == in_order(plan, 1)


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(1, 5))
def test_a_rank_owns_its_contiguous_slice_of_every_batch(plan: Plan, world: int) -> None:
    epoch = plan.epoch(0)
    for rank in range(world):
        owned = sorted(read(epoch, rank, world))
        expected = []
        for batch in range(plan.batches):
            start, stop = rank_slice(plan.batch_rows(batch), rank, world)
            expected += [(batch, place) for place in range(start, stop)]
        assert owned == expected


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(1, 4), st.data())
def test_going_on_from_a_batch_reads_exactly_what_is_left(plan: Plan, world: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, plan.batches))
    epoch = plan.epoch(2)
    for rank in range(world):
        whole = read(epoch, rank, world)
        assert read(epoch, rank, world, first) == {p: r for p, r in whole.items() if p[0] >= first}


@settings(max_examples=60, deadline=None)
@given(plans(), st.integers(1, 3))
def test_items_without_a_row_of_the_rank_are_not_read(plan: Plan, world: int) -> None:
    epoch, first = plan.epoch(0), plan.batches // 2
    for rank in range(world):
        for item in epoch.items_of(rank, world, first):
            assert epoch.owned(item, rank, world, first).any()


@settings(max_examples=60, deadline=None)
@given(plans())
def test_items_come_in_the_order_in_which_their_first_rows_are_needed(plan: Plan) -> None:
    epoch = plan.epoch(0)
    first_needed = [int(epoch.rows(item).batch.min()) for item in epoch.items]
    assert first_needed == sorted(first_needed)
    assert sum(item.rows for item in epoch.items) == plan.total


@settings(max_examples=60, deadline=None)
@given(plans())
def test_an_item_is_one_window_of_whole_pieces(plan: Plan) -> None:
    for item in plan.epoch(3).items:
        assert 1 <= len(item.pieces) <= plan.window
        rows = plan.epoch(3).rows(item)
        expected = [(p.row_group, row) for p in item.pieces for row in range(p.start, p.stop)]
        assert sorted(zip(rows.row_group.tolist(), rows.row.tolist(), strict=True)) == sorted(expected)


@settings(max_examples=80, deadline=None)
@given(plans())
def test_row_groups_are_cut_only_between_lanes(plan: Plan) -> None:
    pieces = [piece for item in plan.epoch(0).items for piece in item.pieces]
    assert len(pieces) <= len(plan.sizes) + plan.lanes - 1
    covered = Counter((p.row_group, row) for p in pieces for row in range(p.start, p.stop))
    assert set(covered.values()) == {1} and len(covered) == plan.total


@settings(max_examples=80, deadline=None)
@given(plans(), st.sampled_from([1, 2, 4, 8]))
def test_ranks_that_divide_the_lanes_read_no_piece_twice(plan: Plan, world: int) -> None:
    if plan.lanes % world:
        return
    epoch = plan.epoch(1)
    reads = [piece for rank in range(world) for item in epoch.items_of(rank, world) for piece in item.pieces]
    assert len(reads) == len(set(reads)) <= len(plan.sizes) + plan.lanes - 1


def test_lanes_divide_the_batch_and_leave_each_a_row_group() -> None:
    def lanes(groups: int, batch: int) -> int:
        return Plan((4,) * groups, batch, 0, "v").lanes

    assert [lanes(100, b) for b in (1, 2, 6, 12, 8, 24, 64, 7)] == [1, 2, 2, 4, 8, 8, MAX_LANES, 1]
    assert [lanes(groups, 64) for groups in (1, 2, 3, 4, 7, 8, 9)] == [1, 2, 2, 4, 4, 8, 8]


def test_a_batch_mixes_rows_of_as_many_row_groups_as_there_are_lanes() -> None:
    plan = Plan((64,) * 40, 32, 0, "v", window=4)
    groups = plan.epoch(0).order()[0].reshape(-1, 32)
    assert plan.lanes == 8
    assert min(len(set(batch)) for batch in groups.tolist()) >= 8


def test_a_window_shuffles_rows_of_its_row_groups_into_each_other() -> None:
    plan = Plan((64,) * 16, 1, 0, "v", window=16)  # one lane, one window
    groups, rows = plan.epoch(0).order()
    assert len(set(groups[:64].tolist())) > 12
    assert np.abs(np.corrcoef(np.arange(1024), rows)[0, 1]) < 0.15


def test_the_last_batch_is_short_and_never_dropped() -> None:
    plan = Plan((5, 5, 5, 2), 8, 0, "v")
    assert (plan.batches, [plan.batch_rows(b) for b in range(3)]) == (3, [8, 8, 1])
    shares = [len([p for p in read(plan.epoch(0), rank, 4) if p[0] == 2]) for rank in range(4)]
    assert shares == [0, 0, 0, 1]


def test_data_smaller_than_a_batch_is_one_short_batch() -> None:
    plan = Plan((1, 2), 64, 0, "v")
    assert (plan.batches, plan.batch_rows(0)) == (1, 3)
    assert sorted(in_order(plan, 0)) == [(0, 0), (1, 0), (1, 1)]
    parts = [read(plan.epoch(0), rank, 5) for rank in range(5)]
    assert sorted(map(len, parts)) == [0, 0, 1, 1, 1]


def test_a_single_row_is_an_epoch() -> None:
    plan = Plan((1,), 4, 0, "v")
    assert in_order(plan, 0) == [(0, 0)]


def test_epochs_seeds_and_dataset_versions_each_have_their_own_order() -> None:
    plan = Plan((16,) * 8, 16, 0, "v1")
    variants = [
        in_order(plan, 0),
        in_order(plan, 1),
        in_order(replace(plan, seed=1), 0),
        in_order(replace(plan, version="v2"), 0),
    ]
    assert all(a != b for i, a in enumerate(variants) for b in variants[i + 1 :])
    assert in_order(Plan((16,) * 8, 16, 0, "v1"), 1) == variants[1]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 100), st.integers(1, 12))
def test_rank_slices_tile_a_batch_evenly(rows: int, world: int) -> None:
    slices = [rank_slice(rows, rank, world) for rank in range(world)]
    assert [at for start, stop in slices for at in range(start, stop)] == list(range(rows))
    lengths = [stop - start for start, stop in slices]
    assert max(lengths) - min(lengths) <= 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 512), st.integers(1, 3 * 4096**2))
def test_a_window_holds_about_thirty_two_megabytes(rows: int, row_bytes: int) -> None:
    window = window_for(rows, row_bytes)
    assert 1 <= window <= MAX_WINDOW
    assert window == 1 or window * rows * row_bytes <= WINDOW_BYTES
    assert window == MAX_WINDOW or (window + 1) * rows * row_bytes > WINDOW_BYTES


def test_a_window_of_known_pictures_is_known() -> None:
    assert window_for(64, 128 * 128 * 3) == 10
    assert window_for(64, 128 * 128) == 16
    assert window_for(64, 4096 * 4096 * 3) == 1
    assert window_for(64, 0) == MAX_WINDOW
