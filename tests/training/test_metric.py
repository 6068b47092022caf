"""Metric learning: batches, a toy that is learnt, what is found in it, and the model that is kept and read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import DataError, UsageError
from tests.training.test_finetune import NO_ROWS, recipe, stripes
from training.artifact import ModelCard, load_model, save_model
from training.configs import TransferConfig
from training.fit import HELD_FRACTION, Labels, metric_fold, refit_metric
from training.images import ImagePath
from training.judgement import judge
from training.learnt import GALLERIES, asked_of, in_summary, name_of
from training.retrieval import NAMES, per_query, retrieval_metrics
from training.splits import Fold, cross_validation, hold_out
from training.tasks.finetune import Recipe
from training.tasks.metric import (
    MetricRecipe,
    balanced_batches,
    build,
    embed,
    learn,
    parameter_groups,
    starting_centres,
)
from training.tasks.nearness import METRIC, SCALE, dump_metric, learn_nearness, load_metric
from training.transform import evaluation_view
from training.weights import initial_weights

ROWS = 48


def metric_recipe(steps: int = 1, base: Recipe | None = None, **options: Any) -> MetricRecipe:
    return MetricRecipe(base or recipe(epochs=3), embedding=8, steps=steps, **options)


def groups_of(count: int, size: int = 4) -> list[str]:
    return [f"g{row // size}" for row in range(count)]


def toy() -> tuple[np.ndarray, Labels]:
    """Lying and standing stripes; groups of two pictures of a class."""
    pixels, _ = stripes(ROWS)
    order = np.argsort(np.arange(ROWS) % 2, kind="stable")
    truth = (np.arange(ROWS) >= ROWS // 2).astype(np.int64)
    return pixels[order], Labels(truth, [f"c{t}" for t in truth], groups_of(ROWS, 2), "group")


def fold_of(labels: Labels) -> Fold:
    return cross_validation(labels.names, labels.groups, folds=3, repeats=1, split="group", seed=0)[0]


# Batches


@pytest.mark.parametrize("size", [4, 5, 7, 8, 9, 16, 32])
def test_a_batch_holds_as_many_images_of_each_of_its_classes(size: int) -> None:
    counts = (40, 10, 30)
    truth = np.repeat(np.arange(3), counts)
    batches = balanced_batches(np.eye(3, dtype=bool)[truth], size, np.random.default_rng(0))
    assert len(batches) == sum(counts) // size
    shown: set[int] = set()
    for batch in batches:
        assert len(set(batch.tolist())) == len(batch) == min(size, 32)
        held = [n for n in np.bincount(truth[batch], minlength=3) if n]
        assert len(held) == max(2, min(3, size // 4)) and max(held) - min(held) <= 1
        assert max(held) <= 10 or size > 30
        shown |= set(truth[batch].tolist())
    assert shown == {0, 1, 2}


@pytest.mark.parametrize("size", [4, 8, 12])
def test_no_batch_is_of_one_class_wherever_a_round_of_turns_ends(size: int) -> None:
    truth = np.repeat(np.arange(5), 60)
    for seed in range(5):
        for batch in balanced_batches(np.eye(5, dtype=bool)[truth], size, np.random.default_rng(seed)):
            assert len(set(truth[batch])) == max(2, size // 4)


def test_all_of_a_class_is_shown_before_any_of_it_is_shown_again() -> None:
    truth = np.repeat(np.arange(2), 20)
    batches = balanced_batches(np.eye(2, dtype=bool)[truth], 8, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(40))


def test_rows_without_a_label_or_with_several_are_shown_too() -> None:
    members = np.zeros((30, 3), dtype=bool)
    members[:10, :2] = True
    members[10:20, 2] = True
    batches = balanced_batches(members, 12, np.random.default_rng(0))
    for batch in batches:
        assert len(set(batch.tolist())) == len(batch)
    rows = np.concatenate(batches)
    assert (rows < 10).any() and (rows >= 20).any() and ((rows >= 10) & (rows < 20)).any()


def test_a_class_with_fewer_rows_than_a_batch_asks_for_gives_all_it_has() -> None:
    members = np.eye(2, dtype=bool)[np.asarray([0] * 20 + [1] * 2)]
    (batch, *_) = balanced_batches(members, 16, np.random.default_rng(0))
    assert {20, 21} <= set(batch.tolist()) and len(batch) == 10


# Learning


@pytest.mark.parametrize("loss", ["centre_contrastive", "triplet"])
def test_a_toy_is_learnt_and_found_better_than_by_chance(loss: Any) -> None:
    pixels, labels = toy()
    half = np.arange(ROWS) % 4 < 2
    train, test = np.flatnonzero(half), np.flatnonzero(~half)
    outcome = learn(metric_recipe(loss=loss), pixels, labels.truth, labels.groups, train, NO_ROWS, "toy")
    assert outcome.history[-1]["loss"] < outcome.history[0]["loss"]
    (found,) = embed(outcome.model, outcome.initial.input, pixels[test], "cpu")
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert found.shape == (len(test), 8)
    values = retrieval_metrics(found, labels.truth[test], [labels.groups[r] for r in test])
    value, chance = values["map_at_r"]["value"], values["map_at_r"]["chance"]
    assert value is not None
    assert chance is not None
    assert value > 0.9
    assert chance < 0.6


def test_training_twice_gives_the_same_weights_whatever_random_numbers_were_drawn_before() -> None:
    pixels, labels = toy()
    rows = np.arange(ROWS)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        chosen = metric_recipe(base=recipe(epochs=1), centres="learnt", steps=2)
        outcome = learn(chosen, pixels, labels.truth, labels.groups, rows[:24], rows[24:], 0, 0)
        found.append(outcome.model.state_dict())
        assert 0 <= outcome.history[0]["held_loss"] <= 1
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_held_rows_choose_the_epoch_and_nothing_else() -> None:
    pixels, labels = toy()
    rows = np.arange(ROWS)
    chosen = metric_recipe()
    one = learn(chosen, pixels, labels.truth, labels.groups, rows[::2], rows[1::2], 0, 0)
    best = min(one.history, key=lambda row: row["held_loss"])
    assert one.best_epoch == best["epoch"]
    again = learn(
        chosen, pixels, labels.truth, labels.groups, rows[::2], NO_ROWS, 0, 0, stop_after=one.best_epoch
    ).model.state_dict()
    assert all(torch.equal(t, again[name]) for name, t in one.model.state_dict().items())


def test_a_single_held_group_of_each_class_can_choose_the_epoch() -> None:
    pixels, labels = toy()
    held = np.asarray([0, 1, ROWS - 2, ROWS - 1])
    train = np.setdiff1d(np.arange(ROWS), held)
    assert len({labels.groups[r] for r in held}) == len(set(labels.truth[held])) == 2
    outcome = learn(metric_recipe(), pixels, labels.truth, labels.groups, train, held, 0, 0)
    losses = [row["held_loss"] for row in outcome.history]
    assert np.isfinite(losses).all()
    assert outcome.best_epoch == 1 + int(np.argmin(losses))


def test_learnt_centres_and_the_head_have_their_place_in_the_optimiser() -> None:
    pixels, labels = toy()
    outcome = learn(metric_recipe(steps=3), pixels, labels.truth, labels.groups, np.arange(8), NO_ROWS, stop_after=1)
    centres = torch.nn.Linear(3, 2)
    groups = parameter_groups(outcome.model, centres, recipe(layer_decay=0.5), outcome.initial)
    seen = [id(p) for group in groups for p in group["params"]]
    expected = [id(p) for module in (outcome.model, centres) for p in module.parameters()]
    assert sorted(seen) == sorted(expected)
    assert groups[-1]["scale"] == 10 and max(g["scale"] for g in groups[:-1]) == 1


@pytest.mark.parametrize("held", [NO_ROWS, np.arange(4)])
def test_a_training_that_diverges_is_refused_in_one_line_that_names_the_rate(held: np.ndarray) -> None:
    pixels, labels = toy()
    chosen = metric_recipe(base=recipe(epochs=1, lr=1e20))
    with pytest.raises(DataError, match=r"diverged in epoch 1 .*; lower --lr 1e\+20") as caught:
        learn(chosen, pixels, labels.truth, labels.groups, np.arange(4, ROWS), held, 0, 0)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("loss", ["centre_contrastive", "proxy_anchor"])
def test_centres_start_where_training_will_first_see_the_images_of_their_class(loss: Any) -> None:
    """Batch norm trains with the statistics of its batches; what it has learnt of other images is another place."""
    pixels, labels = toy()
    chosen = metric_recipe(loss=loss, base=recipe(batch_size=ROWS))
    initial = initial_weights(chosen.base.wanted)
    model = build(initial.network, initial.input, chosen.embedding, chosen.steps)
    model.seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(torch.linspace(0, 5, len(buffer)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    members = np.eye(2, dtype=bool)[labels.truth]
    (centres,) = starting_centres(chosen, model, initial.input, pixels, members)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not any(part.training for part in model.modules())
    with torch.no_grad():
        (found,) = model.train()(evaluation_view(pixels, initial.input, "cpu"))
    for number in (0, 1):
        mean = found[labels.truth == number].mean(dim=0)
        assert float(torch.nn.functional.cosine_similarity(mean, centres().detach()[number], dim=0)) > 0.999
    assert float(found.mean(dim=0).norm()) < 0.2


# Out of fold


def test_the_labels_of_a_folds_test_side_change_nothing_but_what_counts_as_found() -> None:
    pixels, labels = toy()
    fold = fold_of(labels)
    changed = labels.truth.copy()
    changed[fold.test] = 1 - changed[fold.test]
    chosen = metric_recipe(base=recipe(epochs=2))
    one, other = (metric_fold(chosen, pixels, known, fold) for known in (labels, replace(labels, truth=changed)))
    for name in ("probabilities", "distances", "inner_rows", "inner_probabilities"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.best_epoch == other.best_epoch
    assert [row["loss"] for row in one.history] == [row["loss"] for row in other.history]
    assert not {labels.groups[r] for r in one.inner_rows} & {labels.groups[r] for r in fold.test}
    assert not np.array_equal(one.more[name_of("all", 1)], other.more[name_of("all", 1)])


def test_a_fold_says_what_its_test_rows_find_at_each_step_in_both_galleries() -> None:
    pixels, labels = toy()
    fold = fold_of(labels)
    result = metric_fold(metric_recipe(steps=3, base=recipe(epochs=2)), pixels, labels, fold)
    judged = judge([result], labels, ["c0", "c1"], 0)
    assert judged.metrics["balanced_accuracy"]["value"] > 0.8
    asked = asked_of([result])
    assert asked is not None and asked.steps == 3
    metrics = asked.metrics(labels.groups, seed=0)
    assert set(metrics) == {(gallery, step) for gallery in GALLERIES for step in (1, 2, 3)}
    for (_, step), of in metrics.items():
        assert all(0 < (of[name]["chance"] or 0) < 1 for name in NAMES[:1]), step
        assert (of["map_at_r"]["value"] or 0) > (of["map_at_r"]["chance"] or 1)
    entries = in_summary(metrics, 3)
    assert set(NAMES) < set(entries)
    assert {"step_1/recall_at_8", "step_2/test_gallery/map_at_r", "test_gallery/recall_at_1"} < set(entries)
    assert entries["recall_at_1"] == metrics["all", 3]["recall_at_1"]


def test_a_fit_with_a_share_of_the_labels_is_asked_among_the_images_that_frozen_features_are_asked_among() -> None:
    pixels, labels = toy()
    fold = fold_of(labels)
    few = replace(fold, train=fold.train[np.isin(fold.train % 8, (0, 1, 2, 3))], share=0.5)
    result = metric_fold(metric_recipe(base=recipe(epochs=1)), pixels, labels, few)
    everyone = np.concatenate([fold.test, fold.train])
    outcome = learn(
        metric_recipe(base=recipe(epochs=1)), pixels, labels.truth, labels.groups, *sides(few, labels), 0, 0
    )
    found = embed(outcome.model, outcome.initial.input, pixels[everyone], "cpu")[-1]
    own = [labels.groups[r] for r in everyone]
    expected = per_query(found, labels.truth[everyone], own, asked=np.arange(len(fold.test)), deals=0)
    np.testing.assert_allclose(result.more[name_of("all", 1)][:, : len(NAMES)], expected.scores)
    assert set(result.inner_rows) <= set(few.train)


def sides(fold: Fold, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Training rows of a fold, and those that choose the epoch."""
    train, held = hold_out(*labels.take(fold.train), fraction=HELD_FRACTION, seed=0)
    return fold.train[train], fold.train[held]


def test_label_sets_are_learnt_and_judged_label_by_label() -> None:
    pixels, truth = stripes(96)
    bright = np.arange(96) // 2 % 2 == 1
    shown = np.clip(pixels / 2 + 110 * bright[:, None, None, None], 0, 255).astype(np.uint8)
    sets = np.column_stack([truth == 1, bright])  # a quarter has neither
    labels = Labels(sets, ["a"] * 96, groups_of(96), "image")
    fold = Fold(0, 0, np.arange(64), np.arange(64, 96))
    result = metric_fold(metric_recipe(base=recipe(epochs=6)), shown, labels, fold)
    p = result.probabilities
    assert p.shape == (32, 2)
    for k in (0, 1):
        own = sets[64:, k]
        assert own.mean() == 0.5
        assert np.mean((p[:, k] >= 0.5) == own) > 0.7


# Where classes lie


def test_probabilities_are_a_softmax_over_squared_distances_to_class_means() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    truth = np.arange(20) % 3
    found = learn_nearness(x, truth, 4)
    means = np.stack([x[truth == k].mean(axis=0) for k in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    raw = np.exp(-SCALE * ((x[:, None] - means) ** 2).sum(axis=2))
    expected = np.column_stack([raw / raw.sum(axis=1, keepdims=True), np.zeros(20)])  # the last class was absent
    np.testing.assert_allclose(found.probabilities(x), expected, atol=1e-5)


def test_a_label_is_as_likely_as_not_halfway_between_those_that_have_it_and_the_others() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    sets = rng.random((30, 3)) < 0.5
    sets[:, 2] = False
    found = learn_nearness(x, sets, 3)
    mean = x[sets[:, 0]].mean(axis=0)
    squares = ((x - mean / np.linalg.norm(mean)) ** 2).sum(axis=1)
    half = (squares[sets[:, 0]].mean() + squares[~sets[:, 0]].mean()) / 2
    np.testing.assert_allclose(found.probabilities(x)[:, 0], 1 / (1 + np.exp(SCALE * (squares - half))), atol=1e-5)
    assert not found.probabilities(x)[:, 2].any()


# The artifact


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of an embedding with all steps."""
    pixels, labels = toy()
    chosen = metric_recipe(steps=3, base=recipe(epochs=1))
    _, content, _ = refit_metric(chosen, pixels, labels, np.arange(ROWS), 1)
    outcome = learn(chosen, pixels, labels.truth, labels.groups, np.arange(ROWS), NO_ROWS, "refit", stop_after=1)
    card = ModelCard(
        architecture=outcome.initial.architecture,
        image_path=ImagePath(32, 32),
        input=outcome.initial.input,
        head="metric",
        classes=("c0", "c1"),
        temperature=0.5,
    )
    folder = tmp_path_factory.mktemp("kept") / "model"
    save_model(folder, card, outcome.model.network, files=[(METRIC, content)])
    return folder


def test_what_is_read_back_embeds_and_judges_as_what_was_trained(kept: Path) -> None:
    pixels, labels = toy()
    chosen = metric_recipe(steps=3, base=recipe(epochs=1))
    outcome = learn(chosen, pixels, labels.truth, labels.groups, np.arange(ROWS), NO_ROWS, "refit", stop_after=1)
    expected = embed(outcome.model, outcome.initial.input, pixels, "cpu")[-1]
    model = load_model(kept)
    found = model.embed(pixels)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    raw = learn_nearness(expected, labels.truth, 2).probabilities(found)
    sharp = raw**2 / (raw**2).sum(axis=1, keepdims=True)  # temperature 0.5
    np.testing.assert_allclose(model.classify(found), sharp, atol=1e-4)
    np.testing.assert_allclose(model.probabilities(pixels), sharp, atol=1e-4)


def test_a_metric_model_with_a_changed_head_is_refused(kept: Path, tmp_path: Path) -> None:
    import shutil

    for name, change in (("changed", b"x"), ("gone", None)):
        folder = tmp_path / name
        shutil.copytree(kept, folder)
        if change is None:
            (folder / METRIC).unlink()
        else:
            (folder / METRIC).write_bytes((kept / METRIC).read_bytes() + change)
        with pytest.raises(UsageError, match=r"metric\.safetensors: missing or changed"):
            load_model(folder)


def test_a_head_of_other_classes_or_a_damaged_one_is_refused_in_one_line() -> None:
    nearness = learn_nearness(np.eye(3, dtype=np.float32), np.arange(3), 3)
    content = dump_metric({"w": torch.ones(2)}, nearness, 2)
    tensors, again, steps = load_metric(content, 3, several=False)
    assert steps == 2 and torch.equal(again.means, nearness.means) and tensors["w"].tolist() == [1, 1]
    with pytest.raises(UsageError, match="holds 3 classes, the model has 4"):
        load_metric(content, 4, several=False)
    with pytest.raises(UsageError, match="damaged"):
        load_metric(content[:40], 3, several=False)


# Flags


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "finetune", "loss": "triplet"}, "--loss triplet: needs --task metric"),
        ({"task": "svm", "steps": 2}, "--steps 2: needs --task metric"),
        ({"task": "metric", "steps": 4}, "--steps 4: must be 1, 2 or 3"),
        ({"task": "metric", "embedding": 1}, "--embedding 1: must lie between 2 and 4096"),
        ({"task": "metric", "batch_size": 3}, "--batch-size 3: --task metric compares images of two classes"),
        ({"task": "metric", "margin": 0.0}, "--margin 0.0: must be positive"),
        ({"task": "metric", "loss": "triplet", "centres": "means"}, "--centres means: triplet has none to move"),
        ({"task": "metric", "unit": "group", "pooling": "attention"}, "--pooling attention: needs frozen features"),
    ],
)
def test_a_flag_that_cannot_be_right_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        TransferConfig("d", out="o", **changes)
    assert len(str(caught.value).splitlines()) == 1
