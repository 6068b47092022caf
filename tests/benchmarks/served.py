"""The serving parts of `make bench`: latency added, throughput reached, beside other ways to serve the same model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.sides import Row
from training import domain, phantom
from training.artifact import ModelCard, save_model
from training.encoder import Architecture, architecture_for, seed_weights
from training.images import ImagePath
from training.transform import Input

ROOT = Path(__file__).parents[2]
SECONDS = 12
CLIENTS = (1, 16, 64)
PEERS = ("fastapi", "batcher", "litserve")


def models(folder: Path) -> dict[str, Path]:
    """ViT-Ti/16 at 224 px and the `tiny` preset, with seven classes, random weights and a domain of 900 images."""
    vit = Architecture("vit_tiny_patch16_224", 224, 224, 3, 16)
    tiny = architecture_for(preset="tiny", model=None, image_size="auto", channels=3)
    found = {}
    for name, architecture in {"ViT-Ti/16 224": vit, "tiny": tiny}.items():
        found[name] = folder / name.split("/", maxsplit=1)[0]
        network = architecture.build(7)
        seed_weights(network, 0, "bench.")
        shown = Input(architecture.height, architecture.width, 3, (0.5,) * 3, (0.2,) * 3)
        stored = ImagePath(architecture.height, architecture.width)
        card = ModelCard(architecture, stored, shown, "network", tuple(f"kind/{n}" for n in range(7)))
        vectors = np.random.default_rng(0).normal(size=(900, 192)).astype(np.float32)
        looks = np.random.default_rng(1).random((900, 25)).astype(np.float32)
        known = domain.learn(vectors, looks, np.linspace(0.5, 1.5, 900), np.linspace(1, 9, 900))
        save_model(found[name] / "model", card, network, files=[(domain.REFERENCE, known.dumps())])
    return found


def pictures(folder: Path) -> dict[str, Path]:
    """JPEGs of about 30 KB and 1 MB."""
    found = {}
    for name, size, grain in (("30 KB", (384, 512), 9), ("1 MB", (1800, 2400), 22)):
        base = Image.fromarray(phantom.render(3, 64, 0, 256)).resize(size[::-1], Image.Resampling.BICUBIC)
        noise = np.random.default_rng(0).integers(0, grain, (*size, 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(base)[..., None] + noise, 0, 255).astype(np.uint8)).save(
            file, "JPEG", quality=88
        )
        found[name] = folder / f"{name.replace(' ', '')}.jpg"
        found[name].write_bytes(file.getvalue())
    return found


def in_process(run: Path, picture: Path) -> tuple[float, float]:
    """(milliseconds of one call with decoding, images/s in batches of 16 with decoding), all cores, no server."""
    code = (
        "import sys, time, json, torch, numpy as np\n"
        "from cluster.session import cores\n"
        "from tests.benchmarks.peers import answers_of, pixels_of, BATCH\n"
        "from training.artifact import load_model\n"
        "torch.set_num_threads(cores())\n"
        "model, body = load_model(sys.argv[1]), open(sys.argv[2], 'rb').read()\n"
        "def some(n):\n"
        "    began = time.perf_counter()\n"
        "    answers_of(model, [pixels_of(model, body) for _ in range(n)])\n"
        "    return time.perf_counter() - began\n"
        "some(1), some(BATCH)\n"
        "one = np.median([some(1) for _ in range(60)])\n"
        "many = np.median([some(BATCH) for _ in range(12)])\n"
        "print(json.dumps([one * 1000, BATCH / many]))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(run), str(picture)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    one, many = json.loads(out.stdout)
    return float(one), float(many)


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def server(name: str, run: Path, *flags: str) -> Iterator[str]:
    """A server of that kind, up and warm; its URL."""
    port, scratch = free_port(), tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    ours = ["cluster.cli", "serve", "--model", str(run), "--port", str(port), *flags]
    command = ours if name == "ours" else ["tests.benchmarks.peers", name, str(run), str(port)]
    log = Path(scratch) / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=os.environ | {"RAY_TMPDIR": scratch},
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 180
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{name} did not start: {log.read_text()[-2000:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/classify", timeout=2)
            except urllib.error.HTTPError:
                break  # it answers: GET is not allowed
            except OSError:
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1/classify"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)


def load(url: str, picture: Path, clients: int, seconds: float = SECONDS, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.load", url, str(picture), str(clients), str(seconds), *flags]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(out.stdout))


def served() -> list[Row]:
    folder, rows = Path(tempfile.mkdtemp(prefix="rayograph-bench-")), []
    try:
        runs, files = models(folder), pictures(folder)
        for model, run in runs.items():
            for size, picture in files.items():
                full = model != "tiny" and size == "30 KB"
                rows += _compare(model, run, size, picture, PEERS if full else (), CLIENTS if full else (1, 16))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def _compare(
    model: str, run: Path, size: str, picture: Path, peers: tuple[str, ...], clients: tuple[int, ...]
) -> list[Row]:
    one, many = in_process(run, picture)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in ("ours", *peers):
        with server(name, run) as url:
            flags = ("--json",) if name == "litserve" else ()
            found[name] = {count: load(url, picture, count, SECONDS, *flags) for count in clients}
        print(f"  {model} {size} {name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    what, ours = f"serve {model}, {size} JPEG", found["ours"]
    rows: list[Row] = [
        (
            f"{what}, 1 client: p50 ms / one call in process",
            f"{ours[1]['p50_ms']:.1f}",
            f"{one:.1f}",
            f"+{ours[1]['p50_ms'] - one:.1f} ms",
            "≤ +8 ms",
        ),
        (
            f"{what}, 16 clients (they use {ours[16]['client_cpu']:.2f} cores): requests/s / images/s in process",
            f"{ours[16]['per_second']:.1f}",
            f"{many:.1f}",
            f"{ours[16]['per_second'] / many:.2f}",
            "≥ 0.8",
        ),
    ]
    for name in peers:
        for count in clients:
            a, b = ours[count], found[name][count]
            rows.append(
                (
                    f"{what}, {count} clients: requests/s / {name} (p50 {a['p50_ms']:.0f} / {b['p50_ms']:.0f} ms)",
                    f"{a['per_second']:.1f}",
                    f"{b['per_second']:.1f}",
                    f"{a['per_second'] / b['per_second']:.2f}",
                    "> 1",
                )
            )
    return rows


def killed() -> list[Row]:
    """16 clients while one process of the service is killed with `kill -9`: an encoder of two, then the ingress."""
    folder, rows = Path(tempfile.mkdtemp(prefix="rayograph-bench-")), []
    try:
        run, picture = models(folder)["tiny"], pictures(folder)["30 KB"]
        for part, patience in (("Encoder", 8), ("Ingress", 20)):
            with server("ours", run, "--replicas", "2") as url:
                timer = threading.Timer(5, kill_one, (part,))
                timer.start()
                found = load(url, picture, 16, 5 + patience, "--retry")
                timer.join()
            rows.append(
                (
                    f"one {part.lower()} killed under 16 clients: requests / failed once / lost after 15 s of retries",
                    f"{found['requests']}",
                    f"{found['failed']} / {found['lost']}",
                    f"{found['slowest_recovery_s']:.1f} s slowest",
                    "0 lost",
                )
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def replicas(part: str) -> list[int]:
    """The processes of a deployment."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                if f"ray::ServeReplica:rayograph:{part}" in (path / "cmdline").read_text():
                    found.append(int(path.name))
    return found


def kill_one(part: str) -> None:
    os.kill(replicas(part)[0], signal.SIGKILL)
