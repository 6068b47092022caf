"""From a RUN and a DATASET to two lists: `suggest` on small data."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster.cli import main
from cluster.errors import UsageError
from cluster.session import Resources
from training.artifact import ModelCard, load_model, save_model
from training.configs import IngestConfig, SuggestConfig, TransferConfig
from training.dataset import Dataset
from training.ingest import ingest
from training.suggest import CROSS_VALIDATION, MODEL, NEIGHBOURS, held_out, sort_out, suggest
from training.transfer import transfer
from training.weights import initial_weights, wanted_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def encoder(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN as `pretrain` leaves one: an encoder without classes, here with random weights."""
    folder, dataset = tmp_path_factory.mktemp("encoder") / "run", Dataset.open(phantoms)
    wanted = wanted_for(config_of_probe(phantoms, folder, "none", model="test_vit", image_size="32"), dataset, "cpu")
    initial = initial_weights(wanted)
    save_model(
        folder / "model", ModelCard(initial.architecture, dataset.image_path, initial.input), initial.network.eval()
    )
    return folder


def config_of_probe(data: Path, out: Path, init: str, **changes: Any) -> TransferConfig:
    return TransferConfig(str(data), out=str(out), init=init, task="linear", folds=3, **changes)


@pytest.fixture(scope="module")
def probed(phantoms: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear probe of the encoder."""
    out = tmp_path_factory.mktemp("probed") / "run"
    transfer(config_of_probe(phantoms, out, str(encoder)))
    return out


@pytest.fixture(scope="module")
def other(ray_session: Resources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATASET of phantoms of another seed, at the size of the model's own."""
    out = tmp_path_factory.mktemp("other") / "dataset"
    ingest(IngestConfig("phantom:90", out=str(out), image_size="32", seed=9))
    return out


@pytest.fixture(scope="module")
def mixed(phantoms: Path, ray_session: Resources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATASET of coarse noise, a third of it unlabelled, of 20 unlabelled phantoms, of copies and a broken file."""
    source, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    lines = ["path,label,group"]
    for number in range(30):
        grain = np.repeat(np.repeat(generator.integers(256, size=(8, 8), dtype=np.uint8), 4, axis=0), 4, axis=1)
        Image.fromarray(grain).save(source / f"{number}.png")
        lines.append(f"{number}.png,{['', 'a', 'b'][number % 3]},{number}")
    dataset = Dataset.open(phantoms)
    selection = dataset.select(("label=",))
    for number, pixels in enumerate(dataset.pixels(selection.take(range(20)))):
        Image.fromarray(pixels.squeeze()).save(source / f"phantom-{number}.png")
        lines.append(f"phantom-{number}.png,,{100 + number}")
    shutil.copy(source / "1.png", source / "again.png")  # labelled a
    shutil.copy(source / "3.png", source / "copy.png")  # unlabelled
    (source / "broken.png").write_bytes(b"no image")
    lines += ["again.png,b,90", "copy.png,,91", "broken.png,,92"]
    (source / "index.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path_factory.mktemp("mixed") / "mixed"
    ingest(IngestConfig(str(source), out=str(out), image_size="32", max_quarantined=0.1))
    return out


NOISE = {f"{number}.png" for number in range(0, 30, 3)}
PHANTOMS = {f"phantom-{number}.png" for number in range(20)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where suggestions go: in one folder, for features are kept there, and starting a model is what takes time."""
    return tmp_path_factory.mktemp("suggested")


def config(model: Path, data: Path, out: Path, **changes: Any) -> SuggestConfig:
    return SuggestConfig(model=str(model), data=str(data), out=str(out), **{"n": 10, **changes})


def listed(out: Path, name: str) -> list[dict[str, str]]:
    with (out / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def manifest_of(data: Path) -> dict[str, dict[str, Any]]:
    return {row["image_id"]: row for row in Dataset.open(data).manifest.to_pylist()}


def relabelled(data: Path, out: Path, changes: dict[str, str]) -> Path:
    """A copy of a DATASET in which some images carry another label, by their ids."""
    shutil.copytree(data, out)
    table = pq.read_table(out / "manifest.parquet")
    ids, labels = table["image_id"].to_pylist(), table["label"].to_pylist()
    labels = [changes.get(image, label) for image, label in zip(ids, labels, strict=True)]
    at = table.column_names.index("label")
    pq.write_table(table.set_column(at, "label", pa.array(labels, pa.string())), out / "manifest.parquet")
    return out


def test_the_lists_hold_what_they_should_and_nothing_else(phantoms: Path, probed: Path, place: Path) -> None:
    out = place / "lists"
    summary = suggest(config(probed, phantoms, out))
    known, classes = manifest_of(phantoms), load_model(probed).card.classes
    to_label, look_again = listed(out, "to_label"), listed(out, "look_again")
    assert len(to_label) == summary["to_label"] == 10
    assert len(look_again) == summary["look_again"] <= 10
    assert [row["rank"] for row in to_label] == [str(n) for n in range(1, 11)]
    assert all(known[row["image_id"]]["label"] == "" == row["label"] for row in to_label)
    assert all(known[row["image_id"]]["label"] == row["label"] != "" for row in look_again)
    assert all(known[row["image_id"]]["status"] == "ok" for row in to_label + look_again)
    assert max(Counter(row["group"] for row in to_label).values()) == 1
    for row in to_label:
        assert {row["top_class"], row["second_class"]} <= set(classes)
        assert float(row["probability"]) >= float(row["second_probability"])
        assert row["path"] == known[row["image_id"]]["path"]
    assert {row["judged_by"] for row in look_again} <= {CROSS_VALIDATION}
    for name in ("to_label.png", "report.html"):
        assert (out / name).is_file()


def test_the_same_seed_makes_the_same_lists_and_features_are_kept(
    phantoms: Path, probed: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = (suggest(config(probed, phantoms, place / name)) for name in ("one", "two"))
    assert "kept from before" in capsys.readouterr().err
    for name in ("to_label.csv", "look_again.csv"):
        assert (place / "one" / name).read_bytes() == (place / "two" / name).read_bytes()
    assert first["to_label"] == again["to_label"]
    suggest(config(probed, phantoms, place / "one"))
    assert "already done" in capsys.readouterr().out


def test_labels_flipped_after_the_run_are_among_the_first_to_look_wrong(
    phantoms: Path, probed: Path, place: Path
) -> None:
    predictions = pq.read_table(probed / "predictions.parquet").to_pylist()
    classes = load_model(probed).card.classes
    sure = sorted(predictions, key=lambda row: -row[row["truth"]])[:4]  # what the folds were surest of, and right
    changes = {row["image_id"]: min(classes, key=lambda c: row[c]) for row in sure}
    data = relabelled(phantoms, place / "flips" / "dataset", changes)
    suggest(config(probed, data, place / "flipped"))
    found = listed(place / "flipped", "look_again")
    assert set(changes) <= {row["image_id"] for row in found}
    for row in [row for row in found if row["image_id"] in changes]:
        assert row["label"] == changes[row["image_id"]]
        assert row["looks_like"] == next(p["truth"] for p in sure if p["image_id"] == row["image_id"])
    assert (place / "flipped" / "look_again.png").is_file()


def test_an_encoder_without_classes_suggests_typical_images_and_judges_by_neighbours(
    phantoms: Path, encoder: Path, place: Path
) -> None:
    suggest(config(encoder, phantoms, place / "encoder"))
    found, known = listed(place / "encoder", "to_label"), manifest_of(phantoms)
    assert len(found) == len({row["group"] for row in found}) == 10
    assert all(known[row["image_id"]]["label"] == "" for row in found)
    assert all(int(row["images_alike"]) >= 1 for row in found)
    assert {row["judged_by"] for row in listed(place / "encoder", "look_again")} <= {NEIGHBOURS}


def test_data_with_one_kind_of_images_gets_one_list_and_a_line(
    phantoms: Path, probed: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = manifest_of(phantoms).values()
    name = load_model(probed).card.classes[0]
    full = relabelled(phantoms, place / "full" / "dataset", {r["image_id"]: name for r in everything if not r["label"]})
    summary = suggest(config(probed, full, place / "first"))
    assert "has no unlabelled image" in capsys.readouterr().err
    assert summary["to_label"] == 0 == len(listed(place / "first", "to_label"))
    assert summary["look_again"] > 0
    bare = relabelled(phantoms, place / "bare" / "dataset", {r["image_id"]: "" for r in everything})
    summary = suggest(config(probed, bare, place / "second"))
    assert "has no label" in capsys.readouterr().err
    assert (summary["to_label"], summary["look_again"]) == (10, 0)
    single = relabelled(phantoms, place / "single" / "dataset", {r["image_id"]: name for r in everything})
    with pytest.raises(UsageError, match="nothing to suggest"):
        suggest(config(probed, single, place / "third"))
    assert not (place / "third").exists()


def test_probabilities_of_unseen_labels_come_from_the_model_and_of_strange_ones_from_neighbours(
    phantoms: Path, other: Path, probed: Path, tmp_path: Path
) -> None:
    model, dataset = load_model(probed), Dataset.open(other)
    rows = sort_out(dataset, dataset.select())
    features = model.embed(dataset.pixels(rows.selection))
    classes, probabilities, by = held_out(str(probed), model, dataset, rows, features)
    assert set(by) == {MODEL}
    np.testing.assert_allclose(probabilities, model.classify(features[rows.labelled]), atol=1e-12)
    assert list(classes) == list(model.card.classes)
    strange = Dataset.open(relabelled(other, tmp_path / "strange", {rows.selection.column("image_id")[0]: "moon"}))
    changed = sort_out(strange, strange.select())
    classes, probabilities, by = held_out(str(probed), model, strange, changed, features)
    assert "moon" in classes
    assert set(by) == {NEIGHBOURS}
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_out_of_fold_predictions_are_used_for_the_images_they_were_made_of(phantoms: Path, probed: Path) -> None:
    model, dataset = load_model(probed), Dataset.open(phantoms)
    rows = sort_out(dataset, dataset.select())
    features = np.zeros((len(rows.selection), 1), dtype=np.float32)  # not looked at
    classes, probabilities, by = held_out(str(probed / "model"), model, dataset, rows, features)
    assert set(by) == {CROSS_VALIDATION}
    table = pq.read_table(probed / "predictions.parquet")
    order = pc.index_in(pa.array(np.asarray(rows.selection.column("image_id"))[rows.labelled]), table["image_id"])
    expected = np.stack([table[name].take(order).to_numpy() for name in classes], axis=1)
    np.testing.assert_allclose(probabilities, expected)


def test_copies_and_broken_files_are_never_suggested_and_copies_that_disagree_are_shown_first(
    encoder: Path, mixed: Path, place: Path
) -> None:
    summary = suggest(config(encoder, mixed, place / "copies", n=50))
    assert {row["path"] for row in listed(place / "copies", "to_label")} == NOISE | PHANTOMS
    assert summary["left_out"] == 0  # an encoder does not know what was labelled
    first = listed(place / "copies", "look_again")[0]
    assert (first["path"], first["reason"]) == ("1.png", "copies of this image carry different labels")


def test_images_unlike_what_the_model_was_trained_on_are_left_out_unless_asked_for(
    probed: Path, mixed: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = suggest(config(probed, mixed, place / "alike", n=50))
    suggested = {row["path"] for row in listed(place / "alike", "to_label")}
    assert not suggested & NOISE
    assert summary["left_out"] == 30 - len(suggested)
    assert len(suggested & PHANTOMS) >= 18  # of its own kind about one in a hundred is refused
    assert f"{summary['left_out']} of 30 unlabelled images left out as unlike" in capsys.readouterr().err
    page = (place / "alike" / "report.html").read_text()
    assert f"Left out as unlike the labelled images that the model was trained on: {summary['left_out']} of 30" in page
    asked = suggest(config(probed, mixed, place / "unlike", n=50, unlike=True))
    assert {row["path"] for row in listed(place / "unlike", "to_label")} == NOISE | PHANTOMS
    assert asked["left_out"] == 0


def test_data_of_which_everything_is_unlike_the_model_gets_an_empty_list_and_says_why(
    probed: Path, mixed: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = manifest_of(mixed).items()
    phantoms = {image for image, row in known if row["path"] in PHANTOMS}
    noise = relabelled(mixed, place / "noise" / "mixed", dict.fromkeys(phantoms, "a"))
    summary = suggest(config(probed, noise, place / "nothing"))
    assert (summary["to_label"], summary["left_out"]) == (0, 10)
    assert not listed(place / "nothing", "to_label")
    assert "10 of 10" in (place / "nothing" / "report.html").read_text()
    assert "--unlike" in capsys.readouterr().err


def test_the_command_line_suggests_and_refuses_in_one_line(
    phantoms: Path, probed: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("cluster.cli._install_signals", lambda: None)
    command = ["suggest", "--model", str(probed), "--out", "asked", "--n", "4", "--no-images", "--data"]
    assert main([*command, str(phantoms)]) == 0
    page = (place / "asked" / "report.html").read_text()
    assert "data:image" not in page
    assert page.count("Figure left out, because it shows images of the data") >= 1
    assert len(listed(place / "asked", "to_label")) == 4
    capsys.readouterr()
    assert main([*command, "gone", "--overwrite"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("gone: no such folder or file")
