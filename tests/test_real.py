"""The real images beside the checkout, in minutes; `make results` has the long runs."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.session import Resources
from tests.benchmarks.copies import read_set
from training.configs import IngestConfig, TransferConfig
from training.copies import merge_groups, near_copies
from training.dataset import Dataset
from training.ingest import ingest
from training.transfer import transfer

pytestmark = [pytest.mark.ray, pytest.mark.real, pytest.mark.slow]


def index(folder: Path) -> list[dict[str, str]]:
    with (folder / "index.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def ingested(ray_session: Resources, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cervix and retina, ingested with the defaults but a small stored size."""
    out = tmp_path_factory.mktemp("real")
    for name in ("cervix", "retina"):
        ingest(IngestConfig(str(shared_data / name / "index.csv"), out=str(out / name), image_size="64"))
    return out


@pytest.mark.parametrize(("name", "images"), [("cervix", 3038), ("retina", 2661)])
def test_every_row_of_the_index_is_accounted_for(ingested: Path, shared_data: Path, name: str, images: int) -> None:
    listed = index(shared_data / name)
    rows = pq.read_table(ingested / name / "manifest.parquet").to_pylist()
    counts = Dataset.open(ingested / name).info["counts"]
    assert len(listed) == len(rows) == counts["images"] == images
    assert [row["path"] for row in rows] == [row["path"] for row in listed]
    assert counts["ok"] + counts["duplicate"] + counts["quarantined"] == images
    assert counts["quarantined"] == 0
    assert [row["group_given"] for row in rows] == [row["group"] for row in listed]


def test_exactly_the_byte_identical_copies_are_duplicates(ingested: Path, shared_data: Path) -> None:
    contents = [(shared_data / "retina" / row["path"]).read_bytes() for row in index(shared_data / "retina")]
    assert Dataset.open(ingested / "retina").info["counts"]["duplicate"] == len(contents) - len(set(contents))


def test_near_copies_weld_few_patients_of_the_retina(ingested: Path, shared_data: Path) -> None:
    """design.md: merging by hash and correlation keeps 239 of the 241 groups; by hash alone one took 905 of 1,058."""
    rows = pq.read_table(ingested / "retina" / "manifest.parquet").to_pylist()
    labelled = [row for row in rows if row["label"] and row["group_given"]]
    given = {row["group_given"] for row in labelled}
    kept = {row["group"] for row in labelled if row["status"] == "ok"}
    assert len(given) == len({row["group"] for row in index(shared_data / "retina") if row["label"] and row["group"]})
    assert len(kept) >= 239
    assert Dataset.open(ingested / "retina").info["counts"]["largest_group_fraction"] < 0.05


@pytest.mark.parametrize(("name", "pairs"), [("cervix", 0), ("chest_ct", 0), ("retina", 15)])
def test_near_copies_of_real_sets_are_few_and_none_is_turned(shared_data: Path, name: str, pairs: int) -> None:
    """The pairs of the retina are the same photograph under two numbers; adjacent slices of a lung are no copies."""
    real = read_set(shared_data / name)
    near = near_copies(real.thumbnails)
    near = near.take(near.copies)
    assert len(near) <= pairs
    assert not near.turn.any()
    assert len(set(real.groups)) - len(set(merge_groups(real.groups, near.rows))) <= pairs // 2 + 1


def test_imagenet_features_tell_cells_apart_better_than_chance(ingested: Path, tmp_path: Path) -> None:
    """Normal against abnormal layers of the cervix: three classes of Herlev, by slide."""
    dataset = Dataset.open(ingested / "cervix")
    assert len(dataset.select(labelled=True)) == 917
    classes = len(dataset.info["classes"])
    config = TransferConfig(
        str(ingested / "cervix"), out=str(tmp_path / "run"), task="linear", folds=3, image_size="64", images=False
    )
    accuracy = transfer(config)["metrics"]["balanced_accuracy"]
    assert classes == 7
    assert accuracy["ci95"][0] > 1 / classes
    assert np.all(np.asarray(accuracy["per_fold"]) > 1 / classes)
