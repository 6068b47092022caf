"""What `auto` means on a machine, and what a machine cannot do."""

from __future__ import annotations

import pytest

from cluster.errors import ResourceError, UsageError
from cluster.session import Resources, cores
from training.device import (
    accelerator,
    choose_device,
    count_workers,
    device_in,
    precision_of,
    require_room,
    threads_for,
)

LOCAL = Resources(cpus=64, gpus=0, nodes=1, local=True)
CLUSTER = Resources(cpus=64, gpus=8, nodes=4, local=False)


def test_auto_means_a_worker_per_gpu_or_at_most_two_on_cpus() -> None:
    assert count_workers("auto", CLUSTER, "cuda") == 8
    assert count_workers("auto", LOCAL, "cuda") == count_workers("auto", None, "cuda") == 1
    assert count_workers("auto", None, "cpu") == count_workers("auto", CLUSTER, "cpu") == min(2, cores())


def test_a_number_is_that_number_where_there_is_room() -> None:
    assert count_workers("1", None, "cpu") == count_workers("1", LOCAL, "cpu") == 1
    assert count_workers("63", CLUSTER, "cpu") == 63  # one is left for reading
    assert count_workers("8", CLUSTER, "cuda") == 8


@pytest.mark.parametrize("workers", ["0", "-1", "1.5", "two", "", "²", " 2", "1:2"])
def test_a_number_that_is_none_is_refused_with_its_flag(workers: str) -> None:
    with pytest.raises(UsageError) as caught:
        count_workers(workers, CLUSTER, "cpu")
    assert str(caught.value) == f"--workers {workers}: give a number from 1 on, or auto"


def test_more_workers_than_there_are_places_are_refused_with_the_limit() -> None:
    with pytest.raises(ResourceError, match="--workers 9: the cluster has 8 GPUs"):
        count_workers("9", CLUSTER, "cuda")
    with pytest.raises(ResourceError, match="--workers 64: only 63 CPU cores"):
        count_workers("64", CLUSTER, "cpu")
    for found in (None, LOCAL):  # a local session may claim more CPUs than the machine has
        with pytest.raises(ResourceError, match=f"only {cores()} CPU cores"):
            count_workers(str(cores() + 1), found, "cpu")


def test_a_session_needs_a_cpu_for_reading_beside_the_workers() -> None:
    require_room(Resources(3, 0, 1, True), 2, "cpu")
    require_room(Resources(1, 4, 1, True), 4, "cuda")
    for found, device in ((Resources(2, 0, 1, True), "cpu"), (Resources(0, 4, 1, True), "cuda")):
        with pytest.raises(ResourceError, match="--workers 2"):
            require_room(found, 2, device)


def test_the_cpu_is_always_there_and_what_is_not_is_refused() -> None:
    assert choose_device("cpu") == "cpu"
    found = choose_device("auto")
    assert found in {"cuda", "mps", "cpu"} and choose_device(found) == found
    assert accelerator() == (found != "cpu")
    for other in {"cuda", "mps"} - {found}:
        with pytest.raises(UsageError, match=f"--device {other}: this machine has none"):
            choose_device(other)


def test_the_gpus_of_a_cluster_count_even_where_the_driver_has_none() -> None:
    assert device_in("auto", CLUSTER) == device_in("cuda", CLUSTER) == "cuda"
    assert device_in("cpu", CLUSTER) == "cpu"
    assert device_in("auto", LOCAL) == device_in("auto", Resources(8, 0, 2, False)) == choose_device("auto")


def test_precision_is_as_asked_and_full_on_cpus() -> None:
    assert precision_of("auto", "cpu") == "fp32"
    assert (precision_of("bf16", "cpu"), precision_of("fp32", "cuda")) == ("bf16", "fp32")


def test_workers_share_the_cores_and_each_has_one() -> None:
    assert threads_for(1) == cores()
    for workers in range(1, 9):
        assert threads_for(workers) >= 1
        assert threads_for(workers) * workers <= max(cores(), workers)
