"""Pretraining while its parts are killed: nothing is lost, nothing is seen twice, and the curve is the same."""

from __future__ import annotations

import functools
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import kills
from tests.kills import CONTROLLER, DESK, RANK, READER, Killer, writing
from tests.runs import Pretrained, flags, pretrain_config, rayograph, rows_of, steps_of, under_way
from training import checkpoint

pytestmark = pytest.mark.slow


def test_every_part_of_a_run_is_killed_in_turn_and_nothing_of_it_is_lost(
    pretrained: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes"
    config = pretrain_config(
        Path(pretrained.config.data), tmp_path / "run", watchdog_s=6.0, receipt=str(notes), probe=False
    )
    began = time.monotonic()
    with rayograph(*flags(config), "--watchdog-s", "6", "--receipt", str(notes), "--no-probe") as process:
        killer = Killer(config, process)
        killer.after(8)
        killer.kill("a rank, in a step", RANK, which=1)
        killer.kill("rank 0, in a checkpoint", RANK, when=functools.partial(writing, config))
        killer.kill("the controller", CONTROLLER)
        killer.kill("the desk", DESK)
        killer.kill("a rank that is stopped", RANK, which=1, how=signal.SIGSTOP)
        killer.kill("a reading task", READER)
        assert process.wait() == 0, process.said()
        said = process.said()
    with capsys.disabled():
        spent = kills.useful_s(config.out), time.monotonic() - began
        print("\n" + kills.report(killer.kills, len(steps_of(config.out)), *spent))
    assert re.search("rank [01] hangs and is replaced", said), said
    assert "Traceback" not in said and "A worker died" not in said
    kills.same_curve(config, pretrained.run)
    verdict = kills.as_planned(config, notes)
    assert "each shown once in each of" in verdict.sentence
    starts = [row for row in rows_of(config.out) if row.get("event") == "start"]
    assert len(starts) >= 6


@pytest.fixture
def small_disk(namespaces: None, tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_fills_ends_the_run_in_one_line_and_costs_nothing_that_was_saved(
    pretrained: Pretrained, small_disk: Path
) -> None:
    config = pretrain_config(Path(pretrained.config.data), small_disk / "run", probe=False)
    filler = small_disk / "filler"
    with rayograph(*flags(config), "--no-probe") as process:
        process.until(functools.partial(under_way, config.out, 20), "20 steps are done")
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(2**12))
        assert process.wait() == 1, process.said()
        assert "free some space" in process.said().splitlines()[-1]
        assert "Traceback" not in process.said()
    state, _ = checkpoint.newest(Path(config.out) / "checkpoints")
    assert state is not None and state.position.step > 0
    filler.unlink()
    with rayograph(*flags(config), "--no-probe") as process:
        assert process.wait() == 0, process.said()
    kills.same_curve(config, pretrained.run)


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_step_and_images(phantoms: Path, tmp_path: Path) -> None:
    config = pretrain_config(phantoms, tmp_path / "run", lr=1e30)
    with rayograph(*flags(config), "--no-probe", "--lr", "1e30") as process:
        assert process.wait() == 1, process.said()
        last = process.said().splitlines()[-1]
    assert re.search(r"the loss is (nan|inf) at step \d+ of epoch 1: not finite (of images [0-9a-f]+|somewhere)", last)
    assert "lower --lr" in last


WAYS = {
    "a rank": (RANK, signal.SIGKILL),
    "the controller": (CONTROLLER, signal.SIGKILL),
    "the desk": (DESK, signal.SIGKILL),
    "a reading task": (READER, signal.SIGKILL),
    "a rank that is stopped": (RANK, signal.SIGSTOP),
}
DRIVER = {"the driver": signal.SIGKILL, "the driver, asked to end": signal.SIGTERM}


@pytest.mark.chaos
def test_a_hundred_kills_at_random_moments_leave_every_curve_as_it_was(
    pretrained: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many runs as it takes. `KILLS` and `SEED` of the environment change the number and the moments."""
    wanted, chooser = int(os.environ.get("KILLS", "100")), random.Random(int(os.environ.get("SEED", "0")))
    done: list[kills.Kill] = []
    run, last, useful = 0, pretrained.summary["steps"], 0.0
    began = time.monotonic()
    while len(done) < wanted:
        run += 1
        out, notes = tmp_path / f"run{run}", tmp_path / f"notes{run}"
        config = pretrain_config(Path(pretrained.config.data), out, watchdog_s=8.0, receipt=str(notes), probe=False)
        arguments = [*flags(config), "--watchdog-s", "8", "--receipt", str(notes), "--no-probe"]
        while not (out / "summary.json").exists():
            with rayograph(*arguments) as process:
                killer = Killer(config, process, done)
                _kill_until_the_end(killer, chooser, last, wanted)
                assert process.wait() in (0, -signal.SIGKILL, 75), process.said()
                assert "Traceback" not in process.said()
        kills.same_curve(config, pretrained.run)
        kills.as_planned(config, notes)
        useful += kills.useful_s(out)
        with capsys.disabled():
            print(f"\nrun {run}: {kills.report(done, last, useful, time.monotonic() - began)}")


def _kill_until_the_end(killer: Killer, chooser: random.Random, last: int, wanted: int) -> None:
    """Kills at moments uniform in wall time until the driver was, or the run is nearly at its end."""
    process, first = killer.process, killer.step
    process.until(lambda: killer.step > first or killer.step >= last - 1, "a step")
    while len(killer.kills) < wanted and killer.step < last - 20:
        time.sleep(chooser.uniform(0, 3))
        what = chooser.choice([*WAYS, *DRIVER])
        if process.popen.poll() is not None or killer.step >= last - 20:
            return
        if what in DRIVER:
            killer.kills.append(kills.Kill(what, killer.step, float("nan")))
            process.kill_group() if DRIVER[what] == signal.SIGKILL else process.signal(DRIVER[what])
            return
        title, how = WAYS[what]
        there = len(kills.processes(process, title))
        if there:
            killer.kill(what, title, which=chooser.randrange(there), how=how)
