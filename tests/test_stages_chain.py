"""`transfer --stages` end to end on phantoms: what is refused before it runs, what is kept, what each stage gave."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import balanced_accuracy_score

from cluster.errors import UsageError
from cluster.session import Resources
from tests.runs import rayograph, weights_run
from tests.test_hierarchy_chain import INPUTS, of_two_inputs
from training import stages
from training.artifact import read_card
from training.configs import EvaluateConfig, IngestConfig, TransferConfig
from training.dataset import Dataset
from training.evaluate import evaluate
from training.ingest import ingest
from training.lineage import labelled_by, own_images, seen_by
from training.transfer import transfer

pytestmark = pytest.mark.ray

FOLDS = 3


@pytest.fixture(scope="session")
def related(ray_session: Resources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATASET of phantoms of another seed: other images, other patients, some of the same names."""
    out = tmp_path_factory.mktemp("related") / "dataset"
    ingest(IngestConfig("phantom:90", out=str(out), image_size="32", seed=3))
    return out


def pool(data: Path, **more: Any) -> dict[str, Any]:
    small = {"model": "test_vit", "image_size": "32", "batch_size": 32, "workers": "1", "probe": False}
    return {"name": "pool", "verb": "pretrain", "data": str(data), "epochs": 2, **small, **more}


def labelled(data: Path, **more: Any) -> dict[str, Any]:
    return {"name": "cric", "verb": "transfer", "data": str(data), "epochs": 1, "folds": 2, **more}


def written(folder: Path, *stages: dict[str, Any], name: str = "chain.yaml") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"stages": list(stages)}))  # JSON is YAML
    return str(folder / name)


def config(data: Path, out: Path, chain: str, **changes: Any) -> TransferConfig:
    return TransferConfig(str(data), out=str(out), stages=chain, **{"folds": FOLDS, "task": "knn", **changes})


def times(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file below."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def balanced(file: Path) -> float:
    rows = pq.read_table(file).to_pylist()
    classes = sorted({row["truth"] for row in rows})
    said = [max(classes, key=lambda c, row=row: row[c]) for row in rows]  # type: ignore[misc]
    return float(balanced_accuracy_score([row["truth"] for row in rows], said))


def halved(source: Path, target: Path) -> Path:
    """A copy of a DATASET with a column `half`, of which each patient has images of both kinds."""
    shutil.copytree(source, target)
    table = Dataset.open(source).manifest
    halves = pa.array(["ab"[at % 2] for at in range(table.num_rows)])
    pq.write_table(table.append_column("half", halves), target / "manifest.parquet")
    return target


# Refused before anything runs


def refused(config: TransferConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        transfer(config)
    assert "\n" not in str(caught.value)
    assert not Path(config.out).exists()
    assert not list(Path(config.out).parent.glob(".*.stage"))


def test_a_stage_with_labels_of_the_target_s_images_is_refused(phantoms: Path, tmp_path: Path) -> None:
    chain = written(tmp_path, pool(phantoms), labelled(phantoms))
    refused(config(phantoms, tmp_path / "run", chain), "stage 'cric': trains on labels of 106 images of .* would leak")


def test_a_target_of_several_inputs_is_laid_out_in_the_cases_that_they_are_joined_into(
    phantoms: Path, tmp_path: Path
) -> None:
    """Where no case was named it is the patient: that is no reason to refuse it, what the stage has seen is."""
    data = of_two_inputs(phantoms, tmp_path / "data", cases=False)
    chain = written(tmp_path / "chain", labelled(data))
    inputs: dict[str, Any] = {"task": "hierarchical", "learner": "features", "inputs": INPUTS, "unit": "case"}
    refused(config(data, tmp_path / "run", chain, **inputs), "stage 'cric': trains on labels of 106 images")


def test_a_stage_with_labels_of_other_images_of_the_target_s_patients_is_refused(
    phantoms: Path, tmp_path: Path
) -> None:
    data = halved(phantoms, tmp_path / "halved")
    chain = written(tmp_path, pool(data), labelled(data, where=["half=a"]))
    wanted = config(data, tmp_path / "run", chain, where=("half=b",), folds=2)
    refused(wanted, r"stage 'cric': trains on labels of 0 images of .*, and of \d+ of its groups, such as ")


def test_first_weights_with_labels_of_the_target_s_patients_are_refused(phantoms: Path, tmp_path: Path) -> None:
    data = halved(phantoms, tmp_path / "halved")
    other = own_images(Dataset.open(data).select(("half=a",), labelled=True))
    weights_run(tmp_path / "first", seen=other, labelled=other)
    stage = {"name": "pool", "verb": "pretrain", "data": str(data), "init": "first"}
    wanted = config(data, tmp_path / "run", written(tmp_path, stage), where=("half=b",), folds=2)
    refused(wanted, r"stage 'pool': --init .*first was trained with labels of \d+ groups of the target")


def test_a_teacher_with_labels_of_the_target_s_patients_is_refused(phantoms: Path, tmp_path: Path) -> None:
    images = own_images(Dataset.open(phantoms).select(labelled=True))
    for name, labelled in (("taught", images), ("shown", frozenset[str]())):
        weights_run(tmp_path / name, seen=images, labelled=labelled)
    first = pool(phantoms) | {"epochs": 1}
    taught = pool(phantoms, name="distilled", method="distill", teacher="taught")
    del taught["model"]
    wanted = config(phantoms, tmp_path / "run", written(tmp_path, first, taught))
    refused(wanted, r"stage 'distilled': --teacher .*taught was trained with labels of \d+ groups of the target")
    chain = stages.read_chain(written(tmp_path, first, taught | {"teacher": "shown"}))
    assert stages.teacher_of(chain[1].config) == str(tmp_path / "shown") and stages.teacher_of(chain[0].config) is None


def test_what_a_stage_or_the_target_cannot_do_is_said_before_the_first_stage_runs(
    phantoms: Path, related: Path, tmp_path: Path
) -> None:
    good = written(tmp_path, pool(phantoms))
    refused(config(phantoms, tmp_path / "run", good, folds=40), "fewer than --folds 40")
    many = written(tmp_path, pool(phantoms), labelled(related, folds=30))
    refused(config(phantoms, tmp_path / "run", many), "stage 'cric': class .* fewer than --folds 30")
    none = written(tmp_path, pool(phantoms), labelled(related, where=["truth=gone"]))
    refused(config(phantoms, tmp_path / "run", none), "stage 'cric': .*no labelled image is left by --where truth=gone")
    conv = written(tmp_path, labelled(related, init="imagenet"), {"name": "p", "verb": "pretrain", "data": "phantom:9"})
    refused(config(phantoms, tmp_path / "run", conv), "stage 'p': --method mae needs a ViT, but stage 'cric' gives")
    assert not list(tmp_path.glob(".phantom*"))  # nor was anything ingested


# The whole chain


@pytest.mark.slow
def test_a_killed_chain_goes_on_and_another_target_or_a_longer_chain_finds_its_stages(
    phantoms: Path, related: Path, tmp_path: Path
) -> None:
    chain = written(tmp_path / "plans", pool(phantoms), labelled(related))
    wanted = config(phantoms, tmp_path / "run", chain)
    command = ["transfer", "--data", wanted.data, "--out", wanted.out, "--stages", chain, "--task", "knn"]
    with rayograph(*command, "--folds", str(FOLDS)) as process:
        process.until(lambda: bool(list(tmp_path.glob(".pretrain-*.stage/summary.json"))), "the first stage is done")
        process.kill_group()
    (first,) = tmp_path.glob(".pretrain-*.stage")
    kept = times(first)
    assert not (tmp_path / "run" / "summary.json").exists()

    summary = transfer(wanted)
    assert times(first) == kept
    _check_gains(tmp_path / "run", summary)
    _check_lineage(tmp_path / "run", first, phantoms, related)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What each stage gave" in page and "first weights: those of stage cric." in page
    with pytest.raises(UsageError, match="images were seen"):
        evaluate(EvaluateConfig(model=wanted.out, data=str(related), out=str(tmp_path / "judged")))

    second = Path(read_card(tmp_path / "run")[0].lineage["initial"]["init"])
    kept |= times(second)
    transfer(config(phantoms, tmp_path / "linear", chain, task="linear"))
    third = {"name": "again", "verb": "pretrain", "data": str(related), "epochs": 1, "batch_size": 32, "workers": "1"}
    longer = written(
        tmp_path / "plans", pool(phantoms), labelled(related), third | {"probe": False}, name="longer.yaml"
    )
    before = set(tmp_path.glob(".*.stage"))
    found = transfer(config(phantoms, tmp_path / "longer", longer))
    assert times(first) | times(second) == kept
    made = {path.name.split("-")[0] for path in set(tmp_path.glob(".*.stage")) - before}
    assert made == {".pretrain", ".transfer"}  # the new stage, and the target from the point that was the last
    assert [stage["name"] for stage in found["stages"]] == ["none", "pool", "cric", "again"]
    for ours, before in zip(found["stages"][:3], summary["stages"], strict=True):
        assert before["metrics"].items() <= ours["metrics"].items()  # of a point that was the last, the main ones

    assert transfer(wanted) == summary  # already done
    with pytest.raises(UsageError, match=r"its stages differ .* first at 'again'"):
        written(tmp_path / "plans", pool(phantoms), labelled(related), third)
        transfer(wanted)


def _check_gains(run: Path, summary: dict[str, Any]) -> None:
    none, first, second = summary["stages"]
    assert [s["name"] for s in (none, first, second)] == ["none", "pool", "cric"]
    assert [s["verb"] for s in (none, first, second)] == [None, "pretrain", "transfer"]
    assert none["gain"] is None and none["key"] is None
    assert second["metrics"].items() <= summary["metrics"].items()
    files = [run / "stages" / "none", run / "stages" / "pool", run]
    values = [balanced(folder / "predictions.parquet") for folder in files]
    assert first["gain"]["balanced_accuracy"]["difference"] == pytest.approx(values[1] - values[0])
    assert second["gain"]["balanced_accuracy"]["difference"] == pytest.approx(values[2] - values[1])
    assert summary["chain_gain"]["balanced_accuracy"]["difference"] == pytest.approx(values[2] - values[0])
    assert first["overlap"]["images"] == 106 and second["overlap"]["images"] == second["overlap"]["groups"] == 0
    assert second["overlap"]["namesakes"] > 0


def _check_lineage(run: Path, first: Path, pooled: Path, related: Path) -> None:
    lineage = read_card(run)[0].lineage
    assert [s["name"] for s in lineage["stages"]] == ["pool", "cric"]
    assert [s["dataset"] for s in lineage["stages"]] == [Dataset.open(d).version for d in (pooled, related)]
    assert lineage["stages"][0]["images"] == 200 == read_card(first)[0].lineage["images"]
    assert lineage["stages"][0]["config"]["epochs"] == 2
    middle = lineage["initial"]["lineage"]
    assert (middle["verb"], middle["task"], middle["initial"]["lineage"]["verb"]) == (
        "transfer",
        "finetune",
        "pretrain",
    )
    with_labels = own_images(Dataset.open(related).select(labelled=True))
    assert seen_by(str(run)) == own_images(Dataset.open(pooled).select()) | with_labels
    assert labelled_by(str(run)) == with_labels


@pytest.mark.slow
def test_rotations_a_teacher_and_labels_make_a_chain_of_one_network(
    phantoms: Path, related: Path, tmp_path: Path
) -> None:
    """Paper 2's network learns to tell turns, then what the first stage's network sees, then labels of other images."""
    turned = pool(phantoms, method="rotation") | {"model": "parallel_resnet_tiny", "epochs": 1}
    distilled = pool(related, name="distilled", method="distill", teacher="first", epochs=1)
    del distilled["model"]  # it is the network of the stage before
    chain = written(tmp_path, turned, distilled, labelled(related))
    weights_run(tmp_path / "first", seen=own_images(Dataset.open(phantoms).select()))
    summary = transfer(config(phantoms, tmp_path / "run", chain))
    assert [stage["name"] for stage in summary["stages"]] == ["none", "pool", "distilled", "cric"]
    card, _ = read_card(tmp_path / "run")
    assert card.architecture.name == "parallel_resnet_tiny"
    methods = [stage["config"].get("method") for stage in card.lineage["stages"]]
    assert methods == ["rotation", "distill", None]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in _points(tmp_path / "run")]
    filters = [name for name, tensor in weights[0].items() if tensor.ndim == 4]
    assert len(weights) == 3 and filters
    for before, after in pairwise(weights):  # each stage trained what the one before had left
        assert not any(np.array_equal(before[name], after[name]) for name in filters)


def _points(run: Path) -> list[Path]:
    """The RUNs of a chain's stages, the first one first."""
    found = [run]
    while (before := read_card(found[0])[0].lineage["initial"]["init"]) not in {"none", "imagenet"}:
        found.insert(0, Path(before))
    return found[:-1]
