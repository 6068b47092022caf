"""What `auto` means: device, precision and how many workers. The same code runs on CPU, one GPU and many nodes."""

from __future__ import annotations

import functools
from pathlib import Path

from cluster.errors import ResourceError, UsageError
from cluster.session import Resources, cores


def accelerator() -> bool:
    """Whether this machine shows a GPU that training could use; does not import torch where there clearly is none."""
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() or Path("/System/Library").exists()):
        return False
    return choose_device("auto") != "cpu"


def choose_device(device: str) -> str:
    """`cuda`, `mps` or `cpu`.

    Raises:
        UsageError: the device asked for is not there.
    """
    import torch

    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "auto":
        return found
    if device not in {found, "cpu"}:
        raise UsageError(f"--device {device}: this machine has none (auto would be {found})")
    return device


@functools.cache
def bf16_gains(device: str) -> bool:
    """Whether mixed precision pays on this device; on CPUs it was measured not to, even with AMX, at these widths."""
    import torch

    return device == "cuda" and torch.cuda.is_bf16_supported()


def precision_of(precision: str, device: str) -> str:
    return ("bf16" if bf16_gains(device) else "fp32") if precision == "auto" else precision


def device_in(device: str, found: Resources) -> str:
    """The device of the session's workers: in a cluster `auto` is its GPUs, even where the driver's host has none.

    Raises:
        UsageError: the device asked for is not there.
    """
    if not found.local and device in {"auto", "cuda"} and found.gpus:
        return "cuda"
    return choose_device(device)


def count_workers(workers: str, found: Resources | None, device: str) -> int:
    """Workers that `--workers` means here.

    Raises:
        UsageError: not a number.
        ResourceError: more workers than the cluster's GPUs or this machine's cores.
    """
    if workers == "auto":
        if device == "cuda":
            return max(1, found.gpus if found else 1)
        return min(2, cores())
    if not workers.isdecimal() or int(workers) < 1:
        raise UsageError(f"--workers {workers}: give a number from 1 on, or auto")
    count = int(workers)
    if device == "cuda" and found and count > found.gpus:
        raise ResourceError(f"--workers {count}: the cluster has {found.gpus} GPUs; ask for at most that many")
    # a cluster's CPUs are real, and Ray Data needs one of them; a local session's are logical
    limit = cores() if found is None or found.local else found.cpus - 1
    if device != "cuda" and count > limit:
        raise ResourceError(f"--workers {count}: only {limit} CPU cores are here for them; ask for at most that many")
    return count


def workers_between(workers: str, found: Resources | None, device: str) -> tuple[int, int]:
    """The least and the most workers that `--workers N` or `MIN:MAX` means here.

    More than there is room for now may join a cluster later, but not a local session.

    Raises:
        UsageError: neither form.
        ResourceError: fewer can be had than the least.
    """
    low, sign, high = workers.partition(":")
    if not sign:
        count = count_workers(workers, found, device)
        return count, count
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise UsageError(f"--workers {workers}: give MIN:MAX, two numbers from 1 on, the smaller one first")
    least, most = count_workers(low, found, device), int(high)
    if found is None or found.local:
        most = max(least, min(most, cores() if device != "cuda" else max(1, found.gpus if found else 1)))
    return least, most


def require_room(found: Resources, workers: int, device: str) -> None:
    """There is a CPU for each worker (those with a GPU take none) and one for reading: else Ray Data waits forever.

    Raises:
        ResourceError: the running session has fewer.
    """
    needed = 1 + (workers if device != "cuda" else 0)
    if found.cpus < needed:
        raise ResourceError(
            f"--workers {workers}: needs {needed} CPUs, one of them to read the data, but this Ray session has "
            f"{found.cpus}; lower --workers or give Ray more CPUs"
        )


def threads_for(workers: int) -> int:
    """Torch threads of each of `workers` processes on this machine."""
    return max(1, cores() // workers)
