"""More data than memory: what the feed holds does not depend on how much there is to read."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training.configs import IngestConfig
from training.dataset import ROW_GROUP, Dataset
from training.ingest import PART_ROWS, ingest

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SIDE = 256
STORE_BYTES = 200 * 1024**2
ROUND = """
import json, os, resource, sys, time
import ray
from cluster.session import prepare_environment
prepare_environment()
quiet = {"include_dashboard": False, "log_to_driver": False}
ray.init(address="local", num_cpus=4, object_store_memory=int(sys.argv[2]), **quiet)
from training.dataset import Dataset
from training.feed import Feed, source_of
dataset = Dataset.open(sys.argv[1])
selection = dataset.select()
source = source_of(dataset, dataset.plan(selection, batch_size=64, seed=0))
seen, waits, began = 0, [], time.monotonic()
for batch in Feed(source, rank=0, world=1, start=(0, 0), epochs=1):
    seen += len(batch.samples)
    waits.append(batch.wait_s)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seen": seen, "peak": peak, "longest": max(waits), "seconds": time.monotonic() - began}))
"""


def grown(small: Path, folder: Path, times: int) -> Dataset:
    """A DATASET whose shards are those of `small`, that many times: linked, so that only reading them costs."""
    dataset = Dataset.open(small)
    (folder / "shards").mkdir(parents=True)
    tables = []
    for number in range(times):
        names = {}
        for shard in sorted((small / "shards").iterdir()):
            names[shard.name] = f"part-{number:03d}-{shard.name}"
            os.link(shard, folder / "shards" / names[shard.name])
        table = dataset.manifest
        ids = pa.array([f"{name}-{number}" for name in table["image_id"].to_pylist()])
        shards = pa.array([names[name] for name in table["shard"].to_pylist()])
        table = table.set_column(table.column_names.index("image_id"), "image_id", ids)
        tables.append(table.set_column(table.column_names.index("shard"), "shard", shards))
    pq.write_table(pa.concat_tables(tables), folder / "manifest.parquet")
    (folder / "dataset.json").write_text(json.dumps(dataset.info | {"version": f"{dataset.version}-{times}"}))
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DATASET of one shard of images that no codec makes smaller: 100 MB."""
    folder = tmp_path_factory.mktemp("noise")
    images = np.random.default_rng(0).integers(0, 256, (PART_ROWS, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(folder / "noise.npz", train_images=images, train_labels=np.zeros((PART_ROWS, 1), np.uint8))
    ingest(IngestConfig(str(folder / "noise.npz"), out=str(folder / "data"), image_size=str(SIDE)))
    (folder / "noise.npz").unlink()
    return folder / "data"


def read_all(dataset: Dataset) -> dict[str, float]:
    """One epoch through the feed, in a process and a Ray of its own."""
    done = subprocess.run(
        [sys.executable, "-c", ROUND, dataset.uri, str(STORE_BYTES)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[1],
        env={k: v for k, v in os.environ.items() if k not in {"RAY_ADDRESS", "RAY_AUTH_TOKEN"}},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_two_gigabytes_of_shards_go_through_an_object_store_of_200_megabytes(noise: Path, tmp_path: Path) -> None:
    few, many = grown(noise, tmp_path / "few", 5), grown(noise, tmp_path / "many", 20)
    size = sum(file.stat().st_size for file in (tmp_path / "many" / "shards").iterdir())
    assert size > 2e9 > 5 * STORE_BYTES
    less, more = read_all(few), read_all(many)
    assert (less["seen"], more["seen"]) == (5 * PART_ROWS, 20 * PART_ROWS)
    assert more["peak"] < 1.15 * less["peak"] + 50e6, "four times the data, and the trainer's memory as before"
    assert more["longest"] < 60


AMPLIFICATION = {1: 1.0, 2: 1.0, 3: 1.25, 4: 1.0, 5: 1.5, 6: 1.5, 7: 1.75, 8: 1.0}
"""Row groups that all workers together read for each there is, by their number; see `Epoch.items_of`."""


@pytest.mark.parametrize("world", AMPLIFICATION)
def test_an_epoch_reads_hardly_more_than_the_shards_hold_where_workers_share_no_lane(
    noise: Path, tmp_path: Path, world: int
) -> None:
    """And with 3, 5, 6 or 7 workers no more than the lanes that two of them share, which both read whole."""
    dataset = grown(noise, tmp_path / "many", 20)
    plan = dataset.plan(dataset.select(), batch_size=64, seed=0)
    epoch, groups = plan.epoch(0), len(plan.sizes)
    assert groups == 20 * PART_ROWS // ROW_GROUP
    assert AMPLIFICATION[world] == 1 + (world - math.gcd(world, plan.lanes)) / plan.lanes
    read = sum(len(item.pieces) for rank in range(world) for item in epoch.items_of(rank, world))
    assert AMPLIFICATION[world] * groups <= read <= 1.05 * AMPLIFICATION[world] * groups
