"""Proof of what a run trained on: every rank notes each image where its loss is computed; afterwards the notes are
held against the plan and the dataset. Plain files, no Ray."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster import storage
from cluster.errors import DataError, UsageError
from training.dataset import Dataset, Selection
from training.plan import Plan

_FILE = struct.Struct("<8sQI")
"""Magic, the time in ns at which the recorder was opened, and how many ranks have a file of that start."""
_MAGIC = b"RAYORCP2"
_STEP = struct.Struct("<IIIIQ")
"""CRC32 of the rest of the record, images, epoch, global batch, position of the first image within the epoch."""
_PER_IMAGE = 16
"""Bytes of an image: its row of the selection (int64), then, after all rows, 8 bytes of its hash."""
RUN_ID = "run.id"
"""The file of a RUN with what its receipts are named after: runs may share a folder for them."""


def run_id(run: Path, step: int) -> str:
    """What the receipts of the RUN in the local folder `run` are named after: drawn at its start, the same whenever it
    is taken up again, and another one where it was thrown away and begun anew.

    Args:
        step: at which it is taken up.

    Raises:
        UsageError: it has done steps without receipts.
    """
    file = run / RUN_ID
    if not file.exists():
        if step:
            raise UsageError(
                f"--receipt: this run has done {step:,} steps without, and receipts of the rest would prove nothing; "
                "leave it out, or begin anew with --overwrite"
            )
        storage.write_text(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8")


def hash_of(pixels: np.ndarray) -> int:
    """64 bits of the SHA-256 of one image's bytes; its shape is not part of them.

    Of what the standard library has, the fastest here that a changed pixel cannot slip through: processors have
    instructions for it.
    """
    return int.from_bytes(hashlib.sha256(np.ascontiguousarray(pixels).reshape(-1).data).digest()[:8], "little")


class Recorder:
    """Appends what one rank was shown to `folder/receipt-<run>-<token>-rank<rank>.bin`, its own file alone.

    Args:
        run: as of `run_id`.
        token: names this start of the run; no two starts share one, since a file is never reopened.
        world: ranks of this start.

    Raises:
        RayographError: the token was used before, or the folder cannot be written.
    """

    def __init__(self, folder: Path, run: str, token: str, rank: int, world: int) -> None:
        self.path = folder / f"receipt-{run}-{token}-rank{rank}.bin"
        with storage.explained(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb", buffering=0)
        self._write(_FILE.pack(_MAGIC, time.time_ns(), world))

    def add(self, epoch: int, batch: int, positions: np.ndarray, samples: np.ndarray, images: np.ndarray) -> None:
        """One step's images have left this process: a kill of it loses at most the step that is being written.

        Args:
            epoch, batch: both from 0; the global batch within the epoch.
            positions: [b], places in the epoch's order, of which a rank's are consecutive; b may be 0.
            samples: [b], rows of the selection.
            images: uint8 [b, H, W, C], as they are handed to the augmentation.

        Raises:
            RayographError: they cannot be written; the disk is full, perhaps.
        """
        count = len(positions)
        if not count:
            return
        if int(positions[-1]) - int(positions[0]) != count - 1 or len(samples) != count or len(images) != count:
            raise ValueError(f"{count} positions from {positions[0]} to {positions[-1]}: must be consecutive")
        hashes = np.fromiter((hash_of(image) for image in images), dtype="<u8", count=count)
        body = np.asarray(samples, dtype="<i8").tobytes() + hashes.tobytes()
        head = _STEP.pack(0, count, epoch, batch, int(positions[0]))[4:]
        self._write(struct.pack("<I", zlib.crc32(head + body)) + head + body)

    def _write(self, content: bytes) -> None:
        with storage.explained(self.path):
            if self._file.write(content) != len(content):  # what comes before a disk is full is written
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class Receipts:
    """What all ranks noted: one entry [M] per image shown, in order of (epoch, position).

    Where a start of the run did a step again that an earlier one had done, only the later entries are here: the
    checkpoint that it went on from knew nothing of the earlier ones.
    """

    epoch: np.ndarray
    position: np.ndarray
    sample: np.ndarray
    digest: np.ndarray
    """`hash_of` the pixels, uint64."""
    starts: int
    repeated_steps: int
    """Global batches that more than one start worked on."""
    absent: int = 0
    """Ranks of these starts of which there is no file here."""

    def __len__(self) -> int:
        return len(self.epoch)


def load(folder: Path, run: str) -> Receipts:
    """The notes of all ranks and all starts of the run `run`, and of no other that used the same folder; a record cut
    off by a kill is left out.

    Starts are told apart by the token in the file's name, and ordered by the clock of the machine that opened it.

    Raises:
        DataError: a file is none of ours, or was damaged after it was written.
    """
    files = sorted(folder.glob(f"receipt-{run}-*.bin"))
    parts = [part for path in files if (part := _read(path)) is not None]
    opened: dict[str, int] = {}
    for part in parts:
        opened[part.token] = min(part.opened, opened.get(part.token, part.opened))
    rank = {token: number for number, token in enumerate(sorted(opened, key=lambda token: (opened[token], token)))}
    names = ("epoch", "batch", "position", "sample", "digest")
    columns = {name: np.concatenate([_NONE[name], *(part.columns[name] for part in parts)]) for name in names}
    start = np.concatenate([np.empty(0, np.int64), *(np.full(part.rows, rank[part.token]) for part in parts)])
    keys = np.stack([columns["epoch"], columns["position"]], axis=1)
    _, which = np.unique(keys, axis=0, return_inverse=True)
    which = which.reshape(-1)
    last = np.full(int(which.max(initial=-1)) + 1, -1)
    np.maximum.at(last, which, start)
    kept = np.flatnonzero(start == last[which])
    kept = kept[np.lexsort((columns["position"][kept], columns["epoch"][kept]))]
    again = start != last[which]
    repeated = np.unique(np.stack([columns["epoch"], columns["batch"]], axis=1)[again], axis=0)
    return Receipts(
        epoch=columns["epoch"][kept],
        position=columns["position"][kept],
        sample=columns["sample"][kept],
        digest=columns["digest"][kept],
        starts=len(opened),
        repeated_steps=len(repeated),
        absent=sum({part.token: part.world for part in parts}.values()) - len(parts),
    )


_NONE = {name: np.empty(0, np.int64) for name in ("epoch", "batch", "position", "sample")} | {
    "digest": np.empty(0, np.uint64)
}


@dataclass(frozen=True, eq=False)
class _Part:
    token: str
    opened: int
    world: int
    rows: int
    columns: dict[str, np.ndarray]


def _read(path: Path) -> _Part | None:
    """None for a file that was killed while it was being opened."""
    content = path.read_bytes()
    token, found, rank = path.stem.removeprefix("receipt-").rpartition("-rank")
    named = bool(found) and rank.isdecimal()
    if named and len(content) < _FILE.size and _MAGIC.startswith(content[: len(_MAGIC)]):
        return None
    magic, opened, world = _FILE.unpack_from(content) if len(content) >= _FILE.size else (b"", 0, 0)
    if magic != _MAGIC or not named:
        raise DataError(f"{path}: not a receipt of this Rayograph; leave it out")
    columns: dict[str, list[np.ndarray]] = {name: [empty] for name, empty in _NONE.items()}
    at = _FILE.size
    while at + _STEP.size <= len(content):
        crc, count, epoch, batch, first = _STEP.unpack_from(content, at)
        end = at + _STEP.size + count * _PER_IMAGE
        if end > len(content):
            break
        if zlib.crc32(content[at + 4 : end]) != crc:
            raise DataError(f"{path}: damaged after byte {at}, so it proves nothing; restore it or leave it out")
        body = at + _STEP.size
        columns["epoch"].append(np.full(count, epoch, np.int64))
        columns["batch"].append(np.full(count, batch, np.int64))
        columns["position"].append(np.arange(first, first + count, dtype=np.int64))
        columns["sample"].append(np.frombuffer(content, "<i8", count, body))
        columns["digest"].append(np.frombuffer(content, "<u8", count, body + 8 * count))
        at = end
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    return _Part(token, opened, world, len(joined["epoch"]), joined)


# The check


def expected_order(plan: Plan, selection: Selection, epoch: int) -> np.ndarray:
    """Rows of the selection [N] in the order in which an epoch is to show them."""
    groups, rows = plan.epoch(epoch).order()
    places = [places for _, _, _, places in selection.row_groups]
    first = np.concatenate([[0], np.cumsum([len(part) for part in places])])
    return np.asarray(np.concatenate(places)[first[groups] + rows])


def hashes_of(dataset: Dataset, selection: Selection) -> np.ndarray:
    """`hash_of` every image of a selection, uint64 [N] in its order; reads all of them, one row group at a time."""
    hashes = np.empty(len(selection), dtype=np.uint64)
    for shard, row_group, rows, places in selection.row_groups:
        hashes[places] = [hash_of(image) for image in dataset.read_row_group(shard, row_group, rows)]
    return hashes


@dataclass(frozen=True)
class Verdict:
    """What the receipts say, summed over the epochs. All but the first four are 0 for a run that did as planned."""

    images: int
    epochs: int
    shown: int
    repeated_steps: int
    missing: int
    """Images that an epoch did not show."""
    duplicate: int
    """Showings of an image beyond the first within an epoch."""
    out_of_order: int
    """Showings of another image than the one planned for the place."""
    changed: int
    """Showings of other pixels than the dataset has for that image."""
    unplanned: int
    """Showings at a place, in an epoch or of an image that the plan does not have."""
    sentence: str

    @property
    def proven(self) -> bool:
        return not (self.missing or self.duplicate or self.out_of_order or self.changed or self.unplanned)


def check(receipts: Receipts, plan: Plan, selection: Selection, hashes: np.ndarray, epochs: int) -> Verdict:
    """Proves or refutes that every epoch showed each image once, in the planned order, with the dataset's own pixels.

    Args:
        hashes: what `hashes_of` says of the dataset, uint64 [N].
        epochs: how many the run was to do, from the first.
    """
    total = len(selection)
    known = (receipts.epoch < epochs) & (receipts.position < total)
    known &= (receipts.sample >= 0) & (receipts.sample < total)
    counts = {"missing": 0, "duplicate": 0, "out_of_order": 0, "changed": 0, "unplanned": int((~known).sum())}
    first_fault = ""
    for epoch in range(epochs):
        rows = np.flatnonzero(known & (receipts.epoch == epoch))
        position, sample = receipts.position[rows], receipts.sample[rows]
        seen = np.bincount(sample, minlength=total)
        misplaced = sample != expected_order(plan, selection, epoch)[position]
        changed = receipts.digest[rows] != hashes[sample]
        counts["missing"] += int((seen == 0).sum())
        counts["duplicate"] += int(np.maximum(seen - 1, 0).sum())
        counts["out_of_order"] += int(misplaced.sum())
        counts["changed"] += int(changed.sum())
        first_fault = first_fault or _first_fault(epoch, position, misplaced | changed, seen, total)
    sentence = _sentence(total, epochs, receipts, counts, first_fault)
    return Verdict(total, epochs, len(receipts), receipts.repeated_steps, **counts, sentence=sentence)


def _first_fault(epoch: int, position: np.ndarray, wrong: np.ndarray, seen: np.ndarray, total: int) -> str:
    places = np.bincount(position, minlength=total)
    faulty = np.concatenate([np.flatnonzero(places != 1), position[wrong]])
    if len(faulty):
        return f"first in epoch {epoch + 1} at place {int(faulty.min()) + 1}"
    return "" if (seen == 1).all() else f"first in epoch {epoch + 1}"


WORDS: Sequence[tuple[str, str]] = (
    ("missing", "missing"),
    ("duplicate", "shown again within an epoch"),
    ("out_of_order", "not in the planned place"),
    ("changed", "with other pixels than the data set's"),
    ("unplanned", "not in the plan at all"),
)


def _sentence(images: int, epochs: int, receipts: Receipts, counts: dict[str, int], first_fault: str) -> str:
    shown, repeated_steps = len(receipts), receipts.repeated_steps
    again = f"; {repeated_steps:,} steps were done again after a restart, and their last time counts"
    if not any(counts.values()):
        return (
            f"Proven: {images:,} images, each shown once in each of {epochs:,} epochs, in the planned order, with the "
            f"data set's own pixels ({shown:,} showings)" + (again if repeated_steps else "") + "."
        )
    faults = ", ".join(f"{counts[name]:,} {words}" for name, words in WORDS if counts[name])
    if receipts.absent and not any(counts[name] for name, _ in WORDS if name != "missing"):
        return (
            f"Not proven: {faults} of {images:,} images in {epochs:,} epochs, but {receipts.absent:,} of the receipts "
            "are not here; other hosts that trained have them in a folder of their own, if they share none."
        )
    return (
        f"Refuted: of {images:,} images in {epochs:,} epochs, {faults}"
        + (f" ({first_fault})" if first_fault else "")
        + (again if repeated_steps else "")
        + "."
    )
