"""What the end-to-end tests share: small runs, what they leave behind, and `rayograph` processes to stop and kill."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.configs import PretrainConfig

ROOT = Path(__file__).parents[1]
START_S = 180
"""How long anything may take that starts Ray, on a machine that is busy with something else."""


@dataclass(frozen=True)
class Pretrained:
    """A finished RUN of `pretrain`: its config, folder and summary, and what it printed."""

    config: PretrainConfig
    run: Path
    summary: dict[str, Any]
    printed: str


def pretrain_config(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """175 steps of a tiny ViT on 32 px in a few seconds; the last batch of each epoch is short."""
    config = PretrainConfig(
        str(data),
        out=str(out),
        model="test_vit",
        image_size="32",
        epochs=25,
        batch_size=32,
        workers="2",
        checkpoint_s=0.2,
    )
    return replace(config, **changes)


def weights_run(run: Path, *, seen: Iterable[str] = (), labelled: Iterable[str] = ()) -> Path:
    """A RUN that trained nothing but says whose images, and whose labels, its weights have seen."""
    # not above: processes that must not load torch import this module for its other functions
    from training.artifact import ModelCard, save_model
    from training.encoder import Architecture
    from training.images import ImagePath
    from training.transform import Input

    card = ModelCard(
        Architecture("test_vit", 32, 32, 3, 16), ImagePath(32, 32), Input(32, 32, 3, (0.5,) * 3, (0.5,) * 3)
    )
    save_model(run / "model", card, card.architecture.build(), seen=seen, labelled=labelled)
    return run


def rows_of(run: str | Path) -> list[dict[str, Any]]:
    """The complete lines of `metrics.jsonl`; none where there is no such file yet."""
    path = Path(run) / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def steps_of(run: str | Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(run) if "step" in row]


def losses_of(run: str | Path) -> list[float]:
    """The loss of every step, each of which is there once and in order."""
    steps = steps_of(run)
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    return [row["loss"] for row in steps]


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Polls until `condition` holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"after {timeout_s} s still not: {what}"
        time.sleep(0.02)


def under_way(run: str | Path, steps: int) -> bool:
    """Whether a run has done that many steps and left a checkpoint."""
    return len(steps_of(run)) >= steps and any((Path(run) / "checkpoints").glob("step-*"))


@dataclass(frozen=True)
class Process:
    """A `rayograph` process that leads a session of its own, so that all it starts can be found."""

    popen: subprocess.Popen[str]
    stderr: Path

    def family(self) -> set[int]:
        """The living processes of its session, itself included."""
        everyone = (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
        return {pid for pid in everyone if _session(pid) == self.popen.pid}

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for `condition`, in vain if the process ends before."""
        wait_until(lambda: condition() or self.popen.poll() is not None, START_S, what)
        assert self.popen.poll() is None, self.said()

    def signal(self, kind: signal.Signals) -> None:
        self.popen.send_signal(kind)

    def kill_group(self) -> None:
        """kill -9 for the driver and whatever shares its process group."""
        os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(30)
        wait_until(lambda: not self.family(), 60, "Ray's processes have noticed that their driver is gone")

    def wait(self, timeout_s: float = 300) -> int:
        return self.popen.wait(timeout_s)

    def said(self) -> str:
        return self.stderr.read_text(encoding="utf-8")


def _session(pid: int) -> int:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if state[0] == "Z" else int(state[3])


@contextlib.contextmanager
def rayograph(*arguments: str, address: str | None = None) -> Iterator[Process]:
    """A started `rayograph` with a Ray folder of its own, or in the cluster at `address`; nothing of it is left after
    the block."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: Ray puts sockets below it
    stderr = folder / "stderr"
    ray = {"RAY_ADDRESS": address} if address else {"RAY_TMPDIR": str(folder)}
    with stderr.open("w") as sink:
        popen = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *arguments],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | ray,
            stdout=subprocess.DEVNULL,
            stderr=sink,
            text=True,
            start_new_session=True,
        )
    process = Process(popen, stderr)
    try:
        yield process
    finally:
        for pid in process.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        popen.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def flags(config: PretrainConfig) -> list[str]:
    """The command line that means `config`, written out by hand from its fields."""
    given = config.as_dict()
    chosen = ("out", "model", "image_size", "epochs", "batch_size", "workers", "checkpoint_s")
    pairs = [(f"--{name.replace('_', '-')}", str(given[name])) for name in chosen]
    return ["pretrain", "--data", config.data, *(part for pair in pairs for part in pair)]


def tree_of(folder: Path) -> Path:
    """`folder`, with a copy of the four packages."""
    for name in ("cluster", "serving", "training", "tuning"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def wheel_of(folder: Path) -> Path:
    """A folder below `folder` with what an installed wheel of this checkout would have put there."""
    source = tree_of(folder / "source")  # a build leaves traces beside what it builds
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    shutil.unpack_archive(wheel, folder / "installed", "zip")
    return folder / "installed"
