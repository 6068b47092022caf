"""Pretraining over hosts with networks of their own that come and go, data and results on an object store only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster import parts, storage
from tests import kills, s3
from tests.hosts import Host, Hosts, Inside
from tests.runs import Pretrained, losses_of, pretrain_config
from training import checkpoint
from training.configs import PretrainConfig
from training.desk import METRICS, read_metrics

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
WAIT_S = 400
READ_S = 1.2
"""What the store takes for each row group: so the run still goes on when a host comes back, on a fast machine, too."""


@pytest.fixture(scope="module")
def crowd(namespaces: None) -> Iterator[Hosts]:
    """A head that can read but not train, and two hosts that can train but not read."""
    with Hosts(3) as three:
        yield three


@pytest.fixture(scope="module")
def store(crowd: Hosts) -> Iterator[s3.Store]:
    """An S3 server that every host reaches, and this process."""
    with s3.running(crowd.address) as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        found.bucket = found.make("shared")
        yield found


@pytest.fixture(scope="module")
def cluster(crowd: Hosts, store: s3.Store, pretrained: Pretrained) -> Hosts:
    """A Ray cluster of them: only its head sees the local data set."""
    for host in (crowd[1], crowd[2]):
        host.hide(pretrained.config.data)
    start(crowd, store)
    return crowd


def start(crowd: Hosts, store: s3.Store) -> None:
    head, first, second = (crowd[number] for number in range(3))
    head.ray_head(cpus=3, resources={"reader": 1}, env=environment(store))
    join(first, head, store)
    join(second, head, store)


def join(host: Host, head: Host, store: s3.Store) -> None:
    host.ray_worker(head, cpus=2, resources={"trainer": 1}, env=environment(store))


def environment(store: s3.Store) -> dict[str, str]:
    return store.environment | {"PYTHONPATH": str(ROOT)}


def steps(config: PretrainConfig) -> int:
    """Steps that are durable."""
    return max((checkpoint.step_of(name) for name in checkpoint.names(f"{config.out}/checkpoints")), default=0)


def until(process: Inside, condition: Callable[[], bool], what: str, log: Path) -> None:
    began = time.monotonic()
    while not condition():
        assert process.poll() is None and time.monotonic() - began < WAIT_S, (
            f"not so: {what}\n{log.read_text()[-3000:]}"
        )
        time.sleep(0.1)


def test_a_run_whose_hosts_are_killed_added_drained_and_its_head_lost_ends_as_if_nothing_had_happened(
    cluster: Hosts, store: s3.Store, pretrained: Pretrained, tmp_path: Path
) -> None:
    head = cluster[0]
    data, notes, log = f"{store.bucket}/data", tmp_path / "notes", tmp_path / "said"
    storage.upload(Path(pretrained.config.data), data)
    config = pretrain_config(Path(pretrained.config.data), tmp_path / "unused", receipt=str(notes))
    config = PretrainConfig(**{**vars(config), "data": data, "out": f"{store.bucket}/run"})
    command = [
        *[sys.executable, "-m", "cluster.cli", "pretrain", data, "--out", config.out, "--model", config.model or ""],
        *["--image-size", config.image_size, "--epochs", str(config.epochs), "--batch-size", str(config.batch_size)],
        *["--checkpoint-s", "3", "--workers", "1:2", "--train-on", "trainer", "--read-on", "reader"],
        *["--receipt", str(notes), "--no-probe"],
    ]
    with log.open("w") as sink, store.refusing(_slow):
        known = environment(store) | {"RAY_ADDRESS": head.gcs}
        process = head.popen(command, cwd=ROOT, env=known, stdout=sink, stderr=sink)
        until(process, lambda: steps(config) >= 10, "10 steps on two hosts", log)
        lost = _killed_in_an_upload(cluster, store, config, process, log)
        reached = steps(config)
        until(process, lambda: steps(config) >= reached + 10, "10 steps more on one host", log)
        join(lost, head, store)
        until(process, lambda: _starts(config)[-1:] == [2], "two hosts train again", log)
        assert _thrown_away(config) == 0, "a checkpoint came first when a host was taken up"
        lost.drain(head)
        until(process, lambda: _starts(config)[-1:] == [1], "the host that stays trains alone", log)
        assert _thrown_away(config) == 0, "a checkpoint came first when a host was about to go"
        reached = steps(config)
        until(process, lambda: steps(config) > reached, "a checkpoint without the host that goes", log)
        for host in (head, cluster[1], cluster[2]):  # a node outlives its head by a minute, and then ends itself
            host.kill()
    before = _starts(config)
    assert before[0] == 2 and before[-2:] == [2, 1] and 1 in before[:-2], before
    reached = steps(config)
    assert reached < pretrained.summary["steps"], "the run was at its end before the head was lost"

    start(cluster, store)
    done = head.run(command, cwd=ROOT, env=known, timeout_s=WAIT_S)
    said = log.read_text() + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "Traceback" not in said
    rows = read_metrics(storage.read_bytes(f"{config.out}/{METRICS}").decode())
    starts = [row for row in rows if row.get("event") == "start"]
    assert [row["workers"] for row in starts] == [*before, 2]
    assert starts[-1]["from_step"] >= reached, "the same command goes on from what was durable"
    losses: list[float] = [row["loss"] for row in rows if "step" in row]
    np.testing.assert_allclose(losses, losses_of(pretrained.run), rtol=1e-4)
    local = PretrainConfig(**{**vars(config), "data": pretrained.config.data})
    kills.as_planned(local, notes)
    summary = json.loads(storage.read_bytes(f"{config.out}/summary.json"))
    assert summary["samples_seen"] == config.epochs * 200 and summary["restarts"] == len(before)


def _killed_in_an_upload(crowd: Hosts, store: s3.Store, config: PretrainConfig, process: Inside, log: Path) -> Host:
    """The host that was killed while one of its ranks was uploading a checkpoint, which never came to be."""
    with store.holding("PUT", f"/{checkpoint.STATE}") as held:
        until(process, lambda: bool(held.caller), "a checkpoint is on its way", log)
        (lost,) = (host for host in (crowd[1], crowd[2]) if host.address == held.caller)
        lost.kill()
    on_its_way = checkpoint.step_of(Path(held.path).parent.name)
    state, _ = checkpoint.newest(f"{config.out}/checkpoints")
    assert state is not None and state.position.step < on_its_way
    return lost


def _slow(method: str, path: str) -> int:
    if method == "GET" and "/shards/" in path:
        time.sleep(READ_S)
    return 0


def _starts(config: PretrainConfig) -> list[int]:
    """Ranks of each group that was started, of what is durable."""
    rows = read_metrics(parts.read(f"{config.out}/{METRICS}.parts"))
    return [row["workers"] for row in rows if row.get("event") == "start"]


def _thrown_away(config: PretrainConfig) -> int:
    """Steps that the group before the last one had done, and that the last one did not go on from."""
    rows = [json.loads(line) for line in parts.read(f"{config.out}/{METRICS}.parts").splitlines()]
    before, last = [at for at, row in enumerate(rows) if row.get("event") == "start"][-2:]
    return int(max(row["step"] for row in rows[before:last] if "step" in row)) - int(rows[last]["from_step"])


def test_hosts_that_cannot_open_the_data_set_train_on_what_others_read_for_them(
    cluster: Hosts, store: s3.Store, pretrained: Pretrained
) -> None:
    head, out, epochs = cluster[0], f"{store.bucket}/blind", 3
    config = pretrained.config
    command = [
        *[sys.executable, "-m", "cluster.cli", "pretrain", config.data, "--out", out, "--model", config.model or ""],
        *["--image-size", config.image_size, "--epochs", str(epochs), "--batch-size", str(config.batch_size)],
        *["--workers", "2", "--train-on", "trainer", "--read-on", "reader", "--no-probe"],
    ]
    done = head.run(command, cwd=ROOT, env=environment(store) | {"RAY_ADDRESS": head.gcs}, timeout_s=WAIT_S)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(storage.read_bytes(f"{out}/{METRICS}").decode())
    assert [row["workers"] for row in rows if row.get("event") == "start"] == [2]
    assert [row["samples"] for row in rows if "step" in row][-1] == epochs * 200
