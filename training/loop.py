"""The worker loop of `pretrain`: what every rank does for every global batch. Runs inside Ray Train."""

from __future__ import annotations

import contextlib
import math
import secrets
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster import storage
from cluster.code import check_here
from cluster.errors import DataError, RayographError, UsageError
from training import checkpoint
from training.augment import augmentation_of
from training.checkpoint import Position, Saver
from training.configs import PretrainConfig
from training.device import threads_for
from training.encoder import PRESETS, choose_preset
from training.feed import Batch, Feed, Source, image_ids
from training.line import Line
from training.methods import METHODS, Material, Method
from training.receipt import Recorder
from training.schedule import parameter_groups, warmup_cosine
from training.transform import Augmentation, Input
from training.views import draw_views, render
from training.weights import Initial, Wanted, initial_weights


@dataclass(frozen=True)
class Job:
    """All that a rank needs to know; plain values, shipped to every worker."""

    config: PretrainConfig
    out: str
    """Path or URI that every rank can write."""
    source: Source
    wanted: Wanted
    precision: str
    feed_tasks: int
    teacher: Wanted | None = None
    """Of the weights that the method learns from, where it does."""
    run: str = ""
    """What its receipts are named after, where they are kept."""

    @property
    def checkpoints(self) -> str:
        return storage.join(self.out, "checkpoints")


@dataclass(frozen=True)
class After:
    """What all ranks do after a step."""

    checkpoint: bool = False
    stop: bool = False
    failed: bool = False
    """The last checkpoint could not be written."""


@dataclass(frozen=True)
class Learner:
    """What is trained: the method's module (its `.kept` is what stays) and how images are shown to it."""

    module: Method
    input: Input
    architecture: dict[str, Any]
    provenance: dict[str, Any]
    teacher: dict[str, Any] | None = None
    """Where the teacher's weights come from, if there are any."""


def build(job: Job) -> Learner:
    """The method with its first weights: a pure function of the job, the same on every rank."""
    config = job.config
    preset = PRESETS[choose_preset(config.preset, job.wanted.device)]
    initial = initial_weights(job.wanted)
    teacher = _teacher(job.teacher) if job.teacher else None
    with torch.random.fork_rng(devices=[]):
        module = METHODS[config.method].build(Material(initial.network, initial.input, config, preset, teacher))
    module.seed(config.seed)
    return Learner(
        module,
        initial.input,
        initial.architecture.as_dict(),
        initial.provenance,
        teacher.provenance if teacher else None,
    )


def _teacher(wanted: Wanted) -> Initial:
    try:
        return initial_weights(wanted)
    except UsageError as error:
        raise UsageError(str(error).replace("--init", "--teacher")) from error


def augmentation(config: PretrainConfig) -> Augmentation:
    return augmentation_of(config)


class EndedError(RayographError):
    """What all ranks of a group ended with, each by itself: nobody is left waiting for anybody."""


def train(values: dict[str, Any]) -> None:
    """What `worker.enter` runs. A deliberate error is told to the desk, which refuses to start again.

    Args:
        values: `job`, a reference to the Job; `desk`, the name of the desk; `code`, the driver's (`this_code`).
    """
    import ray.train.torch

    job: Job = ray.get(values["job"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    with contextlib.closing(Line(values["desk"], rank)) as line:
        try:
            check_here(values["code"])
            threads = threads_for(context.get_local_world_size())
            Rank(job, rank, world, ray.train.torch.get_device(), threads, line).run()
        except EndedError as error:
            if error.__cause__:  # else another rank, or the desk itself, knows why
                line.fail(error.__cause__)
        except RayographError as error:
            line.fail(error)
            raise  # the others wait for this rank: its end makes theirs
        except Exception:
            line.say(
                f"rank {rank} of {world} ended:\n{traceback.format_exc()}"
            )  # Ray Train tells the driver only the last
            raise


class Rank:
    """One process of the group, from its newest checkpoint to the last step."""

    def __init__(self, job: Job, rank: int, world: int, device: torch.device, threads: int, line: Line) -> None:
        torch.set_num_threads(threads)
        self.job, self.rank, self.world, self.device, self.line = job, rank, world, device, line
        self.config = job.config
        self.learner = build(job)
        self.module = self.learner.module.to(device)
        groups = parameter_groups(self.module, self.config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.recorder: Recorder | None = None
        self.position = self._resume()
        self.parallel = self._distribute()
        self.plan = job.source.plan
        self.total_steps = self.config.epochs * self.plan.batches
        self.peak_lr = self.config.lr * self.config.batch_size / 256
        self.saver = Saver(
            job.checkpoints,
            self.config.keep,
            order=self.plan.digest,
            before=line.flush,
            after=line.saved,
            complain=line.say,
        )
        self.saved_at, self.saved_step = time.monotonic(), self.position.step

    def _resume(self) -> Position:
        """Every rank stands where the newest checkpoint that rank 0 found intact says.

        Raises:
            EndedError: the run is not to go on.
        """
        found: list[Any] = [None, None, None, None]
        if self.rank == 0:
            name, complaints = checkpoint.newest_name(self.job.checkpoints)
            for complaint in complaints:
                self.line.say(complaint)
            step = checkpoint.step_of(name) if name else 0
            group, refused = self.line.begin(from_step=step, workers=self.world, device=str(self.device))
            found = [name, group, refused, secrets.token_hex(4)]
        if self.world > 1:
            dist.broadcast_object_list(found, src=0)  # not each for itself: one may see a newer one than another
        name, group, refused, token = found
        self.line.join(group)
        if refused:
            raise EndedError(refused)
        if self.config.receipt:
            self.recorder = Recorder(Path(self.config.receipt), self.job.run, token, self.rank, self.world)
        if name is None:
            return Position()
        state = checkpoint.load(self.job.checkpoints, name)
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
        """Steps until the last one, or until the driver wants the group to end, for good or to start another one.

        Raises:
            EndedError: a step or a checkpoint that starting again would not mend.
        """
        with contextlib.closing(self.recorder) if self.recorder else contextlib.nullcontext():
            self.line.now("data")
            for batch in self._batches():
                row, after = self.step(batch)
                if self.rank == 0:
                    self.line.write(row)
                if after != After():
                    self._save(after)
                if after.stop:
                    return
                self.line.now("data")
            self._save(After(stop=True))

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

    def step(self, batch: Batch) -> tuple[dict[str, Any], After]:
        """One optimiser step on this rank's part of a global batch: its metrics row, and what is to be done after it.

        The loss is the mean over the global batch: a rank's sum, times world / rows, because DDP averages over ranks.
        """
        began, saving = time.monotonic(), self.saver.busy
        self.line.now("step", self.position.step + 1)
        lr = self.peak_lr * warmup_cosine(self.position.step, self.total_steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.recorder:
            self.recorder.add(batch.epoch, batch.number, batch.positions, batch.samples, batch.images)
        self.module.begin(self.position.step, self.total_steps, batch.epoch)
        losses = self._losses(batch)
        (losses.sum() * (self.world / batch.rows)).backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip)
        loss_sum, after = self._agree(float(losses.detach().sum()))
        loss = loss_sum / batch.rows
        self.position = self._next(batch)
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise EndedError("diverged") from self._diverged(batch, losses, loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.after_step(self._observed(batch))
        seconds = time.monotonic() - began
        row = {
            "step": self.position.step,
            "epoch": batch.epoch + 1,
            "loss": loss,
            "lr": lr,
            "images_per_second": batch.rows / (seconds + batch.wait_s),
            "grad_norm": float(norm),
            "data_wait_s": batch.wait_s,
            "samples": self.position.samples,
            "saving": saving or self.saver.busy,  # a small state may be on a local disk within a step
        }
        return row, after

    def _losses(self, batch: Batch) -> Tensor:
        """Loss of each of this rank's samples, float32 [b]; zeros that keep the graph where it has none."""
        positions, images = batch.positions, batch.images
        if not len(positions):
            source = self.job.source.plan
            positions = np.zeros(1, dtype=np.int64)
            images = np.zeros(
                (1, self.learner.input.height, self.learner.input.width, self.learner.input.channels), np.uint8
            )
            assert batch.rows < source.batch_size
        module = self.module
        groups = module.views(self.learner.input)
        draws, noise = draw_views(
            groups, augmentation(self.config), module.noise, self.config.seed, batch.epoch, positions=positions
        )
        views = render(images, groups, draws, self.device)
        enabled = self.job.precision == "bf16"
        module.train(len(batch.positions) > 0)  # running statistics of batch norm are not of zeros
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            losses: Tensor = self.parallel(*views, torch.from_numpy(noise).to(self.device))
        return losses if len(batch.positions) else losses * 0.0

    def _observed(self, batch: Batch) -> Tensor | None:
        """Mean over the global batch of what the method observed of each sample, equal on all ranks."""
        own = self.module.observed
        if own is None:
            return None
        total = own[: len(batch.positions)].to(self._wire(), torch.float64).sum(dim=0)
        if self.world > 1:
            dist.all_reduce(total)
        return total / batch.rows

    def _agree(self, loss_sum: float) -> tuple[float, After]:
        """The sum of losses over all ranks, and what rank 0 wants of all of them after this step."""
        wanted = After()
        if self.rank == 0:
            stop = self.line.stop()
            due = time.monotonic() - self.saved_at > self.config.checkpoint_s and not self.saver.busy
            wanted = After(due, stop, self.saver.failed)
        values = torch.tensor([loss_sum, *map(float, astuple(wanted))], dtype=torch.float64, device=self._wire())
        if self.world > 1:
            dist.all_reduce(values)
        total, *flags = (float(v) for v in values.tolist())
        return total, After(*(flag > 0 for flag in flags))

    def _diverged(self, batch: Batch, losses: Tensor, loss: float) -> DataError:
        """Raised by all ranks, for they agree on the loss; names the samples whose own loss is not finite."""
        mine = [int(s) for s, bad in zip(batch.samples, ~torch.isfinite(losses.detach()).cpu(), strict=False) if bad]
        found: list[list[int]] = [mine]
        if self.world > 1:
            found = [[] for _ in range(self.world)]
            dist.all_gather_object(found, mine)
        rows = sorted({row for part in found for row in part})
        named = ", ".join(image_ids(self.job.source, rows[:5])) + (
            f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        )
        first = batch.number * self.config.batch_size
        where = (
            f"of images {named}"
            if rows
            else f"somewhere in its gradients (positions {first} to {first + batch.rows - 1})"
        )
        return DataError(
            f"the loss is {loss} at step {self.position.step} of epoch {batch.epoch + 1}: not finite {where}; "
            "lower --lr, or use --precision fp32, and start again"
        )

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

    def _save(self, after: After) -> None:
        """Rank 0 is writing a checkpoint of this position, or has written it where nothing comes after it.

        Raises:
            EndedError: the last one could not be written.
        """
        self.line.now("save")
        self.saved_at = time.monotonic()
        try:
            if self.rank == 0 and self.position.step > self.saved_step:
                self.saver.save(self.position, self.module, self.optimizer)
                self.saved_step = self.position.step
                self.line.push()
            if self.rank == 0 and (after.stop or after.failed):
                self.saver.wait()
        except RayographError as error:
            raise EndedError("no checkpoint") from error
        if after.failed:
            raise EndedError("rank 0 could not write its checkpoint")
