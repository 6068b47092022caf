"""What the kill tests share: finding the processes of a run, killing them at chosen moments, and the oracles."""

from __future__ import annotations

import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from tests.runs import Process, losses_of, rows_of, steps_of, wait_until
from training import checkpoint, receipt
from training.configs import PretrainConfig
from training.dataset import Dataset

RANK, CONTROLLER, DESK, READER = (
    "ray::RayTrainWorker",
    "ray::TrainController",
    "ray::Desk",
    "ray::MapBatches(ReadItems)",
)
NEXT_STEP_S = 120
FIFTHS = 5


def processes(process: Process, title: str) -> list[int]:
    """The living processes of a run's family that Ray calls so."""
    found = []
    for pid in sorted(process.family()):
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_text(errors="replace").startswith(title):
                found.append(pid)
    return found


def writing(config: PretrainConfig) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any((Path(config.out) / "checkpoints").glob(".step-*.partial"))


@dataclass(frozen=True)
class Kill:
    what: str
    """Which process, and at which moment."""
    step: int
    """The last step whose row was there."""
    recovery_s: float
    """Until the next step that had not been done before; nan where the driver was killed, and started again by hand."""
    redone: int = 0
    """Steps whose rows were there at the kill, and that were done again."""


@dataclass
class Killer:
    """Kills parts of one run, and waits each time until the run has got beyond where it was."""

    config: PretrainConfig
    process: Process
    kills: list[Kill] = field(default_factory=list)

    @property
    def step(self) -> int:
        return max((row["step"] for row in steps_of(self.config.out)), default=0)

    @property
    def starts(self) -> int:
        return sum(row.get("event") == "start" for row in rows_of(self.config.out))

    def kill(
        self,
        what: str,
        title: str,
        *,
        which: int = 0,
        when: Callable[[], bool] = lambda: True,
        how: signal.Signals = signal.SIGKILL,
    ) -> Kill:
        """One process of that title is killed at the first moment at which `when` holds.

        It has been got over when the ranks were started again, which a lost reading task does not need, and have done
        a step that had not been done before: rows on their way at the kill are no such step.
        """
        found: list[int] = []

        def there() -> bool:
            found[:] = processes(self.process, title)  # of one look: a task may have ended at the next
            return len(found) > which

        wait_until(there, NEXT_STEP_S, f"{title} {which} is there")
        victim = found[which]
        _soon(when, f"{what}: its moment has come")
        starts, before, began = self.starts, steps_of(self.config.out), time.monotonic()
        reached = max((row["step"] for row in before), default=0)
        published = max(map(checkpoint.step_of, checkpoint.names(Path(self.config.out) / "checkpoints")), default=0)
        try:
            os.kill(victim, how)
        except ProcessLookupError:  # it was a task, and has ended
            return self.kill(what, title, which=0, when=when, how=how)
        redone: list[dict[str, Any]] = []
        if title != READER:
            self.process.until(lambda: self.starts > starts, f"another start after {what}")
            resumed = [row["from_step"] for row in rows_of(self.config.out) if row.get("event") == "start"][-1]
            assert resumed >= published, f"after {what}: from step {resumed}, where a checkpoint of {published} lay"
            redone = [row for row in before if row["step"] > resumed]
            at_most_one_interval(redone, self.config)
        self.process.until(lambda: self.step > reached, f"a step beyond {reached} after {what}")
        self.kills.append(Kill(what, reached, time.monotonic() - began, len(redone)))
        return self.kills[-1]

    def after(self, steps: int) -> None:
        """Returns when the run has done that many steps more."""
        goal = self.step + steps
        self.process.until(lambda: self.step >= goal, f"step {goal}")


def _soon(when: Callable[[], bool], what: str) -> None:
    """As `wait_until`, but without a pause between looks: some moments are short."""
    began = time.monotonic()
    while not when():
        assert time.monotonic() - began < NEXT_STEP_S, f"still not: {what}"


def as_planned(config: PretrainConfig, notes: Path) -> receipt.Verdict:
    """Oracle 1: where the losses were computed, each image was there once per epoch, in the planned order."""
    dataset = Dataset.open(config.data)
    selection = dataset.select(config.where)
    plan = dataset.plan(selection, batch_size=config.batch_size, seed=config.seed)
    run = storage.read_bytes(storage.join(config.out, receipt.RUN_ID)).decode()
    verdict = receipt.check(
        receipt.load(notes, run), plan, selection, receipt.hashes_of(dataset, selection), config.epochs
    )
    assert verdict.proven, verdict.sentence
    return verdict


def same_curve(config: PretrainConfig, twin: Path, rtol: float = 0.0) -> None:
    """Oracle 2: the losses of a run that was never interrupted, bit by bit; to `rtol` with other numbers of ranks."""
    ours, theirs = losses_of(config.out), losses_of(twin)
    if rtol:
        np.testing.assert_allclose(ours, theirs, rtol=rtol)
    else:
        assert ours == theirs


def at_most_one_interval(redone: list[dict[str, Any]], config: PretrainConfig) -> None:
    """Oracle 3: between the checkpoint that a run goes on from and its death no other one had come to its end.

    `redone` are the rows of the steps in between: at most the end of that checkpoint's own writing, the steps until the
    next one was due, and those during which that one was being written.
    """
    writing = [bool(row["saving"]) for row in redone]
    begun = sum(now and not before for before, now in zip([False, *writing], writing, strict=False))
    assert begun <= 2, f"{begun} checkpoints were begun in {len(redone)} steps that were done again"
    seconds = [config.batch_size / row["images_per_second"] for row in redone if not row["saving"]]
    bound = config.checkpoint_s + 3 * max(seconds, default=0.0)
    assert sum(seconds) <= bound, f"{sum(seconds):.1f} s of steps without a checkpoint were done again"


def useful_s(run: str | Path) -> float:
    """Seconds in which the steps that stand at the end of a run were computed: each once, without its wait for data."""
    steps = steps_of(run)
    samples = np.diff([row["samples"] for row in steps], prepend=0)
    return float(sum(n / row["images_per_second"] - row["data_wait_s"] for n, row in zip(samples, steps, strict=True)))


def report(kills: list[Kill], steps: int, useful_s: float, wall_s: float) -> str:
    """What was killed at which fifth of a run, how long it took to get on, and the goodput.

    Goodput is useful wall time / wall time. Useful is what `useful_s` counts; the rest is the start of processes,
    waiting for data, steps whose results a kill threw away, and getting on after it.

    Args:
        steps: of a whole run.
        useful_s: of all runs together.
        wall_s: from the first command to now.
    """
    lines = [f"{len(kills)} kills, by fifths of the run's {steps} steps:"]
    moments = {what: Counter(_fifth(k.step, steps) for k in kills if k.what == what) for what in _kinds(kills)}
    for what, counts in (moments | {"all": sum(moments.values(), Counter())}).items():
        lines.append(f"  {what:30} {' '.join(f'{counts[at]:3}' for at in range(FIFTHS))}   {counts.total():3}")
    redone, times = [k.redone for k in kills], [k.recovery_s for k in kills if math.isfinite(k.recovery_s)]
    lines.append(f"steps done again: most {max(redone, default=0)}, in all {sum(redone)}")
    if times:
        lines.append(f"seconds to the next step: median {np.median(times):.1f}, longest {max(times):.1f}")
    lines.append(f"goodput: {useful_s / wall_s:.3f} ({useful_s:.1f} s of {wall_s:.0f} s)")
    return "\n".join(lines)


def _kinds(kills: list[Kill]) -> list[str]:
    return [what for what, _ in Counter(k.what for k in kills).most_common()]


def _fifth(step: int, steps: int) -> int:
    return min(FIFTHS - 1, FIFTHS * step // steps)
