"""The worker loop of `pretrain`: what every rank does for every global batch. Runs inside Ray Train."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from torch import nn

from cluster import storage
from cluster.errors import DataError, RayographError
from training import checkpoint
from training.checkpoint import Position, State
from training.configs import PretrainConfig
from training.device import threads_for
from training.encoder import PRESETS, choose_preset, seed_weights
from training.feed import Batch, Feed, Source
from training.methods import METHODS
from training.schedule import parameter_groups, warmup_cosine
from training.transform import Augmentation, Input, sample_draws, training_view
from training.weights import Wanted, initial_weights

STOP, FAILURE, WRITER = ".stop", ".failure.json", ".writer"
"""Files in --out: the driver's request to stop at the next step, a worker's deliberate error, and rank 0's lock."""
WRITER_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Job:
    """All that a rank needs to know; plain values, shipped to every worker."""

    config: PretrainConfig
    out: str
    source: Source
    wanted: Wanted
    precision: str
    feed_tasks: int

    @property
    def checkpoints(self) -> Path:
        return Path(self.out) / "checkpoints"


@dataclass(frozen=True)
class Learner:
    """What is trained: the method's module (its `.encoder` is what stays) and how images are shown to it."""

    module: nn.Module
    input: Input
    architecture: dict[str, Any]
    provenance: dict[str, Any]


def build(job: Job) -> Learner:
    """The method with its first weights: a pure function of the job, the same on every rank."""
    config = job.config
    preset = PRESETS[choose_preset(config.preset, job.wanted.device)]
    initial = initial_weights(job.wanted)
    with torch.random.fork_rng(devices=[]):
        module = METHODS[config.method](
            initial.network,
            decoder_width=config.decoder_width or preset.decoder_width,
            decoder_depth=config.decoder_depth or preset.decoder_depth,
            mask_ratio=config.mask_ratio,
            norm_pix=config.norm_pix,
        )
    for name, child in module.named_children():
        if name != "encoder":
            seed_weights(child, config.seed, f"{config.method}.{name}.")
    _seed_own(module, config.seed, config.method)
    return Learner(module, initial.input, initial.architecture.as_dict(), initial.provenance)


def _seed_own(module: nn.Module, seed: int, prefix: str) -> None:
    """Parameters that belong to the method itself and to none of its children, such as the mask token."""
    from training import keyed

    for name, parameter in module.named_parameters(recurse=False):
        generator = torch.Generator().manual_seed(keyed.number("weights", seed, f"{prefix}.{name}") % 2**63)
        with torch.no_grad():
            parameter.normal_(0, 0.02, generator=generator)


def augmentation(config: PretrainConfig) -> Augmentation:
    return Augmentation(config.min_crop, config.flip)


def train(values: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`. A deliberate error is written down and not retried."""
    job: Job = values["job"]
    import ray.train.torch

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    try:
        threads = threads_for(context.get_local_world_size())
        Rank(job, rank, world, ray.train.torch.get_device(), threads).run()
    except RayographError as error:
        if rank == 0:
            storage.write_json(Path(job.out) / FAILURE, {"kind": type(error).__name__, "message": str(error)})


class Rank:
    """One process of the group, from its newest checkpoint to the last step."""

    def __init__(self, job: Job, rank: int, world: int, device: torch.device, threads: int) -> None:
        torch.set_num_threads(threads)
        self.job, self.rank, self.world, self.device = job, rank, world, device
        self.writer = self._only_writer()
        self.config = job.config
        self.learner = build(job)
        self.module = self.learner.module.to(device)
        groups = parameter_groups(self.module, self.config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.position = self._resume()
        self.parallel = self._distribute()
        self.plan = job.source.plan
        self.total_steps = self.config.epochs * self.plan.batches
        self.peak_lr = self.config.lr * self.config.batch_size / 256
        self.saved = time.monotonic()

    def _only_writer(self) -> FileLock:
        """Rank 0 holds the run's files, and every rank may read its checkpoints.

        Workers outlive a driver that was killed by a moment: the same command again must not write beside them.
        """
        lock = FileLock(str(Path(self.job.out) / WRITER))
        if self.rank == 0:
            lock.acquire(timeout=WRITER_PATIENCE_S)
        if self.world > 1:
            dist.barrier()
        return lock

    def _resume(self) -> Position:
        state, complaints = checkpoint.newest(self.job.checkpoints)
        if self.rank == 0:
            for complaint in complaints:
                self._log(complaint)
        if state is None:
            return Position()
        checkpoint.restore(self.module, self.optimizer, state.tensors)
        return state.position

    def _distribute(self) -> nn.Module:
        if self.world == 1:
            return self.module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames broadcast_buffers; 2.9 knows no other
            return nn.parallel.DistributedDataParallel(
                self.module, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def run(self) -> None:
        with self._released(), _Log(self) if self.rank == 0 else contextlib.nullcontext() as log:
            for batch in self._batches():
                row = self.step(batch)
                if log is not None:
                    log.write(row)
                if row["stop"]:
                    self.save()
                    return
                if row["checkpoint"]:
                    self.save()
            self.save()

    @contextlib.contextmanager
    def _released(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.writer.release()

    def _batches(self) -> Iterator[Batch]:
        feed = Feed(
            self.job.source,
            rank=self.rank,
            world=self.world,
            start=(self.position.epoch, self.position.batch),
            epochs=self.config.epochs,
            tasks=self.job.feed_tasks,
        )
        with contextlib.closing(feed):
            yield from feed

    def step(self, batch: Batch) -> dict[str, Any]:
        """One optimiser step on this rank's part of a global batch.

        The loss is the mean over the global batch: a rank's sum, times world / rows, because DDP averages over ranks.
        """
        began = time.monotonic()
        lr = self.peak_lr * warmup_cosine(self.position.step, self.total_steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = self._losses(batch)
        (losses.sum() * (self.world / batch.rows)).backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip)
        flags = self._agree(float(losses.detach().sum()))
        loss = flags[0] / batch.rows
        self.position = self._next(batch)
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise DataError(
                f"the loss is {loss} at step {self.position.step} (epoch {batch.epoch + 1}, samples from "
                f"{batch.number * self.config.batch_size}); lower --lr, or --precision fp32, and start again"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - began
        return {
            "step": self.position.step,
            "epoch": batch.epoch + 1,
            "loss": loss,
            "lr": lr,
            "images_per_second": batch.rows / (seconds + batch.wait_s),
            "grad_norm": float(norm),
            "data_wait_s": batch.wait_s,
            "samples": self.position.samples,
            "checkpoint": flags[1] > 0,
            "stop": flags[2] > 0,
        }

    def _losses(self, batch: Batch) -> torch.Tensor:
        """Loss of each of this rank's samples, float32 [b]; zeros that keep the graph where it has none."""
        positions, images = batch.positions, batch.images
        if not len(positions):
            source = self.job.source.plan
            positions = np.zeros(1, dtype=np.int64)
            images = np.zeros(
                (1, self.learner.input.height, self.learner.input.width, self.learner.input.channels), np.uint8
            )
            assert batch.rows < source.batch_size
        module: Any = self.module
        draws, noise = sample_draws(
            augmentation(self.config), module.patches, self.config.seed, batch.epoch, positions=positions
        )
        views = training_view(images, self.learner.input, draws, self.device)
        enabled = self.job.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            losses: torch.Tensor = self.parallel(views, torch.from_numpy(noise).to(self.device))
        return losses if len(batch.positions) else losses * 0.0

    def _agree(self, loss_sum: float) -> list[float]:
        """[sum of losses, ranks that want a checkpoint, ranks that were asked to stop] over all ranks."""
        due = self.rank == 0 and time.monotonic() - self.saved > self.config.checkpoint_s
        stop = self.rank == 0 and (Path(self.job.out) / STOP).exists()
        values = torch.tensor([loss_sum, float(due), float(stop)], dtype=torch.float64, device=self._wire())
        if self.world > 1:
            dist.all_reduce(values)
        return [float(v) for v in values.tolist()]

    def _wire(self) -> torch.device:
        """Where tensors of the process group live; MPS has neither float64 nor a group."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def _next(self, batch: Batch) -> Position:
        last = batch.number + 1 == self.plan.batches
        return Position(
            epoch=batch.epoch + last,
            batch=0 if last else batch.number + 1,
            step=self.position.step + 1,
            samples=self.position.samples + batch.rows,
        )

    def save(self) -> None:
        """Rank 0 has written a checkpoint; the others wait only in the next step's reduction."""
        if self.rank == 0:
            tensors = checkpoint.collect(self.module, self.optimizer)
            checkpoint.save(self.job.checkpoints, State(self.position, tensors), self.config.keep)
        self.saved = time.monotonic()

    def _log(self, text: str) -> None:
        with (Path(self.job.out) / "run.log").open("a", encoding="utf-8") as file:
            file.write(text + "\n")


class _Log:
    """`metrics.jsonl` and TensorBoard, cut back to the checkpoint that the run resumes from."""

    def __init__(self, rank: Rank) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(rank.job.out) / "metrics.jsonl"
        first = rank.position.step
        _truncate(self.path, first)
        self.file = self.path.open("a", encoding="utf-8")
        start = {
            "event": "start",
            "from_step": first,
            "workers": rank.world,
            "device": str(rank.device),
            "pid": os.getpid(),
        }
        self.file.write(json.dumps(start) + "\n")
        self.board = SummaryWriter(str(Path(rank.job.out) / "tensorboard"), purge_step=first + 1)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.board.close()

    def write(self, row: dict[str, Any]) -> None:
        kept = {k: v for k, v in row.items() if k not in {"checkpoint", "stop"}}
        self.file.write(json.dumps(kept) + "\n")
        self.file.flush()
        for name in ("loss", "lr", "images_per_second", "grad_norm"):
            self.board.add_scalar(name, row[name], row["step"])


def _truncate(path: Path, last_step: int) -> None:
    """Drop the rows of steps after `last_step`, and a last line cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("step", 0) <= last_step:
            kept.append(line)
    storage.write_text(path, "".join(line + "\n" for line in kept))
