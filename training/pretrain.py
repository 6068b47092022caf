"""`pretrain`: launches the worker loop on Ray Train, watches it, and turns its last checkpoint into a RUN."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import errors, storage
from cluster.errors import RayographError, ResourceError, StoppedError, UsageError, nearest
from cluster.outdir import OutDir
from cluster.progress import Bar, progress, say
from cluster.session import Resources, session
from training import checkpoint, figures
from training.artifact import ModelCard, save_model
from training.configs import PretrainConfig
from training.dataset import Dataset, Selection
from training.device import choose_device, count_workers, precision_of, threads_for
from training.encoder import Architecture, architecture_for
from training.feed import Source
from training.ingest import resolve_data
from training.loop import FAILURE, STOP, Job, Learner, augmentation, build, train
from training.methods import METHODS
from training.transform import evaluation_view
from training.weights import Wanted
from training import keyed

MAX_RESTARTS = 3
STOP_PATIENCE_S = 7.0
"""How long a stopped run may take to write its checkpoint before it is ended without one."""


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """The RUN at `config.out` holds an encoder pretrained on all images of `config.data`; returns its summary.

    Raises:
        UsageError: a flag cannot be right for this data or method.
        ResourceError: more workers than the machine or cluster has.
        StoppedError: stopped on request; the same command goes on.
    """
    if config.method not in METHODS:
        raise UsageError(f"--method {config.method}: no such method.{nearest(config.method, METHODS)}")
    device = choose_device(config.device)
    _refuse_early(config, device)
    opened = OutDir.open(
        config.out,
        verb="pretrain",
        config=config.as_dict(),
        identity=config.identity(),
        raisable={name: getattr(config, name) for name in config.RAISABLE},
        overwrite=config.overwrite,
    )
    with opened as out:
        if out.state == "done":
            return out.summary()
        for name in (STOP, FAILURE):
            (out.path / name).unlink(missing_ok=True)
        dataset = resolve_data(config.data, out=config.out)
        selection = dataset.select(config.where)
        with session(cpus=_logical_cpus(config, device), log=out.log) as found:
            workers = count_workers(config.workers, found, device)
            job = _job(config, out.path, dataset, selection, device, workers)
            learner = build(job)
            _announce(job, learner, workers, len(selection))
            started = time.monotonic()
            _run(job, workers, device, found)
            seconds = time.monotonic() - started
        return _finish(out, job, learner, dataset, selection, workers, seconds)


def _refuse_early(config: PretrainConfig, device: str) -> None:
    """What can be refused before anything is read."""
    count_workers(config.workers, None, device) if device == "cpu" else None
    if config.init == "imagenet":
        raise UsageError(
            f"--init imagenet: a convolutional network, and --method {config.method} needs a ViT; "
            "use --init none, a RUN or timm:NAME of a ViT"
        )
    if config.init == "none":
        architecture_for(
            preset=config.preset, model=config.model, image_size=config.image_size, channels=3, device=device
        )


def _logical_cpus(config: PretrainConfig, device: str) -> int:
    """Each worker reserves one, and its feed needs some of its own: else Ray Data waits forever on a small machine."""
    workers = count_workers(config.workers, None, device) if device == "cpu" else 1
    return 1 + 3 * workers


def _job(config: PretrainConfig, out: Path, dataset: Dataset, selection: Selection, device: str, workers: int) -> Job:
    plan = dataset.plan(selection, batch_size=config.batch_size, seed=config.seed)
    wanted = Wanted(
        init=config.init,
        preset=config.preset,
        model=config.model,
        image_size=config.image_size,
        seed=config.seed,
        device=device,
        channels=dataset.channels,
        mean=tuple(dataset.info["mean"]),
        std=tuple(dataset.info["std"]),
    )
    return Job(
        config=config,
        out=str(out.resolve()),
        source=Source(str(dataset.path.resolve()), config.where, False, plan),
        wanted=wanted,
        precision=precision_of(config.precision, device),
        threads=threads_for(workers) if device == "cpu" else threads_for(workers * 2),
        feed_tasks=2,
    )


def _announce(job: Job, learner: Learner, workers: int, images: int) -> None:
    network = Architecture(**learner.architecture)
    source = learner.provenance.get("sha256", "")
    say(
        f"{job.config.method}: {network.name} at {network.height}x{network.width}, patch {network.patch}, "
        f"{network.channels} channels, on {job.wanted.device} with {workers} workers, {job.precision}; "
        f"{images:,} images, {job.config.epochs} epochs of {job.source.plan.batches} steps"
    )
    say(f"initial weights: {job.wanted.init}{f' (sha256 {source})' if source else ''}")


def _run(job: Job, workers: int, device: str, found: Resources) -> None:
    """The worker loop has come to its end on every rank, or an error says why not."""
    outcome: list[BaseException | None] = []

    def fit() -> None:
        try:
            _trainer(job, workers, device).fit()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=fit, name="train", daemon=True)
    thread.start()
    total = job.config.epochs * job.source.plan.total
    with _stopping(job) as stopped, progress("pretrain", total, "images") as bar:
        tail = _Tail(Path(job.out) / "metrics.jsonl", bar, found)
        while thread.is_alive():
            thread.join(0.5)
            tail.read()
            if stopped() and time.monotonic() - stopped() > STOP_PATIENCE_S:
                break
        tail.read()
    _raise_failure(job, outcome, bool(stopped()))


def _trainer(job: Job, workers: int, device: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        train,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo", timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=device == "cuda", resources_per_worker={"CPU": 1} if device != "cuda" else None
        ),
        run_config=RunConfig(
            name=f"rayograph-{uuid.uuid4().hex[:12]}",  # an old name would resume Ray's state of an old run
            storage_path=str(Path(job.out) / ".ray"),
            failure_config=FailureConfig(max_failures=MAX_RESTARTS, controller_failure_limit=0),
        ),
    )


@contextlib.contextmanager
def _stopping(job: Job) -> Iterator[Callable[[], float]]:
    """Ctrl-C and SIGTERM ask the ranks for a checkpoint; yields the time of the request, 0.0 before it."""
    asked = [0.0]
    kind = [0]

    def ask(number: int, _frame: object) -> None:
        if asked[0] and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        asked[0], kind[0] = time.monotonic(), number
        (Path(job.out) / STOP).touch()

    if threading.current_thread() is not threading.main_thread():
        yield lambda: asked[0]
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if kind[0] == signal.SIGINT:
        raise KeyboardInterrupt


class _Tail:
    """Follows `metrics.jsonl` for the progress bar, and notices a start that never comes."""

    def __init__(self, path: Path, bar: Bar, found: Resources) -> None:
        self.path, self.bar, self.offset, self.samples = path, bar, 0, 0

    def read(self) -> None:
        if not self.path.exists():
            return
        if self.path.stat().st_size < self.offset:  # cut back by a restart
            self.offset = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read()
        lines = content[: content.rfind(b"\n") + 1]
        self.offset += len(lines)
        rows = [json.loads(line) for line in lines.splitlines()]
        steps = [row for row in rows if "step" in row]
        if steps and steps[-1]["samples"] > self.samples:
            self.bar.advance(steps[-1]["samples"] - self.samples, f"loss {steps[-1]['loss']:.4f}")
            self.samples = steps[-1]["samples"]


def _raise_failure(job: Job, outcome: list[BaseException | None], stopped: bool) -> None:
    if stopped:
        raise StoppedError("stopped; the same command again goes on from its last checkpoint")
    failure = Path(job.out) / FAILURE
    if failure.exists():
        values = storage.read_json(failure)
        raise getattr(errors, values["kind"], RayographError)(values["message"])
    error = outcome[0] if outcome else None
    if error is not None:
        raise RayographError(f"training failed: {_cause(error)}; details in {job.out}/run.log") from error


def _cause(error: BaseException) -> str:
    """The innermost message of Ray's nested errors, in one line."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return lines[-1] if lines else type(inner).__name__


def _finish(
    out: OutDir,
    job: Job,
    learner: Learner,
    dataset: Dataset,
    selection: Selection,
    workers: int,
    seconds: float,
) -> dict[str, Any]:
    state, _ = checkpoint.newest(job.checkpoints)
    if state is None or state.position.epoch < job.config.epochs:
        raise RayographError(f"training ended before its last epoch; details in {out.log}")
    module = learner.module
    module.load_state_dict({k.removeprefix("model."): v for k, v in state.tensors.items() if k.startswith("model.")})
    rows = _metrics(out.path)
    steps = [r for r in rows if "step" in r]
    starts = [r for r in rows if r.get("event") == "start"]
    card = ModelCard(
        architecture=Architecture(**learner.architecture),
        image_path=dataset.image_path,
        input=learner.input,
        metrics={"final_loss": steps[-1]["loss"]},
        lineage={
            "verb": "pretrain",
            "method": job.config.method,
            "dataset": dataset.version,
            "images": sorted(selection.column("sha256")),
            "initial": learner.provenance,
            "config": job.config.identity(),
        },
    )
    encoder: Any = module.encoder
    save_model(out.path / "model", card, encoder)
    _figures(out.path, job, learner, dataset, selection, steps)
    rate = [r["images_per_second"] for r in steps]
    summary = {
        "epochs": job.config.epochs,
        "steps": state.position.step,
        "samples_seen": state.position.samples,
        "final_loss": float(np.mean([r["loss"] for r in steps[-job.source.plan.batches :]])),
        "images_per_second": float(np.median(rate)),
        "seconds": seconds,
        "workers": workers,
        "restarts": len(starts) - 1,
        "data_wait_share": float(
            sum(r["data_wait_s"] for r in steps) / max(1e-9, sum(job.config.batch_size / r for r in rate))
        ),
    }
    out.finish(summary)
    say(
        f"done: loss {summary['final_loss']:.4f}, {summary['images_per_second']:,.0f} images/s; load it elsewhere with:"
    )
    say(card.architecture.snippet(str(out.path / "model" / "model.safetensors")))
    return summary


def _metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _figures(
    out: Path, job: Job, learner: Learner, dataset: Dataset, selection: Selection, steps: list[dict[str, Any]]
) -> None:
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    xs = np.asarray([r["step"] for r in steps])
    figures.curves({"loss": (xs, np.asarray([r["loss"] for r in steps]))}, folder / "loss.png", "step", "loss")
    chosen = np.sort(keyed.generator("pictures", job.config.seed).permutation(len(selection))[:8])
    pixels = dataset.pixels(selection.take(chosen))
    images = evaluation_view(pixels, learner.input)
    module: Any = learner.module.cpu().eval()
    noise = keyed.generator("masks", job.config.seed).random((len(images), module.patches), dtype=np.float32)
    masked, made = module.pictures(images, torch.from_numpy(noise))
    show = learner.input.restore
    figures.reconstructions(show(images), show(masked), show(made), folder / "reconstructions.png")
