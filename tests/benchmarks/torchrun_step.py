"""The peer of `bench fed`: the very step of training.loop under torchrun, fed with tensors that lie in memory."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from training.configs import PretrainConfig
from training.dataset import Dataset
from training.feed import Batch, source_of
from training.line import Line
from training.loop import Job, Rank
from training.plan import rank_slice
from training.weights import Wanted


class Alone(Line):
    """A rank without a driver."""

    def __init__(self) -> None:
        self._stop = False

    def begin(self, **start: Any) -> tuple[int, str | None]:
        return 1, None

    def stop(self) -> bool:
        return self._stop


def main(data: str, result: str, batch_size: str) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    out = tempfile.mkdtemp()
    config = PretrainConfig(data, out=out, epochs=4, batch_size=int(batch_size), workers="2", preset="tiny")
    dataset = Dataset.open(data)
    selection = dataset.select()
    plan = dataset.plan(selection, batch_size=config.batch_size, seed=config.seed)
    wanted = Wanted(
        init="none",
        preset="tiny",
        model=None,
        image_size="auto",
        seed=config.seed,
        device="cpu",
        channels=dataset.channels,
        mean=tuple(dataset.info["mean"]),
        std=tuple(dataset.info["std"]),
    )
    job = Job(config, config.out, source_of(dataset, plan), wanted, "fp32", 2)
    trainer = Rank(job, rank, world, torch.device("cpu"), 1, Alone())
    low, high = rank_slice(config.batch_size, rank, world)
    images = dataset.pixels(selection.take(np.arange(low, high)))
    rows = []
    for number in range(config.epochs * plan.batches):
        epoch, within = divmod(number, plan.batches)
        positions = within * config.batch_size + np.arange(low, high)
        batch = Batch(epoch, within, config.batch_size, positions, positions, images, 0.0, frozenset())
        rows.append(trainer.step(batch)[0])
    if rank == 0:
        Path(result).write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
