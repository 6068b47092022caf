"""Pretraining on a `ray.cluster_utils.Cluster` that loses a node in the middle of an epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import kills
from tests.runs import Pretrained, flags, pretrain_config, rayograph, rows_of, steps_of

pytestmark = [pytest.mark.slow, pytest.mark.ray]
DETECTION = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}


@contextlib.contextmanager
def cluster_of(head: dict[str, Any], others: list[dict[str, Any]]) -> Iterator[Any]:
    """A head and other nodes, each with an object store of its own, on this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={**head, "include_dashboard": False, "_system_config": DETECTION}
    )
    try:
        for other in others:
            cluster.add_node(**other)
        yield cluster
    finally:
        cluster.shutdown()


ALIKE = {"num_cpus": 1}
"""Nodes of which any may train or read: of three, two train, and of two, one."""
TRAINER = {"num_cpus": 2, "resources": {"trainer": 1}}
CLUSTERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[str]]] = {
    "some read and some train": (
        {"num_cpus": 3, "resources": {"reader": 1}},
        [TRAINER, TRAINER],
        ["--train-on", "trainer", "--read-on", "reader"],
    ),
    "all alike": (ALIKE, [ALIKE, ALIKE], []),
    "the one that reads": ({"num_cpus": 2, "resources": {"trainer": 2}}, [ALIKE], ["--train-on", "trainer"]),
}
"""The head, the other nodes, of which one is lost, and where to train and read."""


@pytest.mark.parametrize("kind", CLUSTERS)
def test_a_node_that_is_removed_in_the_middle_of_an_epoch_is_done_without(
    kind: str, pretrained: Pretrained, tmp_path: Path
) -> None:
    head, others, where = CLUSTERS[kind]
    notes = tmp_path / "notes"
    config = pretrain_config(
        Path(pretrained.config.data), tmp_path / "run", workers="1:4", receipt=str(notes), probe=False
    )
    more = (*where, "--receipt", str(notes), "--no-probe")
    with cluster_of(head, others) as nodes, rayograph(*flags(config), *more, address=nodes.address) as process:
        process.until(lambda: len(steps_of(config.out)) >= 10, "10 steps on two nodes")
        reached = len(steps_of(config.out))
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        assert process.wait() == 0, process.said()
        assert "Traceback" not in process.said()
    starts = [row for row in rows_of(config.out) if row.get("event") == "start"]
    workers = [row["workers"] for row in starts]
    # Ray may not have noticed by the next start, which then comes to nothing
    assert workers in ([2, 1], [2, 2, 1]), starts
    assert 0 < starts[1]["from_step"] < pretrained.summary["steps"] and reached < pretrained.summary["steps"]
    kills.same_curve(config, pretrained.run, rtol=1e-4)
    kills.as_planned(config, notes)
