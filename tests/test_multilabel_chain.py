"""Label sets from a folder to an answer: `transfer`, `evaluate`, `predict`, the endpoint, on pictures of findings."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from serving.app import Seen, Service, create_app
from serving.deployments import Classifier
from tests.asgi import ask
from tests.findings import CLASSES, write_findings
from training.artifact import load_model
from training.multilabel import NAMES

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def run(ray_session: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear probe of 360 pictures of 90 patients on ImageNet's features, by the command line."""
    root = tmp_path_factory.mktemp("findings")
    write_findings(root / "in", 360)
    index = root / "in" / "index.csv"
    head, *lines = index.read_text().splitlines()
    sides = [f"{line},{'right' if at // 4 % 2 else 'left'}" for at, line in enumerate(lines)]  # by patient
    index.write_text("\n".join([f"{head},side", *sides]) + "\n")
    command = ["transfer", str(root / "in"), "--out", str(root / "run"), "--task", "linear", "--folds", "3"]
    assert main([*command, "--image-size", "64", "--by", "side", "--prevalence", "0.1"]) == 0
    return root / "run"


def rows_of(file: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(file).to_pylist())


def table_of(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(truth bool [N, K], probabilities [N, K])"""
    truth = np.asarray([[name in row["truth"].split("|") for name in CLASSES] for row in rows])
    return truth, np.asarray([[row[name] for name in CLASSES] for row in rows])


def test_a_folder_with_label_sets_becomes_a_model_that_tells_both_findings(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["multi_label"] is True and summary["classes"] == list(CLASSES)
    assert list(summary["metrics"])[: len(NAMES)] == list(NAMES)
    truth, p = table_of(rows_of(run / "predictions.parquet"))
    assert len(truth) == 360 and (truth.sum(axis=1) == 2).any()
    assert summary["metrics"]["accuracy"]["value"] == pytest.approx(((p >= 0.5) == truth).all(axis=1).mean())
    assert summary["metrics"]["auroc"]["ci95"][0] > 0.7  # guessing gives a half
    assert json.loads((run / "model" / "model.json").read_text())["activation"] == "sigmoid"
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "Each label by itself" in report and "share of images whose whole set of labels is right" in report
    assert set(summary["subgroups"]["side"]["parts"]) == {"left", "right"}
    assert set(summary["thresholds"]) == set(CLASSES)
    assert "0.1" in summary["thresholds"]["spot"]["Youden"]["at_prevalence"]
    assert "Not judged, because an image may have several labels" in report and "By side" in report
    assert not (run / "figures" / "confusion.png").exists() and (run / "figures" / "reliability.png").is_file()


def test_two_models_of_label_sets_are_compared_out_of_fold_and_on_unseen_pictures(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "knn"
    command = ["transfer", str(run.parent / "in"), "--out", str(other), "--task", "knn", "--folds", "3"]
    assert main([*command, "--image-size", "64"]) == 0
    models = ["evaluate", "--model", str(run), "--against", str(other)]
    assert main([*models, "--out", str(tmp_path / "compared")]) == 0
    own, theirs, found = (
        json.loads((folder / "summary.json").read_text()) for folder in (run, other, tmp_path / "compared")
    )
    for name in NAMES:
        expected = own["metrics"][name]["value"] - theirs["metrics"][name]["value"]
        assert found["against"]["knn"]["metrics"][name]["difference"] == pytest.approx(expected), name
    fresh = write_findings(tmp_path / "new", 80, seed=5)
    unseen = [*models, "--data", str(fresh), "--out", str(tmp_path / "unseen"), "--prevalence", "0.1"]
    assert main(unseen) == 0
    summary = json.loads((tmp_path / "unseen" / "summary.json").read_text())
    assert set(summary["against"]["knn"]["metrics"]) == set(NAMES) and set(summary["thresholds"]) == set(CLASSES)


def test_unseen_pictures_are_judged_predicted_and_answered_alike(run: Path, tmp_path: Path) -> None:
    folder = write_findings(tmp_path / "new", 80, seed=5)
    assert main(["evaluate", "--model", str(run), "--data", str(folder), "--out", str(tmp_path / "judged")]) == 0
    assert json.loads((tmp_path / "judged" / "summary.json").read_text())["metrics"]["auroc"]["value"] > 0.7
    truth, p = table_of(sorted(rows_of(tmp_path / "judged" / "predictions.parquet"), key=lambda row: row["image_id"]))
    out = tmp_path / "predicted.parquet"
    assert main(["predict", str(folder), "--model", str(run), "--out", str(out)]) == 0
    predicted = sorted(rows_of(out), key=lambda row: row["image_id"])
    again = table_of(predicted)
    assert np.array_equal(again[0], truth)
    np.testing.assert_allclose(again[1], p, atol=1e-5)
    for row, own in zip(predicted, again[1], strict=True):
        assert row["label"] == "|".join(name for name, value in zip(CLASSES, own, strict=True) if value >= 0.5)
    answers = [_asked(run, folder / row["path"]) for row in predicted[:5]]
    for answer, own in zip(answers, again[1], strict=False):
        said = {c["label"]: c["probability"] for c in answer["classes"]}
        assert [said[name] for name in CLASSES] == pytest.approx(own.tolist(), abs=1e-5)
        assert answer["several"] is True and answer["tree"]["probability"] == max(said.values())


class InProcess:
    """The backend of the endpoints without Ray: the encoder and the classifier of one model."""

    def __init__(self, run: Path) -> None:
        self.classifier = Classifier(str(run))

    async def see(self, pixels: np.ndarray, look: np.ndarray) -> Seen:
        features = self.classifier.model.embed(pixels[None])
        return features[0], self.classifier.judge(features, look[None])[0]

    async def search(self, *_: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        raise NotImplementedError

    async def ready(self) -> None:
        return


def _asked(run: Path, picture: Path) -> dict[str, Any]:
    card = load_model(run).card
    service = Service(
        name="run",
        sha256="",
        card_sha256="",
        classes=card.classes,
        image_path=card.image_path.as_dict(),
        channels=card.input.channels,
        metrics=card.metrics,
        limit=0.0,
        index=None,
        body_bytes=2**20,
        timeout_s=60,
        several=card.activation == "sigmoid",
    )
    app = create_app(service, InProcess(run))
    answer: dict[str, Any] = asyncio.run(ask(app, "/v1/classify", picture.read_bytes())).json()
    return answer


def test_an_order_of_label_sets_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_findings(tmp_path / "in", 40)
    command = ["transfer", str(folder), "--out", str(tmp_path / "run"), "--order", *CLASSES]
    assert main(command) == 2
    assert "--order: images have several labels" in capsys.readouterr().err
    assert main([*command, "--multi-label"]) == 2
