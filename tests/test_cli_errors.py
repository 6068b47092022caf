"""What bad input gets: the right exit code, one or two lines on stderr, and nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from cluster.cli import main
from tests.hostile import encoded
from tests.runs import ROOT, Pretrained, rayograph


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with sources, results and things that are neither."""
    monkeypatch.chdir(tmp_path)
    picture = encoded(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3), "PNG")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").write_bytes(picture)
    (tmp_path / "images" / "two.png").write_bytes(picture[::-1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "readme.md").write_text("# no image\n")
    (tmp_path / "no_path.csv").write_text("file,label\none.png,a\n")
    (tmp_path / "ragged.csv").write_text("path,label\none.png\n")
    (tmp_path / "no_rows.csv").write_text("path,label\n")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and then nothing")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "typo.yaml").write_text("epoch: 3\n")
    (tmp_path / "broken.yaml").write_text("epochs: [3\n")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("the only copy\n")
    (tmp_path / "broken.safetensors").write_bytes(b"not tensors")
    return tmp_path


EARLY: dict[str, tuple[str, int, str]] = {
    "no verb of that name": ("pretrian --data d --out o", 2, "pretrain"),
    "a missing flag": ("ingest images", 2, "--out"),
    "an unknown flag": ("ingest images --out o --imagesize 32", 2, "--image-size"),
    "an unknown key in a YAML file": ("pretrain --config typo.yaml --data images --out o", 2, "epochs"),
    "a YAML file that is none": ("pretrain --config broken.yaml --data images --out o", 2, "broken.yaml"),
    "a YAML file that is missing": ("pretrain --config gone.yaml --data images --out o", 2, "gone.yaml"),
    "a number that is none": ("pretrain --data images --out o --epochs many", 2, "--epochs"),
    "no epochs": ("pretrain --data images --out o --epochs 0", 2, "--epochs 0: must be at least 1"),
    "one fold": ("transfer --data images --out o --folds 1", 2, "--folds 1: needs at least 2"),
    "a task that is none": ("transfer --data images --out o --task guess", 2, "--task"),
    "a share above one": ("ingest images --out o --max-quarantined 2", 2, "between 0 and 1"),
    "a missing folder": ("ingest gone --out o", 2, "gone: no such folder or file"),
    "an empty folder": ("ingest empty --out o", 2, "empty: no image in this folder"),
    "a folder without images": ("ingest texts --out o", 2, "texts: no image in this folder"),
    "a CSV without the column path": (
        "ingest no_path.csv --out o",
        2,
        "no_path.csv: no column 'path' (found: file, label)",
    ),
    "a CSV line that is too short": ("ingest ragged.csv --out o", 2, "ragged.csv:2: 1 fields where the header has 2"),
    "a CSV without rows": ("ingest no_rows.csv --out o", 2, "no_rows.csv: has no rows"),
    "an .npz that is none": ("ingest broken.npz --out o", 2, "broken.npz: not a readable .npz"),
    "a Parquet manifest that is none": ("ingest broken.parquet --out o", 2, "broken.parquet: not a readable Parquet"),
    "a source that is a text": ("ingest typo.yaml --out o", 2, "typo.yaml: not a folder"),
    "phantoms without a number": ("ingest phantom:some --out o", 2, "phantom:some: give a count"),
    "a scheme that nobody knows": ("ingest carrier://pigeon --out o", 2, "carrier://pigeon"),
    "a size that is none": ("ingest images --out o --image-size big", 2, "--image-size big: give N or HxW"),
    "a size out of range": ("ingest images --out o --image-size 5", 2, "between 8 and 4096"),
    "a window that is none": ("ingest images --out o --window 3:1", 2, "--window 3:1: give auto, or LOW:HIGH"),
    "an --out that is somebody's": ("ingest images --out theirs --overwrite", 2, "is not a result of rayograph"),
    "an --out that is a file": ("ingest images --out typo.yaml", 2, "--out typo.yaml: is a file"),
    "ImageNet weights for MAE": (
        "pretrain --data images --out o --init imagenet",
        2,
        "--init imagenet: a convolutional",
    ),
    "a size that the patch does not divide": (
        "pretrain --data images --out o --image-size 100",
        2,
        "--image-size 100x100: the patch of 12 px does not divide it; try 96x96",
    ),
    "a method that is none": (
        "pretrain --data images --out o --method mea",
        2,
        "--method mea: no such method. Did you mean 'mae'?",
    ),
    "a model that is none": (
        "pretrain --data images --out o --model vit_tinny",
        2,
        "--model vit_tinny: timm has no such model",
    ),
    "too many workers": ("pretrain --data images --out o --workers 64", 1, "--workers 64: only"),
    "workers that are no number": ("pretrain --data images --out o --workers two", 2, "--workers two: give a number"),
    "a device that is not here": (
        "pretrain --data images --out o --device cuda",
        2,
        "--device cuda: this machine has none",
    ),
    "data that is missing": ("pretrain --data gone --out o", 2, "gone: no such folder or file"),
    "a model that is no RUN": ("predict images --model empty --out o.parquet", 2, "empty: not a RUN"),
    "a model that is missing": ("embed images --model gone --out o.parquet", 2, "gone: not a RUN"),
    "weights of no RUN": ("transfer --data images --out o --init empty", 2, "empty: not a RUN"),
    "a chain that is missing": ("transfer --data images --out o --stages gone.yaml", 2, "gone.yaml: no such file"),
    "a chain that is none": (
        "transfer --data images --out o --stages typo.yaml",
        2,
        "unknown key 'epoch'; a chain has",
    ),
    "a chain and first weights": (
        "transfer --data images --out o --stages typo.yaml --init none",
        2,
        "not with --stages",
    ),
    "evaluation of no RUN": ("evaluate --model images --data images --out o", 2, "images: not a RUN"),
    "nothing to evaluate on": (
        "evaluate --model images --out o",
        2,
        "give unseen images by --data, or RUNs to compare",
    ),
    "rows of data that is not given": (
        "evaluate --model images --against empty --where sex=f --out o",
        2,
        "--where sex=f: chooses rows of --data, which is not given",
    ),
    "an index of no RUN": ("index build --model empty --data images --out o", 2, "empty: not a RUN"),
    "an index that is none": ("index check --index empty", 2, "empty: not an INDEX"),
    "no neighbours": ("index search images/one.png --index empty --k 0", 2, "--k 0: must lie between 1 and 1,000"),
    "suggestions of no RUN": ("suggest --model empty --data images --out o", 2, "empty: not a RUN"),
    "suggestions of nothing": ("suggest --model empty --data images --out o --n 0", 2, "--n 0: must be at least 1"),
    "a service of no RUN": ("serve --model empty", 2, "empty: not a RUN"),
    "a service for everybody": ("serve --model empty --host 0.0.0.0", 2, "--host 0.0.0.0: whoever reaches this"),
    "a port that is none": ("serve --model empty --port 70000", 2, "--port 70000: must lie between 0 and 65535"),
}
PROCESSES = (
    "a missing flag",
    "an empty folder",
    "a CSV line that is too short",
    "an --out that is a file",
    "too many workers",
)
"""Of these, a whole process is looked at; the others call `main`, which is all that a process does."""
ON_DATA: dict[str, tuple[str, int, str]] = {
    "weights that are missing": ("transfer --data DATA --out o --init gone", 2, "--init gone: neither imagenet, none"),
    "weights that are no tensors": (
        "transfer --data DATA --out o --init broken.safetensors",
        2,
        "broken.safetensors: not a safetensors file",
    ),
    "more folds than a class has groups": ("transfer --data DATA --out o --folds 50", 2, "fewer than --folds 50"),
    "a condition on no column": ("transfer --data DATA --out o --where modalty=oct", 2, "no column 'modalty'"),
    "a condition that is none": ("pretrain --data DATA --out o --where modality", 2, "give COLUMN=VALUE"),
    "a condition that nothing meets": ("pretrain --data DATA --out o --where label=moon", 2, "no image is left"),
    "an order that lacks classes": (
        "transfer --data DATA --out o --order healthy disease/cyst",
        2,
        "--order healthy disease/cyst: lacks disease/",
    ),
    "an order of a class twice": ("transfer --data DATA --out o --order healthy healthy", 2, "names a class twice"),
    "a single class": ("transfer --data DATA --out o --where label=healthy", 2, "needs images of at least two classes"),
    "an encoder that should classify": ("evaluate --model RUN --data DATA --out o", 2, "an encoder without classes"),
    "a comparison with no RUN": ("evaluate --model RUN --against images --out o", 2, "images: not a RUN"),
    "a result of another verb": ("transfer --data DATA --out RUN", 2, "holds a result of `rayograph pretrain`"),
    "an --out for predictions that is a folder": ("embed DATA --model RUN --out empty", 2, "--out empty: is a folder"),
    "another config in the same --out": ("pretrain --data DATA --out RUN --seed 5", 2, "differs"),
}


@pytest.fixture
def _signals() -> Generator[None]:
    """`main` installs handlers that belong to a process of its own."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


def check(code: int, stderr: str, expected_code: int, message: str) -> None:
    lines = stderr.strip().splitlines()
    assert code == expected_code, stderr
    assert 1 <= len(lines) <= 2, stderr
    assert lines[0].startswith("rayograph: error: "), stderr
    assert message in stderr
    assert "Traceback" not in stderr and len(max(lines, key=len)) < 600


def listing(folder: Path) -> set[str]:
    """Everything below a folder but the empty lock files that may stay in folders that were there before."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != ".lock"}


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("name", EARLY)
def test_bad_input_is_told_in_a_line_or_two_and_leaves_nothing(
    place: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command, code, message = EARLY[name]
    before = listing(place)
    found = main(command.split())
    said = capfd.readouterr()
    check(found, said.err, code, message)
    assert said.out == ""
    assert listing(place) == before


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_that_was_given_bad_input_says_nothing_more(place: Path, name: str) -> None:
    command, code, message = EARLY[name]
    before = listing(place)
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *command.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    check(done.returncode, done.stderr, code, message)
    assert done.stdout == ""
    assert listing(place) == before


@pytest.mark.ray
@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("name", ON_DATA)
def test_what_does_not_fit_the_data_or_the_run_is_refused(
    place: Path, name: str, phantoms: Path, pretrained: Pretrained, capfd: pytest.CaptureFixture[str]
) -> None:
    command, code, message = ON_DATA[name]
    before = listing(place) | listing(pretrained.run) | listing(phantoms)
    names = {"DATA": str(phantoms), "RUN": str(pretrained.run)}
    found = main([names.get(word, word) for word in command.split()])
    check(found, capfd.readouterr().err, code, message)
    assert listing(place) | listing(pretrained.run) | listing(phantoms) == before


@pytest.mark.ray
@pytest.mark.usefixtures("_signals", "ray_session")
def test_a_class_with_one_member_under_five_folds_is_one_line(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for number in range(12):
        folder = place / "labelled" / ("rare" if number == 0 else "common")
        folder.mkdir(parents=True, exist_ok=True)
        content = encoded(rng.integers(0, 256, (32, 32), dtype=np.uint8), "PNG")
        (folder / f"{number}.png").write_bytes(content)
    assert main(["ingest", "labelled", "--out", "data", "--image-size", "32"]) == 0
    capfd.readouterr()
    found = main(["transfer", "--data", "data", "--out", "o", "--task", "linear", "--image-size", "32"])
    check(found, capfd.readouterr().err, 2, "class 'rare' has 1 group, fewer than --folds 5: merge or drop the class")
    assert not (place / "o").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("_signals", "ray_session")
def test_labels_that_name_no_file_stop_ingest_until_they_are_mended(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    index = place / "images" / "index.csv"
    index.write_text("path,label\none.png,a\ngone.png,b\n")
    command = ["ingest", "images", "--out", "o", "--image-size", "32"]
    check(
        main(command),
        capfd.readouterr().err,
        1,
        "1 of 2 images cannot be read (1x no such file); the first is gone.png",
    )
    index.write_text("path,label\none.png,a\n")
    assert main(command) == 0
    assert json.loads((place / "o" / "summary.json").read_text())["images"] == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("_signals", "ray_session")
def test_a_second_writer_is_told_who_the_first_is(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = place / "o"
    with rayograph("ingest", "phantom:2000", "--out", str(out)) as first:
        first.until((out / "config.yaml").exists, "the first writer has begun")
        first.signal(signal.SIGSTOP)  # it must not finish meanwhile
        try:
            code = main(["ingest", "phantom:2000", "--out", "o"])
            check(code, capfd.readouterr().err, 1, f"o: another process is writing it (pid {first.popen.pid} on ")
        finally:
            first.signal(signal.SIGCONT)


ONE_CPU = """
import logging, sys, cluster.session, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         object_store_memory=10**8)
import ray.data
print("ready", flush=True)
import time
began = time.monotonic()
from cluster.cli import main
code = main(sys.argv[1:])
print(time.monotonic() - began, flush=True)
sys.exit(code)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("verb", ["pretrain", "embed"])
def test_a_job_whose_cpus_can_never_be_had_says_so_within_30_seconds(
    phantoms: Path, pretrained: Pretrained, tmp_path: Path, verb: str
) -> None:
    data = ["--data", str(phantoms)] if verb == "pretrain" else [str(phantoms), "--model", str(pretrained.run)]
    done = subprocess.run(
        [sys.executable, "-c", ONE_CPU, verb, *data, "--out", str(tmp_path / "o"), "--workers", "1"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "rayograph: error: --workers 1: needs 2 CPUs" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert float(done.stdout.splitlines()[-1]) < 30
    assert not (tmp_path / "o").is_file() and not (tmp_path / "o" / "summary.json").exists()


def test_a_cluster_that_does_not_answer_is_said_within_30_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "ingest", "phantom:8", "--out", str(tmp_path / "o")],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_TOKEN": "ab" * 32},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert time.monotonic() - began < 30
    check(done.returncode, done.stderr, 1, "RAY_ADDRESS=127.0.0.1:1: no cluster answers there")
