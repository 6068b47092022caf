"""What a report says of label sets beside the main metrics: thresholds, subgroups, overlap and comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UsageError
from training import multilabel
from training.bootstrap import Units
from training.calibration import Inner
from training.compare import compare, mcnemar
from training.dataset import label_of
from training.predictions import aligned, read_predictions
from training.probabilities import calibrated, temperature_for
from training.statistics import NOT_OF_LABEL_SETS, Predictions, sections_for
from training.thresholds import choose, predictive_values
from training.transductive import Overlap, overlap_blocks

CLASSES = ["a", "b", "c"]
ROWS = 240


def sets_of(rng: np.random.Generator, rows: int) -> np.ndarray:
    truth = rng.random((rows, 3)) < [0.5, 0.3, 0.4]
    truth[~truth.any(axis=1), 2] = True
    return np.asarray(truth)


def said_of(rng: np.random.Generator, truth: np.ndarray, skill: Any = 1.0) -> np.ndarray:
    """Overconfident probabilities that tell each label a little."""
    scores = 4 * (rng.normal(size=truth.shape) + np.asarray(skill) * (2.0 * truth - 1))
    return np.asarray(1 / (1 + np.exp(-scores)))


def predictions(*, inner: bool = True) -> Predictions:
    """Three folds of one repeat; better at one site than at the other."""
    rng = np.random.default_rng(0)
    group, truth = np.arange(ROWS) // 4, sets_of(rng, ROWS)
    north = group % 2 == 0
    raw, fold = said_of(rng, truth, np.where(north, 1.5, 0.5)[:, None]), group % 3
    known = {}
    for one in range(3):
        own = sets_of(rng, 90)
        known[0, one] = Inner(own, said_of(rng, own))
    return Predictions(
        classes=CLASSES,
        truth=truth,
        raw=raw,
        probabilities=raw,
        image=np.arange(ROWS),
        group=group.astype(str),
        fold=fold,
        repeat=np.zeros(ROWS, dtype=np.int64),
        inner=known if inner else {},
        columns={"site": np.where(north, "north", "south").tolist()},
    )


def test_each_label_has_thresholds_that_its_fold_s_inner_rows_chose() -> None:
    data = predictions()
    sections, summary = sections_for(data, prevalence=(0.1,), resamples=20)
    assert [s.heading for s in sections] == ["Thresholds", "Not judged", "Subgroups"]
    assert NOT_OF_LABEL_SETS in str(sections[1].blocks) and "Each label by itself" in str(sections[0].blocks)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    called = np.zeros(ROWS, dtype=bool)
    for one in range(3):
        inner, rows = data.inner[0, one], data.fold == one
        temperature = temperature_for(inner.raw, inner.truth)
        scores = calibrated(inner.raw, temperature, several=True)
        threshold = choose(scores[:, 1], inner.truth[:, 1].astype(bool), 0.9)
        assert summary["thresholds"]["b"]["sensitivity 0.90"]["threshold_per_fold"][one] == pytest.approx(threshold)
        called[rows] = calibrated(data.raw[rows], temperature, several=True)[:, 1] >= threshold
    found, has = summary["thresholds"]["b"]["sensitivity 0.90"], data.truth[:, 1]
    assert found["sensitivity"]["value"] == pytest.approx(called[has].mean())
    assert found["specificity"]["value"] == pytest.approx((~called)[~has].mean())
    ppv, _ = predictive_values(found["sensitivity"]["value"], found["specificity"]["value"], 0.1)
    assert found["at_prevalence"]["0.1"]["ppv"]["value"] == pytest.approx(float(ppv))


def test_a_prevalence_without_anything_to_choose_thresholds_on_is_answered_in_words() -> None:
    sections, summary = sections_for(predictions(inner=False), prevalence=(0.1,), resamples=5)
    assert "thresholds" not in summary
    assert "nothing that they may be chosen on" in str(sections[0].blocks)
    assert [s.heading for s in sections_for(predictions(inner=False), resamples=5)[0]] == ["Not judged", "Subgroups"]


def test_subgroups_and_their_gap_are_those_of_the_metrics_of_label_sets() -> None:
    data = predictions()
    _, summary = sections_for(data, resamples=30, seed=2)
    found = summary["subgroups"]["site"]
    value = {}
    for name, part in found["parts"].items():
        keep = np.asarray(data.columns["site"]) == name
        rows = {"group": np.asarray(data.group)[keep], "fold": data.fold[keep], "repeat": data.repeat[keep]}
        alone = multilabel.summarise(data.truth[keep], data.probabilities[keep], **rows, resamples=30, seed=2)
        assert part["metrics"]["auroc"] == alone["auroc"] and not part["marks"]
        value[name] = alone["balanced_accuracy"]["value"] or 0
    assert (found["gap"]["best"], found["gap"]["worst"]) == ("north", "south")
    assert found["gap"]["balanced_accuracy"]["value"] == pytest.approx(value["north"] - value["south"])


def test_a_value_of_whose_rows_all_have_a_label_is_not_compared() -> None:
    data = predictions()
    data.truth[np.asarray(data.columns["site"]) == "south", 0] = True
    found = sections_for(data, resamples=5)[1]["subgroups"]["site"]
    assert found["parts"]["south"]["marks"] == ["lacks a class"] and found["gap"] is None


def test_what_is_left_without_seen_groups_is_judged_as_label_sets() -> None:
    data = predictions()
    group = [str(name) for name in np.asarray(data.group)]
    seen = np.asarray([int(name) < 20 for name in group])
    rows: dict[str, Any] = {"truth": data.truth, "probabilities": data.probabilities}
    rows |= {"fold": data.fold, "repeat": data.repeat}
    _, entry = overlap_blocks(Overlap(seen, seen), rows=np.arange(ROWS), group=group, resamples=20, **rows)
    left = {name: values[~seen] for name, values in rows.items()}
    alone = multilabel.summarise(**left, group=np.asarray(group)[~seen], resamples=20)
    assert entry["metrics_without"] == alone and entry["groups"] == 20


def test_label_sets_are_compared_by_their_metrics_and_by_whole_sets() -> None:
    data = predictions()
    other = said_of(np.random.default_rng(9), data.truth, 0.3)
    rows: dict[str, Any] = {"group": data.group, "fold": data.fold, "repeat": data.repeat}
    found = compare(data.truth, data.probabilities, {"other": other}, **rows, resamples=60)["other"]
    assert tuple(found["metrics"]) == multilabel.NAMES and found["delong"] is None
    ours, theirs = (
        multilabel.summarise(data.truth, p, **rows, resamples=2)["hamming"]["value"] or 0
        for p in (data.probabilities, other)
    )
    assert found["metrics"]["hamming"]["difference"] == pytest.approx(ours - theirs)
    right = [((p >= 0.5) == data.truth).all(axis=1) for p in (data.probabilities, other)]
    expected = mcnemar(*right, group=np.asarray(data.group), repeat=data.repeat)
    assert found["mcnemar"]["p_group"] == expected["p_group"]
    assert Units.of(data.group, data.fold, data.repeat).groups == 60


def written(folder: Path, data: Predictions, *, several: bool) -> str:
    """What `transfer` leaves of predictions of label sets."""
    folder.mkdir()
    (folder / "config.yaml").write_text("verb: transfer\n")
    summary = {"protocol": {"split": "group", "repeats": 1}, "classes": CLASSES, "multi_label": several}
    (folder / "summary.json").write_text(json.dumps(summary))
    names = [label_of(row, CLASSES) if several else CLASSES[int(row.argmax())] for row in data.truth]
    columns: dict[str, Any] = {"image_id": [str(i) for i in range(ROWS)], "group": list(np.asarray(data.group))}
    columns |= {"case": [""] * ROWS, "repeat": data.repeat, "fold": data.fold, "truth": names}
    columns |= {name: data.raw[:, at] for at, name in enumerate(CLASSES)}
    pq.write_table(pa.table(columns), folder / "predictions.parquet")
    return str(folder)


def test_predictions_of_label_sets_are_read_back_and_never_aligned_with_those_of_single_classes(tmp_path: Path) -> None:
    data = predictions()
    ours = read_predictions(written(tmp_path / "sets", data, several=True))
    assert ours.several and np.array_equal(ours.truth, data.truth)
    np.testing.assert_array_equal(aligned(ours, ours), data.raw)
    other = read_predictions(written(tmp_path / "single", data, several=False))
    with pytest.raises(UsageError, match=f"only {ours.run} judges label sets"):
        aligned(ours, other)
