"""`make bench`: speeds as ratios, both sides in one run on one machine. `python -m tests.benchmarks.bench [NAME …]`.

Each part runs its two sides in turn, more than once, and reports the ratio of the medians. Idle machine, please.
"""

from __future__ import annotations

import io
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.session import cores, session
from tests.benchmarks.pretraining import checkpoints, pretrain_bare, pretrain_fed
from tests.benchmarks.served import killed, served
from tests.benchmarks.sides import Row, rate_of
from training import phantom
from training.images import ImagePath, decode_bytes

SMALL, LARGE = 3000, 40
ROUNDS = 3


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


def ingest_small() -> list[Row]:
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
                ours.append(rate_of(SMALL, lambda: read_all(listing, path, str(folder / "shards"))) / cores())
        with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
            for number in range(ROUNDS + 1):  # the first one warms up, as above
                out = folder / f"plain{number}"
                out.mkdir()
                rate = rate_of(SMALL, lambda out=out: _plain_loops(folder / "images", out, pool))  # type: ignore[misc]
                plain.append(rate / cores())
            plain = plain[1:]
        a, b = float(np.median(ours)), float(np.median(plain))
        what = f"ingest, 256 px JPEG, images/s per core (Ray start {start:.0f} s apart) / a plain Pillow loop on each"
        return [(what, f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}", "≥ 0.9")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def decode_large() -> list[Row]:
    texture = np.kron(phantom.render(3, 64, 0, 250), np.ones((8, 10), np.uint8))
    noise = np.random.default_rng(0).integers(0, 24, (*texture.shape, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(texture[..., None] + noise, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    data = file.getvalue()
    path = ImagePath(224, 224)

    def full() -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB").resize((224, 179), Image.Resampling.BICUBIC)

    a = np.median([rate_of(LARGE, lambda: [decode_bytes(data, path) for _ in range(LARGE)]) for _ in range(ROUNDS)])
    b = np.median([rate_of(LARGE, lambda: [full() for _ in range(LARGE)]) for _ in range(ROUNDS)])
    what = f"2000x2500 JPEG ({len(data) // 1024} KB) to 224 px, images/s: reduced scale / full decode"
    return [(what, f"{a:.0f}", f"{b:.0f}", f"{a / b:.1f}", "≥ 4")]


PARTS: dict[str, Callable[[], list[Row]]] = {
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
