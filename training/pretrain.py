"""`pretrain`: images without labels to a RUN with an encoder, its metrics and its figures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.errors import RayographError, UsageError, nearest
from cluster.outdir import OutDir
from cluster.progress import say
from cluster.session import cores, in_cluster, session
from training import checkpoint, figures, keyed
from training.artifact import ModelCard, save_model
from training.configs import PretrainConfig
from training.dataset import Dataset, Selection
from training.device import choose_device, count_workers, device_in, precision_of, require_room
from training.encoder import Architecture, architecture_for
from training.feed import Source
from training.ingest import resolve_data
from training.launch import launch
from training.lineage import own_images, seen_by
from training.loop import FAILURE, STOP, Job, Learner, build
from training.methods import METHODS
from training.transform import evaluation_view
from training.weights import Wanted, located

MAX_FEED_TASKS = 8
"""Reading tasks of one rank at the same time."""


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """The RUN at `config.out` holds an encoder pretrained on all images of `config.data`; returns its summary.

    Raises:
        UsageError: a flag cannot be right for this data or method.
        ResourceError: more workers than the machine or cluster has.
        StoppedError: stopped on request; the same command goes on.
    """
    if config.method not in METHODS:
        raise UsageError(f"--method {config.method}: no such method.{nearest(config.method, METHODS)}")
    _refuse_early(config)
    with config.open_out("pretrain") as out:
        if out.state == "done":
            return out.summary()
        for name in (STOP, FAILURE):
            (out.path / name).unlink(missing_ok=True)
        dataset = resolve_data(config.data, out=config.out)
        selection = dataset.select(config.where)
        with session(cpus=1 + 3 * cores(), log=out.log) as found:
            device = device_in(config.device, found)
            workers = count_workers(config.workers, found, device)
            require_room(found, workers, device)
            # each worker reserves a CPU: without some for its feed, Ray Data would wait forever on a small machine
            tasks = min(MAX_FEED_TASKS, max(1, (found.cpus - workers) // workers))
            job = _job(config, out.path, dataset, selection, device, tasks)
            learner = build(job)
            _announce(job, learner, workers, len(selection))
            started = time.monotonic()
            launch(job, workers, device)
            seconds = time.monotonic() - started
        return _finish(out, job, learner, dataset, selection, workers, seconds)


def _refuse_early(config: PretrainConfig) -> None:
    """What can be refused before anything is read, or Ray is up."""
    if config.init == "imagenet":
        raise UsageError(
            f"--init imagenet: a convolutional network, and --method {config.method} needs a ViT; "
            "use --init none, a RUN or timm:NAME of a ViT"
        )
    if in_cluster():
        return  # its devices are not known yet
    device = choose_device(config.device)
    if device == "cpu":
        count_workers(config.workers, None, device)
    if config.init == "none":
        architecture_for(
            preset=config.preset, model=config.model, image_size=config.image_size, channels=3, device=device
        )


def _job(config: PretrainConfig, out: Path, dataset: Dataset, selection: Selection, device: str, tasks: int) -> Job:
    plan = dataset.plan(selection, batch_size=config.batch_size, seed=config.seed)
    wanted = Wanted(
        init=located(config.init),
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
        feed_tasks=tasks,
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
            "initial": learner.provenance,
            "config": job.config.identity(),
        },
    )
    encoder: Any = module.encoder
    save_model(out.path / "model", card, encoder, seen=own_images(selection) | seen_by(job.config.init))
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
        "data_wait_share": _wait_share(steps, job),
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


def _wait_share(steps: list[dict[str, Any]], job: Job) -> float:
    """Share of the training time that rank 0 waited for data."""
    plan = job.source.plan
    seconds = sum(plan.batch_rows((r["step"] - 1) % plan.batches) / r["images_per_second"] for r in steps)
    return float(sum(r["data_wait_s"] for r in steps) / max(1e-9, seconds))
