"""`transfer` and `evaluate` by case and by group: what is judged, what is written, and what is refused."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UsageError
from training.configs import EvaluateConfig, TransferConfig
from training.dataset import Dataset
from training.evaluate import evaluate
from training.transfer import transfer

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cased(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms as two cases of each patient; the slices of the first patients stand alone."""
    folder = tmp_path_factory.mktemp("cased") / "dataset"
    shutil.copytree(phantoms, folder)
    table = pq.read_table(folder / "manifest.parquet")
    groups = table["group"].to_pylist()
    cases = [f"{group}-{at % 2}" if group > "p00010" else "" for at, group in enumerate(groups)]
    table = table.set_column(table.column_names.index("case"), "case", pa.array(cases, pa.string()))
    pq.write_table(table, folder / "manifest.parquet")
    return folder


def config(data: Path, out: Path, **changes: Any) -> TransferConfig:
    plain = {"init": "none", "model": "test_vit", "image_size": "32", "folds": 3, "task": "knn", "unit": "case"}
    return TransferConfig(str(data), out=str(out), **{**plain, **changes})


def rows_of(file: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(file).to_pylist())


def test_the_figures_are_those_of_cases_and_images_are_still_answered(cased: Path, tmp_path: Path) -> None:
    summary = transfer(config(cased, tmp_path / "run", repeats=2))
    classes = summary["classes"]
    images, units = (rows_of(tmp_path / "run" / f"{name}.parquet") for name in ("predictions", "units"))
    assert len(images) == 2 * summary["images"]
    pooled: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in images:
        pooled[row["repeat"], row["fold"], row["case"] or row["image_id"]].append(row)
    assert len(units) == len(pooled) < len(images)
    for row in units:
        own = pooled[row["repeat"], row["fold"], row["unit"]]
        assert (row["images"], row["group"], row["truth"]) == (len(own), own[0]["group"], own[0]["truth"])
        expected = [np.mean([image[name] for image in own]) for name in classes]
        np.testing.assert_allclose([row[name] for name in classes], expected, atol=1e-9)
    right = [row["truth"] == max(classes, key=lambda name, row=row: row[name]) for row in units]  # type: ignore[misc]
    assert summary["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    protocol = summary["protocol"]
    assert (protocol["unit"], protocol["pooling"], protocol["units"]) == ("case", "mean", len(units) // 2)
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Judged by case" in report and "A single image is answered by the image" in report


def test_an_attention_is_left_beside_the_model_and_evaluate_judges_by_it(cased: Path, tmp_path: Path) -> None:
    summary = transfer(config(cased, tmp_path / "run", task="linear", pooling="attention"))
    assert summary["protocol"]["pooling"] == "attention"
    assert (tmp_path / "run" / "model" / "pooling.safetensors").is_file()
    ours = rows_of(tmp_path / "run" / "units.parquet")
    judged = EvaluateConfig(
        model=str(tmp_path / "run"), data=str(cased), out=str(tmp_path / "out"), unit="case", allow_seen=True
    )
    by_mean = evaluate(judged)
    attended = EvaluateConfig(
        **{**judged.as_dict(), "pooling": "attention", "out": str(tmp_path / "attended"), "where": ()}
    )
    by_attention = evaluate(attended)
    assert by_mean["protocol"]["units"] == by_attention["protocol"]["units"] == len(ours)
    theirs = rows_of(tmp_path / "attended" / "units.parquet")
    assert {row["unit"] for row in ours} == {row["unit"] for row in theirs}
    for row in theirs:
        assert sum(row[name] for name in summary["classes"]) == pytest.approx(1)
    assert by_mean["metrics"]["accuracy"] != by_attention["metrics"]["accuracy"]
    images = len(Dataset.open(cased).select(labelled=True))
    assert pq.read_table(tmp_path / "attended" / "predictions.parquet").num_rows == images
    plain = config(cased, tmp_path / "plain")
    transfer(plain)
    assert "mean_level_error" not in by_mean["metrics"]
    without = {**attended.as_dict(), "model": plain.out, "out": str(tmp_path / "no"), "where": ()}
    with pytest.raises(UsageError, match=r"--pooling attention: .* has none; use --pooling mean"):
        evaluate(EvaluateConfig(**without))


def test_two_runs_are_compared_by_case_out_of_fold_and_on_other_images(cased: Path, tmp_path: Path) -> None:
    own, other = (
        transfer(config(cased, tmp_path / name, task=name, repeats=2, label_fraction=(1.0, 0.6)))
        for name in ("knn", "linear")
    )
    whole, part = (own["budgets"][share]["metrics"] for share in ("1", "0.6"))
    assert whole.items() <= own["metrics"].items() and whole != part
    runs: dict[str, Any] = {"model": str(tmp_path / "knn"), "against": (str(tmp_path / "linear"),), "unit": "case"}
    found = evaluate(EvaluateConfig(**runs, out=str(tmp_path / "out")))
    assert found["protocol"] == own["protocol"]
    for name in ("accuracy", "balanced_accuracy", "auroc"):
        ours, theirs = own["metrics"][name], other["metrics"][name]
        assert found["metrics"][name]["value"] == pytest.approx(ours["value"])
        assert found["against"]["linear"]["own"][name]["value"] == pytest.approx(theirs["value"])
        difference = found["against"]["linear"]["metrics"][name]["difference"]
        assert difference == pytest.approx(ours["value"] - theirs["value"])
    by_run, again = (rows_of(tmp_path / name / "units.parquet") for name in ("knn", "out"))
    sizes = [{(row["repeat"], row["unit"]): row["images"] for row in rows} for rows in (by_run, again)]
    assert sizes[0] == sizes[1] and len(by_run) == len(again) == len(sizes[0])
    unseen = evaluate(EvaluateConfig(**runs, data=str(cased), out=str(tmp_path / "unseen"), allow_seen=True))
    assert unseen["protocol"]["units"] == own["protocol"]["units"]
    report = (tmp_path / "unseen" / "report.html").read_text(encoding="utf-8")
    assert f"All models judged the same {own['protocol']['units']} cases of" in report
    with pytest.raises(UsageError, match="--pooling attention: judges images of --data, which is not given"):
        EvaluateConfig(**runs, pooling="attention", out=str(tmp_path / "no"))


def test_an_order_is_that_of_every_file_and_evaluate_judges_by_it(cased: Path, tmp_path: Path) -> None:
    order = ("healthy", "disease/diffuse", "disease/cyst", "disease/nodule")
    summary = transfer(config(cased, tmp_path / "run", order=order))
    assert summary["classes"] == list(order)
    assert pq.read_schema(tmp_path / "run" / "predictions.parquet").names[-4:] == list(order)
    rows = rows_of(tmp_path / "run" / "units.parquet")
    place = {name: at for at, name in enumerate(order)}
    off = [abs(int(np.argmax([row[name] for name in order])) - place[row["truth"]]) for row in rows]
    assert summary["metrics"]["mean_level_error"]["value"] == pytest.approx(np.mean(off))
    judged = EvaluateConfig(model=str(tmp_path / "run"), data=str(cased), out=str(tmp_path / "out"), allow_seen=True)
    assert "mean_level_error" in evaluate(judged)["metrics"]
    assert pq.read_schema(tmp_path / "out" / "predictions.parquet").names[-4:] == list(order)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"split": "image"}, "--unit case: a split by image would put"),
        ({"unit": "image", "pooling": "attention"}, "--pooling attention: needs --unit case or group"),
        ({"task": "finetune", "pooling": "attention"}, "--pooling attention: needs frozen features"),
    ],
)
def test_what_cannot_be_pooled_is_refused(changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=part):
        config(tmp_path, tmp_path / "out", **changes)
