"""`make bench`: speeds as ratios, both sides in one run on one machine. `python -m tests.benchmarks.bench [NAME …]`.

Each part runs its two sides in turn, more than once, and reports the ratio of the medians. Idle machine, please.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster import storage
from cluster.session import cores, session
from tests.benchmarks.served import killed, served
from training import phantom
from training.configs import IngestConfig, PretrainConfig
from training.desk import read_metrics
from training.images import ImagePath, decode_bytes

ROOT = Path(__file__).parents[2]
SMALL, LARGE = 3000, 40
ROUNDS = 3
SLOW_EVERY_S = 30.0
"""Between checkpoints to a store that takes 2 s for each request."""


def main() -> int:
    wanted = sys.argv[1:] or list(PARTS)
    print(f"{cores()} cores, torch {_torch_version()}\n")
    print("| what | ours | peer | ratio | aim |\n|---|---|---|---|---|", flush=True)
    for name in wanted:
        print(f"… {name}", file=sys.stderr, flush=True)
        for row in PARTS[name]():
            print("| " + " | ".join(row) + " |", flush=True)
    return 0


def _torch_version() -> str:
    import torch

    return f"{torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"


def _rate(count: int, work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


# Ingest


def _write_jpegs(folder: Path) -> None:
    """SMALL JPEGs of 256 px, all different, in sub-folders of one class each."""
    generator = np.random.default_rng(0)
    base = [phantom.render(i, 64, 0, 256) for i in range(64)]
    for at in range(SMALL):
        pixels = np.roll(base[at % 64], (int(generator.integers(256)), int(generator.integers(256))), (0, 1))
        target = folder / f"class{at % 2}" / f"{at:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("RGB").save(target, quality=90)


def _plain_loop(folder: Path, out: Path, part: int, parts: int) -> None:
    """The same work as ingest in one plain loop: read, hash, decode, fit, thumbnail, perceptual hash, Parquet.

    Over every `parts`-th file from `part` on.
    """
    import hashlib

    import imagehash
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for at, file in enumerate(sorted(folder.rglob("*.jpg"))[part::parts]):
        data = file.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        image = Image.open(io.BytesIO(data)).convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)
        pixels = np.asarray(image)
        if (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all():
            pixels = pixels[..., :1]
        thumbnail = Image.fromarray(np.ascontiguousarray(pixels[..., 0])).resize((64, 64), Image.Resampling.BICUBIC)
        values = pixels.astype(np.float64) / 255
        rows.append(
            {
                "id": digest,
                "hash": str(imagehash.phash(thumbnail)),
                "mean": float(values.mean()),
                "square": float((values**2).mean()),
                "grey": thumbnail.tobytes(),
                "pixels": pixels.tobytes(),
            }
        )
        if len(rows) == 512:
            pq.write_table(
                pa.Table.from_pylist(rows), out / f"{part}-{at}.parquet", compression="zstd", row_group_size=64
            )
            rows = []


def _plain_loops(folder: Path, out: Path, pool: ProcessPoolExecutor) -> None:
    """A plain loop per core, at once: cores that share a memory bus, or are two threads of one, count alike."""
    list(pool.map(_plain_loop, *zip(*((folder, out, part, cores()) for part in range(cores())), strict=True)))


def ingest_small() -> list[tuple[str, str, str, str, str]]:
    from training.ingest import read_all
    from training.sources import list_source

    folder = Path(tempfile.mkdtemp(prefix="rayograph-bench-"))
    try:
        _write_jpegs(folder / "images")
        listing = list_source(str(folder / "images"))
        path = ImagePath(128, 128)
        ours, plain = [], []
        began = time.perf_counter()
        with session(cpus=cores()):
            start = time.perf_counter() - began
            read_all(listing, path, str(folder / "warm"))  # workers have imported what they need
            for _ in range(ROUNDS):
                ours.append(_rate(SMALL, lambda: read_all(listing, path, str(folder / "shards"))) / cores())
        with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
            for number in range(ROUNDS + 1):  # the first one warms up, as above
                out = folder / f"plain{number}"
                out.mkdir()
                rate = _rate(SMALL, lambda out=out: _plain_loops(folder / "images", out, pool))  # type: ignore[misc]
                plain.append(rate / cores())
            plain = plain[1:]
        a, b = float(np.median(ours)), float(np.median(plain))
        what = f"ingest, 256 px JPEG, images/s per core (Ray start {start:.0f} s apart) / a plain Pillow loop on each"
        return [(what, f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}", "≥ 0.9")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def decode_large() -> list[tuple[str, str, str, str, str]]:
    texture = np.kron(phantom.render(3, 64, 0, 250), np.ones((8, 10), np.uint8))
    noise = np.random.default_rng(0).integers(0, 24, (*texture.shape, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(texture[..., None] + noise, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    data = file.getvalue()
    path = ImagePath(224, 224)

    def full() -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB").resize((224, 179), Image.Resampling.BICUBIC)

    a = np.median([_rate(LARGE, lambda: [decode_bytes(data, path) for _ in range(LARGE)]) for _ in range(ROUNDS)])
    b = np.median([_rate(LARGE, lambda: [full() for _ in range(LARGE)]) for _ in range(ROUNDS)])
    what = f"2000x2500 JPEG ({len(data) // 1024} KB) to 224 px, images/s: reduced scale / full decode"
    return [(what, f"{a:.0f}", f"{b:.0f}", f"{a / b:.1f}", "≥ 4")]


# Pretraining


def _dataset(folder: Path) -> str:
    from training.ingest import ingest

    ingest(IngestConfig("phantom:1280", out=str(folder / "data"), image_size="128", channels="3"))
    return str(folder / "data")


def _steady(rows: list[dict[str, Any]], skip: int = 5, waits: bool = True) -> float:
    """Images per second over the steps after the first `skip`, with or without waits for data."""
    rows = [r for r in rows if "step" in r][skip:]
    seconds = sum(64 / r["images_per_second"] - (0 if waits else r["data_wait_s"]) for r in rows)
    return float(64 * len(rows) / seconds)


def pretrain_fed() -> list[tuple[str, str, str, str, str]]:
    """Ray Train with Ray Data against torchrun with tensors in memory: the same step, the same environment."""
    from training.pretrain import pretrain

    folder = Path(tempfile.mkdtemp(prefix="rayograph-bench-"))
    fed, bare, first, inner, alone, both = [], [], [], [], [], []
    try:
        data = _dataset(folder)
        for number in range(2):
            out = folder / f"run{number}"
            config = PretrainConfig(
                data, out=str(out), epochs=4, batch_size=64, workers="2", preset="tiny", probe=False
            )
            pretrain(config)
            rows = read_metrics((out / "metrics.jsonl").read_text())
            fed.append(_steady(rows))
            inner.append(_steady(rows, waits=False))
            first.append(next(row["data_wait_s"] for row in rows if "step" in row))
            bare.append(_steady(_torchrun(data, folder / f"two{number}.json", 2)))
            alone.append(_steady(_torchrun(data, folder / f"one{number}.json", 1)))
            with ThreadPoolExecutor(2) as pool:
                lone = pool.map(lambda name: _torchrun(data, folder / name, 1), ("a.json", "b.json"))
                both.append(sum(_steady(rows) for rows in lone))
        a, b, c, d, e = (float(np.median(rates)) for rates in (fed, bare, inner, alone, both))
        what = "MAE pretraining, tiny, 2 workers, images/s: Ray Train"
        return [
            (f"{what} fed by Ray Data / torchrun on tensors in memory", *_pair(a, b), "≥ 0.95"),
            (f"{what}, without waits for data / torchrun", f"{c:.0f}", f"{b:.0f}", f"{c / b:.3f}", "≥ 0.975"),
            ("from the start of the ranks to their first batch, s", f"{np.median(first):.1f}", "", "", "≤ 10"),
            ("the step on 2 workers / twice that on 1, a thread each, torchrun", *_pair(b, 2 * d), "≥ 0.85"),
            ("two workers that never speak / twice one: what this machine's cores allow", *_pair(e, 2 * d), ""),
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _torchrun(data: str, result: Path, processes: int) -> list[dict[str, Any]]:
    """Metrics rows of the bare step under torchrun."""
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"),
            *("-m", "tests.benchmarks.torchrun_step", data, str(result)),
        ],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return list(json.loads(result.read_text()))


def checkpoints() -> list[tuple[str, str, str, str, str]]:
    """What a checkpoint costs the steps, to a local disk and to an S3 server that takes 2 s for each request."""
    from tests import s3
    from training.pretrain import pretrain

    folder = Path(tempfile.mkdtemp(prefix="rayograph-bench-"))
    try:
        data = _dataset(folder)
        config = PretrainConfig(data, out=str(folder / "run"), epochs=16, batch_size=64, workers="2", preset="tiny")
        config = replace(config, probe=False, checkpoint_s=6.0)
        with session(cpus=1 + 3 * cores()):
            pretrain(config)
            text = (folder / "run" / "metrics.jsonl").read_text()
            local, plain = _saving(text), _steady(read_metrics(text))
            pretrain(replace(config, out=str(folder / "probed"), probe=True))
            probed = _steady(read_metrics((folder / "probed" / "metrics.jsonl").read_text()))
        with s3.running() as store, environment(store.environment):
            out = f"{store.make('bench')}/run"
            with store.refusing(_slow), session(cpus=1 + 3 * cores()):
                pretrain(replace(config, out=out, checkpoint_s=SLOW_EVERY_S))  # else it is saving all the time
            slow = _saving(storage.read_bytes(f"{out}/metrics.jsonl").decode())
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
            "p99 step in ms while a throttled store takes a checkpoint / of the other steps of the run",
            *_pair(1000 * slow["p99_saving"], 1000 * slow["p99"]),
            "≤ 1.1",
        ),
        ("images/s with probes of the checkpoints beside / without", *_pair(probed, plain), "≥ 0.95"),
    ]


def _slow(method: str, path: str) -> int:
    time.sleep(2.0 if method == "PUT" else 0.0)
    return 0


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _saving(text: str) -> dict[str, float]:
    """Of a run's metrics: checkpoints, seconds that their steps took beyond the median step, and p99 with and without.

    The steps right after a save began carry the copy of the state; they count as saving.
    """
    rows = [row for row in read_metrics(text) if "step" in row][10:]
    seconds = np.asarray([64 / row["images_per_second"] - row["data_wait_s"] for row in rows])
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


def pretrain_bare() -> list[tuple[str, str, str, str, str]]:
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
            rates[name].append(_rate(64 * 3, lambda step=step: [step() for _ in range(3)]))  # type: ignore[misc]
    a, b = float(np.median(rates["ours"])), float(np.median(rates["lightly"]))
    peak = matmul_peak_gflops(cores(), seconds=2.0)
    achieved = a * flops_per_image(module, [Views(Input(96, 96, 3, (0.0,) * 3, (1.0,) * 3))]) / 1e9
    _where_time_goes(ours)
    return [
        ("MAE step, one process, images/s: ours / lightly 1.6 modules, equal shapes", *_pair(a, b), "≥ 1.1"),
        ("MAE step, GFLOP/s / torch.mm peak, fp32", *_pair(achieved, peak), "0.68 (a bare loop)"),
    ]


def _pair(a: float, b: float) -> tuple[str, str, str]:
    return f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}"


def _where_time_goes(step: Callable[[], None]) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            step()
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    parts = ", ".join(f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / total:.0%}" for e in events[:10])
    print(f"where our step's time goes: {parts}")


PARTS: dict[str, Callable[[], list[tuple[str, str, str, str, str]]]] = {
    "ingest": ingest_small,
    "decode": decode_large,
    "bare": pretrain_bare,
    "fed": pretrain_fed,
    "checkpoints": checkpoints,
    "serve": served,
    "killed": killed,
}

if __name__ == "__main__":
    sys.exit(main())
