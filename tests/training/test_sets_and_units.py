"""Label sets and units through the whole of a judgement: inner predictions, budgets, gains, mistakes, guesses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import f1_score

from cluster.errors import UsageError
from training import report
from training.attention import linear_head
from training.dataset import label_of
from training.fit import FoldResult, Labels, attention_fold, fit_frozen, frozen_fold
from training.fits import Fits
from training.gains import gain_between
from training.judgement import guessing, judge, of_units
from training.mistakes import confident_mistakes, hesitant_hits, mistakes_section
from training.probabilities import calibrated, temperature_for
from training.splits import budget, cross_validation, hold_outs, leave_one_site_out
from training.units import fold_of_units, units_of

CLASSES = ["a", "b", "c"]
TASKS = pytest.mark.parametrize("task", ["linear", "knn", "svm"])


def sets_of(count: int = 160, seed: int = 0, *, twins: bool = True) -> tuple[np.ndarray, Labels]:
    """Features [N, 6] that tell three labels a little, two rows to a group; every row has a label at least."""
    rng = np.random.default_rng(seed)
    step = 2 if twins else 1
    truth = np.repeat(rng.random((count // step, 3)) < [0.5, 0.3, 0.4], step, axis=0)
    truth[~truth.any(axis=1), 2] = True
    features = rng.normal(size=(count, 6)) + np.concatenate([truth, truth], axis=1)
    names = [label_of(row, CLASSES) for row in truth]
    return features.astype(np.float32), Labels(truth, names, [f"g{row // step}" for row in range(count)], "group")


@TASKS
def test_the_labels_of_a_folds_test_side_change_nothing_of_what_is_said_of_it(task: str) -> None:
    features, labels = sets_of()
    fold = cross_validation(labels.names, labels.groups, folds=3, repeats=1, split="group", seed=0)[1]
    changed = labels.truth.copy()
    changed[fold.test] = ~changed[fold.test]
    said = []
    for truth in (labels.truth, changed):
        known = Labels(truth, labels.names, labels.groups, "group")
        result = frozen_fold(task, features, known, 3, 0, fold)
        judged = judge([result], known, CLASSES, 0)
        inner = judged.inner[0, 1]
        assert inner.raw.shape == inner.truth.shape == (len(fold.train), 3)
        temperature = temperature_for(result.inner_probabilities, inner.truth)
        expected = calibrated(result.probabilities, temperature, several=True)
        np.testing.assert_array_equal(judged.probabilities, expected)
        said.append((judged.probabilities, inner.raw))
    for ours, theirs in zip(*said, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@TASKS
def test_inner_predictions_of_label_sets_are_of_classifiers_that_did_not_train_on_them(task: str) -> None:
    """Labels drawn at random, one pair of twins per group: who has seen the twin knows the answer."""
    _, labels = sets_of(240, 3)
    features = np.repeat(np.random.default_rng(4).normal(size=(120, 40)), 2, axis=0).astype(np.float32)
    fold = cross_validation(labels.names, labels.groups, folds=3, repeats=1, split="group", seed=0)[0]
    result = frozen_fold(task, features, labels, 3, 0, fold)
    shares = labels.truth[fold.train].mean(axis=0)
    by_chance = np.maximum(shares, 1 - shares)
    right = ((result.inner_probabilities >= 0.5) == labels.truth[fold.train]).mean(axis=0)
    assert (right < by_chance + 0.1).all()


def attention_result() -> tuple[FoldResult, Labels]:
    features, labels = sets_of(120, 5)
    single = Labels(
        labels.truth[:, 0].astype(np.int64), ["ab"[int(t)] for t in labels.truth[:, 0]], labels.groups, "group"
    )
    units = units_of("group", single.names, [""] * 120, single.groups)
    fold = cross_validation(single.names, single.groups, folds=3, repeats=1, split="group", seed=0)[0]
    return attention_fold(features, single, units, 2, 0, fold_of_units(units, fold)), single


def test_an_attention_says_what_it_makes_of_the_cases_that_stopped_it_and_is_kept(tmp_path: Path) -> None:
    features, _ = sets_of(120, 5)
    result, labels = attention_result()
    units = units_of("group", labels.names, [""] * 120, labels.groups)
    fold = fold_of_units(
        units, cross_validation(labels.names, labels.groups, folds=3, repeats=1, split="group", seed=0)[0]
    )
    assert len(result.inner_rows) and set(result.inner_rows) < set(fold.train)
    assert result.inner_probabilities.shape == (len(result.inner_rows), 2)
    judged = judge([result], labels, ["a", "b"], 0)
    assert judged.inner[0, 0].rows is result.inner_rows and len(judged.rows) == len(fold.test)
    fits = Fits(tmp_path, {"units": units.of_row.tolist()}, [str(row) for row in range(len(features))])
    fits.save(fold, result)
    found = fits.load(fold)
    assert found is not None and found.best_epoch == result.best_epoch
    np.testing.assert_array_equal(found.inner_rows, result.inner_rows)


def test_units_pool_what_was_raw_and_what_was_said_inside_too() -> None:
    features, labels = sets_of()
    units = units_of("group", labels.names, [""] * len(features), labels.groups)
    folds = cross_validation(labels.names, labels.groups, folds=3, repeats=1, split="group", seed=0)
    judged = judge([frozen_fold("knn", features, labels, 3, 0, fold) for fold in folds], labels, CLASSES, 0)
    pooled = of_units(judged, units, labels.groups, 0, ordered=False)
    raw = {int(row): judged.raw[at] for at, row in enumerate(judged.rows)}
    for row, value in zip(pooled.rows, pooled.raw, strict=True):
        np.testing.assert_allclose(value, (raw[int(row)] + raw[int(row) + 1]) / 2)
    for key, inner in pooled.inner.items():
        assert len(inner.rows) == len(judged.inner[key].rows) // 2
        np.testing.assert_array_equal(inner.truth, labels.truth[inner.rows])


def test_a_budget_of_label_sets_leaves_two_groups_of_every_class_and_of_those_without_it() -> None:
    _, labels = sets_of(400, 7)
    rows = np.arange(400)
    kept: set[int] = set()
    for share in (0.02, 0.1, 0.5, 1.0):
        found = budget(labels.names, labels.groups, rows, share=share, seed=1)
        assert kept <= set(found.tolist())
        kept = set(found.tolist())
        for side in (labels.truth, ~labels.truth):
            assert all(len({labels.groups[r] for r in found if side[r, k]}) >= 2 for k in range(3))
        assert len({labels.groups[r] for r in found}) * 2 == len(found)  # whole groups
    assert len(budget(labels.names, labels.groups, rows, share=0.5, seed=1)) == pytest.approx(200, abs=12)


def test_sites_and_hold_outs_look_at_the_classes_of_a_set_and_not_at_the_set() -> None:
    names = ["a|b", "b", "a", "b|c", "c", "a", "b", "c"] * 3
    groups = [f"g{row}" for row in range(24)]
    sites = ["north" if row % 8 < 4 else "south" for row in range(24)]
    assert len(leave_one_site_out(names, groups, sites)) == 2  # the sets a|b and b|c are at one site alone
    with pytest.raises(UsageError, match="class 'd' is known at site 'north' alone"):
        leave_one_site_out(["a|d", *names[1:]], groups, sites)
    for fold in hold_outs(names, groups, fraction=0.4, repeats=3, seed=0):
        for side in (fold.train, fold.test):
            assert {name for row in side for name in names[row].split("|")} == set(CLASSES)


def test_gains_of_label_sets_are_those_of_their_metrics(tmp_path: Path) -> None:
    _, labels = sets_of()
    rng, files = np.random.default_rng(0), []
    for name, skill in (("before", 0.1), ("after", 0.35)):
        p = np.clip(0.5 + skill * (2.0 * labels.truth - 1) + rng.normal(0, 0.25, labels.truth.shape), 0, 1)
        rows: dict[str, Any] = {
            "image_id": [f"i{r:03d}" for r in range(len(p))],
            "group": labels.groups,
            "truth": labels.names,
        }
        rows |= {"repeat": [0] * len(p), "fold": [0] * len(p)} | {c: p[:, k] for k, c in enumerate(CLASSES)}
        files.append((tmp_path / f"{name}.parquet", p))
        pq.write_table(pa.table(rows), files[-1][0])
    found: Any = gain_between(files[0][0], files[1][0], CLASSES, several=True, seed=0)
    scores = [f1_score(labels.truth, p >= 0.5, average="macro") for _, p in files]
    assert found["f1_macro"]["difference"] == pytest.approx(scores[1] - scores[0])
    assert found["balanced_accuracy"]["ci95"][0] > 0 > found["hamming"]["ci95"][1]


def test_the_mistakes_of_label_sets_are_the_labels_that_are_wrong_most_surely() -> None:
    truth = np.asarray([[True, False], [True, True], [False, True], [True, False]])
    p = np.asarray([[0.9, 0.95], [0.4, 0.9], [0.1, 0.8], [0.6, 0.3]])
    alone = list("wxyz")
    assert confident_mistakes(truth, p, alone, np.arange(4)).tolist() == [0, 1]
    assert hesitant_hits(truth, p, alone, np.arange(4)).tolist() == [3, 2]


def test_the_section_names_the_label_in_question_and_asks_for_its_map(tmp_path: Path) -> None:
    truth = np.asarray([[True, False], [True, True], [False, False]])
    p = np.asarray([[0.9, 0.95], [0.6, 0.9], [0.1, 0.2]])
    asked: list[int] = []

    def maps(pixels: np.ndarray, classes: np.ndarray) -> np.ndarray:
        asked.extend(classes.tolist())
        return np.zeros(pixels.shape[:3], dtype=np.float32)

    pixels = np.zeros((3, 16, 16, 1), dtype=np.uint8)
    made = mistakes_section(
        tmp_path, classes=["a", "b"], truth=truth, probabilities=p, groups=list("xyz"), rows=np.arange(3),
        pixels=pixels.__getitem__, maps=maps, method="grad_cam", judged="images",
    )  # fmt: skip
    tables = [block for block in made.blocks if isinstance(block, report.Table)]
    assert list(tables[0].rows[0]) == ["1", "a", "a|b", "b", "0.95"]
    assert asked[0] == 1
    first = made.blocks[0]
    assert (
        isinstance(first, report.Text) and "1 of 3 judgements of single images were wrong in a label" in first.paragraph
    )


def test_guessing_label_sets_reaches_what_the_best_guess_reaches() -> None:
    truth = np.asarray([[1, 0], [1, 0], [1, 1], [0, 1], [0, 0]], dtype=bool)
    levels = guessing(truth, 2)
    assert levels["accuracy"] == pytest.approx(0.4)
    assert levels["f1_macro"] == pytest.approx(f1_score(truth, np.ones_like(truth), average="macro"))
    assert levels["f1_micro"] == pytest.approx(f1_score(truth, np.ones_like(truth), average="micro"))
    assert levels["average_precision"] == pytest.approx(0.5)
    assert "hamming" not in levels and "ece" not in levels


def test_the_linear_heads_of_several_labels_are_one_layer() -> None:
    import torch

    features, labels = sets_of()
    fitted = fit_frozen("linear", features, labels, np.arange(len(features)), 3, 0)
    head = linear_head(fitted.estimators, 3)  # type: ignore[union-attr]
    assert head is not None
    said = torch.sigmoid(head(torch.from_numpy(features))).numpy()
    np.testing.assert_allclose(said, fitted.probabilities(features), atol=1e-5)
    other = fit_frozen("knn", features, labels, np.arange(len(features)), 3, 0)
    assert linear_head(other.estimators, 3) is None  # type: ignore[union-attr]
