"""From a model to its index and back: `index build`, `search` and `check` on small data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import training.gallery as galleries
from cluster.errors import DataError, UsageError
from serving import index, snapshot
from serving.configs import IndexBuildConfig, IndexCheckConfig, IndexSearchConfig
from tests.hostile import encoded
from tests.runs import rayograph
from tests.test_transfer_chain import config as transfer_config
from training.artifact import load_model
from training.dataset import Dataset
from training.gallery import gallery
from training.transfer import transfer

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear probe on a network without training."""
    out = tmp_path_factory.mktemp("model") / "run"
    transfer(transfer_config(phantoms, out, init="none", model="test_vit", image_size="32", task="linear"))
    return out


@pytest.fixture(scope="module")
def built(model: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "index"
    index.build(config(model, phantoms, out, kind="flat"), gallery=gallery)
    return out


def config(model: Path, data: Path, out: Path, **changes: Any) -> IndexBuildConfig:
    return IndexBuildConfig(model=str(model), data=str(data), out=str(out), **changes)


def hits(image: Path, index_folder: Path, **changes: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = index.search(IndexSearchConfig(str(image), index=str(index_folder), **changes))[
        "hits"
    ]
    return found


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def png(folder: Path, pixels: np.ndarray) -> Path:
    file = folder / "query.png"
    file.write_bytes(encoded(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, "PNG"))
    return file


def test_the_vectors_are_the_models_features_of_the_datasets_images(built: Path, model: Path, phantoms: Path) -> None:
    dataset, stored = Dataset.open(phantoms), snapshot.current(built)
    selection = dataset.select()
    assert stored.rows["image_id"].to_pylist() == selection.column("image_id")
    for name in ("label", "group", "sha256"):
        assert stored.rows[name].to_pylist() == selection.column(name)
    features = unit(load_model(model).embed(dataset.pixels(selection)))
    np.testing.assert_allclose(stored.vectors, features, atol=1e-5)
    assert all(jpeg[:2] == b"\xff\xd8" for jpeg in stored.rows["thumbnail"].to_pylist())
    summary = json.loads((built / "summary.json").read_text())
    assert {"vectors", "kind", "recall_at_10", "bytes_per_vector", "build_seconds"} <= set(summary)
    assert (summary["vectors"], summary["kind"], summary["recall_at_10"]) == (len(selection), "flat", 1.0)


@pytest.mark.parametrize("labelled", [False, True])
def test_neighbours_are_those_of_brute_force(
    built: Path, model: Path, phantoms: Path, tmp_path: Path, labelled: bool
) -> None:
    dataset, stored = Dataset.open(phantoms), snapshot.current(built)
    pixels = dataset.pixels(dataset.select().take([17]))
    query = unit(load_model(model).embed(pixels))[0]
    cosines = stored.vectors @ query
    may = stored.labelled if labelled else np.ones(len(cosines), dtype=bool)
    found = hits(png(tmp_path, pixels[0]), built, k=12, labelled=labelled)
    np.testing.assert_allclose([hit["score"] for hit in found], -np.sort(-cosines[may])[:12], atol=1e-5)
    place = {i: at for at, i in enumerate(stored.rows["image_id"].to_pylist())}
    np.testing.assert_allclose([cosines[place[hit["id"]]] for hit in found], [hit["score"] for hit in found], atol=1e-5)
    assert labelled or found[0]["id"] == dataset.select().column("image_id")[17]
    assert not labelled or all(hit["label"] for hit in found)


def test_images_of_the_querys_own_group_are_left_out(built: Path, phantoms: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(phantoms)
    file, group = png(tmp_path, dataset.pixels(dataset.select().take([3]))[0]), dataset.select().column("group")[3]
    assert hits(file, built, k=1)[0]["group"] == group
    with pytest.raises(UsageError, match="its group is not known; give it with --group"):
        hits(file, built, not_same_group=True)
    found = hits(file, built, k=1000, not_same_group=True, group=group)
    assert group not in {hit["group"] for hit in found}
    others = [g for g in dataset.select().column("group") if g != group]
    assert len(found) == len(others)


def test_search_prints_a_table_or_json(
    built: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Dataset.open(phantoms)
    file = png(tmp_path, dataset.pixels(dataset.select().take([0]))[0])
    found = hits(file, built, k=2)
    table = capsys.readouterr().out
    assert all(hit["id"] in table and f"{hit['score']:.4f}" in table for hit in found)
    hits(file, built, k=2, json=True)
    assert json.loads(capsys.readouterr().out) == {"hits": found}


def test_check_says_that_an_index_is_whole_and_when_it_is_not(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index.check(IndexCheckConfig(index=str(built)))["recall_at_10"] == 1
    assert "whole" in capsys.readouterr().out
    shutil.copytree(built, tmp_path / "index")
    rows = tmp_path / "index" / "snapshots" / "000001" / "rows.arrow"
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"rows\.arrow: missing or changed"):
        index.check(IndexCheckConfig(index=str(tmp_path / "index")))
    with pytest.raises(DataError, match=r"below 1\.1; build it again"):
        index.check(IndexCheckConfig(index=str(built), min_recall=1.1))


def test_a_second_build_is_already_done_and_one_under_a_changed_model_is_refused(
    built: Path, model: Path, phantoms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (built / "CURRENT").stat().st_mtime_ns
    index.build(config(model, phantoms, built, kind="flat"), gallery=gallery)
    assert capsys.readouterr().out == f"already done: {built}\n"
    assert (built / "CURRENT").stat().st_mtime_ns == before
    with pytest.raises(UsageError, match="kind differs"):
        index.build(config(model, phantoms, built, kind="hnsw"), gallery=gallery)

    shutil.copytree(model, tmp_path / "run")
    index_folder = tmp_path / "index"
    index.build(config(tmp_path / "run", phantoms, index_folder), gallery=gallery)
    card = tmp_path / "run" / "model" / "model.json"
    values = json.loads(card.read_text())
    values["sha256"]["model.safetensors"] = "ab" * 32
    card.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"was built under what .* held before"):
        index.build(config(tmp_path / "run", phantoms, index_folder), gallery=gallery)


def test_another_models_index_is_refused(built: Path, phantoms: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    transfer(transfer_config(phantoms, other, init="none", model="test_vit", image_size="32", task="linear", seed=5))
    dataset = Dataset.open(phantoms)
    file = png(tmp_path, dataset.pixels(dataset.select().take([0]))[0])
    with pytest.raises(UsageError, match="is not the model of this index"):
        hits(file, built, model=str(other))


def test_another_kind_of_index_costs_no_second_pass(
    model: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.build(config(model, phantoms, tmp_path / "one", kind="flat"), gallery=gallery)

    def never(*_: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(galleries, "embed", never)
    monkeypatch.setattr(galleries, "_thumbnails", never)
    summary = index.build(config(model, phantoms, tmp_path / "two", kind="hnsw"), gallery=gallery)
    assert summary["kind"] == "hnsw" and summary["recall_at_10"] > 0.95
    assert index.check(IndexCheckConfig(index=str(tmp_path / "two")))["vectors"] == summary["vectors"]


def test_only_the_wanted_images_are_indexed(model: Path, phantoms: Path, tmp_path: Path) -> None:
    wanted = config(model, phantoms, tmp_path / "index", labelled=True, where=("label=healthy",))
    index.build(wanted, gallery=gallery)
    stored = snapshot.current(tmp_path / "index")
    assert set(stored.rows["label"].to_pylist()) == {"healthy"}
    selection = Dataset.open(phantoms).select(("label=healthy",), labelled=True)
    assert stored.rows["image_id"].to_pylist() == selection.column("image_id")


def test_bad_input_leaves_nothing(model: Path, phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no image is left"):
        index.build(config(model, phantoms, tmp_path / "index", where=("label=moon",)), gallery=gallery)
    with pytest.raises(UsageError, match="no such folder or file"):
        index.build(config(model, tmp_path / "gone", tmp_path / "index"), gallery=gallery)
    with pytest.raises(UsageError, match="not a RUN"):
        index.build(config(tmp_path, phantoms, tmp_path / "index"), gallery=gallery)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_killed_during_the_build_the_same_command_finishes_it(model: Path, phantoms: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    command = ["index", "build", "--model", str(model), "--data", str(phantoms), "--out", str(out), "--kind", "hnsw"]
    with rayograph(*command) as process:
        process.until(lambda: any(tmp_path.glob("*.partial")), "features are being computed")
        process.kill_group()
    assert not (out / "CURRENT").exists() and not (out / "summary.json").exists()
    (out / ".build-left").mkdir()  # what a build leaves that is killed while it writes
    (out / "snapshots" / ".000001.partial").mkdir(parents=True)
    with rayograph(*command) as process:
        assert process.wait() == 0, process.said()
    assert index.check(IndexCheckConfig(index=str(out)))["vectors"] == 200
    assert {p.name for p in out.iterdir()} - {".lock", "run.log"} == {
        "CURRENT",
        "snapshots",
        "config.yaml",
        "summary.json",
    }
    assert [p.name for p in (out / "snapshots").iterdir()] == ["000001"]
    kept = next(tmp_path.glob(".*.gallery"))
    assert sorted(p.name for p in kept.iterdir()) == ["rows.arrow", "vectors.safetensors"]
