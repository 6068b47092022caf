"""`pretrain` on Ray: the order of samples, the loss of every step, and what stopping and killing leave of it."""

from __future__ import annotations

import functools
import itertools
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from cluster.errors import UsageError
from tests import kills
from tests.runs import (
    Pretrained,
    flags,
    losses_of,
    pretrain_config,
    rayograph,
    rows_of,
    steps_of,
    under_way,
)
from tests.training.test_report import Page
from training import checkpoint, feed
from training.configs import IngestConfig, PretrainConfig
from training.dataset import Dataset
from training.feed import Batch, Feed, Source
from training.ingest import ingest
from training.launch import aside
from training.plan import Plan
from training.pretrain import pretrain

pytestmark = pytest.mark.ray

IMAGES, BATCH = 200, 32
STEPS = math.ceil(IMAGES / BATCH)
ONE_ROW = ("path=phantom/000003.png",)


# The feed, driven from this process


def source_of(data: Path, *, batch_size: int = BATCH, where: tuple[str, ...] = ()) -> Source:
    dataset = Dataset.open(data)
    return feed.source_of(dataset, dataset.plan(dataset.select(where), batch_size=batch_size, seed=3), where)


def batches(source: Source, rank: int, world: int, *, start: tuple[int, int] = (0, 0), epochs: int = 2) -> list[Batch]:
    return list(Feed(source, rank=rank, world=world, start=start, epochs=epochs))


def same(one: Batch, other: Batch) -> bool:
    return (one.epoch, one.number, one.rows) == (other.epoch, other.number, other.rows) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("positions", "samples", "images")
    )


@pytest.fixture(scope="module")
def whole(phantoms: Path) -> list[Batch]:
    """Two epochs as a single rank gets them."""
    return batches(source_of(phantoms), 0, 1)


def test_every_epoch_holds_every_image_once_with_its_own_pixels(phantoms: Path, whole: list[Batch]) -> None:
    assert [(b.epoch, b.number) for b in whole] == list(itertools.product(range(2), range(STEPS)))
    assert [b.rows for b in whole] == 2 * ([BATCH] * (IMAGES // BATCH) + [IMAGES % BATCH])
    dataset = Dataset.open(phantoms)
    pixels = dataset.pixels(dataset.select())
    for epoch in range(2):
        own = [b for b in whole if b.epoch == epoch]
        order = np.concatenate([b.samples for b in own])
        assert sorted(order) == list(range(IMAGES))
        assert list(np.concatenate([b.positions for b in own])) == list(range(IMAGES))
        np.testing.assert_array_equal(np.concatenate([b.images for b in own]), pixels[order])
    first, second = (np.concatenate([b.samples for b in whole if b.epoch == e]) for e in range(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(IMAGES))


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_shares_the_batches_of_one_in_order(phantoms: Path, whole: list[Batch], world: int) -> None:
    ranks = [batches(source_of(phantoms), rank, world) for rank in range(world)]
    for number, alone in enumerate(whole):
        parts = [rank[number] for rank in ranks]
        assert {(p.epoch, p.number, p.rows) for p in parts} == {(alone.epoch, alone.number, alone.rows)}
        for name in ("positions", "samples", "images"):
            np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(alone, name))
        assert max(len(p.samples) for p in parts) - min(len(p.samples) for p in parts) <= 1


@pytest.mark.parametrize(
    ("world", "start"), [(1, (0, 1)), (1, (1, 4)), (2, (0, 3)), (2, (1, STEPS - 1)), (3, (1, 0)), (3, (0, 5))]
)
def test_a_feed_from_a_position_is_the_rest_of_the_whole_feed(
    phantoms: Path, world: int, start: tuple[int, int]
) -> None:
    source, rank = source_of(phantoms), world - 1
    rest = batches(source, rank, world, start=start)
    expected = [b for b in batches(source, rank, world) if (b.epoch, b.number) >= start]
    assert len(rest) == len(expected)
    assert all(map(same, rest, expected))


@pytest.mark.parametrize(
    ("batch_size", "where", "world"),
    [(1000, (), 3), (IMAGES, (), 1), (64, ONE_ROW, 1), (64, ONE_ROW, 3), (1, ONE_ROW, 2)],
)
def test_batches_larger_than_the_data_and_ranks_without_a_row_lose_nothing(
    phantoms: Path, batch_size: int, where: tuple[str, ...], world: int
) -> None:
    source = source_of(phantoms, batch_size=batch_size, where=where)
    total = 1 if where else IMAGES
    ranks = [batches(source, rank, world) for rank in range(world)]
    for rank in ranks:
        assert [(b.epoch, b.number, b.rows) for b in rank] == [(0, 0, total), (1, 0, total)]
    for epoch in range(2):
        assert sorted(np.concatenate([rank[epoch].samples for rank in ranks])) == list(range(total))


def test_images_are_decoded_in_tasks_of_ray_data_and_not_by_the_trainer(whole: list[Batch]) -> None:
    decoders = frozenset[int]().union(*(b.decoder_pids for b in whole))
    assert decoders
    assert os.getpid() not in decoders
    for pid in decoders:
        title = Path(f"/proc/{pid}/cmdline")
        assert not title.exists() or title.read_text().startswith("ray::")


def test_what_is_skipped_is_not_read(phantoms: Path) -> None:
    plan: Plan = source_of(phantoms).plan
    epoch = plan.epoch(0)
    wanted = epoch.items_of(0, 1, STEPS - 1)
    assert sum(epoch.owned(item, 0, 1, STEPS - 1).sum() for item in wanted) == IMAGES % BATCH
    assert len(wanted) <= len(epoch.items)


# Whole runs


def test_a_run_leaves_a_row_per_step_and_the_summary_that_scripts_read(pretrained: Pretrained) -> None:
    epochs, summary = pretrained.config.epochs, pretrained.summary
    steps = steps_of(pretrained.run)
    assert [row["step"] for row in steps] == list(range(1, epochs * STEPS + 1))
    assert [row["epoch"] for row in steps] == [e + 1 for e in range(epochs) for _ in range(STEPS)]
    for row in steps:
        assert math.isfinite(row["loss"]) and row["lr"] >= 0 and row["images_per_second"] > 0
    assert (summary["epochs"], summary["steps"], summary["samples_seen"]) == (epochs, epochs * STEPS, epochs * IMAGES)
    assert (summary["workers"], summary["restarts"]) == (2, 0)
    assert summary["final_loss"] == pytest.approx(np.mean([row["loss"] for row in steps[-STEPS:]]))
    assert summary["images_per_second"] > 0 and summary["seconds"] > 0
    assert summary["final_loss"] < steps[0]["loss"]
    for name in ("config.yaml", "summary.json", "run.log", "model/model.json", "model/model.safetensors"):
        assert (pretrained.run / name).is_file(), name
    for name in ("loss.png", "reconstructions.png", "probes.png"):
        assert (pretrained.run / "figures" / name).read_bytes().startswith(b"\x89PNG")
    assert list((pretrained.run / "tensorboard").glob("events.*"))
    assert len(list((pretrained.run / "checkpoints").glob("step-*"))) <= pretrained.config.keep
    assert not list(pretrained.run.rglob("*.pkl")) + list(pretrained.run.rglob("*.pt"))


def test_the_report_and_the_summary_say_what_the_encoder_can_tell_apart_and_how_it_waited(
    pretrained: Pretrained,
) -> None:
    probed = [row for row in rows_of(pretrained.run) if "probed_step" in row][-1]
    assert probed["probed_step"] == pretrained.summary["steps"]
    words = Page((pretrained.run / "report.html").read_text(encoding="utf-8")).words
    for name in ("knn_balanced_accuracy", "linear_balanced_accuracy", "chance"):
        assert 0 < probed[name] <= 1 and pretrained.summary[name] == probed[name]
        assert f"{probed[name]:.3f}" in words
    share = pretrained.summary["data_wait_share"]
    assert 0 < share < 1 and f"share of it waiting for data {share:.1%}" in " ".join(words.split())
    assert "Images of the training data: the original, what the network was shown" in words


def test_the_learning_rate_rises_then_falls_and_belongs_to_the_global_batch(pretrained: Pretrained) -> None:
    rates = [row["lr"] for row in steps_of(pretrained.run)]
    peak = int(np.argmax(rates))
    assert max(rates) == pytest.approx(pretrained.config.lr * BATCH / 256, rel=0.02)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert peak <= 0.1 * len(rates)


def test_a_finished_run_is_already_done(pretrained: Pretrained, capsys: pytest.CaptureFixture[str]) -> None:
    before = (pretrained.run / "metrics.jsonl").read_bytes()
    assert pretrain(pretrained.config)["final_loss"] == pytest.approx(pretrained.summary["final_loss"])
    assert capsys.readouterr().out.startswith("already done")
    assert (pretrained.run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_one_worker_and_two_have_the_same_losses_up_to_rounding(pretrained: Pretrained, tmp_path: Path) -> None:
    summary = pretrain(pretrain_config(Path(pretrained.config.data), tmp_path / "run", workers="1", probe=False))
    assert summary["workers"] == 1
    alone, together = losses_of(tmp_path / "run"), losses_of(pretrained.run)
    np.testing.assert_allclose(alone[:STEPS], together[:STEPS], rtol=1e-5)
    np.testing.assert_allclose(alone, together, rtol=1e-4)


@pytest.mark.slow
def test_two_workers_agree_with_one_also_where_a_batch_has_one_row(phantoms: Path, tmp_path: Path) -> None:
    for workers in ("1", "2"):
        config = pretrain_config(
            phantoms, tmp_path / workers, where=ONE_ROW, epochs=3, workers=workers, probe=workers == "1"
        )
        assert pretrain(config)["samples_seen"] == 3
    np.testing.assert_allclose(losses_of(tmp_path / "2"), losses_of(tmp_path / "1"), rtol=1e-4)


@pytest.mark.slow
def test_more_epochs_take_a_finished_run_further(pretrained: Pretrained, tmp_path: Path) -> None:
    shutil.copytree(pretrained.run, tmp_path / "run")
    more = pretrained.config.epochs + 1
    summary = pretrain(pretrain_config(Path(pretrained.config.data), tmp_path / "run", epochs=more))
    assert (summary["epochs"], summary["steps"]) == (more, more * STEPS)
    losses = losses_of(tmp_path / "run")
    assert losses[:-STEPS] == losses_of(pretrained.run)
    assert len(losses) == more * STEPS


def test_a_data_set_made_anew_at_the_same_place_does_not_take_a_run_further(
    pretrained: Pretrained, phantoms: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "dataset", tmp_path / "run"
    shutil.copytree(phantoms, data)
    shutil.copytree(pretrained.run, out)
    config = out / "config.yaml"
    config.write_text(config.read_text().replace(str(phantoms), str(data)))
    (out / "summary.json").unlink()
    metrics = (out / "metrics.jsonl").read_bytes()
    again = pretrain_config(data, out, epochs=pretrained.config.epochs + 1)
    ingest(IngestConfig("phantom:201", out=str(data), image_size="32", overwrite=True))
    with pytest.raises(UsageError, match=f"--data {data}: not the data set that this run was trained on so far"):
        pretrain(again)
    assert (out / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(data)
    shutil.copytree(phantoms, data)
    assert pretrain(again)["steps"] == pretrained.summary["steps"] + STEPS
    assert losses_of(out)[:-STEPS] == losses_of(pretrained.run)


def damaged(config: PretrainConfig, how: Callable[[bytes], bytes]) -> str:
    """The state in the newest checkpoint is what `how` makes of it; what is to be said of it."""
    folder = Path(config.out) / "checkpoints"
    name = checkpoint.names(folder)[0]
    state = folder / name / checkpoint.STATE
    state.write_bytes(how(state.read_bytes()))
    return f"{name} is damaged (the sha256 of state.safetensors differs from its manifest); falling back"


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def one_bit_flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.slow
def test_a_run_stopped_three_times_goes_on_to_the_losses_of_one_that_was_not(
    pretrained: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice its newest checkpoint is damaged meanwhile, once Ray's snapshot. What the ranks noted is of one run."""
    notes, complaint = tmp_path / "notes", ""
    config = pretrain_config(Path(pretrained.config.data), tmp_path / "run", receipt=str(notes))
    for way, code, steps in ((signal.SIGTERM, 75, 20), (signal.SIGINT, 130, 60), (signal.SIGKILL, -9, 100)):
        probe = () if way == signal.SIGTERM else ("--no-probe",)  # it, too, is gone when a run was stopped
        with rayograph(*flags(config), "--receipt", str(notes), *probe) as process:
            process.until(functools.partial(under_way, config.out, steps), f"{steps} steps are done")
            assert complaint in process.said()
            assert len(process.family()) > 3  # Ray's own and the workers: what is looked for below can be seen
            if way == signal.SIGKILL:
                process.kill_group()
            else:
                process.signal(way)
                assert process.wait(10) == code, process.said()
                assert process.family() == set()
                assert "the same command again goes on" in process.said().splitlines()[-1]
                assert "Traceback" not in process.said()
        done, whole = len(steps_of(config.out)), len(losses_of(pretrained.run))
        # workers notice the loss of their driver a moment after kill -9, and may be at the end by then
        assert steps <= done and (done < whole or way == signal.SIGKILL), "it was stopped midway"
        assert not (Path(config.out) / "summary.json").exists()
        if way == signal.SIGINT:
            complaint = damaged(config, half)
    complaint = damaged(config, one_bit_flipped)
    states_of_ray = list(aside(Path(config.out)).iterdir())
    assert states_of_ray, "Ray Train keeps its own state of the run there"
    for folder in states_of_ray:
        (folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).write_text('{"ray_version": "2.60.0", "checkpoint_resu')
    summary = pretrain(replace(config, probe=False))
    assert complaint in capsys.readouterr().err
    assert losses_of(config.out) == losses_of(pretrained.run)
    kills.as_planned(config, notes)
    assert summary["receipt"]["sentence"].startswith("Proven")
    assert summary["samples_seen"] == pretrained.summary["samples_seen"]
    starts = [row["from_step"] for row in rows_of(config.out) if row.get("event") == "start"]
    assert len(starts) == 4
    assert starts == sorted(starts) and starts[0] == 0 < starts[1]


@pytest.mark.slow
def test_a_method_with_a_teacher_and_a_centre_goes_on_after_a_kill_as_if_nothing_had_been(
    phantoms: Path, tmp_path: Path
) -> None:
    options = {"method": "dino", "prototypes": 64, "head_width": 32, "local_crops": 2}
    whole, killed = (
        pretrain_config(phantoms, tmp_path / name, epochs=6, probe=False, **options) for name in ("whole", "killed")
    )
    pretrain(whole)
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with rayograph(*flags(killed), *given, "--no-probe") as process:
        process.until(functools.partial(under_way, killed.out, STEPS), "an epoch is done")
        process.kill_group()
    assert not (Path(killed.out) / "summary.json").exists()
    pretrain(killed)
    assert losses_of(killed.out) == losses_of(whole.out)
    starts = [row["from_step"] for row in rows_of(killed.out) if row.get("event") == "start"]
    assert len(starts) == 2 and 0 < starts[1] < len(losses_of(whole.out))
    files = [Path(run.out) / "model" / "model.safetensors" for run in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (Path(whole.out) / "figures" / "reconstructions.png").exists()
