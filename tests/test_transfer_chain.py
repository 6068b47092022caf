"""From labels to a judged model and back: `transfer`, `evaluate`, `predict` and `embed` on small data."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster import storage
from cluster.errors import UsageError
from cluster.session import Resources
from tests.hostile import encoded, write_hostile
from tests.runs import Pretrained, rayograph
from training import conformal, metrics
from training.artifact import load_model, read_card
from training.configs import EvaluateConfig, InferenceConfig, IngestConfig, TransferConfig
from training.dataset import Dataset
from training.evaluate import evaluate
from training.feed import Feed, source_of
from training.inference import Decode, embed, predict
from training.ingest import ingest
from training.sources import list_source
from training.thresholds import predictive_values
from training.transfer import transfer
from training.transform import Input, evaluation_view

pytestmark = pytest.mark.ray

FOLDS = 3
TASKS = ["linear", "knn", "svm", pytest.param("finetune", marks=pytest.mark.slow)]
METRICS = {"accuracy", "balanced_accuracy", "kappa", "kappa_quadratic", "f1_macro", "auroc", "ece"}
PLAIN = {"image_id", "group", "case", "repeat", "fold", "truth"}


def config(data: Path, out: Path, **changes: Any) -> TransferConfig:
    return TransferConfig(str(data), out=str(out), **{"folds": FOLDS, "epochs": 2, "task": "knn", **changes})


def rows_of(file: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(file).to_pylist())


def probabilities(rows: list[dict[str, Any]], classes: list[str]) -> np.ndarray:
    return np.asarray([[row[name] for name in classes] for row in rows], dtype=np.float64)


@pytest.fixture(scope="session")
def probed(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear probe of the pretrained RUN on its own data."""
    out = tmp_path_factory.mktemp("probed") / "run"
    transfer(config(Path(pretrained.config.data), out, init=str(pretrained.run), task="linear"))
    return out


@pytest.fixture(scope="session")
def unseen(ray_session: Resources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATASET of phantoms of another seed, at the size of the model's own."""
    out = tmp_path_factory.mktemp("unseen") / "dataset"
    ingest(IngestConfig("phantom:90", out=str(out), image_size="32", seed=9))
    return out


# transfer


@pytest.mark.parametrize("task", TASKS)
def test_each_task_judges_every_labelled_image_once_per_repeat(
    phantoms: Path, pretrained: Pretrained, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeats, run = 1 if task == "finetune" else 2, Path("run")
    monkeypatch.chdir(tmp_path)  # Ray's workers are elsewhere: relative paths must not reach them
    data, init = (Path(os.path.relpath(path)) for path in (phantoms, pretrained.run))
    summary = transfer(config(data, run, init=str(init), task=task, repeats=repeats))
    rows = rows_of(run / "predictions.parquet")
    selection = Dataset.open(phantoms).select(labelled=True)
    truth = dict(zip(selection.column("image_id"), selection.column("label"), strict=True))
    classes = sorted(set(truth.values()))
    assert set(rows[0]) == PLAIN | set(classes)
    for repeat in range(repeats):
        own = [row for row in rows if row["repeat"] == repeat]
        assert sorted(row["image_id"] for row in own) == sorted(truth)
        assert {row["fold"] for row in own} == set(range(FOLDS))
        folds_of: dict[str, set[int]] = {}
        for row in own:
            folds_of.setdefault(row["group"], set()).add(row["fold"])
        assert all(len(folds) == 1 for folds in folds_of.values()), "a group was tested in two folds"
    assert all(row["truth"] == truth[row["image_id"]] for row in rows)
    values = probabilities(rows, classes)
    assert ((values >= 0) & (values <= 1)).all()
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-6)
    _check_metrics(summary["metrics"], rows, classes, FOLDS * repeats)
    assert set(summary["metrics"]) >= {"recall_at_1", "map_at_r"}
    assert summary["protocol"] == {
        "split": "group", "folds": FOLDS, "repeats": repeats, "groups": len(set(selection.column("group"))),
        "unit": "image",
    }  # fmt: skip
    for name in ("report.html", "config.yaml", "figures/confusion.png", "figures/reliability.png", "model/README.md"):
        assert (run / name).is_file(), name
    assert not [p for p in run.rglob("*") if p.suffix in {".pkl", ".pt", ".pth"}]
    assert load_model(run).probabilities(Dataset.open(phantoms).pixels(selection.take([0]))).shape == (1, len(classes))


def _check_metrics(found: dict[str, Any], rows: list[dict[str, Any]], classes: list[str], fits: int) -> None:
    assert set(found) > METRICS == set(metrics.NAMES)
    assert "brier" in found
    for name, metric in found.items():
        if name not in METRICS:
            continue
        assert set(metric) == {"value", "ci95", "per_fold"}
        low, high = metric["ci95"]
        assert low <= metric["value"] <= high, name
        assert len(metric["per_fold"]) == fits
    said = np.asarray(classes)[probabilities(rows, classes).argmax(axis=1)]
    truth = np.asarray([row["truth"] for row in rows])
    assert found["accuracy"]["value"] == pytest.approx((said == truth).mean())
    assert found["balanced_accuracy"]["value"] == pytest.approx(
        np.mean([(said == truth)[truth == name].mean() for name in set(truth)])
    )


def test_a_budget_of_labels_is_a_curve_whose_end_is_the_run_itself(
    phantoms: Path, pretrained: Pretrained, tmp_path: Path
) -> None:
    """Shares of the training groups under one hold-out protocol; the model kept is of the largest share."""
    init, protocol = str(pretrained.run), {"split": "holdout", "repeats": 2, "test_fraction": 0.3}
    shares = (0.75, 0.25)
    summary = transfer(config(phantoms, tmp_path / "curve", init=init, label_fraction=shares, **protocol))
    assert summary["protocol"] == {
        "split": "holdout",
        "folds": 1,
        "repeats": 2,
        "groups": summary["protocol"]["groups"],
        "unit": "image",
    }
    budgets = summary["budgets"]
    assert list(budgets) == ["0.25", "0.75"]
    largest, smallest = (budgets[share]["metrics"] for share in ("0.75", "0.25"))
    assert {name: summary["metrics"][name] for name in largest} == largest != smallest
    assert budgets["0.25"]["train_groups"] < budgets["0.75"]["train_groups"]
    report = (tmp_path / "curve" / "report.html").read_text()
    assert "How much labels help" in report
    alone = transfer(config(phantoms, tmp_path / "alone", init=init, label_fraction=(0.75,), **protocol))
    assert alone["metrics"] == summary["metrics"]
    curve, own = (load_model(tmp_path / name) for name in ("curve", "alone"))
    assert curve.domain is not None and own.domain is not None
    assert len(curve.domain.vectors) == len(own.domain.vectors) < 106
    classes = curve.card.classes
    ours, theirs = (rows_of(tmp_path / name / "predictions.parquet") for name in ("curve", "alone"))
    np.testing.assert_array_equal(probabilities(ours, list(classes)), probabilities(theirs, list(classes)))


@pytest.mark.slow
def test_sites_left_out_one_by_one_are_judged_with_all_that_is_said_of_a_transfer(
    phantoms: Path, pretrained: Pretrained, tmp_path: Path
) -> None:
    """The statistics of a run, wired: each stands in the summary and the report, and is of the predictions on disk."""
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(phantoms, data)
    table = pq.read_table(data / "manifest.parquet")
    site_of = {group: "ABC"[int(group.lstrip("p")) // 8 % 3] for group in table["group"].to_pylist() if group}
    pq.write_table(
        table.append_column("site", pa.array([site_of.get(group) for group in table["group"].to_pylist()])),
        data / "manifest.parquet",
    )
    flags = {"split": "site", "site_column": "site", "by": ("site",), "prevalence": (0.1,)}
    summary = transfer(config(data, run, init=str(pretrained.run), task="linear", **flags))
    rows, classes = rows_of(run / "predictions.parquet"), summary["classes"]
    assert (summary["protocol"]["split"], summary["protocol"]["folds"]) == ("site", 3)
    assert {(row["fold"], site_of[row["group"]]) for row in rows} == {(0, "A"), (1, "B"), (2, "C")}

    said = np.asarray(classes)[probabilities(rows, classes).argmax(axis=1)]
    right = said == np.asarray([row["truth"] for row in rows])
    parts = summary["subgroups"]["site"]["parts"]
    for name in "ABC":
        own = np.asarray([site_of[row["group"]] == name for row in rows])
        assert parts[name]["images"] == own.sum()
        assert parts[name]["metrics"]["accuracy"]["value"] == pytest.approx(right[own].mean())
    assert set(summary["thresholds"]) == set(classes)
    for goals in summary["thresholds"].values():
        for found in goals.values():
            assert len(found["threshold_per_fold"]) == 3
            ppv, _ = predictive_values(found["sensitivity"]["value"], found["specificity"]["value"], 0.1)
            assert found["at_prevalence"]["0.1"]["ppv"]["value"] == pytest.approx(float(ppv), nan_ok=True)
    assert set(summary["conformal"]) == {f"{level:.2f}" for level in conformal.LEVELS}
    assert all(0 < sets["coverage"]["value"] <= 1 for sets in summary["conformal"].values())
    overlap, price = summary["overlap"], summary["leak_price"]
    assert overlap["images"] == overlap["of_images"] == len(rows) and overlap["metrics_without"] is None
    assert price["difference"] == pytest.approx(price["by_image"] - price["by_group"])

    page = (run / "report.html").read_text(encoding="utf-8")
    titles = ("Calibration", "Thresholds", "Prediction sets", "Subgroups", "Seen before", "The price of a leak")
    assert [title for title in titles if f">{title}</h2>" not in page] == []
    assert "PPV at 0.1" in page and "Each site was judged by a model of the others" in page
    assert "Balanced accuracy by site: A" in page  # in the checklist


@pytest.mark.slow
def test_an_interrupted_transfer_does_not_fit_finished_folds_again(
    phantoms: Path, pretrained: Pretrained, tmp_path: Path
) -> None:
    wanted = config(phantoms, tmp_path / "run", init=str(pretrained.run), task="finetune", epochs=6)
    twin = config(phantoms, tmp_path / "twin", init=str(pretrained.run), task="finetune", epochs=6)
    folds = tmp_path / "run" / "folds"
    command = ["transfer", "--data", wanted.data, "--out", wanted.out, "--init", wanted.init, "--task", "finetune"]
    with rayograph(*command, "--folds", str(FOLDS), "--epochs", "6", "--workers", "1") as process:
        process.until(lambda: any(folds.glob("repeat-*")), "one fold is done")
        process.kill_group()
    assert not (tmp_path / "run" / "summary.json").exists()
    before = {path: path.stat().st_mtime_ns for path in folds.glob("repeat-*")}
    assert 0 < len(before) < FOLDS
    transfer(wanted)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(folds.glob("repeat-*"))) == FOLDS
    transfer(twin)
    classes = Dataset.open(phantoms).info["classes"]
    ours, theirs = (rows_of(tmp_path / name / "predictions.parquet") for name in ("run", "twin"))
    assert [row["image_id"] for row in ours] == [row["image_id"] for row in theirs]
    np.testing.assert_allclose(probabilities(ours, classes), probabilities(theirs, classes), atol=1e-4)


def test_a_class_with_fewer_groups_than_folds_is_refused_and_leaves_nothing(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"class '.*' has \d+ groups, fewer than --folds 40") as caught:
        transfer(config(phantoms, tmp_path / "run", init="none", model="test_vit", image_size="32", folds=40))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


# A mark per patient tells nothing about new patients


@pytest.mark.slow
def test_marks_of_patients_with_random_labels_give_chance_by_group_and_much_more_by_image(
    ray_session: Resources, tmp_path: Path
) -> None:
    """24 patients of 20 images: noise over a pattern of blocks that only this patient has; labels are drawn."""
    rng = np.random.default_rng(5)
    patients, images = 24, 20
    labels = rng.permutation(np.repeat(["a", "b"], patients // 2))
    folder, lines = tmp_path / "in", ["path,label,group"]
    folder.mkdir()
    for patient in range(patients):
        mark = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((12, 12, 1)))
        for image in range(images):
            pixels = (mark + rng.integers(64, 192, (48, 48, 3))) / 2
            (folder / f"{patient}-{image}.png").write_bytes(encoded(pixels.astype(np.uint8), "PNG"))
            lines.append(f"{patient}-{image}.png,{labels[patient]},patient{patient}")
    (folder / "index.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ingest(IngestConfig(str(folder), out=str(tmp_path / "data"), image_size="48"))
    accuracy = {}
    for split in ("group", "image"):
        changes = {"init": "imagenet", "image_size": "48", "folds": 5, "split": split}
        accuracy[split] = transfer(config(tmp_path / "data", tmp_path / split, **changes))["metrics"]["accuracy"]
    low, high = accuracy["group"]["ci95"]
    assert low <= 0.5 <= high
    assert accuracy["image"]["value"] > 0.85
    assert accuracy["image"]["ci95"][0] > high


# evaluate


def test_evaluate_refuses_images_of_the_models_lineage_unless_told_otherwise(
    probed: Path, phantoms: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"106 of 106 images were seen.*\n.*--allow-seen"):
        evaluate(EvaluateConfig(model=str(probed), data=str(phantoms), out=str(tmp_path / "refused")))
    assert not (tmp_path / "refused").exists()
    allowed = EvaluateConfig(model=str(probed), data=str(phantoms), out=str(tmp_path / "allowed"), allow_seen=True)
    summary = evaluate(allowed)
    assert summary["seen"] == summary["images"] == 106
    assert summary["overlap"]["groups"] == summary["overlap"]["of_groups"] == summary["seen_groups"]
    page = (tmp_path / "allowed" / "report.html").read_text(encoding="utf-8")
    assert "106 of these images" in page and "The models have seen 106 of the 106 judged images" in page
    assert "of which it had seen a part" in page and "external validation" not in page
    hidden = EvaluateConfig(**allowed.as_dict() | {"images": False, "out": str(tmp_path / "hidden"), "where": ()})
    evaluate(hidden)
    page = (tmp_path / "hidden" / "report.html").read_text(encoding="utf-8")
    assert "Mistakes" in page and "left out" in page


def test_images_of_pretraining_alone_count_as_seen(probed: Path, tmp_path: Path, phantoms: Path) -> None:
    """An unlabelled image of the pretraining, labelled elsewhere, is of the lineage."""
    dataset = Dataset.open(phantoms)
    unlabelled = [r for r in rows_of(phantoms / "manifest.parquet") if not r["label"]]
    truth = {row["image_id"]: row["truth"] for row in unlabelled}
    shutil.copytree(phantoms, tmp_path / "labelled")
    table = dataset.manifest
    labels = [truth.get(i, "") for i in table["image_id"].to_pylist()]
    table = table.set_column(table.column_names.index("label"), "label", pa.array(labels, pa.string()))
    pq.write_table(table, tmp_path / "labelled" / "manifest.parquet")
    with pytest.raises(UsageError, match="94 of 94 images were seen"):
        evaluate(EvaluateConfig(model=str(probed), data=str(tmp_path / "labelled"), out=str(tmp_path / "out")))


@pytest.mark.slow
def test_evaluate_judges_unseen_images_and_predict_agrees_number_by_number(
    probed: Path, unseen: Path, tmp_path: Path
) -> None:
    summary = evaluate(EvaluateConfig(model=str(probed), data=str(unseen), out=str(tmp_path / "judged")))
    assert summary["seen"] == summary["seen_groups"] == 0 and "overlap" not in summary
    assert summary["namesakes"] > 0  # phantoms of two seeds are patients of one name
    judged = {row["image_id"]: row for row in rows_of(tmp_path / "judged" / "predictions.parquet")}
    selection = Dataset.open(unseen).select(labelled=True)
    assert set(judged) == set(selection.column("image_id"))
    predict(InferenceConfig(str(unseen), model=str(probed), out=str(tmp_path / "predicted.parquet")))
    predicted = {row["image_id"]: row for row in rows_of(tmp_path / "predicted.parquet")}
    assert len(predicted) == 90
    classes = sorted(set(selection.column("label")))
    _check_metrics(summary["metrics"], list(judged.values()), classes, 1)
    for image, row in judged.items():
        assert row["truth"] == predicted[image]["truth"]
    ours, theirs = ([found[i] for i in judged] for found in (judged, predicted))
    np.testing.assert_allclose(probabilities(ours, classes), probabilities(theirs, classes), rtol=1e-5, atol=1e-8)
    page = (tmp_path / "judged" / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h2 [^>]*>(.*?)</h2>", page)
    assert titles[:4] == ["What was asked", "Data", "Protocol", "Results"]
    assert titles[-3:] == ["Mistakes", "Limits", "Checklist"] and "Thresholds" in titles
    assert "that it had not seen" in page and "attention rollout" in page and "groups are called as groups" in page
    assert "external validation" in page
    assert (tmp_path / "judged" / "figures" / "mistakes.png").is_file()


def test_labels_that_the_model_does_not_know_are_refused(probed: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("healthy", "stranger"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_bytes(encoded(rng.integers(0, 256, (32, 32)).astype(np.uint8), "PNG"))
    with pytest.raises(UsageError, match="the model has no class 'stranger'"):
        evaluate(EvaluateConfig(model=str(probed), data=str(tmp_path / "in"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.slow
def test_against_compares_out_of_fold_predictions_of_the_same_folds(
    probed: Path, phantoms: Path, pretrained: Pretrained, tmp_path: Path
) -> None:
    other, apart = tmp_path / "other", tmp_path / "apart"
    transfer(config(phantoms, other, init=str(pretrained.run), task="knn"))
    transfer(config(phantoms, apart, init=str(pretrained.run), task="knn", seed=3))
    summary = evaluate(EvaluateConfig(model=str(probed), against=(str(other),), out=str(tmp_path / "out")))
    own, theirs = (storage.read_json(run / "summary.json") for run in (probed, other))
    assert summary["protocol"] == own["protocol"] and summary["images"] == 106
    found = summary["against"]["other"]
    for name in metrics.NAMES:
        assert summary["metrics"][name]["value"] == pytest.approx(own["metrics"][name]["value"]), name
        assert found["own"][name]["value"] == pytest.approx(theirs["metrics"][name]["value"]), name
        expected = own["metrics"][name]["value"] - theirs["metrics"][name]["value"]
        assert found["metrics"][name]["difference"] == pytest.approx(expected), name
        assert set(found["metrics"][name]) == {"difference", "ci95", "p", "p_holm"}
    assert found["mcnemar"]["p_holm"] == found["mcnemar"]["p_group"] and found["delong"] is None
    assert rows_of(tmp_path / "out" / "predictions.parquet") == rows_of(probed / "predictions.parquet")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (
        "Comparison" in page
        and "is ahead of" in page
        and "Comparison of models by internal evaluation" in page
        and (tmp_path / "out" / "figures" / "differences.png").is_file()
    )
    with pytest.raises(UsageError, match=r"judgements have other folds; make --seed \(3 and 0\) equal"):
        evaluate(EvaluateConfig(model=str(probed), against=(str(apart),), out=str(tmp_path / "refused")))
    with pytest.raises(UsageError, match="is named twice"):
        evaluate(EvaluateConfig(model=str(probed), against=(f"{probed}/model",), out=str(tmp_path / "refused")))
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_against_judges_all_models_on_unseen_images_and_refuses_what_any_of_them_saw(
    probed: Path, unseen: Path, phantoms: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"  # has seen nothing of `phantoms`
    data = tmp_path / "data"
    ingest(IngestConfig("phantom:120", out=str(data), image_size="32", seed=4))
    transfer(config(data, other, init="none", model="test_vit", image_size="32"))
    both: dict[str, Any] = {"model": str(other), "against": (str(probed),)}
    summary = evaluate(EvaluateConfig(**both, data=str(unseen), out=str(tmp_path / "both")))
    assert summary["protocol"]["split"] == "unseen" and summary["seen"] == 0
    found = summary["against"][probed.name]
    for run, values in ((other, summary["metrics"]), (probed, found["own"])):
        alone = evaluate(EvaluateConfig(model=str(run), data=str(unseen), out=str(tmp_path / f"alone-{run.name}")))
        assert "against" not in alone
        assert {name: values[name] for name in METRICS} == {name: alone["metrics"][name] for name in METRICS}
    for name, metric in found["metrics"].items():
        expected = summary["metrics"][name]["value"] - found["own"][name]["value"]
        assert metric["difference"] == pytest.approx(expected), name
    with pytest.raises(UsageError, match=rf"106 of 106 images were seen in the \(pre\)training of {probed}"):
        evaluate(EvaluateConfig(**both, data=str(phantoms), out=str(tmp_path / "refused")))
    assert not (tmp_path / "refused").exists()


# predict and embed


def test_predict_answers_a_hostile_folder_row_by_row(probed: Path, tmp_path: Path) -> None:
    expected = {n: r for n, r in write_hostile(tmp_path / "in").items() if n != "no_extension"}
    summary = predict(InferenceConfig(str(tmp_path / "in"), model=str(probed), out=str(tmp_path / "out.parquet")))
    rows = {row["path"]: row for row in rows_of(tmp_path / "out.parquet")}
    assert summary["images"] == len(rows) == len(expected)
    classes = list(read_card(probed)[0].classes)
    for name, reason in expected.items():
        row = rows[name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")]
        values = [row[c] for c in classes]
        if reason is None:
            assert (row["status"], row["reason"]) == ("ok", "")
            assert sum(values) == pytest.approx(1)
            assert row["label"] == classes[int(np.argmax(values))]
        else:
            assert row["status"] == "quarantined"
            assert reason in row["reason"]
            assert row["label"] is None and values == [None] * len(classes)
    assert summary["quarantined"] == sum(reason is not None for reason in expected.values())


@pytest.mark.slow
def test_a_second_predict_is_already_done_and_another_model_is_not(
    probed: Path, unseen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    predict(InferenceConfig(str(unseen), model=str(probed), out=str(out), where=("label=healthy",)))
    capsys.readouterr()
    predict(InferenceConfig(str(unseen), model=str(probed), out=str(out), where=("label=healthy",)))
    assert capsys.readouterr().out == f"already done: {out}\n"
    with pytest.raises(UsageError, match="where differs"):
        predict(InferenceConfig(str(unseen), model=str(probed), out=str(out)))


@pytest.mark.slow
def test_a_fused_svm_of_layers_and_radiomics_is_judged_kept_and_answers_elsewhere_the_same(
    phantoms: Path, unseen: Path, tmp_path: Path
) -> None:
    run, chosen = tmp_path / "run", {"task": "svm", "features": "fused", "layers": ("1", "-1", "last")}
    transfer(config(phantoms, run, init="imagenet", image_size="32", **chosen))
    model, dataset = load_model(run), Dataset.open(unseen)
    selection = dataset.select()
    predict(InferenceConfig(str(unseen), model=str(run), out=str(tmp_path / "predicted.parquet")))
    embed(InferenceConfig(str(unseen), model=str(run), out=str(tmp_path / "embedded.parquet")))
    said = {row["image_id"]: row for row in rows_of(tmp_path / "predicted.parquet")}
    shown = {row["image_id"]: row["embedding"] for row in rows_of(tmp_path / "embedded.parquet")}
    ids, features = selection.column("image_id"), model.embed(dataset.pixels(selection))
    np.testing.assert_allclose(np.asarray([shown[one] for one in ids]), features, atol=1e-5)
    found = probabilities([said[one] for one in ids], list(model.card.classes))
    np.testing.assert_allclose(found, model.classify(features), atol=1e-4)
    assert not (run / "features.safetensors").exists()  # those of other layers are kept by other names
    assert model.card.features.layers[0] == "1" and model.card.features.radiomic


def test_an_encoder_has_no_classes_to_predict(pretrained: Pretrained, unseen: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an encoder without classes"):
        predict(InferenceConfig(str(unseen), model=str(pretrained.run), out=str(tmp_path / "out.parquet")))
    assert list(tmp_path.iterdir()) == []


def test_embed_and_the_printed_timm_snippet_give_the_same_features(
    pretrained: Pretrained, unseen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(InferenceConfig(str(unseen), model=str(pretrained.run), out=str(tmp_path / "out.parquet")))
    rows = rows_of(tmp_path / "out.parquet")
    dataset = Dataset.open(unseen)
    selection = dataset.select()
    assert [row["image_id"] for row in rows] == selection.column("image_id")
    found = re.search(r"^import timm\n.*?^model\.eval\(\)$", pretrained.printed, re.DOTALL | re.MULTILINE)
    assert found is not None
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)  # the snippet must not depend on where it runs
    exec(found[0], names)
    images = evaluation_view(dataset.pixels(selection), read_card(pretrained.run)[0].input)
    with torch.inference_mode():
        features = names["model"](images).numpy()
    np.testing.assert_allclose(np.asarray([row["embedding"] for row in rows]), features, rtol=1e-4, atol=1e-5)


# One picture, one path


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_image_becomes_the_same_tensor_on_every_way_to_the_network(
    ray_session: Resources, tmp_path: Path, channels: int
) -> None:
    expected = write_hostile(tmp_path / "in")
    for name, reason in expected.items():
        if reason is not None:
            (tmp_path / "in" / name).unlink()
    ingest(IngestConfig(str(tmp_path / "in"), out=str(tmp_path / "data"), image_size="24x40", max_merged_group=1.0))
    dataset = Dataset.open(tmp_path / "data")
    selection = dataset.select()
    wanted = Input(32, 32, channels, (0.4,) * channels, (0.2,) * channels)
    stored = evaluation_view(dataset.pixels(selection), wanted)

    listing = list_source(str(tmp_path / "in"))
    rows = listing.rows.append_column("at", pa.array(np.arange(listing.rows.num_rows)))
    decoded = Decode(listing.reader, dataset.image_path, channels)(rows.combine_chunks())
    place = {path: at for at, path in enumerate(listing.rows["path"].to_pylist())}
    chosen = decoded["image"][[place[path] for path in selection.column("path")]]
    torch.testing.assert_close(evaluation_view(chosen, wanted), stored, rtol=0, atol=0)

    source = source_of(dataset, dataset.plan(selection, batch_size=8, seed=0))
    for batch in Feed(source, rank=0, world=1, start=(0, 0), epochs=1):
        torch.testing.assert_close(
            evaluation_view(batch.images, wanted), stored[torch.from_numpy(batch.samples)], rtol=0, atol=0
        )
    assert stored.shape == (len(selection), channels, 32, 32)
