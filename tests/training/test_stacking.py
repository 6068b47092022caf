"""Stacking and several inputs: who sees what, and what a missing input says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from sklearn.ensemble import RandomForestClassifier
from torch import nn

from cluster.errors import UsageError
from training.artifact import Model, ModelCard
from training.encoder import Architecture
from training.fit import Labels
from training.hierarchical_fit import (
    Ground,
    fit_chains,
    fit_hierarchy,
    hierarchical_fold,
    inner_folds,
    out_of_fold,
    stacked,
)
from training.images import ImagePath
from training.splits import Fold
from training.tasks.frozen import logistic
from training.tasks.inputs import Inputs, inputs_of, joined, one_input
from training.tasks.learners import SmallNetworks
from training.tasks.stacking import (
    META_LEARNERS,
    SMALLEST_LEAF,
    TREES,
    averaged,
    evidence_of,
    judge_inner,
    load_meta,
)
from training.tasks.structures import probabilities_of
from training.transform import Input

CLASSES = ("healthy", "ill/early", "ill/late")
ROWS = 90
every_meta_learner = pytest.mark.parametrize("name", sorted(META_LEARNERS))


def ground(
    features: np.ndarray, truth: np.ndarray, stack: str = "forest", inputs: Inputs | None = None, epochs: int = 8
) -> Ground:
    labels = Labels(truth, [CLASSES[t] for t in truth], [f"g{row // 3}" for row in range(len(truth))], "group")
    learner = SmallNetworks(features, epochs, 16, 1e-2, 0.05, 0.1, 0)
    found = one_input(len(truth)) if inputs is None else inputs
    return Ground(learner, labels, found, CLASSES, "transferred", "features", (), stack, 0)


def noise(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn at random for each group, features the same within a group: who saw a row knows its twins."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(rng.integers(0, 3, ROWS // 3), 3)
    return np.repeat(rng.normal(size=(ROWS // 3, 20)), 3, axis=0).astype(np.float32), truth


def test_the_evidence_of_a_row_does_not_know_its_label() -> None:
    """The watermark: other labels of an inner fold's test side leave its evidence as it was."""
    features, truth = noise()
    made, rows = ground(features, truth), np.arange(ROWS)
    inner = inner_folds(made, rows, 0)
    before = out_of_fold(made, rows, inner, (0,), 0)
    for number, (_, test) in enumerate(inner):
        changed = truth.copy()
        changed[test] = (truth[test] + 1) % 3
        after = out_of_fold(ground(features, changed), rows, inner, (0,), 0)
        np.testing.assert_array_equal(after[test], before[test])
        others = np.concatenate([side for at, (_, side) in enumerate(inner) if at != number])
        assert (after[others] != before[others]).any()


@every_meta_learner
def test_who_stacks_noise_learns_nothing(name: str) -> None:
    features, truth = noise()
    made, rows = ground(features, truth, name), np.arange(ROWS)
    for train, test in inner_folds(made, rows, 0):
        assert not {row // 3 for row in train} & {row // 3 for row in test}
    _, said = stacked(made, rows, (0,), 0)
    assert (said.argmax(axis=1) == truth).mean() < 0.55


@every_meta_learner
def test_a_kept_meta_learner_answers_exactly_as_before_and_fits_the_same_twice(name: str) -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(ROWS) % 3
    evidence = np.eye(3)[truth] + rng.normal(0, 0.3, (ROWS, 3))
    one, other = (META_LEARNERS[name](evidence, truth, 3, 0) for _ in range(2))
    np.testing.assert_array_equal(one.probabilities(evidence), other.probabilities(evidence))
    again = load_meta(name, safetensors.numpy.load(safetensors.numpy.save(one.tensors())), 3)
    np.testing.assert_array_equal(again.probabilities(evidence), one.probabilities(evidence))
    assert (one.probabilities(evidence).argmax(axis=1) == truth).mean() > 0.85
    sides = [(np.arange(30, ROWS), np.arange(30)), (np.arange(60), np.arange(30, ROWS))]
    changed = truth.copy()
    changed[:30] = (truth[:30] + 1) % 3
    ours, theirs = (judge_inner(name, evidence, y, sides, 3, 0) for y in (truth, changed))
    np.testing.assert_array_equal(ours[:30], theirs[:30])


@pytest.mark.parametrize("present", [(0, 1, 2), (0, 2)])
def test_meta_learners_say_what_scikit_learn_says(present: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    truth = np.asarray(present)[np.arange(ROWS) % len(present)]
    evidence, asked = (rng.normal(0, 0.5, (ROWS, 4)) + np.eye(4)[truth] for _ in range(2))
    trees = RandomForestClassifier(
        TREES, min_samples_leaf=SMALLEST_LEAF, class_weight="balanced_subsample", random_state=7
    ).fit(evidence, truth)
    ours = META_LEARNERS["forest"](evidence, truth, 3, 7).probabilities(asked)
    np.testing.assert_allclose(ours[:, present], trees.predict_proba(asked), atol=1e-12)
    lines = logistic().fit(evidence, truth)
    ours = META_LEARNERS["logistic"](evidence, truth, 3, 7).probabilities(asked)
    np.testing.assert_allclose(ours[:, present], lines.predict_proba(asked), atol=1e-12)
    assert len(present) == 3 or not ours[:, 1].any()


def test_a_forest_that_could_lead_in_circles_is_not_read() -> None:
    truth = np.arange(ROWS) % 3
    kept = dict(META_LEARNERS["forest"](np.eye(3)[truth], truth, 3, 0).tensors())
    for damage in (0, 10**9):
        left = np.where(kept["left"] >= 0, damage, -1)
        with pytest.raises(ValueError, match="forest"):
            load_meta("forest", kept | {"left": left}, 3)


# Several inputs


def eyes(missing: int = 0) -> tuple[np.ndarray, np.ndarray, Inputs]:
    """Cases of three rows, two of `oct`, which tells healthy from ill, and one of `fundus`, which tells the ill apart;
    the first `missing` cases have no fundus, but a row of no input."""
    rng = np.random.default_rng(0)
    case = np.repeat(np.arange(ROWS // 3), 3)
    truth = case % 3
    of_row = np.where(np.arange(ROWS) % 3 == 2, 1, 0)
    features = rng.normal(0, 0.3, (ROWS, 6)).astype(np.float32)
    features[of_row == 0, 0] += 3 * (truth[of_row == 0] > 0)
    features[of_row == 1, 1] += 3 * (truth[of_row == 1] > 1)
    of_row[(of_row == 1) & (case < missing)] = -1
    return features, truth, Inputs(("oct", "fundus"), of_row, case)


@pytest.mark.parametrize("stack", ["forest", "logistic"])
def test_two_inputs_stacked_know_what_each_alone_does_not(stack: str) -> None:
    features, truth, inputs = eyes(missing=2)
    made = ground(features, truth, stack, inputs, epochs=40)
    fold = Fold(0, 0, np.arange(60), np.arange(60, ROWS))
    result = hierarchical_fold(made, fold)
    right = (result.probabilities.argmax(axis=1) == truth[fold.test]).mean()
    assert right >= 0.9
    alone = hierarchical_fold(replace(made, inputs=replace(inputs, names=("oct",)), stack="none"), fold)
    assert (alone.probabilities.argmax(axis=1) == truth[fold.test]).mean() < right - 0.15
    for case in np.unique(inputs.case_of_row[fold.test]):  # one answer for all images of a case
        own = result.probabilities[inputs.case_of_row[fold.test] == case]
        np.testing.assert_array_equal(own, np.tile(own[0], (3, 1)))


@every_meta_learner
def test_labels_of_the_judged_change_nothing_of_what_is_said_of_them_by_two_inputs(name: str) -> None:
    """The watermark: of a fold's test side, and of each inner fold's, whose evidence fits the meta-learner."""
    features, truth, inputs = eyes(missing=2)
    rows, fold = np.arange(ROWS), Fold(0, 0, np.arange(60), np.arange(60, ROWS))
    made = ground(features, truth, name, inputs)

    def other(judged: np.ndarray) -> Ground:
        changed = truth.copy()
        changed[judged] = (truth[judged] + 1) % 3
        return ground(features, changed, name, inputs)

    ours, theirs = (hierarchical_fold(one, fold) for one in (made, other(fold.test)))
    np.testing.assert_array_equal(ours.probabilities, theirs.probabilities)
    np.testing.assert_array_equal(ours.inner_probabilities, theirs.inner_probabilities)
    inner = inner_folds(made, rows, 0)
    before = out_of_fold(made, rows, inner, (0,), 0)
    for train, test in inner:
        own, others = (np.unique(inputs.case_of_row[side]) for side in (test, train))
        assert not set(own) & set(others)
        after = out_of_fold(other(test), rows, inner, (0,), 0)
        np.testing.assert_array_equal(after[own], before[own])
        assert (after[others] != before[others]).any()


@pytest.mark.parametrize("stack", ["none", "forest", "logistic"])
def test_a_model_answers_case_by_case_the_images_of_an_input_averaged_and_one_may_be_missing(stack: str) -> None:
    features, truth, inputs = eyes()
    hierarchy = fit_hierarchy(ground(features, truth, stack, inputs), np.arange(ROWS), (0,), 0).hierarchy
    path, shown = ImagePath(8, 8), Input(8, 8, 1, (0.5,), (0.2,))
    card = ModelCard(Architecture("test_vit", 8, 8, 1), path, shown, classes=CLASSES, temperature=0.6)
    model = Model(card, nn.Identity(), None, None, "cpu", "", hierarchy=hierarchy)
    rows = np.asarray([7, 0, 2, 1, 6, 11, 8, 30])  # cases of all inputs, of oct alone (30) and of fundus alone (11)
    asked = Inputs(inputs.names, inputs.of_row[rows], inputs.case_of_row[rows])
    answers = model.answers(features[rows], None, asked.of_row)
    found = model.classify_cases(answers, asked)
    for case in set(asked.case_of_row):
        means = []
        for number in range(2):
            own = answers[(asked.case_of_row == case) & (asked.of_row == number)]
            means.append(own.mean(axis=0, keepdims=True) if len(own) else np.full((1, answers.shape[1]), np.nan))
        sharpened = hierarchy.probabilities(means)[0] ** (1 / 0.6)
        expected = sharpened / sharpened.sum()
        for said in found[asked.case_of_row == case]:
            np.testing.assert_allclose(said, expected, atol=1e-9)


def test_a_missing_input_says_what_was_true_of_the_training_rows_and_that_it_is_missing() -> None:
    features, truth, inputs = eyes()
    made = ground(features, truth, "forest", inputs)
    chains = fit_chains(made, np.arange(60), np.arange(60, 75), (0,))
    said = np.full((2, chains[0].tree.width), 0.5)
    absent = np.stack([said[0], np.full(chains[1].tree.width, np.nan)])
    found = evidence_of(chains, [said, absent])
    np.testing.assert_allclose(found[0], [*said[0], *said[0], 1, 1])
    np.testing.assert_allclose(found[1], [*said[0], *chains[1].guess, 1, 0])
    mean = averaged(chains, [said, absent])
    np.testing.assert_allclose(mean[1], probabilities_of(chains[0].tree, said[1:])[0])
    nothing = averaged(chains, [absent, absent])[1]
    both = [probabilities_of(chain.tree, chain.guess[None])[0] for chain in chains]
    np.testing.assert_allclose(nothing, np.mean(both, axis=0))


def test_the_images_of_an_input_are_averaged_case_by_case() -> None:
    _, _, inputs = eyes(missing=1)
    rows = np.arange(6)
    values = np.asarray([[1.0], [3.0], [5.0], [9.0]])
    np.testing.assert_allclose(inputs.means(0, rows, values), [[2.0], [7.0]])
    np.testing.assert_allclose(inputs.means(1, rows, np.asarray([[4.0]])), [[np.nan], [4.0]])


def table(**columns: list[str | None]) -> pa.Table:
    count = len(next(iter(columns.values())))
    return pa.table({"group": ["p1", "p1", "p1", "p2"][:count], "case": [""] * count} | columns)


def test_inputs_are_found_by_their_names_and_joined_by_group_and_eye() -> None:
    rows = table(modality=["oct", "fundus", "xray", "oct"], eye=["L", "L", "L", "R"])
    found = inputs_of(rows, ("oct", "fundus"))
    assert found.of_row.tolist() == [0, 1, -1, 0]
    assert found.case_of_row.tolist() == [0, 0, 0, 1]
    kept = joined(rows, ("oct", "fundus"))
    assert kept["case"].to_pylist() == ["p1 L", "p1 L", "p2 R"]
    named = rows.set_column(1, "case", pa.array(["a", "b", "b", "a"]))
    assert inputs_of(named, ("oct", "fundus")).case_of_row.tolist() == [0, 1, 1, 0]
    assert joined(rows, ()) is rows


def test_inputs_that_no_column_or_several_have_are_refused_in_one_line() -> None:
    rows = table(modality=["oct", "fundus", "oct", "oct"], device=["oct", "fundus", "fundus", "oct"])
    with pytest.raises(UsageError, match="no column has all of these values"):
        inputs_of(rows, ("oct", "mri"))
    with pytest.raises(UsageError, match="the columns modality, device all have these values; name one by"):
        inputs_of(rows, ("oct", "fundus"))
    assert inputs_of(rows, ("oct", "fundus"), "device").of_row.tolist() == [0, 1, 1, 0]
    with pytest.raises(UsageError, match="--input-column modalty: no such column"):
        inputs_of(rows, ("oct", "fundus"), "modalty")


def test_a_misspelt_input_is_refused_when_training_although_its_column_is_named() -> None:
    rows = table(modality=["oct", "fundus", "oct", "oct"])
    for ask in (inputs_of, joined):
        with pytest.raises(UsageError, match=r"no image has 'fundis' in the column 'modality'\. Did you mean 'fundus'"):
            ask(rows, ("oct", "fundis"), "modality")
    alone = rows.filter(pa.array([True, False, True, True]))  # images to judge may be of one input alone
    assert inputs_of(alone, ("oct", "fundus"), "modality", some=True).of_row.tolist() == [0, 0, 0]
    with pytest.raises(UsageError, match="no image has any of them"):
        inputs_of(alone, ("mri", "fundus"), "modality", some=True)
