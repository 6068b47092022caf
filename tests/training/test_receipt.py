"""Receipts: a run that did as planned is proven, and every planted fault refutes it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import DataError, RayographError, UsageError
from cluster.outdir import OutDir
from training import receipt
from training.dataset import ROW_GROUP, Dataset, Selection
from training.plan import Plan, rank_slice
from training.receipt import Recorder, Verdict

EPOCHS, BATCH = 3, 32
NUMBER = itertools.count()
RUN = "0123456789abcdef"


@dataclass
class World:
    """150 images of a selection that names its rows backwards, so that no number is right by accident."""

    folder: Path
    count: int = 150
    pixels: np.ndarray = field(init=False)
    selection: Selection = field(init=False)
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        rows = np.arange(self.count)[::-1]
        self.pixels = np.random.default_rng(0).integers(0, 256, (self.count, 4, 4, 1), dtype=np.uint8)
        self.selection = Selection(pa.table({"shard": ["part-0.parquet"] * self.count, "row": rows}))
        sizes = tuple(len(part) for _, _, part, _ in self.selection.row_groups)
        assert sizes == (ROW_GROUP, ROW_GROUP, self.count - 2 * ROW_GROUP)
        self.plan = Plan(sizes, BATCH, 5, "version")

    @property
    def hashes(self) -> np.ndarray:
        return np.asarray([receipt.hash_of(image) for image in self.pixels], dtype=np.uint64)

    def batches(self, epochs: int = EPOCHS) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
        """(epoch, batch, positions, samples): the planned order, looked up by hand."""
        found = []
        places = {
            (group, at): int(p) for group, part in enumerate(self.selection.row_groups) for at, p in enumerate(part[3])
        }
        for epoch in range(epochs):
            groups, rows = self.plan.epoch(epoch).order()
            order = np.asarray([places[int(g), int(r)] for g, r in zip(groups, rows, strict=True)])
            for batch in range(self.plan.batches):
                positions = np.arange(batch * BATCH, batch * BATCH + self.plan.batch_rows(batch))
                found.append((epoch, batch, positions, order[positions]))
        return found

    def run(
        self,
        batches: list[tuple[int, int, np.ndarray, np.ndarray]],
        world: int = 2,
        pixels: np.ndarray | None = None,
        run: str = RUN,
    ) -> None:
        """Each of `world` ranks records its slices of the batches, as one start of a run."""
        token = f"start{next(NUMBER)}"
        shown = self.pixels if pixels is None else pixels
        for rank in range(world):
            with Recorder(self.folder, run, token, rank, world) as recorder:
                for epoch, batch, positions, samples in batches:
                    low, high = rank_slice(len(positions), rank, world)
                    mine = samples[low:high]
                    recorder.add(epoch, batch, positions[low:high], mine, shown[mine])

    def judge(self, epochs: int = EPOCHS) -> Verdict:
        found = receipt.load(self.folder, RUN)
        return receipt.check(found, self.plan, self.selection, self.hashes, epochs)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    yield World(tmp_path / "receipts")


def faults(verdict: Verdict) -> dict[str, int]:
    return {name: getattr(verdict, name) for name, _ in receipt.WORDS if getattr(verdict, name)}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_that_did_as_planned_is_proven(world: World, ranks: int) -> None:
    world.run(world.batches(), ranks)
    verdict = world.judge()
    assert verdict.proven and faults(verdict) == {}
    assert (verdict.images, verdict.epochs, verdict.shown, verdict.repeated_steps) == (150, EPOCHS, 450, 0)
    assert verdict.sentence == (
        "Proven: 150 images, each shown once in each of 3 epochs, in the planned order, with the data set's own pixels "
        "(450 showings)."
    )


def test_a_missing_image_is_found(world: World) -> None:
    batches = world.batches()
    epoch, batch, positions, samples = batches[-1]
    batches[-1] = (epoch, batch, positions[:-1], samples[:-1])
    world.run(batches, 1)
    verdict = world.judge()
    assert not verdict.proven and faults(verdict) == {"missing": 1}
    assert verdict.sentence == "Refuted: of 150 images in 3 epochs, 1 missing (first in epoch 3 at place 150)."


def test_an_image_in_the_place_of_another_is_found_with_the_one_it_displaced(world: World) -> None:
    batches = world.batches()
    batches[2][3][7] = batches[2][3][6]
    world.run(batches)
    assert faults(world.judge()) == {"missing": 1, "duplicate": 1, "out_of_order": 1}
    assert "(first in epoch 1 at place 72)" in world.judge().sentence


def test_an_image_recorded_twice_by_one_start_is_found(world: World) -> None:
    batches = world.batches()
    world.run([*batches, batches[3]])
    verdict = world.judge()
    assert faults(verdict) == {"duplicate": BATCH} and verdict.repeated_steps == 0


def test_two_images_that_changed_places_are_found(world: World) -> None:
    batches = world.batches()
    batches[4][3][[0, 1]] = batches[4][3][[1, 0]]
    world.run(batches)
    assert faults(world.judge()) == {"out_of_order": 2}


def test_one_changed_pixel_is_found(world: World) -> None:
    changed = world.pixels.copy()
    changed[11, 2, 3, 0] ^= 1
    batches = world.batches()
    world.run(batches[:5])
    world.run(batches[5:], pixels=changed)
    verdict = world.judge()
    assert faults(verdict) == {"changed": EPOCHS - 1}
    assert "(first in epoch 2" in verdict.sentence


def test_an_epoch_too_many_is_found_and_one_too_few_as_well(world: World) -> None:
    world.run(world.batches(EPOCHS))
    assert faults(world.judge(EPOCHS - 1)) == {"unplanned": 150}
    assert faults(world.judge(EPOCHS + 1)) == {"missing": 150}


def test_steps_done_again_after_a_restart_count_once_and_are_named(world: World) -> None:
    batches = world.batches()
    world.run(batches[:9], 2)
    world.run(batches[7:], 1)  # its checkpoint was of step 7, and a worker is gone
    verdict = world.judge()
    assert verdict.proven and verdict.repeated_steps == 2
    assert verdict.sentence.endswith("; 2 steps were done again after a restart, and their last time counts.")
    assert receipt.load(world.folder, RUN).starts == 2


def test_of_a_repeated_step_the_last_time_counts(world: World) -> None:
    batches, wrong = world.batches(), world.batches()
    wrong[8][3][[0, 1]] = wrong[8][3][[1, 0]]
    world.run(wrong[:9])
    world.run(batches[8:])
    assert world.judge().proven
    world.run(wrong[8:9])
    assert faults(world.judge()) == {"out_of_order": 2}


def test_a_restart_that_skipped_a_step_is_found(world: World) -> None:
    batches = world.batches()
    world.run(batches[:6])
    world.run(batches[7:])
    assert faults(world.judge()) == {"missing": BATCH}


def test_a_gap_is_refuted_although_the_notes_of_an_older_run_in_the_same_folder_fill_it(world: World) -> None:
    batches = world.batches()
    world.run(batches, run="fedcba9876543210")
    world.run(batches[:6])
    world.run(batches[7:])
    assert faults(world.judge()) == {"missing": BATCH}
    assert len(receipt.load(world.folder, "fedcba9876543210")) == EPOCHS * world.count


def test_a_run_keeps_its_name_when_it_is_taken_up_again_and_gets_another_when_it_is_begun_anew(tmp_path: Path) -> None:
    def name(*, overwrite: bool = False) -> str:
        data = {"data": "a"}
        opened = OutDir.open(
            str(tmp_path / "run"), verb="pretrain", config=data, identity=data, raisable={}, overwrite=overwrite
        )
        with opened as out:
            return receipt.run_id(out.path, 0)

    first = name()
    assert name() == first
    second = name(overwrite=True)
    assert second != first and name() == second


def test_a_record_cut_off_by_a_kill_is_left_out_and_damage_is_not(world: World) -> None:
    batches = world.batches()
    world.run(batches[:2], 1)
    (file,) = world.folder.glob("receipt-*.bin")
    whole = file.read_bytes()
    counts = []
    for cut in range(0, len(whole) + 1, 4):
        file.write_bytes(whole[:cut])
        counts.append(len(receipt.load(world.folder, RUN)))
    assert counts == sorted(counts) and set(counts) == {0, BATCH, 2 * BATCH}
    file.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(DataError, match="damaged"):
        receipt.load(world.folder, RUN)
    file.write_bytes(b"something else altogether")
    with pytest.raises(DataError, match="not a receipt"):
        receipt.load(world.folder, RUN)


def test_nothing_recorded_proves_nothing(world: World) -> None:
    verdict = world.judge()
    assert faults(verdict) == {"missing": EPOCHS * 150} and verdict.shown == 0


def test_a_rank_without_a_row_writes_nothing_and_a_token_serves_once(world: World) -> None:
    empty = np.empty(0, np.int64)
    with Recorder(world.folder, RUN, "a", 0, 1) as recorder:
        before = recorder.path.stat().st_size
        recorder.add(0, 0, empty, empty, np.empty((0, 1, 1, 1), np.uint8))
        assert recorder.path.stat().st_size == before
        recorder.add(0, 1, np.arange(2), np.arange(2), world.pixels[:2])
        assert recorder.path.stat().st_size > before, "nothing is held back"
    with pytest.raises(RayographError, match="exists"):
        Recorder(world.folder, RUN, "a", 0, 1)


def test_receipts_that_other_hosts_keep_to_themselves_do_not_refute_a_run(world: World) -> None:
    world.run(world.batches(), 2)
    files = sorted(world.folder.glob("*.bin"))
    files[1].unlink()
    verdict = world.judge()
    assert not verdict.proven and verdict.missing
    assert verdict.sentence.startswith("Not proven: ") and "but 1 of the receipts are not here" in verdict.sentence


def test_receipts_for_the_rest_of_a_run_are_refused_and_those_of_a_whole_one_are_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--receipt: this run has done 7 steps without"):
        receipt.run_id(tmp_path, 7)
    assert not list(tmp_path.iterdir())
    name = receipt.run_id(tmp_path, 0)
    assert receipt.run_id(tmp_path, 7) == name


def test_a_disk_that_is_full_is_told_in_one_line(world: World) -> None:
    recorder = Recorder(world.folder, RUN, "a", 0, 1)
    recorder._file.close()
    recorder._file = open("/dev/full", "wb", buffering=0)  # noqa: PTH123, SIM115
    with pytest.raises(RayographError, match="the disk is full"):
        recorder.add(0, 1, np.arange(2), np.arange(2), world.pixels[:2])
    recorder.close()


def test_positions_with_a_gap_are_refused(world: World) -> None:
    with Recorder(world.folder, RUN, "a", 0, 1) as recorder, pytest.raises(ValueError, match="consecutive"):
        recorder.add(0, 0, np.asarray([0, 2]), np.arange(2), world.pixels[:2])


def test_the_hash_is_sha_256_of_the_bytes_whatever_their_layout() -> None:
    image = np.random.default_rng(1).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    expected = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "little")
    assert receipt.hash_of(image) == expected == receipt.hash_of(np.asfortranarray(image))


@pytest.mark.ray
def test_the_hashes_of_a_dataset_are_those_of_its_pixels_in_the_order_of_the_selection(phantoms: Path) -> None:
    dataset = Dataset.open(phantoms)
    selection = dataset.select().take(np.arange(199, 9, -3))
    expected = [receipt.hash_of(image) for image in dataset.pixels(selection)]
    assert receipt.hashes_of(dataset, selection).tolist() == expected
