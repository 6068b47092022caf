"""The chain on an object store: the same commands, the same numbers, and nothing of it stays on this machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster import storage
from tests.s3 import Store
from training.configs import InferenceConfig, TransferConfig
from training.inference import predict
from training.transfer import transfer

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.chaos, pytest.mark.ray]


def ran(*arguments: str) -> str:
    """What a `rayograph` printed that ended well, in a process and a Ray of its own, which know the store."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def table_of(uri: str) -> dict[str, list[object]]:
    return dict(pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pydict())


def shards_of(data: str | Path) -> list[bytes]:
    return [storage.read_bytes(uri) for uri in storage.list_files(storage.join(data, "shards"))]


def test_a_chain_on_an_object_store_gives_the_numbers_of_the_local_one(
    s3: Store, phantoms: Path, tmp_path: Path
) -> None:
    data, run, answers, index = (f"{s3.bucket}/a project/{n}" for n in ("data", "run", "answers.parquet", "index"))
    local = transfer(TransferConfig(str(phantoms), out=str(tmp_path / "run"), task="knn", folds=2, init="none"))
    predict(InferenceConfig(str(phantoms), model=str(tmp_path / "run"), out=str(tmp_path / "answers.parquet")))

    ran("ingest", "phantom:200", "--out", data, "--image-size", "32")
    assert shards_of(data) == shards_of(phantoms)
    told = ran("transfer", "--task", "knn", "--folds", "2", "--init", "none", "--data", data, "--out", run)
    assert f"report in {storage.join(run, 'report.html')}" in told
    assert storage.read_json(f"{run}/summary.json")["metrics"] == json.loads(json.dumps(local["metrics"]))
    ran("predict", data, "--model", run, "--out", answers)
    assert table_of(answers) == table_of(str(tmp_path / "answers.parquet"))
    ran("index", "build", "--model", run, "--data", data, "--out", index)
    assert "whole. Snapshot 000001, 200 vectors" in ran("index", "check", "--index", index)
    assert f"already done: {data}" in ran("ingest", "phantom:200", "--out", data, "--image-size", "32")
    scratch = [
        file.relative_to(tmp_path / "scratch").parts[1:] for file in (tmp_path / "scratch").rglob("*") if file.is_file()
    ]
    kept = {parts[0] for parts in scratch} - {".lock"}
    assert kept >= {"model", "000001"}
    assert all(name in {"model", "000001"} or name.endswith(".gallery") for name in kept), "copies of what was read"
