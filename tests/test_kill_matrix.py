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
from training.dataset import Dataset

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
        killer.kill(IN_CHECKPOINT, RANK, when=functools.partial(writing, config))
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
    found = re.search(
        r"the loss is (nan|inf) at step \d+ of epoch 1: not finite of images ([0-9a-f]+(?:, [0-9a-f]+)*)", last
    )
    assert found, last
    assert set(found[2].split(", ")) <= set(Dataset.open(phantoms).select().column("image_id"))
    assert "lower --lr" in last


IN_CHECKPOINT = "rank 0, in a checkpoint"
LAST_STEPS = 20
"""Left alone, so that a run is not at its end before it was seen to get over a kill."""
CHECKPOINT_STEPS = 60
"""A run that has fewer than these to do may write no checkpoint any more that is waited for."""
WAYS = {
    "a rank": (RANK, signal.SIGKILL),
    IN_CHECKPOINT: (RANK, signal.SIGKILL),
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
    """As many runs as it takes; a hundred kills hit each crash point at least once.

    `KILLS` and `SEED` of the environment change the number and the moments.
    """
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
    if wanted >= 100:
        assert {kill.what for kill in done} == {*WAYS, *DRIVER}


def _kill_until_the_end(killer: Killer, chooser: random.Random, last: int, wanted: int) -> None:
    """Kills at moments uniform in wall time until the driver was, or the run is nearly at its end."""
    process, first = killer.process, killer.step
    process.until(lambda: killer.step > first or killer.step >= last - 1, "a step")
    while len(killer.kills) < wanted and killer.step < last - LAST_STEPS:
        time.sleep(chooser.uniform(0, 3))
        what = chooser.choice(_never_hit(killer.kills) if 2 * len(killer.kills) >= wanted else [*WAYS, *DRIVER])
        if process.popen.poll() is not None or killer.step >= last - LAST_STEPS:
            return
        if what in DRIVER:
            killer.kills.append(kills.Kill(what, killer.step, float("nan")))
            process.kill_group() if DRIVER[what] == signal.SIGKILL else process.signal(DRIVER[what])
            return
        if what == IN_CHECKPOINT and killer.step >= last - CHECKPOINT_STEPS:
            continue
        title, how = WAYS[what]
        there = len(kills.processes(process, title))
        if there and what == IN_CHECKPOINT:
            killer.kill(what, title, when=functools.partial(writing, killer.config))
        elif there:
            killer.kill(what, title, which=chooser.randrange(there), how=how)


def _never_hit(done: list[kills.Kill]) -> list[str]:
    """The crash points that no kill has hit; all of them, where each was. A reading task is seldom there, for one."""
    hit = {kill.what for kill in done}
    return [what for what in (*WAYS, *DRIVER) if what not in hit] or [*WAYS, *DRIVER]
