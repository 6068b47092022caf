"""The statistics of a run: complete, plain JSON, readable, and blind to the labels they judge."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from training.bootstrap import Units
from training.calibration import IN_FOLDS, Inner, fold_temperatures, scaled_by_fold
from training.metrics import summarise
from training.report import Table, write_report
from training.statistics import Predictions, calibration_error, sections_for

CLASSES = ["disease/one", "disease/two", "healthy"]


def predictions(seed: int = 0, images: int = 240) -> Predictions:
    """Two repeats of three folds; overconfident, and better on one site than on another."""
    rng = np.random.default_rng(seed)
    group, site = np.arange(images) // 3, np.where(np.arange(images) // 3 % 3, "north", "south")
    truth = rng.integers(0, 3, images)

    def said(truth: np.ndarray, sure: float) -> np.ndarray:
        p = np.exp(3 * (rng.normal(size=(len(truth), 3)) + sure * np.eye(3)[truth]))
        return np.asarray(p / p.sum(axis=1, keepdims=True))

    raw = np.concatenate([said(truth, 1.2), said(truth, 1.2)])
    fold, repeat = np.concatenate([group % 3, (group // 3) % 3]), np.repeat([0, 1], images)
    inner = {}
    for key in [(r, f) for r in (0, 1) for f in range(3)]:
        own = rng.integers(0, 3, 100)
        inner[key] = Inner(own, said(own, 1.2))
    return Predictions(
        classes=CLASSES,
        truth=np.tile(truth, 2),
        raw=raw,
        probabilities=scaled_by_fold(raw, fold, repeat, fold_temperatures(inner)),
        image=np.tile(np.arange(images), 2),
        group=np.tile(group, 2).astype(str),
        fold=fold,
        repeat=repeat,
        inner=inner,
        columns={"site": np.tile(site, 2).tolist(), "age": np.tile(20 + group % 60, 2).tolist()},
    )


def test_a_run_has_every_section_and_plain_json(tmp_path: Path) -> None:
    sections, summary = sections_for(predictions(), prevalence=(0.01, 0.1), resamples=40)
    assert [s.heading for s in sections] == [
        "Calibration",
        "Thresholds",
        "Prediction sets",
        "Levels of the class tree",
        "Subgroups",
    ]
    assert set(summary) == {"metrics", "calibration", "thresholds", "conformal", "subgroups"}
    assert {"brier", "hierarchical_f1", "level_1/accuracy"} <= set(summary["metrics"])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    write_report(tmp_path / "report.html", title="A run", sections=sections)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "PPV at 0.01" in text and "above 29 to 39" in text
    assert not re.search(r"\b(nan|None)\b", text)


def test_the_brier_score_and_the_calibration_error_are_those_of_scikit_learn_and_of_the_main_metrics() -> None:
    data = predictions()
    where: dict[str, Any] = {"group": data.group, "fold": data.fold, "repeat": data.repeat}
    _, summary = sections_for(data, resamples=40, seed=3)
    halves = [
        brier_score_loss(data.truth[data.repeat == r], data.probabilities[data.repeat == r], labels=[0, 1, 2])
        for r in (0, 1)
    ]
    assert summary["metrics"]["brier"]["value"] == pytest.approx(np.mean(halves))
    expected = summarise(data.truth, data.probabilities, **where, resamples=40, seed=3)["ece"]
    found = calibration_error(data.probabilities, data.truth, Units.of(**where, resamples=40, seed=3))
    assert found["value"] == pytest.approx(expected["value"])
    assert found["ci95"] == pytest.approx(expected["ci95"])
    assert found["per_fold"] == pytest.approx(expected["per_fold"])
    assert summary["calibration"]["temperature"]["ece"] == found


def test_calibration_of_overconfident_predictions_is_mended_by_what_the_inner_rows_say() -> None:
    _, summary = sections_for(predictions(images=900), resamples=10)
    calibration = summary["calibration"]
    assert calibration["temperature"]["ece"]["value"] < calibration["raw"]["ece"]["value"] / 2
    assert calibration["isotonic"]["ece"]["value"] < calibration["raw"]["ece"]["value"]
    assert all(t > 1 for t in calibration["temperature_per_fold"])


def test_nothing_that_is_chosen_changes_with_the_labels_of_the_judged_rows() -> None:
    """A permutation of the test labels changes what is judged, but no temperature, threshold, bound or set."""
    data = predictions()
    order = np.random.default_rng(5).permutation(240)
    shuffled = replace(data, truth=np.tile(data.truth[:240][order], 2))
    one, other = (sections_for(d, resamples=5)[1] for d in (data, shuffled))
    assert one["metrics"]["brier"] != other["metrics"]["brier"]
    assert one["calibration"]["temperature_per_fold"] == other["calibration"]["temperature_per_fold"]
    for name in CLASSES:
        for goal, judged in one["thresholds"][name].items():
            assert judged["threshold_per_fold"] == other["thresholds"][name][goal]["threshold_per_fold"]
    for level, sets in one["conformal"].items():
        assert sets["largest_score_per_fold"] == other["conformal"][level]["largest_score_per_fold"]
        assert sets["size"] == other["conformal"][level]["size"]


def test_a_folds_choices_do_change_with_its_inner_labels() -> None:
    data = predictions()
    inner = dict(data.inner)
    inner[(1, 2)] = replace(inner[(1, 2)], truth=np.random.default_rng(0).permutation(inner[(1, 2)].truth))
    one, other = (sections_for(d, resamples=5)[1] for d in (data, replace(data, inner=inner)))
    for before, after in (
        (s["calibration"]["temperature_per_fold"] for s in (one, other)),
        (s["thresholds"]["healthy"]["Youden"]["threshold_per_fold"] for s in (one, other)),
        (s["conformal"]["0.90"]["largest_score_per_fold"] for s in (one, other)),
    ):
        assert before[:5] == after[:5] and before[5] != after[5]


def test_without_inner_predictions_tree_and_columns_only_calibration_is_left() -> None:
    data = replace(predictions(), classes=["a", "b", "c"], inner={}, columns={})
    sections, summary = sections_for(data, resamples=5)
    assert [s.heading for s in sections] == ["Calibration"]
    (table,) = [b for b in sections[0].blocks if isinstance(b, Table)]
    assert [row[0] for row in table.rows] == ["raw"]
    assert set(summary) == {"metrics", "calibration"}


def test_a_fold_without_inner_predictions_is_refused() -> None:
    data = predictions()
    inner = {key: value for key, value in data.inner.items() if key != (0, 1)}
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        sections_for(replace(data, inner=inner))


def test_the_report_says_where_thresholds_and_sets_were_chosen() -> None:
    for data, other in ((predictions(), "elsewhere"), (replace(predictions(), chosen="elsewhere"), IN_FOLDS)):
        sections = {section.heading: str(section.blocks) for section in sections_for(data, resamples=5)[0]}
        for heading in ("Calibration", "Thresholds", "Prediction sets"):
            assert data.chosen in sections[heading] and other not in sections[heading]
