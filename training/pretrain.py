"""`pretrain`: images without labels to a RUN with an encoder, its metrics and its figures."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import parts, storage
from cluster.errors import RayographError, UsageError
from cluster.nodes import unseen_by
from cluster.outdir import OutDir
from cluster.progress import counted, say
from cluster.session import Resources, cores, in_cluster, session
from training import checkpoint, figures, keyed, receipt, speed
from training.artifact import ModelCard, save_model
from training.configs import PretrainConfig
from training.dataset import Dataset, Selection
from training.desk import METRICS, read_metrics
from training.device import choose_device, device_in, precision_of, require_room, workers_between
from training.encoder import Architecture, architecture_for
from training.encoder_card import encoder_card
from training.feed import source_of
from training.ingest import resolve_data
from training.launch import Team, launch
from training.lineage import labelled_by, named_by, own_groups, own_images, seen_by
from training.loop import Job, Learner, build
from training.methods import METHODS, NEED_VIT, check_method
from training.model_card import README
from training.pretrain_report import Facts, speed_of, write_pretrain_report
from training.probe import SCALARS
from training.probing import Probing
from training.receipt import Verdict
from training.transform import evaluation_view
from training.weights import located, wanted_for

LAZY = ("checkpoints", "receipt", f"{METRICS}.parts")
"""What of an --out in an object store is not copied here when it is taken up again."""
WEIGHTS = "model.safetensors"
MAX_FEED_TASKS = 8
"""Reading tasks of one rank at the same time."""


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """The RUN at `config.out` holds an encoder pretrained on all images of `config.data`; returns its summary.

    Raises:
        UsageError: a flag cannot be right for this data or method.
        ResourceError: more workers than the machine or cluster has.
        StoppedError: stopped on request; the same command goes on.
    """
    check_method(config)
    _refuse_early(config)
    with config.open_out("pretrain", lazy=LAZY) as out:
        if out.state == "done":
            return out.summary()
        dataset = resolve_data(config.data, out=config.out)
        selection = dataset.select(config.where)
        with session(cpus=1 + 3 * cores(), log=out.log) as found:
            device = device_in(config.device, found)
            least, most = workers_between(config.workers, found, device)
            require_room(found, least, device)
            _require_shared(out, found)
            # each worker reserves a CPU: without some for its feed, Ray Data would wait forever on a small machine
            tasks = min(MAX_FEED_TASKS, max(1, (found.cpus - least) // most))
            job = _job(config, out.uri, dataset, selection, device, tasks)
            learner = build(job)
            before = _restore(out, job)
            job = replace(job, run=_named(out, before[0])) if config.receipt else job
            _announce(job, learner, config.workers if least < most else str(most), len(selection))
            started = time.monotonic()
            probing = Probing(job, dataset, selection) if config.probe else None
            with contextlib.closing(probing) if probing else contextlib.nullcontext():
                team = Team(least, most, device, config.train_on, config.read_on)
                launch(job, team, out.path, before, probing or (lambda _desk, _saved: None), out.refuse_if_taken)
            seconds = time.monotonic() - started
        return _finish(out, job, learner, dataset, selection, seconds, probing)


def _restore(out: OutDir, job: Job) -> tuple[int, int]:
    """Step and samples that the run stands at; its metrics so far lie in the local folder."""
    if not storage.is_local(out.uri):
        storage.write_text(out.path / METRICS, parts.read(storage.join(out.uri, f"{METRICS}.parts")))
    state, complaints = checkpoint.newest(job.checkpoints)
    for complaint in complaints:
        say(complaint)
    if state is None:
        return 0, 0
    if state.order not in {"", job.source.plan.digest}:
        raise UsageError(
            f"--data {storage.printable(job.config.data)}: not the data set that this run was trained on so far; bring "
            "that one back, or begin anew with --overwrite (and --init a RUN, to start from what one has learnt)"
        )
    return state.position.step, state.position.samples


def _named(out: OutDir, step: int) -> str:
    """What the run's receipts are named after, kept in it before the first of them is written."""
    name = receipt.run_id(out.path, step)
    out.push()
    return name


def _require_shared(out: OutDir, found: Resources) -> None:
    """Every node of a cluster can write `--out`.

    Raises:
        UsageError: one of them does not see the folder.
    """
    if found.nodes < 2 or not storage.is_local(out.uri):
        return
    blind = unseen_by(str(out.path))
    if blind:
        raise UsageError(
            f"--out {out.path}: not seen by {', '.join(blind)}; choose a folder that all hosts share, or an object "
            "store such as s3://BUCKET/RUN"
        )


def _refuse_early(config: PretrainConfig) -> None:
    """What can be refused before anything is read, or Ray is up."""
    if config.init == "imagenet" and config.method in NEED_VIT:
        raise UsageError(
            f"--init imagenet: a convolutional network, and --method {config.method} needs a ViT; "
            "use --init none, a RUN or timm:NAME of a ViT"
        )
    if in_cluster():
        return  # its devices are not known yet
    device = choose_device(config.device)
    if device == "cpu":
        workers_between(config.workers, None, device)
    if config.init == "none":
        architecture_for(
            preset=config.preset, model=config.model, image_size=config.image_size, channels=3, device=device
        )


def _job(config: PretrainConfig, out: str, dataset: Dataset, selection: Selection, device: str, tasks: int) -> Job:
    plan = dataset.plan(selection, batch_size=config.batch_size, seed=config.seed)
    wanted = wanted_for(config, dataset, device)
    teacher = replace(wanted, init=located(config.teacher), image_size="auto")
    return Job(
        config=config,
        out=out,
        source=source_of(dataset, plan, config.where, read_on=config.read_on),
        wanted=wanted,
        precision=precision_of(config.precision, device),
        feed_tasks=tasks,
        teacher=teacher if METHODS[config.method].NEEDS_TEACHER else None,
    )


def _announce(job: Job, learner: Learner, workers: str, images: int) -> None:
    network = Architecture(**learner.architecture)
    source = learner.provenance.get("sha256", "")
    patch = f"patch {network.patch}, " if network.patch else ""
    say(
        f"{job.config.method}: {network.name} at {network.height}x{network.width}, {patch}"
        f"{counted(network.channels, 'channel')}, on {job.wanted.device} with {workers} workers, {job.precision}; "
        f"{counted(images, 'image')}, {counted(job.config.epochs, 'epoch')} of "
        f"{counted(job.source.plan.batches, 'step')}"
    )
    say(f"initial weights: {job.wanted.init}{f' (sha256 {source})' if source else ''}")
    if job.teacher and learner.teacher:
        say(f"teacher: {job.teacher.init} (sha256 {learner.teacher['sha256']})")


def _finish(
    out: OutDir,
    job: Job,
    learner: Learner,
    dataset: Dataset,
    selection: Selection,
    seconds: float,
    probing: Probing | None,
) -> dict[str, Any]:
    state, _ = checkpoint.newest(job.checkpoints)
    if state is None or state.position.epoch < job.config.epochs:
        raise RayographError(f"training ended before its last epoch; details in {out.name('run.log')}")
    module = learner.module
    module.load_state_dict({k.removeprefix("model."): v for k, v in state.tensors.items() if k.startswith("model.")})
    encoder = module.kept
    rows = read_metrics((out.path / METRICS).read_text(encoding="utf-8"))
    steps = [r for r in rows if "step" in r]
    starts = [r for r in rows if r.get("event") == "start"]
    if probing:
        rows.append(probing.last(encoder, learner.input, state.position.step))
        with (out.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    card = ModelCard(
        architecture=Architecture(**learner.architecture),
        image_path=dataset.image_path,
        input=learner.input,
        metrics={"final_loss": steps[-1]["loss"]},
        lineage={
            "verb": "pretrain",
            "method": job.config.method,
            "dataset": dataset.version,
            "images": len(selection),
            "initial": learner.provenance,
            "config": job.config.identity(),
        }
        | ({"teacher": learner.teacher} if learner.teacher else {}),
    )
    sources = [wanted.init for wanted in (job.wanted, job.teacher) if wanted]
    seen = own_images(selection).union(*map(seen_by, sources))
    labelled = frozenset[str]().union(*map(labelled_by, sources))
    groups = own_groups(selection).union(*map(named_by, sources))
    scores = {name: rows[-1][name] for name in SCALARS if probing and name in rows[-1]}
    data = Path(job.config.data.rstrip("/")).name
    about = encoder_card(card, name=storage.name_of(out.uri), data=data, scores=scores)
    known = {"seen": seen, "labelled": labelled, "groups": groups}
    save_model(out.path / "model", card, encoder, **known, files=[(README, about.encode())])
    flops = speed.flops_per_image(module, module.views(learner.input))
    threads = cores() if job.wanted.device == "cpu" else 1
    peak = speed.matmul_peak_gflops(threads, device=job.wanted.device, precision=job.precision)
    _picture(out.path, job, learner, dataset, selection)
    proof = _proof(job, dataset, selection)
    facts = Facts(
        config=job.config,
        card=card,
        images=len(selection),
        workers=starts[-1]["workers"],
        device=job.wanted.device,
        precision=job.precision,
        seconds=seconds,
        probed=probing.sentence if probing else "",
        flops_per_image=flops,
        peak_gflops=peak if starts[-1]["workers"] <= threads else None,  # the peak of this host, no cluster's
        receipt=proof.sentence if proof else "",
    )
    write_pretrain_report(out.path, facts, rows)
    reached = speed_of(rows, flops, facts.peak_gflops)
    summary = {
        "epochs": job.config.epochs,
        "steps": state.position.step,
        "samples_seen": state.position.samples,
        "final_loss": float(np.mean([r["loss"] for r in steps[-job.source.plan.batches :]])),
        "images_per_second": reached.images_per_second,
        "seconds": seconds,
        "workers": starts[-1]["workers"],
        "restarts": len(starts) - 1,
        "data_wait_share": reached.wait_share,
        "matmul_peak_share": reached.peak_share,
    }
    if proof:
        summary |= {"receipt": vars(proof)}
        say(proof.sentence)
    summary |= scores
    out.finish(summary)
    say(
        f"done: loss {summary['final_loss']:.4f}, {summary['images_per_second']:,.0f} images/s; load it elsewhere with:"
    )
    say(
        card.architecture.snippet(
            str(out.path / "model" / "model.safetensors") if storage.is_local(out.uri) else WEIGHTS
        )
    )
    return summary


def _proof(job: Job, dataset: Dataset, selection: Selection) -> Verdict | None:
    """What the receipts of the ranks say, where they were kept in a folder that this host sees."""
    folder = Path(job.config.receipt) if job.config.receipt else None
    if folder is None:
        return None
    if not folder.is_dir():
        say(f"--receipt {storage.printable(str(folder))}: not on this host; those that trained have it, unproven")
        return None
    notes = receipt.load(folder, job.run)
    return receipt.check(notes, job.source.plan, selection, receipt.hashes_of(dataset, selection), job.config.epochs)


def _picture(out: Path, job: Job, learner: Learner, dataset: Dataset, selection: Selection) -> None:
    chosen = np.sort(keyed.generator("pictures", job.config.seed).permutation(len(selection))[:8])
    pixels = dataset.pixels(selection.take(chosen))
    images = evaluation_view(pixels, learner.input)
    module = learner.module.cpu().eval()
    noise = keyed.generator("masks", job.config.seed).random((len(images), module.noise), dtype=np.float32)
    pictures = module.pictures(images, torch.from_numpy(noise))
    if pictures is None:
        return
    masked, made = pictures
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    show = learner.input.restore
    figures.reconstructions(show(images), show(masked), show(made), folder / "reconstructions.png")
