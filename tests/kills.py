"""What the kill tests share: finding the processes of a run, killing them at chosen moments, and the oracles."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.runs import Process, losses_of, rows_of, steps_of, wait_until
from training import receipt
from training.configs import PretrainConfig
from training.dataset import Dataset

RANK, CONTROLLER, DESK, READER = (
    "ray::RayTrainWorker",
    "ray::TrainController",
    "ray::Desk",
    "ray::MapBatches(ReadItems)",
)
NEXT_STEP_S = 120


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
        starts, reached, began = self.starts, self.step, time.monotonic()
        try:
            os.kill(victim, how)
        except ProcessLookupError:  # it was a task, and has ended
            return self.kill(what, title, which=0, when=when, how=how)
        if title != READER:
            self.process.until(lambda: self.starts > starts, f"another start after {what}")
        self.process.until(lambda: self.step > reached, f"a step beyond {reached} after {what}")
        self.kills.append(Kill(what, reached, time.monotonic() - began))
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


def as_planned(config: PretrainConfig, files: Path) -> receipt.Verdict:
    """Oracle 1: where the losses were computed, each image was there once per epoch, in the planned order."""
    dataset = Dataset.open(config.data)
    selection = dataset.select(config.where)
    plan = dataset.plan(selection, batch_size=config.batch_size, seed=config.seed)
    notes = receipt.load(files.glob("receipt-*.bin"))
    verdict = receipt.check(notes, plan, selection, receipt.hashes_of(dataset, selection), config.epochs)
    assert verdict.proven, verdict.sentence
    return verdict


def same_curve(config: PretrainConfig, twin: Path, rtol: float = 0.0) -> None:
    """Oracle 2: the losses of a run that was never interrupted, bit by bit; to `rtol` with other numbers of ranks."""
    ours, theirs = losses_of(config.out), losses_of(twin)
    if rtol:
        np.testing.assert_allclose(ours, theirs, rtol=rtol)
    else:
        assert ours == theirs


def report(kills: list[Kill]) -> str:
    """A histogram of what was killed, and how long it took to get on."""
    lines = ["kills: " + ", ".join(f"{what} {count}" for what, count in Counter(k.what for k in kills).most_common())]
    times = sorted(k.recovery_s for k in kills if k.recovery_s == k.recovery_s)
    lines.append(f"seconds to the next step: median {np.median(times):.1f}, longest {times[-1]:.1f}")
    return "\n".join(lines)
