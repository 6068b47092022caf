"""How fast training could be at best: the arithmetic of one step, counted, and what matrix products reach here."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from training.methods import Method
from training.views import Views

SIDES = {"cpu": 1024, "mps": 4096, "cuda": 8192}
"""Of the square matrices whose product is timed: large enough for the device's best rate."""
PRODUCTS = 5
"""Timed together."""


def flops_per_image(module: Method, groups: Sequence[Views]) -> float:
    """Floating-point operations of one training step per image, forward and backward: 2 per multiply-add.

    Counted by torch on shapes alone, nothing is computed; matrix products and convolutions count, the rest (norms,
    activations, the optimiser) is a few percent and does not.

    Args:
        module: a method of `training.methods`.
        groups: the views of each image that it takes.
    """
    count = 2
    shadow: Any = copy.deepcopy(module).to("meta").train()
    views = [
        torch.empty(count * group.count, wanted.channels, wanted.height, wanted.width, device="meta")
        for group in groups
        for wanted in [group.input]
    ]
    noise = torch.empty(count, shadow.noise, device="meta")
    # fused attention on the CPU is unknown to torch's counter; written out it is two matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        shadow(*views, noise).sum().backward()
    return float(counter.get_total_flops() / count)


def matmul_peak_gflops(threads: int, seconds: float = 0.5, device: str = "cpu", precision: str = "fp32") -> float:
    """Billions of floating-point operations per second of the fastest matrix products on this machine, for `fp32` or
    `bf16`. Takes about `seconds`; torch's number of threads is as before."""
    side, dtype = SIDES[device], torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = torch.ones(side, side, dtype=dtype, device=device)
        out = matrix @ matrix
        best, end = 0.0, time.perf_counter() + seconds
        while best == 0.0 or time.perf_counter() < end:
            _synchronise(device)
            began = time.perf_counter()
            for _ in range(PRODUCTS):
                torch.mm(matrix, matrix, out=out)
            _synchronise(device)
            best = max(best, PRODUCTS * 2 * side**3 / (time.perf_counter() - began))
    finally:
        torch.set_num_threads(before)
    return best / 1e9


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
