"""Probes of a run's checkpoints, made beside it by Ray."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from tests.runs import START_S, Pretrained, rows_of, wait_until
from training import checkpoint, probing
from training.checkpoint import Position, State
from training.dataset import Dataset
from training.desk import Desk
from training.pretrain import _job
from training.probing import Probing

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def unfitting(run: Path, step: int) -> None:
    """The run's newest checkpoint is whole, but not of its network."""
    state = State(Position(step=step), {"model.other": torch.zeros(1)})
    checkpoint.save(run / "checkpoints", state, keep=9)


def test_an_error_of_the_probe_itself_is_said_once_a_lost_probe_is_not_and_the_next_one_leaves_its_row(
    pretrained: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probing, "SHARE", 1e9)  # no pause after each
    dataset = Dataset.open(pretrained.config.data)
    selection = dataset.select()
    looker = Probing(_job(pretrained.config, str(tmp_path), dataset, selection, "cpu", 1), dataset, selection)
    actor: Any = ray.remote(num_cpus=0)(Desk)
    desk = actor.remote()
    assert ray.get(desk.open.remote(str(tmp_path), str(tmp_path), 0))
    ray.get(desk.begin.remote({"from_step": 0, "workers": 1}))
    log = tmp_path / "run.log"

    def ended(times: int, saved: int) -> bool:
        looker(desk, saved)
        return log.exists() and log.read_text().count("Error(s) in loading state_dict") >= times

    for number in (1, 2):
        unfitting(tmp_path, number)
        wait_until(lambda number=number: ended(number, number), START_S, f"probe {number} has failed")  # type: ignore[misc]
    unfitting(tmp_path, 3)
    wait_until(lambda: ended(2, 3) and looker._probed == 3, START_S, "probe 3 has begun")
    looker.close()
    newest = checkpoint.names(pretrained.run / "checkpoints")[0]
    shutil.copytree(pretrained.run / "checkpoints" / newest, tmp_path / "checkpoints" / newest)
    saved = pretrained.summary["steps"]
    wait_until(lambda: ended(2, saved) and "probed_step" in rows_of(tmp_path)[-1], START_S, "a probe has left its row")

    row = rows_of(tmp_path)[-1]
    assert row["probed_step"] == checkpoint.step_of(newest) == pretrained.summary["steps"]
    assert row["probe_seconds"] > 0
    last = rows_of(pretrained.run)[-1]
    assert {name: row[name] for name in last} == pytest.approx(last), "the finished encoder, probed by the driver"
    said = capsys.readouterr().err.splitlines()
    warnings = [line for line in said if "could not be probed" in line]
    assert len(warnings) == 1 and "RuntimeError" in warnings[0] and "run.log" in warnings[0]
    assert log.read_text().count("a probe of step ") == 2
    ray.kill(desk)
