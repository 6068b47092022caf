"""The pretraining parts of `make bench`: the step, its feeding and its checkpoints, beside peers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster import storage
from cluster.session import cores, session
from tests.benchmarks.sides import Row, environment, pair, rate_of, taken_beside
from training import checkpoint
from training.configs import IngestConfig, PretrainConfig
from training.desk import read_metrics

ROOT = Path(__file__).parents[2]
BATCH = 64
SLOW_EVERY_S = 30.0
"""Between checkpoints to a store that takes 2 s for each request."""


def _dataset(folder: Path) -> str:
    from training.ingest import ingest

    ingest(IngestConfig("phantom:1280", out=str(folder / "data"), image_size="128", channels="3"))
    return str(folder / "data")


def _steady(rows: list[dict[str, Any]], skip: int = 5, waits: bool = True, batch: int = BATCH) -> float:
    """Images per second over the steps after the first `skip`, with or without waits for data."""
    rows = [r for r in rows if "step" in r][skip:]
    seconds = sum(batch / r["images_per_second"] - (0 if waits else r["data_wait_s"]) for r in rows)
    return float(batch * len(rows) / seconds)


def pretrain_fed() -> list[Row]:
    """Ray Train with Ray Data against torchrun with tensors in memory: the same step, the same environment.

    Two workers take both cores of a small machine, so that Ray's own processes take from them; one worker of one thread
    leaves a core to these, as a larger machine does.
    """
    rates: dict[str, list[float]] = {}
    folder = Path(tempfile.mkdtemp(prefix="rayograph-bench-"))
    try:
        data = _dataset(folder)
        for number in range(2):
            for side, rate in _fed_round(data, folder / f"round{number}").items():
                rates.setdefault(side, []).append(rate)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = {side: float(np.median(values)) for side, values in rates.items()}
    what = "MAE pretraining, tiny, 2 workers, images/s: Ray Train"
    spare = "the same, 1 worker of one thread, a core to spare:"
    two, one = found["torchrun"], found["torchrun alone"]
    return [
        (f"{what} fed by Ray Data / torchrun on tensors in memory", *pair(found["fed"], two), "≥ 0.95"),
        (f"{what}, without waits for data / torchrun", *pair(found["steps"], two, 3), "≥ 0.975"),
        (f"{spare} fed / torchrun", *pair(found["fed alone"], one), "≥ 0.95"),
        (f"{spare} without waits for data / torchrun", *pair(found["steps alone"], one, 3), "≥ 0.975"),
        (
            "CPU time that all but the 2 workers take meanwhile, most of it Ray's idle processes, % of a core / of all",
            *(f"{100 * found['beside'] * cores():.0f}", f"{100 * cores()}", f"{found['beside']:.3f}"),
            "",
        ),
        ("from the start of the ranks to their first batch, s", f"{found['first']:.1f}", "", "", "≤ 10"),
        (
            f"the step of {BATCH} images on 2 workers / twice that on 1, a thread each, torchrun",
            *pair(two, 2 * one),
            "≥ 0.85",
        ),
        (
            f"the step of {2 * BATCH} images on 2 workers / twice that of {BATCH} on 1",
            *pair(found["wide"], 2 * one),
            "≥ 0.85",
        ),
        (
            "two workers that never speak / twice one: what this machine's cores allow",
            *pair(found["both"], 2 * one),
            "",
        ),
    ]


def _fed_round(data: str, folder: Path) -> dict[str, float]:
    """Images/s of every side once, and the seconds to the first batch."""
    from training.pretrain import pretrain

    def ours(workers: str) -> list[dict[str, Any]]:
        out = folder / f"run{workers}"
        config = PretrainConfig(
            data, out=str(out), epochs=4, batch_size=BATCH, workers=workers, preset="tiny", probe=False
        )
        pretrain(config)
        return [row for row in read_metrics((out / "metrics.jsonl").read_text()) if "step" in row]

    def torchrun(name: str, processes: int, batch: int = BATCH) -> float:
        return _steady(_torchrun(data, folder / f"{name}.json", processes, batch), batch=batch)

    folder.mkdir()
    with taken_beside(folder / "run2") as shares:
        both = ours("2")
    with environment({"OMP_THREAD_LIMIT": "1"}):
        alone = ours("1")
    with ThreadPoolExecutor(2) as pool:
        lone = sum(pool.map(lambda name: torchrun(name, 1), ("a", "b")))
    return {
        "beside": shares[-1],
        "fed": _steady(both),
        "steps": _steady(both, waits=False),
        "first": both[0]["data_wait_s"],
        "torchrun": torchrun("two", 2),
        "fed alone": _steady(alone),
        "steps alone": _steady(alone, waits=False),
        "torchrun alone": torchrun("one", 1),
        "wide": torchrun("wide", 2, 2 * BATCH),
        "both": lone,
    }


def _torchrun(data: str, result: Path, processes: int, batch: int) -> list[dict[str, Any]]:
    """Metrics rows of the bare step under torchrun."""
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"),
            *("-m", "tests.benchmarks.torchrun_step", data, str(result), str(batch)),
        ],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return list(json.loads(result.read_text()))


def checkpoints() -> list[Row]:
    """What a checkpoint costs the steps, to a local disk and to an S3 server that takes 2 s for each request."""
    from tests import s3
    from training.pretrain import pretrain

    folder = Path(tempfile.mkdtemp(prefix="rayograph-bench-"))
    try:
        data = _dataset(folder)
        config = PretrainConfig(data, out=str(folder / "run"), epochs=10, batch_size=64, workers="2", preset="tiny")
        config = replace(config, probe=False, checkpoint_s=6.0)
        with session(cpus=1 + 3 * cores()):
            pretrain(config)
            text = (folder / "run" / "metrics.jsonl").read_text()
            local, plain = _saving(text), _steady(read_metrics(text))
            pretrain(replace(config, out=str(folder / "probed"), probe=True))
            probed = _steady(read_metrics((folder / "probed" / "metrics.jsonl").read_text()))
        with s3.running() as store, environment(store.environment):
            out, throttle = f"{store.make('bench')}/run", _Throttle(after=4)
            with store.refusing(throttle), session(cpus=1 + 3 * cores()):
                # an interval that leaves steps beside which it saves nothing
                pretrain(replace(config, out=out, epochs=20, checkpoint_s=SLOW_EVERY_S))
            text = storage.read_bytes(f"{out}/metrics.jsonl").decode()
            slow, halves = _saving(text, throttle.step), _halves(text, throttle.step)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    cost = local["lost"] / local["saves"] / 60
    return [
        (
            "a checkpoint to a local disk takes of training, ms / a minute, the default interval",
            f"{1000 * local['lost'] / local['saves']:.0f}",
            "60000",
            f"{cost:.2%}",
            "≤ 3 %",
        ),
        (
            f"p99 step in ms while the store is throttled / before; one run, a checkpoint every {SLOW_EVERY_S:.0f} s",
            *pair(1000 * halves[0], 1000 * halves[1]),
            "≤ 1.1",
        ),
        (
            "of the throttled steps, p99 beside a checkpoint / of the others",
            *pair(1000 * slow["p99_saving"], 1000 * slow["p99"]),
            "",
        ),
        ("images/s with probes of the checkpoints beside / without", *pair(probed, plain), "≥ 0.95"),
    ]


class _Throttle:
    """A store that takes 2 s for each thing it is given, from its checkpoint number `after` on."""

    def __init__(self, after: int) -> None:
        self._after = after
        self._met: set[str] = set()
        self.step = 0
        """Of that checkpoint."""

    def __call__(self, method: str, path: str) -> int:
        name = path.partition("/checkpoints/")[2].partition("/")[0]
        if method == "PUT" and name:
            self._met.add(name)
            if len(self._met) == self._after and not self.step:
                self.step = checkpoint.step_of(name)
        time.sleep(2.0 if method == "PUT" and self.step else 0.0)
        return 0


def _halves(text: str, step: int) -> tuple[float, float]:
    """Seconds of the 99th percentile of a run's steps after `step`, and of those up to it without its first ten."""
    rows = [row for row in read_metrics(text) if "step" in row][10:]
    after, before = (_seconds([r for r in rows if (r["step"] > step) is late]) for late in (True, False))
    print(f"{len(before)} steps before the store was throttled, {len(after)} after")
    return float(np.percentile(after, 99)), float(np.percentile(before, 99))


def _seconds(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.asarray([64 / row["images_per_second"] - row["data_wait_s"] for row in rows])


def _saving(text: str, after: int = 10) -> dict[str, float]:
    """Of a run's metrics: checkpoints, seconds that their steps took beyond the median step, and p99 with and without.

    The steps right after a save began carry the copy of the state; they count as saving.
    """
    rows = [row for row in read_metrics(text) if row.get("step", 0) > after]
    seconds = _seconds(rows)
    busy = np.asarray([row["saving"] for row in rows])
    busy[1:] |= busy[:-1].copy()
    busy[:-1] |= busy[1:].copy()
    begins = int((busy[1:] & ~busy[:-1]).sum())
    usual = float(np.median(seconds[~busy]))
    return {
        "saves": begins,
        "lost": float((seconds[busy] - usual).sum()),
        "p99_saving": float(np.percentile(seconds[busy], 99)),
        "p99": float(np.percentile(seconds[~busy], 99)),
    }


def _mae() -> Any:
    from training.encoder import PRESETS, architecture_for, seed_weights
    from training.methods.mae import MAE

    preset = PRESETS["tiny"]
    encoder = architecture_for(preset="tiny", model=None, image_size="auto", channels=3).build()
    module = MAE(
        encoder,
        decoder_width=preset.decoder_width,
        decoder_depth=preset.decoder_depth,
        mask_ratio=0.75,
        norm_pix=True,
    )
    seed_weights(module, 0)
    return module


def _lightly_loss() -> tuple[Any, Callable[[Any], Any]]:
    """lightly's MAE, from its own modules and its documented recipe, on equal shapes; with normalised targets."""
    import torch
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from torch import nn

    from training.encoder import PRESETS, architecture_for

    preset = PRESETS["tiny"]
    vit = architecture_for(preset="tiny", model=None, image_size="auto", channels=3).build()
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MAEDecoderTIMM(
        num_patches=64,
        patch_size=12,
        embed_dim=192,
        decoder_embed_dim=preset.decoder_width,
        decoder_depth=preset.decoder_depth,
        decoder_num_heads=preset.decoder_width // 32,
    )
    module = nn.ModuleList([backbone, decoder])
    criterion = nn.MSELoss()

    def loss(images: Any) -> Any:
        batch = len(images)
        keep, mask = utils.random_token_mask(size=(batch, backbone.sequence_length), mask_ratio=0.75)
        encoded = backbone.encode(images=images, idx_keep=keep)
        embedded = decoder.embed(encoded)
        tokens = utils.repeat_token(decoder.mask_token, (batch, backbone.sequence_length))
        tokens = utils.set_at_index(tokens, keep, embedded.type_as(tokens))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(tokens), mask))
        target = utils.get_at_index(utils.patchify(images, 12), mask - 1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return criterion(predicted, target)

    assert isinstance(torch.__version__, str)
    return module, loss


def _stepper(module: Any, loss: Callable[[Any], Any], images: Any) -> Callable[[], None]:
    import torch

    from training.schedule import parameter_groups

    optimizer = torch.optim.AdamW(parameter_groups(module, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        loss(images).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def pretrain_bare() -> list[Row]:
    """One process with all cores: our step, lightly's, and the peak of matrix multiplication."""
    import torch

    from training.speed import flops_per_image, matmul_peak_gflops
    from training.transform import Input
    from training.views import Views

    torch.set_num_threads(cores())
    torch.manual_seed(0)
    images = torch.randn(64, 3, 96, 96)
    module = _mae()
    ours = _stepper(module, lambda x: module(x, torch.rand(len(x), 64)).mean(), images)
    theirs = _stepper(*_lightly_loss(), images)
    rates: dict[str, list[float]] = {"ours": [], "lightly": []}
    for step in (ours, theirs):
        for _ in range(3):
            step()
    for _ in range(8):
        for name, step in (("ours", ours), ("lightly", theirs)):
            rates[name].append(rate_of(64 * 3, lambda step=step: [step() for _ in range(3)]))  # type: ignore[misc]
    a, b = float(np.median(rates["ours"])), float(np.median(rates["lightly"]))
    peak = matmul_peak_gflops(cores(), seconds=2.0)
    achieved = a * flops_per_image(module, [Views(Input(96, 96, 3, (0.0,) * 3, (1.0,) * 3))]) / 1e9
    _where_time_goes(ours)
    return [
        ("MAE step, one process, images/s: ours / lightly 1.6 modules, equal shapes", *pair(a, b), "≥ 1.1"),
        ("MAE step, GFLOP/s / torch.mm peak, fp32", *pair(achieved, peak), "0.68 (a bare loop)"),
    ]


def _where_time_goes(step: Callable[[], None]) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            step()
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    parts = ", ".join(f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / total:.0%}" for e in events[:10])
    print(f"where our step's time goes: {parts}")
