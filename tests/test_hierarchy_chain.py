"""`transfer --task hierarchical` of two inputs end to end: killed, gone on with, judged on other images, and asked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UsageError
from cluster.session import Resources
from tests.runs import rayograph
from training.artifact import load_model
from training.configs import EvaluateConfig, InferenceConfig, IngestConfig, TransferConfig
from training.dataset import Dataset
from training.evaluate import evaluate
from training.inference import predict
from training.ingest import ingest
from training.tasks.inputs import Inputs
from training.transfer import transfer

pytestmark = [pytest.mark.ray, pytest.mark.slow]

INPUTS = ("oct", "fundus")
SMALL: dict[str, Any] = {"init": "none", "model": "test_vit", "image_size": "32", "folds": 3, "epochs": 4}
HIERARCHY: dict[str, Any] = {
    "task": "hierarchical",
    "learner": "features",
    "structure": "transferred",
    "stack": "logistic",
}


def of_two_inputs(source: Path, target: Path, *, cases: bool = True) -> Path:
    """A copy of a DATASET whose images are by turns of two inputs, each patient two cases; or without a word of cases,
    so that each patient is one."""
    shutil.copytree(source, target)
    table = pq.read_table(target / "manifest.parquet")
    groups = table["group"].to_pylist()
    at = table.column_names.index("case")
    own = [f"{group}-{row // 2 % 2}" if cases else "" for row, group in enumerate(groups)]
    table = table.set_column(at, "case", pa.array(own))
    table = table.append_column("modality", pa.array([INPUTS[row % 2] for row in range(len(groups))]))
    pq.write_table(table, target / "manifest.parquet")
    return target


@pytest.fixture(scope="module")
def others(ray_session: Resources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of other patients, of two inputs."""
    folder = tmp_path_factory.mktemp("others")
    ingest(IngestConfig("phantom:90", out=str(folder / "plain"), image_size="32", seed=3))
    return of_two_inputs(folder / "plain", folder / "dataset")


def words(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def said_in(folder: Path, name: str = "predictions") -> dict[str, list[float]]:
    """Probabilities of each image, or unit, of a report, in the order of the columns."""
    table = pq.read_table(folder / f"{name}.parquet")
    key = "image_id" if name == "predictions" else "unit"
    classes = sorted(set(table["truth"].to_pylist()))
    return {row[key]: [row[c] for c in classes] for row in table.to_pylist()}


def test_a_killed_hierarchy_of_two_inputs_goes_on_judges_other_images_and_answers_without_an_input(
    phantoms: Path, others: Path, tmp_path: Path
) -> None:
    data, run = of_two_inputs(phantoms, tmp_path / "data"), tmp_path / "run"
    command = ["transfer", "--data", str(data), "--out", str(run), "--unit", "case", "--workers", "1"]
    with rayograph(*command, *words(SMALL | HIERARCHY), "--inputs", *INPUTS) as process:
        process.until(lambda: bool(list(run.glob("folds/repeat*"))), "the first fold is fitted")
        process.kill_group()
    before = {path: path.stat().st_mtime_ns for path in run.glob("folds/repeat*")}
    assert len(before) < 3 and not (run / "summary.json").exists()
    features = (run / "features.safetensors").stat().st_mtime_ns

    summary = transfer(TransferConfig(str(data), out=str(run), unit="case", inputs=INPUTS, **SMALL, **HIERARCHY))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (run / "features.safetensors").stat().st_mtime_ns == features
    assert summary["classes"] == ["disease/cyst", "disease/diffuse", "disease/nodule", "healthy"]
    assert {"hierarchical_f1", "level_1/accuracy"} <= set(summary["metrics"])
    by_image, by_case = said_in(run), said_in(run, "units")
    assert summary["protocol"]["units"] == len(by_case) < len(by_image) == summary["images"]

    judged = EvaluateConfig(model=str(run), data=str(others), out=str(tmp_path / "judged"), unit="case")
    assert set(evaluate(judged)["metrics"]) >= {"hierarchical_f1", "balanced_accuracy"}
    alone = EvaluateConfig(
        model=str(run), data=str(others), out=str(tmp_path / "alone"), unit="case", where=("modality=oct",)
    )
    evaluate(alone)
    with pytest.raises(UsageError, match="judges cases of oct, fundus together, not single images"):
        predict(InferenceConfig(str(others), model=str(run), out=str(tmp_path / "predicted.parquet")))

    model, dataset = load_model(run), Dataset.open(others)
    selection = dataset.select(labelled=True)
    embedded, ids = model.embed(dataset.pixels(selection)), np.asarray(selection.column("image_id"))
    of_row = np.asarray([INPUTS.index(name) for name in selection.column("modality")])
    case = np.unique(selection.column("case"), return_inverse=True)[1]
    for folder, rows in ((tmp_path / "judged", np.arange(len(ids))), (tmp_path / "alone", np.flatnonzero(of_row == 0))):
        answers = model.answers(embedded[rows], None, of_row[rows])
        found = model.classify_cases(answers, Inputs(INPUTS, of_row[rows], case[rows]))
        np.testing.assert_allclose(found.sum(axis=1), 1)
        expected = said_in(folder)
        np.testing.assert_allclose(found, [expected[name] for name in ids[rows]], atol=1e-5)
    both = said_in(tmp_path / "judged")
    assert not np.allclose([both[name] for name in ids[rows]], found, atol=1e-3)  # the fundus had a say
